#include <capo/models/nn/conv_layers.h>
#include <capo/ops/batch_norm.h>
#include <capo/ops/binary.h>
#include <capo/ops/group_norm.h>
#include <capo/ops/unary.h>

#include <cmath>

namespace capo::nn {

namespace {
Shape conv_weight(std::int64_t in, std::int64_t out, const Dims& kernel, const ConvOptions& options) {
  Shape s{out};
  for (auto k : kernel) s.push_back(k);
  s.push_back(in / options.groups);
  return s;
}

// PyTorch takes the fan-in of a transposed weight [in, k.., out / groups] from all axes but the first, too.
Init or_default(const std::optional<Init>& init, const Shape& weight) {
  return init ? *init : Init::uniform(1.0 / std::sqrt(static_cast<double>(numel(weight) / weight[0])));
}

// act(x + residual) after a layer `what` that is tapped or folded.
Tensor activated(const char* what, const Tensor& x, Activation act, const Tensor& residual, double ceiling) {
  CAPO_CHECK(act == Activation::none || act == Activation::relu || act == Activation::silu, what,
             ": the activation must be none, relu or silu, got ", name_of(act));
  const Tensor y = residual.defined() ? x + residual : x;
  if (act == Activation::relu) return ceiling > 0 ? clamp(y, 0, ceiling) : relu(y);
  return act == Activation::silu ? silu(y) : y;
}
}  // namespace

Conv::Conv(Module* up, std::string_view name, std::int64_t in, std::int64_t out, const Dims& kernel, ConvOptions o,
           bool with_bias, Init init, std::optional<Init> bias_init)
    : Layer(up, name), weight(this, "weight", conv_weight(in, out, kernel, o), init, Layout::conv), options(o) {
  if (!with_bias) return;
  bias = std::make_unique<Parameter>(this, "bias", Shape{out}, or_default(bias_init, weight.value().shape()));
}
Tensor Conv::ended(const Tensor& x, Activation act, const Tensor& residual, double ceiling) {
  return conv(x, weight, bias ? bias->value() : Tensor(), options, act, residual, ceiling);
}
Tensor Conv::with_activation(const Tensor& x, Activation act, const Tensor& residual, double ceiling) {
  if (tapped() || act == Activation::silu) return activated("conv", (*this)(x), act, residual, ceiling);
  const ModuleScope scope(&path());
  return ended(x, act, residual, ceiling);
}

ConvTranspose::ConvTranspose(Module* up, std::string_view name, std::int64_t in, std::int64_t out, const Dims& kernel,
                             ConvOptions o, bool with_bias, Init init, std::optional<Init> bias_init)
    : Layer(up, name),
      weight(this, "weight", conv_weight(out, in, kernel, o), init, Layout::conv_transpose),
      options(o) {
  if (!with_bias) return;
  bias = std::make_unique<Parameter>(this, "bias", Shape{out}, or_default(bias_init, weight.value().shape()));
}
Tensor ConvTranspose::forward(const Tensor& x) {
  return conv_transpose(x, weight, bias ? bias->value() : Tensor(), options);
}

BatchNorm::BatchNorm(Module* up, std::string_view name, std::int64_t dim, double e, double m)
    : Layer(up, name),
      weight(this, "weight", {dim}, Init::one()),
      bias(this, "bias", {dim}, Init::zero()),
      running_mean(this, "running_mean", {dim}, Init::zero()),
      running_var(this, "running_var", {dim}, Init::one()),
      eps(e),
      momentum(m) {}

Tensor BatchNorm::normalized(const Tensor& x, Activation act, const Tensor& residual, double ceiling) {
  if (!folded_)
    return batch_norm(x, weight, bias, running_mean, running_var, training() && trained(), momentum, eps, !replaying(),
                      act, residual, 0, ceiling);
  refuse_training();
  return activated("batch_norm", x, act, residual, ceiling);
}
void BatchNorm::refuse_training() const {
  CAPO_CHECK(!training(), path(), ": is folded into its convolution, for inference alone; it cannot train");
}
Tensor BatchNorm::with_activation(const Tensor& x, Activation act, const Tensor& residual, double ceiling) {
  if (tapped()) return activated("batch_norm", (*this)(x), act, residual, ceiling);
  const ModuleScope scope(&path());
  return normalized(x, act, residual, ceiling);
}
Tensor BatchNorm::after(Conv& conv, const Tensor& x, Activation act, const Tensor& residual, double ceiling) {
  if (!folded_ || tapped()) return with_activation(conv(x), act, residual, ceiling);
  refuse_training();
  return conv.with_activation(x, act, residual, ceiling);
}

GroupNorm::GroupNorm(Module* up, std::string_view name, int g, std::int64_t dim, double e)
    : Layer(up, name),
      weight(this, "weight", {dim}, Init::one()),
      bias(this, "bias", {dim}, Init::zero()),
      groups(g),
      eps(e) {}
Tensor GroupNorm::forward(const Tensor& x) { return group_norm(x, groups, weight, bias, eps); }

InstanceNorm::InstanceNorm(Module* up, std::string_view name, std::int64_t dim, double e)
    : Layer(up, name), weight(this, "weight", {dim}, Init::one()), bias(this, "bias", {dim}, Init::zero()), eps(e) {}
Tensor InstanceNorm::forward(const Tensor& x) { return instance_norm(x, weight, bias, eps); }
Tensor InstanceNorm::with_leaky_relu(const Tensor& x, double slope) {
  if (tapped()) return leaky_relu((*this)(x), slope);
  const ModuleScope scope(&path());
  return instance_norm(x, weight, bias, eps, Activation::relu, slope);
}

}  // namespace capo::nn
