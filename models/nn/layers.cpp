#include <capo/models/nn/layers.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/dropout.h>
#include <capo/ops/index.h>
#include <capo/ops/join.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/patch.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>

#include <algorithm>
#include <cmath>

namespace capo::nn {

Linear::Linear(Module* up, std::string_view name, std::int64_t in, std::int64_t out, bool with_bias, Init init)
    : Layer(up, name), weight(this, "weight", {out, in}, init) {
  if (with_bias) bias = std::make_unique<Parameter>(this, "bias", Shape{out}, Init::zero());
}

Tensor Linear::with_activation(const Tensor& x, Activation act) {
  if (tapped()) {
    const Tensor z = (*this)(x);
    switch (act) {
      case Activation::none: return z;
      case Activation::relu: return relu(z);
      case Activation::gelu: return gelu(z);
      case Activation::gelu_tanh: return gelu_tanh(z);
      case Activation::quick_gelu: return quick_gelu(z);
      case Activation::silu: return silu(z);
    }
  }
  const ModuleScope scope(&path());
  return linear(x, weight, bias_or_none(), act);
}

// The factor goes to the product's narrower operands.
Tensor Linear::add_to(const Tensor& r, const Tensor& x, double scale) {
  const auto scaled = [scale](const Tensor& t) { return scale == 1.0 || !t.defined() ? t : t * scale; };
  if (tapped() || r.dtype() != x.dtype()) return r + cast(scaled((*this)(x)), r.dtype());
  const ModuleScope scope(&path());
  return add_linear(r, {{scaled(x), weight, scaled(bias_or_none())}});
}

LayerNorm::LayerNorm(Module* up, std::string_view name, std::int64_t dim, double e)
    : Layer(up, name), weight(this, "weight", {dim}, Init::one()), bias(this, "bias", {dim}, Init::zero()), eps(e) {}
Tensor LayerNorm::forward(const Tensor& x) { return layer_norm(x, weight, bias, eps); }
AddNorm LayerNorm::add(const Tensor& x, const Tensor& r) {
  if (tapped()) {
    const Tensor sum = x + cast(r, x.dtype());
    return {sum, (*this)(sum)};
  }
  const ModuleScope scope(&path());
  return add_layer_norm(x, r, weight, bias, eps);
}

RmsNorm::RmsNorm(Module* up, std::string_view name, std::int64_t dim, double e)
    : Layer(up, name), weight(this, "weight", {dim}, Init::one()), eps(e) {}
Tensor RmsNorm::forward(const Tensor& x) { return rms_norm(x, weight, eps); }

Embedding::Embedding(Module* up, std::string_view name, std::int64_t count, std::int64_t dim, Init init)
    : Layer(up, name), weight(this, "weight", {count, dim}, init) {}
Tensor Embedding::forward(const Tensor& ids) { return embedding(weight, ids); }

Dropout::Dropout(Module* up, std::string_view name, double p_)
    : Layer(up, name), p(p_), rng(build().seed, stream_of(path())) {}
Tensor Dropout::forward(const Tensor& x) { return training() && p > 0 ? dropout(x, p, rng, true) : x; }

DropPath::DropPath(Module* up, std::string_view name, double p_)
    : Layer(up, name), p(p_), rng(build().seed, stream_of(path())) {}
Tensor DropPath::forward(const Tensor& x) { return training() && p > 0 ? drop_path(x, p, rng, true) : x; }

PatchDrop::PatchDrop(Module* up, std::string_view name, double p_, int prefix_)
    : Layer(up, name), p(p_), prefix(prefix_), rng(build().seed, stream_of(path())) {
  CAPO_CHECK(p >= 0 && p < 1, "patch_drop: p must be in [0, 1), got ", p);
  CAPO_CHECK(prefix >= 0, "patch_drop: prefix must not be negative, got ", prefix);
}

Tensor PatchDrop::forward(const Tensor& x) {
  if (!training() || p == 0) return x;
  CAPO_CHECK(x.rank() == 3 && x.size(1) > prefix, "patch_drop: x must be [B, N, C] with more than ", prefix,
             " tokens, got ", x.shape());
  const std::int64_t batch = x.size(0), all = x.size(1), patches = all - prefix;
  const auto kept = std::max<std::int64_t>(1, static_cast<std::int64_t>(static_cast<double>(patches) * (1 - p)));
  Tensor rows;  // of [B N, C]: one index per token, where gather would keep one per element for its gradient
  {
    const NoGrad off;
    const Tensor noise = rand_uniform({batch, patches}, rng, 0, 1, f32, x.device());
    const Tensor random = topk(noise, kept, 1, false).indices;
    const Tensor ordered = topk(random, kept, 1, false).values + static_cast<double>(prefix);
    const Tensor first = expand(arange(prefix, i64, x.device()), {batch, prefix});
    const Tensor start = reshape(arange(batch, i64, x.device()) * static_cast<double>(all), {batch, 1});
    rows = flatten(concat({first, ordered}, 1) + start, 0, 1);
  }
  return reshape(index_select(reshape(x, {batch * all, x.size(2)}), 0, rows), {batch, prefix + kept, x.size(2)});
}

LayerScale::LayerScale(Module* up, std::string_view name, std::int64_t dim, double init)
    : Layer(up, name), gamma(this, "gamma", {dim}, Init::constant(init)) {}
Tensor LayerScale::forward(const Tensor& x) { return x * gamma.value(); }

Mlp::Mlp(Module* up, std::string_view name, std::int64_t dim, std::int64_t hidden, Activation a, double p)
    : Layer(up, name), fc1(this, "fc1", dim, hidden), fc2(this, "fc2", hidden, dim), drop(this, "drop", p), act(a) {}
Tensor Mlp::forward(const Tensor& x) { return drop(fc2(drop(fc1.with_activation(x, act)))); }

PatchEmbed::Proj::Proj(Module* up, std::string_view name, int p, std::int64_t channels, std::int64_t dim)
    : Layer(up, name), weight(this, "weight", {dim, p, p, channels}, Init::xavier(), Layout::conv),
      bias(this, "bias", {dim}, Init::zero()) {}
Tensor PatchEmbed::Proj::forward(const Tensor& patches) { return linear(patches, flatten(weight.value(), 1, 3), bias); }

PatchEmbed::PatchEmbed(Module* up, std::string_view name, int p, std::int64_t channels, std::int64_t dim)
    : Layer(up, name), patch(p), proj(this, "proj", p, channels, dim) {}

Tensor PatchEmbed::forward(const Tensor& image) {
  const std::int64_t channels = proj.weight.value().size(3);
  CAPO_CHECK(image.rank() == 4 && image.size(1) % patch == 0 && image.size(2) % patch == 0 && image.size(3) == channels,
             "patch_embed: image must be [B, H, W, ", channels, "] with H and W multiples of ", patch, ", got ",
             image.shape());
  return proj(patchify(image, patch, patch));
}

}  // namespace capo::nn
