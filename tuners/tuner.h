// Parameter-efficient tuners: modules that hang on a frozen model as taps and add to what it computes.
//
//   x' = OP(x) + tau(x, OP(x))        OP: attention, FFN, block, or any Linear
//
// The algebra, with parameter counts and identities, is in docs/tuners.md; sources are named at each tuner. A tuner's
// parameters are of kind `tuner` and hang below its target ("blocks.3.attn.core.u_prefix.k"); base names never change.
#pragma once

#include <capo/models/nn/attention.h>

namespace capo::tuners {

class Tuner : public nn::Module, public nn::Tap {
 public:
  Tuner(nn::Module* target, std::string_view name) : Module(target, name, nn::Kind::tuner) {}
  nn::Module& target() const { return *parent(); }

  // Folds the tuner into its target's weights: the model then computes the same without extra work. The target's old
  // storage is kept, and unmerge() puts it back: the base has its very bits again. Throws for tuners that do not fold.
  virtual void merge();
  virtual void unmerge();
  virtual bool merged() const { return false; }
};

// A tuner whose whole effect is a sum to its target's weight.
class FoldingTuner : public Tuner {
 public:
  FoldingTuner(nn::Module* target, std::string_view name, nn::Parameter& weight);
  ~FoldingTuner() override;
  void merge() override;
  void unmerge() override;
  bool merged() const override { return kept_.defined(); }

 protected:
  virtual Tensor delta_weight() const = 0;  // of the weight's shape

 private:
  void swap_back();

  nn::Parameter& parameter_;
  // While merged: the weight, whose handle outlives the target (a model may go with its tuners merged), and a tensor
  // that holds the base's storage.
  Tensor weight_, kept_;
};

enum class Reads { x, z, y };  // the stream before the norm, the module's input, its output

struct AdapterOptions {
  std::int64_t dim = 32;    // bottleneck h
  double scale = 1.0;       // s
  Reads reads = Reads::y;
  Activation act = Activation::gelu;
  bool zero_up = true;      // identity at the start; false: Xavier, as modelscope's adapter (not the identity)
};

// tau = s * act(t down^T + b1) up^T + b2, t = x, z or y (Houlsby et al. 2019; U-Tuning 2023; AdaptFormer reads x).
// 2 d h + h + d parameters.
class UAdapter : public Tuner {
 public:
  UAdapter(nn::Module* target, std::string_view name, const AdapterOptions& options);
  Tensor apply(const nn::Site& site) override;
  using Tap::apply;
  const AdapterOptions options;
  nn::Linear down, up;
};

struct TokenOptions {
  std::int64_t length = 10;  // p tokens
};

// Prefix at an attention's core: learned keys and values, merged exactly into the frozen attention by log-sum-exp:
//   o' = (1 - lambda) o + lambda Attn(q, k, v),  lambda = sigmoid(lse_pre - lse), per row and head.
// Equal to attending over [k; keys], [v; values] (Li and Liang 2021); never the identity at the start. 2 p d
// parameters.
class UPrefix : public Tuner {
 public:
  UPrefix(nn::Module* core, std::string_view name, const nn::AttentionPlace& place, const TokenOptions& options);
  AttentionOut apply(const nn::CoreSite& site) override;
  using Tap::apply;
  nn::Parameter k, v;  // [p, d]

 private:
  int heads_;
};

// Prompt at an attention's core: learned tokens sent through the frozen norm and projections,
//   k = norm(tokens) Wk + bk, v = norm(tokens) Wv + bv, merged like a prefix.
// Equal, for the image's rows, to attending over [x; tokens] (VPT-deep, Jia et al. 2022). p d parameters.
class UPrompt : public Tuner {
 public:
  UPrompt(nn::Module* core, std::string_view name, const nn::AttentionPlace& place, const TokenOptions& options);
  AttentionOut apply(const nn::CoreSite& site) override;
  using Tap::apply;
  nn::Parameter tokens;  // [p, d]

 private:
  nn::AttentionPlace place_;
};

// Prefix beside any OP that has no softmax of its own (FFN, block): a small cross-attention from the OP's input,
//   tau(z) = concat_heads Attn(split(z), k, v),  v starts at 0: the identity. 2 p d parameters. Capo's definition.
class UPrefixBeside : public Tuner {
 public:
  UPrefixBeside(nn::Module* target, std::string_view name, const TokenOptions& options);
  Tensor apply(const nn::Site& site) override;
  using Tap::apply;
  nn::Parameter k, v;
};

// Prompt beside any OP: k = v = tokens, times a learned scalar that starts at 0. p d + 1 parameters. Capo's definition.
class UPromptBeside : public Tuner {
 public:
  UPromptBeside(nn::Module* target, std::string_view name, const TokenOptions& options);
  Tensor apply(const nn::Site& site) override;
  using Tap::apply;
  nn::Parameter tokens, scale;
};

struct LoraOptions {
  std::int64_t rank = 8;
  double alpha = 0;         // 0: alpha = rank, i.e. scale 1
  bool rslora = false;      // scale alpha / sqrt(rank) in place of alpha / rank
  double dropout = 0;
  std::string slices = "";  // of a fused qkv: any of "q", "k", "v" ("qv", "q+v"); "": the whole output with one pair
  double scale() const;
};

// y + s (x a^T) b^T (Hu et al. 2022); a kaiming, b zero: the identity at the start. rank (in + out) parameters, per
// slice.
class Lora : public FoldingTuner {
 public:
  Lora(nn::Module* linear, std::string_view name, const LoraOptions& options);
  Tensor apply(const nn::Site& site) override;
  using Tap::apply;

  const LoraOptions options;

 private:
  struct Pair {
    Pair(Module* up, std::int64_t rank, std::int64_t in, std::int64_t out);
    nn::Parameter a, b;  // [r, in], [out, r]
  };
  struct Slice : Module, Pair {
    Slice(Module* up, std::string_view name, std::int64_t rank, std::int64_t width);
  };
  Tensor delta_weight() const override;

  nn::Linear* linear_;
  std::unique_ptr<Pair> whole_;      // all outputs with one pair: "lora.a", "lora.b"
  std::unique_ptr<Slice> slice_[3];  // q, k, v: "lora.q.a", ..
  nn::Dropout dropout_;
};

}  // namespace capo::tuners
