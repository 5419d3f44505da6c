// Multi-head self-attention with a tappable core.
#pragma once

#include <capo/models/nn/layers.h>

namespace capo::nn {

class Attention;

// What an attention tuner needs to know, without naming a model: where to hang, and how tokens become keys and values.
struct AttentionPlace {
  Module* core;      // hang CoreSite taps here
  Module* pre_norm;  // the norm whose output the attention reads (null: none)
  Linear* qkv;       // fused projection [3 C, C]
  Linear* proj;
  Module* k_norm;    // qk-norm, or null
  int heads;
  double scale;
};

// (q, k, v) -> (o, lse), no parameters of its own. [B, N, H, D] each.
class AttentionCore : public Module {
 public:
  using Module::Module;
  bool runs_taps() const override { return true; }
  AttentionOut operator()(const Tensor& z, const Tensor& q, const Tensor& k, const Tensor& v, double scale);
};

struct AttentionConfig {
  std::int64_t dim;
  int heads;
  bool qkv_bias = true;
  bool qk_norm = false;      // layer norm on the head width of q and k
  double proj_drop = 0;
  double norm_eps = 1e-6;    // of the qk-norm
};

// x [B, N, C] -> [B, N, C]: proj(core(split(qkv(x)))).
class Attention : public Layer<Attention> {
 public:
  Attention(Module* up, std::string_view name, const AttentionConfig& config);
  Tensor forward(const Tensor& x);
  const AttentionPlace* attention_place() override { return &place_; }
  int heads() const override { return config.heads; }
  std::int64_t width() const override { return config.dim; }
  // The block tells which norm feeds it.
  void set_pre_norm(Module* norm) { place_.pre_norm = norm; }

  const AttentionConfig config;
  Linear qkv;
  std::unique_ptr<LayerNorm> q_norm, k_norm;
  AttentionCore core;
  Linear proj;
  Dropout proj_drop;

 private:
  AttentionPlace place_;
};

}  // namespace capo::nn
