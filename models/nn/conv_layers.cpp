#include <capo/models/nn/conv_layers.h>
#include <capo/ops/batch_norm.h>
#include <capo/ops/group_norm.h>

#include <cmath>

namespace capo::nn {

namespace {
Shape conv_weight(std::int64_t in, std::int64_t out, const Dims& kernel, const ConvOptions& options) {
  Shape s{out};
  for (auto k : kernel) s.push_back(k);
  s.push_back(in / options.groups);
  return s;
}
}  // namespace

Conv::Conv(Module* up, std::string_view name, std::int64_t in, std::int64_t out, const Dims& kernel, ConvOptions o,
           bool with_bias, Init init)
    : Layer(up, name), weight(this, "weight", conv_weight(in, out, kernel, o), init, Layout::conv), options(o) {
  if (!with_bias) return;
  double fan_in = static_cast<double>(in) / o.groups;
  for (auto k : kernel) fan_in *= static_cast<double>(k);
  bias = std::make_unique<Parameter>(this, "bias", Shape{out}, Init::uniform(1.0 / std::sqrt(fan_in)));
}
Tensor Conv::forward(const Tensor& x) { return conv(x, weight, bias ? bias->value() : Tensor(), options); }

BatchNorm::BatchNorm(Module* up, std::string_view name, std::int64_t dim, double e, double m)
    : Layer(up, name),
      weight(this, "weight", {dim}, Init::one()),
      bias(this, "bias", {dim}, Init::zero()),
      running_mean(this, "running_mean", {dim}, Init::zero()),
      running_var(this, "running_var", {dim}, Init::one()),
      eps(e),
      momentum(m) {}
Tensor BatchNorm::forward(const Tensor& x) {
  const bool frozen = !weight.trainable() && !bias.trainable();
  return batch_norm(x, weight, bias, running_mean, running_var, training() && !frozen, momentum, eps, !replaying());
}

GroupNorm::GroupNorm(Module* up, std::string_view name, int g, std::int64_t dim, double e)
    : Layer(up, name),
      weight(this, "weight", {dim}, Init::one()),
      bias(this, "bias", {dim}, Init::zero()),
      groups(g),
      eps(e) {}
Tensor GroupNorm::forward(const Tensor& x) { return group_norm(x, groups, weight, bias, eps); }

}  // namespace capo::nn
