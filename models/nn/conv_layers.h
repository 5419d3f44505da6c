// The layers of convolutional networks. Names, shapes and initial values follow PyTorch; tensors are channels-last.
#pragma once

#include <capo/models/nn/module.h>
#include <capo/ops/conv.h>

namespace capo::nn {

// Convolution over the axes between the first and the last; weight [out, k.., in / groups].
class Conv : public Layer<Conv> {
 public:
  Conv(Module* up, std::string_view name, std::int64_t in, std::int64_t out, const Dims& kernel,
       ConvOptions options = {}, bool bias = true, Init init = Init::kaiming(2.2360679774997896));
  Tensor forward(const Tensor& x);
  std::int64_t width() const override { return weight.value().size(0); }
  std::int64_t input_width() const override { return weight.value().size(-1) * options.groups; }
  Parameter weight;
  std::unique_ptr<Parameter> bias;
  const ConvOptions options;
};

// [B, .., C] normalised over all but C. Running statistics move only in train(), outside checkpoint replays, and while
// the layer is not frozen.
class BatchNorm : public Layer<BatchNorm> {
 public:
  BatchNorm(Module* up, std::string_view name, std::int64_t dim, double eps = 1e-5, double momentum = 0.1);
  Tensor forward(const Tensor& x);
  Parameter weight, bias;
  Buffer running_mean, running_var;
  const double eps, momentum;
};

class GroupNorm : public Layer<GroupNorm> {
 public:
  GroupNorm(Module* up, std::string_view name, int groups, std::int64_t dim, double eps = 1e-5);
  Tensor forward(const Tensor& x);
  Parameter weight, bias;
  const int groups;
  const double eps;
};

}  // namespace capo::nn
