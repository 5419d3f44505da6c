// Tuners of convolutions: the same algebra on [B, spatial.., C] of one, two or three spatial axes. Both fold.
#pragma once

#include <capo/models/nn/conv_layers.h>
#include <capo/tuners/tuner.h>

namespace capo::tuners {

// LoRA at a Conv, as PEFT's: y + s conv1x1(conv(x, a), b), a with the target's kernel, stride, padding and dilation, b
// zero at the start. Of a grouped target each group has its own rank / groups directions, so that
//   dW[group] = s b[group] a[group]
// folds exactly. rank (in / groups taps + out / groups) parameters. Throws when the rank is no multiple of the groups.
class ConvLora : public FoldingTuner {
 public:
  ConvLora(nn::Module* conv, std::string_view name, const LoraOptions& options);
  Tensor apply(const nn::Site& site) override;
  using Tap::apply;

  const LoraOptions options;
  nn::Parameter a, b;  // [rank, k.., in / groups], [out, 1.., rank / groups]

 private:
  ConvLora(nn::Conv& conv, std::string_view name, const LoraOptions& options);
  Tensor delta_weight() const override;
  nn::Conv& conv_;
  nn::Dropout dropout_;
};

struct ResidualAdapterOptions {
  double scale = 1.0;  // s
};

// Parallel residual adapter (Rebuffi, Bilen, Vedaldi 2018): y + s conv1x1(x), reading x under the kernel's middle tap,
// with the target's stride and groups; zero at the start. in out / groups parameters; folds into the middle tap.
// At a depthwise convolution a factor for each channel. Beside a 1x1 convolution it is that convolution's whole weight
// again, so that the method of that name (presets.h) takes larger kernels alone, as the paper does.
class ResidualAdapter : public FoldingTuner {
 public:
  ResidualAdapter(nn::Module* conv, std::string_view name, const ResidualAdapterOptions& options);
  Tensor apply(const nn::Site& site) override;
  using Tap::apply;

  const ResidualAdapterOptions options;
  nn::Parameter weight;  // [out, 1.., in / groups]

 private:
  ResidualAdapter(nn::Conv& conv, std::string_view name, const ResidualAdapterOptions& options);
  Tensor delta_weight() const override;
  nn::Conv& conv_;
};

}  // namespace capo::tuners
