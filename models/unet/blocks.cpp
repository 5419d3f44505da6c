#include <capo/models/unet/blocks.h>

#include <cmath>

namespace capo::unet {
namespace {

Dims half(const Dims& kernel) {
  Dims pad;
  for (auto k : kernel) pad.push_back((k - 1) / 2);
  return pad;
}

}  // namespace

// For slope 0.01 whatever the model's, as the package's InitWeights_He(1e-2).
nn::Init he_normal(std::int64_t fan_in) {
  return nn::Init::normal(std::sqrt(2.0 / ((1 + 1e-4) * static_cast<double>(fan_in))));
}

ConvNormAct::ConvNormAct(nn::Module* up, std::string_view name, const BlockStyle& style, std::int64_t in,
                         std::int64_t out, const Dims& kernel, const Dims& stride)
    : Layer(up, name),
      conv(this, "conv", in, out, kernel, {.stride = stride, .pad_before = half(kernel)}, style.bias,
           he_normal(in * numel(kernel)), nn::Init::zero()),
      norm(this, "norm", out, style.norm_eps),
      slope(style.slope) {}

ConvStack::ConvStack(nn::Module* up, std::string_view name, const BlockStyle& style, int count, std::int64_t in,
                     std::int64_t out, const Dims& kernel, const Dims& stride)
    : Layer(up, name), convs(this, "convs") {
  for (int i = 0; i < count; ++i)
    convs.add(style, i ? out : in, out, kernel, i ? Dims::filled(stride.size(), 1) : stride);
}

Tensor ConvStack::forward(const Tensor& x) {
  Tensor y = x;
  for (auto& block : convs) y = (*block)(y);
  return y;
}

}  // namespace capo::unet
