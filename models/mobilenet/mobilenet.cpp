#include <capo/models/mobilenet/mobilenet.h>
#include <capo/ops/reduce.h>

#include <algorithm>
#include <cmath>

namespace capo::mobilenet {
namespace {

// The nearest multiple of 8, at least 8, and not more than a tenth below.
std::int64_t rounded(double channels) {
  auto r = std::max<std::int64_t>(8, static_cast<std::int64_t>(channels + 4) / 8 * 8);
  if (static_cast<double>(r) < 0.9 * channels) r += 8;
  return r;
}

MobilenetConfig checked(const MobilenetConfig& c) {
  CAPO_CHECK(c.width >= 0.05 && c.width <= 4, "mobilenet: width must be in [0.05, 4], got ", c.width);
  CAPO_CHECK(c.channels > 0 && c.classes >= 0, "mobilenet: channels must be positive and classes not negative, got ",
             c.channels, " and ", c.classes);
  CAPO_CHECK(c.drop >= 0 && c.drop < 1, "mobilenet: drop must be in [0, 1), got ", c.drop);
  return c;
}

ConvOptions options(const MobilenetConfig& c, std::int64_t kernel, int stride, int groups) {
  const std::int64_t pad = kernel / 2;
  ConvOptions o{.stride = {stride}, .pad_before = {pad}, .groups = groups};
  if (c.pad_after_only && stride == 2) o.pad_before = {0}, o.pad_after = {pad};
  return o;
}

// Kaiming's normal values over the outputs, as torchvision.
nn::Init conv_init(std::int64_t out, std::int64_t kernel) {
  return nn::Init::normal(std::sqrt(2.0 / static_cast<double>(out * kernel * kernel)));
}

std::unique_ptr<nn::BatchNorm> norm_of(nn::Module* up, const char* name, const MobilenetConfig& c, nn::Conv& conv) {
  if (!c.norms) return nullptr;
  auto norm = std::make_unique<nn::BatchNorm>(up, name, conv.width());
  norm->set_source(&conv);
  return norm;
}

struct Stage {
  int expansion, channels, blocks, stride;
};
constexpr Stage kStages[] = {{1, 16, 1, 1}, {6, 24, 2, 2}, {6, 32, 3, 2}, {6, 64, 4, 2},
                             {6, 96, 3, 1}, {6, 160, 3, 2}, {6, 320, 1, 1}};

}  // namespace

ConvNorm::ConvNorm(nn::Module* up, std::string_view name, const MobilenetConfig& c, std::int64_t in, std::int64_t out,
                   std::int64_t kernel, int stride, int groups)
    : Layer(up, name),
      conv(this, "0", in, out, {kernel, kernel}, options(c, kernel, stride, groups), !c.norms, conv_init(out, kernel)),
      norm(norm_of(this, "1", c, conv)) {}

Tensor ConvNorm::forward(const Tensor& x) {  // relu6 is relu with ceiling 6
  return norm ? norm->after(conv, x, Activation::relu, {}, 6) : conv.with_activation(x, Activation::relu, {}, 6);
}

Block::Block(nn::Module* up, std::string_view name, const MobilenetConfig& c, std::int64_t in, std::int64_t out,
             int stride, int expansion)
    : Layer(up, name),
      residual(stride == 1 && in == out),
      conv(this, "conv"),
      expand(expansion == 1 ? nullptr : std::make_unique<ConvNorm>(&conv, "0", c, in, in * expansion, 1, 1, 1)),
      depthwise(&conv, expand ? "1" : "0", c, in * expansion, in * expansion, 3, stride,
                static_cast<int>(in * expansion)),
      project(&conv, expand ? "2" : "1", in * expansion, out, {1, 1}, {}, !c.norms, conv_init(out, 1)),
      norm(norm_of(&conv, expand ? "3" : "2", c, project)) {}

Tensor Block::forward(const Tensor& x) {
  const Tensor inner = depthwise(expand ? (*expand)(x) : x), shortcut = residual ? x : Tensor();
  return norm ? norm->after(project, inner, Activation::none, shortcut)
              : project.with_activation(inner, Activation::none, shortcut);
}

Mobilenet::Mobilenet(const MobilenetConfig& c, const nn::Build& build)
    : Layer(build),
      config(checked(c)),
      body(this, "features"),
      stem(&body, "0", c, c.channels, rounded(32 * c.width), 3, 2, 1),
      classifier(this, "classifier"),
      dropout(&classifier, "0", c.drop) {
  std::int64_t dim = rounded(32 * c.width);
  for (const Stage& s : kStages)
    for (int i = 0; i < s.blocks; ++i) {
      const std::int64_t out = rounded(s.channels * c.width);
      blocks.push_back(std::make_unique<Block>(&body, std::to_string(blocks.size() + 1), c, dim, out,
                                               i == 0 ? s.stride : 1, s.expansion));
      dim = out;
    }
  const std::int64_t wide = rounded(1280 * std::max(1.0, c.width));
  last = std::make_unique<ConvNorm>(&body, std::to_string(blocks.size() + 1), c, dim, wide, 1, 1, 1);
  if (c.classes > 0)
    head = std::make_unique<nn::Head>(&classifier, "1", wide, c.classes, nn::Init::normal(0.01),
                                      nn::Init::uniform(1 / std::sqrt(static_cast<double>(wide))));
}

Tensor Mobilenet::features(const Tensor& image) {
  CAPO_CHECK(image.rank() == 4 && image.size(3) == config.channels, "mobilenet: image must be [B, H, W, ",
             config.channels, "], got ", image.shape());
  Tensor x = stem(image);
  for (auto& block : blocks) x = (*block)(x);
  return mean((*last)(x), {1, 2});
}

}  // namespace capo::mobilenet
