#include <capo/models/unet/classic.h>
#include <capo/models/unet/sizes_internal.h>
#include <capo/ops/join.h>
#include <capo/ops/pool.h>

namespace capo::unet {
namespace {

std::unique_ptr<nn::BatchNorm> norm(nn::Module* up, std::string_view name, std::int64_t dim, bool wanted) {
  return wanted ? std::make_unique<nn::BatchNorm>(up, name, dim) : nullptr;
}

ClassicConfig checked(const ClassicConfig& c) {
  CAPO_CHECK(c.channels > 0 && c.classes > 0 && c.base > 0 && c.depth > 0 && c.depth < 16,
             "unet: channels, classes and base must be positive, depth in [1, 15], got ", c.channels, ", ", c.classes,
             ", ", c.base, " and ", c.depth);
  return c;
}

}  // namespace

DoubleConv::Sequence::Sequence(nn::Module* up, std::int64_t in, std::int64_t out, bool with_norm)
    : Module(up, "double_conv"),
      conv1(this, "0", in, out, {3, 3}, {.pad_before = {1}}, !with_norm),
      norm1(norm(this, "1", out, with_norm)),
      conv2(this, with_norm ? "3" : "2", out, out, {3, 3}, {.pad_before = {1}}, !with_norm),
      norm2(norm(this, "4", out, with_norm)) {
  if (!with_norm) return;
  norm1->set_source(&conv1);
  norm2->set_source(&conv2);
}

DoubleConv::DoubleConv(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t out, bool batch_norm)
    : Layer(up, name), double_conv(this, in, out, batch_norm) {}

Tensor DoubleConv::forward(const Tensor& x) {
  const auto activated = [](nn::BatchNorm* n, nn::Conv& conv, const Tensor& h) {
    return n ? n->after(conv, h, Activation::relu) : conv.with_activation(h, Activation::relu);
  };
  return activated(double_conv.norm2.get(), double_conv.conv2,
                   activated(double_conv.norm1.get(), double_conv.conv1, x));
}

ClassicUnet::Down::Down(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t out, bool batch_norm)
    : Layer(up, name), maxpool_conv(this, in, out, batch_norm) {}
Tensor ClassicUnet::Down::forward(const Tensor& x) { return maxpool_conv.conv(max_pool2d(x, 2)); }

ClassicUnet::Up::Up(nn::Module* parent, std::string_view name, std::int64_t in, std::int64_t out, bool batch_norm)
    : Module(parent, name),
      up(this, "up", in, out, {2, 2}, {.stride = {2}}),
      conv(this, "conv", 2 * out, out, batch_norm) {}

ClassicUnet::ClassicUnet(const ClassicConfig& c, const nn::Build& build)
    : Layer(build), config(checked(c)), inc(this, "inc", c.channels, c.base, c.batch_norm) {
  for (int i = 0; i < c.depth; ++i)
    downs.push_back(std::make_unique<Down>(this, cat("down", i + 1), c.base << i, c.base << (i + 1), c.batch_norm));
  for (int i = c.depth; i-- > 0;)
    ups.push_back(std::make_unique<Up>(this, cat("up", c.depth - i), c.base << (i + 1), c.base << i, c.batch_norm));
  outc = std::make_unique<Out>(this, "outc", c.base, c.classes);
}

Tensor ClassicUnet::forward(const Tensor& x) {
  check_sizes(x, config.channels, {config.divisor(), config.divisor()});
  std::vector<Tensor> skips;
  Tensor h = inc(x);
  for (auto& down : downs) {
    skips.push_back(h);
    h = (*down)(h);
  }
  for (auto& up : ups) {
    h = up->conv(concat({skips.back(), up->up(h)}, -1));
    skips.pop_back();
  }
  return (*outc)(h);
}

}  // namespace capo::unet
