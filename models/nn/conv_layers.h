// The layers of convolutional networks. Names, shapes and initial values follow PyTorch; tensors are channels-last.
#pragma once

#include <capo/models/nn/module.h>
#include <capo/ops/activation.h>
#include <capo/ops/conv.h>

#include <optional>

namespace capo::nn {

// Convolution over the axes between the first and the last; weight [out, k.., in / groups]. bias_init: PyTorch's,
// uniform in +-1 / sqrt(fan-in), unless given.
class Conv : public Layer<Conv> {
 public:
  Conv(Module* up, std::string_view name, std::int64_t in, std::int64_t out, const Dims& kernel,
       ConvOptions options = {}, bool bias = true, Init init = Init::kaiming(2.2360679774997896),
       std::optional<Init> bias_init = {});
  Tensor forward(const Tensor& x) { return ended(x, Activation::none, {}, 0); }
  // act(this(x) + residual), fused while nothing is attached and nothing needs a gradient. act: none, relu or silu,
  // which is never fused; residual: the result's shape, or undefined; ceiling: relu's greatest value (relu6: 6), or 0.
  Tensor with_activation(const Tensor& x, Activation act, const Tensor& residual = {}, double ceiling = 0);
  std::int64_t width() const override { return weight.value().size(0); }
  std::int64_t input_width() const override { return weight.value().size(-1) * options.groups; }
  Parameter weight;
  std::unique_ptr<Parameter> bias;
  const ConvOptions options;

 private:
  Tensor ended(const Tensor& x, Activation act, const Tensor& residual, double ceiling);
};

// The adjoint of Conv, which upsamples with stride > 1; weight [in, k.., out / groups].
class ConvTranspose : public Layer<ConvTranspose> {
 public:
  ConvTranspose(Module* up, std::string_view name, std::int64_t in, std::int64_t out, const Dims& kernel,
                ConvOptions options = {}, bool bias = true, Init init = Init::kaiming(2.2360679774997896),
                std::optional<Init> bias_init = {});
  Tensor forward(const Tensor& x);
  Parameter weight;
  std::unique_ptr<Parameter> bias;
  const ConvOptions options;
};

// [B, .., C] normalised over all but C. Running statistics move only in train(), outside checkpoint replays, and while
// the layer is not frozen.
class BatchNorm : public Layer<BatchNorm> {
 public:
  BatchNorm(Module* up, std::string_view name, std::int64_t dim, double eps = 1e-5, double momentum = 0.1);
  Tensor forward(const Tensor& x) { return normalized(x, Activation::none, {}, 0); }
  // act(this(x) + residual), fused while nothing is attached. act: none, relu or silu; residual: x's shape, or
  // undefined; ceiling: relu's greatest value (relu6: 6), 0: none.
  Tensor with_activation(const Tensor& x, Activation act, const Tensor& residual = {}, double ceiling = 0);
  // The same of conv(x), which folded joins the convolution's own pass.
  Tensor after(Conv& conv, const Tensor& x, Activation act, const Tensor& residual = {}, double ceiling = 0);
  // The convolution whose output alone this layer reads, if the model says so; fold_batch_norms (batch_norms.h) works
  // the layer into it, and from then on the layer passes its input on.
  void set_source(Conv* conv) { source_ = conv; }
  Conv* source() const { return source_; }
  bool folded() const { return folded_; }
  // Not frozen: in train() the batch's statistics are in use, and move the running ones.
  bool trained() const { return weight.trainable() || bias.trainable(); }
  Parameter weight, bias;
  Buffer running_mean, running_var;
  const double eps, momentum;

 private:
  friend void fold_batch_norm(BatchNorm& norm);
  Tensor normalized(const Tensor& x, Activation act, const Tensor& residual, double ceiling);
  void refuse_training() const;  // folded
  Conv* source_ = nullptr;
  bool folded_ = false;
};

class GroupNorm : public Layer<GroupNorm> {
 public:
  GroupNorm(Module* up, std::string_view name, int groups, std::int64_t dim, double eps = 1e-5);
  Tensor forward(const Tensor& x);
  Parameter weight, bias;
  const int groups;
  const double eps;
};

// [B, spatial.., C] normalised over space, per sample and channel (PyTorch's affine=True).
class InstanceNorm : public Layer<InstanceNorm> {
 public:
  InstanceNorm(Module* up, std::string_view name, std::int64_t dim, double eps = 1e-5);
  Tensor forward(const Tensor& x);
  // leaky_relu(this(x), slope), fused while nothing is attached.
  Tensor with_leaky_relu(const Tensor& x, double slope);
  Parameter weight, bias;
  const double eps;
};

}  // namespace capo::nn
