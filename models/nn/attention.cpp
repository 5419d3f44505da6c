#include <capo/models/nn/attention.h>
#include <capo/ops/view.h>

#include <cmath>

namespace capo::nn {

AttentionOut AttentionCore::operator()(const Tensor& z, const Tensor& q, const Tensor& k, const Tensor& v,
                                       double scale) {
  const ModuleScope scope(&path());
  AttentionOptions options;
  options.scale = scale;
  AttentionOut out = attention(q, k, v, options);
  return tapped() ? run_core_taps({z, q, k, v, scale, out}) : out;
}

Attention::Attention(Module* up, std::string_view name, const AttentionConfig& c)
    : Layer(up, name),
      config(c),
      qkv(this, "qkv", c.dim, 3 * c.dim, c.qkv_bias),
      q_norm(c.qk_norm ? std::make_unique<LayerNorm>(this, "q_norm", c.dim / c.heads, c.norm_eps) : nullptr),
      k_norm(c.qk_norm ? std::make_unique<LayerNorm>(this, "k_norm", c.dim / c.heads, c.norm_eps) : nullptr),
      core(this, "core"),
      proj(this, "proj", c.dim, c.dim),
      proj_drop(this, "proj_drop", c.proj_drop) {
  CAPO_CHECK(c.heads > 0 && c.dim % c.heads == 0, "attention: dim ", c.dim, " must be a multiple of heads ", c.heads);
  const double scale = 1.0 / std::sqrt(static_cast<double>(c.dim / c.heads));
  place_ = {&core, nullptr, &qkv, &proj, k_norm.get(), c.heads, scale};
}

Tensor Attention::forward(const Tensor& x) {
  const std::int64_t b = x.size(0), n = x.size(1), d = config.dim / config.heads;
  const auto parts = unbind(reshape(qkv(x), {b, n, 3, config.heads, d}), 2);
  const Tensor q = q_norm ? (*q_norm)(parts[0]) : parts[0];
  const Tensor k = k_norm ? (*k_norm)(parts[1]) : parts[1];
  const AttentionOut out = core(x, q, k, parts[2], place_.scale);
  return proj_drop(proj(reshape(out.o, {b, n, config.dim})));
}

}  // namespace capo::nn
