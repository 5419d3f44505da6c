#include <capo/models/resnet/resnet.h>
#include <capo/ops/binary.h>
#include <capo/ops/join.h>
#include <capo/ops/pool.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>

#include <algorithm>
#include <cmath>

namespace capo::resnet {
namespace {

ConvOptions options(std::int64_t kernel, int stride, int groups = 1) {
  return {.stride = {stride}, .pad_before = {kernel / 2}, .groups = groups};
}

// Kaiming's normal values over `channels` x kernel x kernel.
nn::Init kaiming_normal(std::int64_t channels, std::int64_t kernel) {
  return nn::Init::normal(std::sqrt(2.0 / static_cast<double>(channels * kernel * kernel)));
}
// Over the outputs, as torchvision does; of CIFAR networks over the inputs.
nn::Init conv_init(const ResnetConfig& c, std::int64_t in, std::int64_t out, std::int64_t kernel) {
  return kaiming_normal(c.stem == Stem::cifar ? in : out, kernel);
}

std::int64_t inner_width(const ResnetConfig& c, std::int64_t width) {
  return c.bottleneck ? width * c.width_per_group / 64 * c.groups : width;
}

// The nearest multiple of 8 to a sixteenth, at least 8.
std::int64_t squeezed(std::int64_t dim) { return std::max<std::int64_t>(8, (dim / 16 + 4) / 8 * 8); }

ResnetConfig checked(const ResnetConfig& c) {
  CAPO_CHECK(!c.blocks.empty() && c.blocks.size() <= 8, "resnet: must have 1 to 8 stages, got ", c.blocks.size());
  for (int n : c.blocks) CAPO_CHECK(n > 0, "resnet: every stage must have a block, got ", n);
  CAPO_CHECK(c.width > 0 && c.groups > 0 && c.width_per_group > 0 && c.channels > 0 && c.classes >= 0,
             "resnet: width, groups, width_per_group and channels must be positive, classes not negative, got ",
             c.width, ", ", c.groups, ", ", c.width_per_group, ", ", c.channels, " and ", c.classes);
  CAPO_CHECK(c.bottleneck || (c.groups == 1 && c.width_per_group == 64),
             "resnet: groups and width_per_group need bottleneck blocks, got ", c.groups, " and ", c.width_per_group);
  CAPO_CHECK(c.width <= 65536 && c.groups <= 65536 && c.width_per_group <= 65536,
             "resnet: width, groups and width_per_group must be at most 65536, got ", c.width, ", ", c.groups, " and ",
             c.width_per_group);
  const std::int64_t least = inner_width(c, c.width), most = inner_width(c, c.width << (c.blocks.size() - 1));
  CAPO_CHECK(least > 0 && most <= (1 << 20), "resnet: blocks must be 1 to 1048576 channels wide inside, got ", least,
             " to ", most);
  CAPO_CHECK(c.stem != Stem::deep || c.width % 2 == 0, "resnet: a deep stem needs an even width, got ", c.width);
  CAPO_CHECK(c.shortcut != Shortcut::pad || (!c.bottleneck && c.width % 2 == 0),
             "resnet: padded shortcuts need basic blocks of an even width, got width ", c.width,
             c.bottleneck ? " and bottlenecks" : "");
  return c;
}

// Means of 2x2 windows; of an odd side the last pixels, repeated, are their own mean, as where the padding is not
// counted.
Tensor halved(Tensor x) {
  for (int axis : {1, 2})
    if (const std::int64_t n = x.size(axis); n % 2) x = concat({x, slice(x, axis, n - 1, n)}, axis);
  return avg_pool2d(x, 2);
}

}  // namespace

Squeeze::Squeeze(nn::Module* up, std::string_view name, std::int64_t dim)
    : Layer(up, name),
      fc1(this, "fc1", dim, squeezed(dim), {1, 1}, {}, true, kaiming_normal(squeezed(dim), 1)),
      fc2(this, "fc2", squeezed(dim), dim, {1, 1}, {}, true, kaiming_normal(dim, 1)) {}

Tensor Squeeze::forward(const Tensor& x) { return x * sigmoid(fc2(relu(fc1(mean(x, {1, 2}, true))))); }

Downsample::Downsample(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t out, int stride, bool pool)
    : Layer(up, name),
      halves(pool && stride == 2),
      conv(this, pool ? "1" : "0", in, out, {1, 1}, options(1, pool ? 1 : stride), false, kaiming_normal(out, 1)),
      norm(this, pool ? "2" : "1", out) {
  norm.set_source(&conv);
}

Tensor Downsample::forward(const Tensor& x) { return norm(conv(halves ? halved(x) : x)); }

Block::Block(nn::Module* up, std::string_view name, const ResnetConfig& c, std::int64_t in_, std::int64_t width, int s)
    : Layer(up, name),
      stride(s),
      in(in_),
      out(c.bottleneck ? 4 * width : width),
      conv1(this, "conv1", in, inner_width(c, width), Dims::filled(2, c.bottleneck ? 1 : 3),
            options(c.bottleneck ? 1 : 3, c.bottleneck ? 1 : stride), false,
            conv_init(c, in, inner_width(c, width), c.bottleneck ? 1 : 3)),
      bn1(this, "bn1", inner_width(c, width)),
      conv2(this, "conv2", inner_width(c, width), inner_width(c, width), {3, 3},
            options(3, c.bottleneck ? stride : 1, c.groups), false,
            conv_init(c, inner_width(c, width), inner_width(c, width), 3)),
      bn2(this, "bn2", inner_width(c, width)) {
  bn1.set_source(&conv1);
  bn2.set_source(&conv2);
  if (c.bottleneck) {
    conv3 = std::make_unique<nn::Conv>(this, "conv3", inner_width(c, width), out, Dims{1, 1}, ConvOptions{}, false,
                                       kaiming_normal(out, 1));
    bn3 = std::make_unique<nn::BatchNorm>(this, "bn3", out);
    bn3->set_source(conv3.get());
  }
  if (c.squeeze) se = std::make_unique<Squeeze>(this, "se", out);
  if ((stride != 1 || in != out) && c.shortcut != Shortcut::pad)
    downsample = std::make_unique<Downsample>(this, "downsample", in, out, stride, c.shortcut == Shortcut::pool);
}

Tensor Block::shortcut(const Tensor& x) {
  if (downsample) return (*downsample)(x);
  if (stride == 1 && in == out) return x;
  const Tensor some = slice(slice(x, 1, 0, x.size(1), stride), 2, 0, x.size(2), stride);
  const std::int64_t more = (out - in) / 2;
  return pad(some, {0, 0, 0, more}, {0, 0, 0, more});
}

Tensor Block::forward(const Tensor& x) {
  Tensor y = bn1.after(conv1, x, Activation::relu);
  if (conv3) y = bn2.after(conv2, y, Activation::relu);
  nn::Conv& last_conv = conv3 ? *conv3 : conv2;
  nn::BatchNorm& last = bn3 ? *bn3 : bn2;
  if (se) return relu((*se)(last(last_conv(y))) + shortcut(x));
  return last.after(last_conv, y, Activation::relu, shortcut(x));
}

DeepStem::DeepStem(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t out)
    : Layer(up, name),
      conv0(this, "0", in, out / 2, {3, 3}, options(3, 2), false, kaiming_normal(out / 2, 3)),
      norm1(this, "1", out / 2),
      conv3(this, "3", out / 2, out / 2, {3, 3}, options(3, 1), false, kaiming_normal(out / 2, 3)),
      norm4(this, "4", out / 2),
      conv6(this, "6", out / 2, out, {3, 3}, options(3, 1), false, kaiming_normal(out, 3)) {
  norm1.set_source(&conv0);
  norm4.set_source(&conv3);
}

Tensor DeepStem::forward(const Tensor& x) {
  return conv6(norm4.after(conv3, norm1.after(conv0, x, Activation::relu), Activation::relu));
}

namespace {
std::unique_ptr<nn::Conv> plain_stem(nn::Module* up, const ResnetConfig& c) {
  if (c.stem == Stem::deep) return nullptr;
  const std::int64_t kernel = c.stem == Stem::conv7 ? 7 : 3;
  return std::make_unique<nn::Conv>(up, "conv1", c.channels, c.width, Dims{kernel, kernel},
                                    options(kernel, c.stem == Stem::conv7 ? 2 : 1), false,
                                    conv_init(c, c.channels, c.width, kernel));
}
}  // namespace

Resnet::Resnet(const ResnetConfig& c, const nn::Build& build)
    : Layer(build),
      config(checked(c)),
      conv1(plain_stem(this, c)),
      deep_stem(conv1 ? nullptr : std::make_unique<DeepStem>(this, "conv1", c.channels, c.width)),
      bn1(this, "bn1", c.width) {
  add_stages();
}

Resnet::Resnet(nn::Module* up, std::string_view name, const ResnetConfig& c)
    : Layer(up, name),
      config(checked(c)),
      conv1(plain_stem(this, c)),
      deep_stem(conv1 ? nullptr : std::make_unique<DeepStem>(this, "conv1", c.channels, c.width)),
      bn1(this, "bn1", c.width) {
  add_stages();
}

void Resnet::add_stages() {
  const ResnetConfig& c = config;
  bn1.set_source(conv1 ? conv1.get() : &deep_stem->conv6);
  std::int64_t dim = c.width;
  for (std::size_t i = 0; i < c.blocks.size(); ++i) {
    stages.push_back(std::make_unique<nn::List<Block>>(this, cat("layer", i + 1)));
    for (int k = 0; k < c.blocks[i]; ++k)
      dim = stages[i]->add(c, dim, c.width << i, i > 0 && k == 0 ? 2 : 1).out;
  }
  if (c.classes == 0) return;
  const nn::Init linear = nn::Init::uniform(1 / std::sqrt(static_cast<double>(dim)));  // of PyTorch's Linear
  head = c.stem == Stem::cifar
             ? std::make_unique<nn::Head>(this, "linear", dim, c.classes, kaiming_normal(dim, 1), linear)
             : std::make_unique<nn::Head>(this, "fc", dim, c.classes, linear, linear);
}

Tensor Resnet::stem(const Tensor& image) {
  CAPO_CHECK(image.rank() == 4 && image.size(3) == config.channels, "resnet: image must be [B, H, W, ", config.channels,
             "], got ", image.shape());
  return conv1 ? bn1.after(*conv1, image, Activation::relu)
               : bn1.with_activation((*deep_stem)(image), Activation::relu);
}

Tensor Resnet::stage(std::size_t i, Tensor x) {
  if (i == 0 && config.stem != Stem::cifar) x = max_pool2d(x, 3, 2, 1);
  for (auto& block : *stages[i]) x = (*block)(x);
  return x;
}

std::vector<Tensor> Resnet::maps(const Tensor& image) {
  std::vector<Tensor> all{stem(image)};
  for (std::size_t i = 0; i < stages.size(); ++i) all.push_back(stage(i, all.back()));
  return all;
}

Tensor Resnet::features(const Tensor& image) {
  Tensor x = stem(image);
  for (std::size_t i = 0; i < stages.size(); ++i) x = stage(i, x);
  return mean(x, {1, 2});
}

}  // namespace capo::resnet
