// [Convolution, instance norm, leaky ReLU]: what nnU-Net's and UNETR's networks are made of.
#pragma once

#include <capo/models/nn/conv_layers.h>

#include <string_view>

namespace capo::unet {

struct BlockStyle {
  bool bias = true;     // of the convolutions
  double slope = 0.01;  // of the leaky ReLU
  double norm_eps = 1e-5;
};

// leaky_relu(norm(conv(x))), the sizes divided by the stride; kernel: odd. Children "conv" and "norm".
class ConvNormAct : public nn::Layer<ConvNormAct> {
 public:
  ConvNormAct(nn::Module* up, std::string_view name, const BlockStyle& style, std::int64_t in, std::int64_t out,
              const Dims& kernel, const Dims& stride);
  Tensor forward(const Tensor& x) { return norm.with_leaky_relu(conv(x), slope); }
  nn::Conv conv;
  nn::InstanceNorm norm;
  const double slope;
};

// `count` of them, the first one strided. Children "convs.0", "convs.1", ..
class ConvStack : public nn::Layer<ConvStack> {
 public:
  ConvStack(nn::Module* up, std::string_view name, const BlockStyle& style, int count, std::int64_t in,
            std::int64_t out, const Dims& kernel, const Dims& stride);
  Tensor forward(const Tensor& x);
  nn::List<ConvNormAct> convs;
};

// Initial weights of a convolution before a leaky ReLU of slope 0.01: He et al. 2015, normal.
nn::Init he_normal(std::int64_t fan_in);

}  // namespace capo::unet
