// The layers transformers are made of. Names, shapes and initial values follow PyTorch / timm; tensors are NHWC and
// tokens [B, N, C]. Every layer's forward is the op of the same name. Convolutions and their norms: conv_layers.h.
#pragma once

#include <capo/models/nn/module.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/matmul.h>

namespace capo::nn {

// y = x w^T + b; weight [out, in]. Default init: trunc_normal(0.02) and zero bias (timm's ViT).
class Linear : public Layer<Linear> {
 public:
  Linear(Module* up, std::string_view name, std::int64_t in, std::int64_t out, bool bias = true,
         Init init = Init::trunc_normal(0.02));
  Tensor forward(const Tensor& x) { return linear(x, weight, bias_or_none()); }
  // act(this(x)), fused while nothing is attached.
  Tensor with_activation(const Tensor& x, Activation act);
  // r + scale * this(x), fused while nothing is attached and r is of the product's dtype (an f32 stream is not).
  Tensor add_to(const Tensor& r, const Tensor& x, double scale = 1.0);
  Tensor bias_or_none() const { return bias ? bias->value() : Tensor(); }
  std::int64_t in() const { return weight.value().size(1); }
  std::int64_t out() const { return weight.value().size(0); }
  std::int64_t width() const override { return out(); }
  std::int64_t input_width() const override { return in(); }

  Parameter weight;
  std::unique_ptr<Parameter> bias;
};

class LayerNorm : public Layer<LayerNorm> {
 public:
  LayerNorm(Module* up, std::string_view name, std::int64_t dim, double eps = 1e-6);
  Tensor forward(const Tensor& x);
  // {x + r, this(x + r)}, fused while nothing is attached. x may be f32 beside a 16-bit r.
  AddNorm add(const Tensor& x, const Tensor& r);
  Tensor reapply(const Tensor& x) override { return (*this)(x); }
  Parameter weight, bias;
  const double eps;
};

class RmsNorm : public Layer<RmsNorm> {
 public:
  RmsNorm(Module* up, std::string_view name, std::int64_t dim, double eps = 1e-6);
  Tensor forward(const Tensor& x);
  Tensor reapply(const Tensor& x) override { return (*this)(x); }
  Parameter weight;
  const double eps;
};

// ids (i64) -> rows of weight [count, dim].
class Embedding : public Layer<Embedding> {
 public:
  Embedding(Module* up, std::string_view name, std::int64_t count, std::int64_t dim, Init init = Init::normal(1.0));
  Tensor forward(const Tensor& ids);
  Parameter weight;
};

// Active in train() only; its stream is drawn from (seed, path).
class Dropout : public Layer<Dropout> {
 public:
  Dropout(Module* up, std::string_view name, double p);
  Tensor forward(const Tensor& x);
  Generator* generator() override { return &rng; }
  const double p;
  Generator rng;
};

// Drops whole samples of a residual branch (stochastic depth).
class DropPath : public Layer<DropPath> {
 public:
  DropPath(Module* up, std::string_view name, double p);
  Tensor forward(const Tensor& x);
  Generator* generator() override { return &rng; }
  const double p;
  Generator rng;
};

// In train() only: [B, prefix + N, C] -> [B, prefix + kept, C], the first `prefix` tokens and, drawn for each sample,
// kept = max(1, int(N (1 - p))) of the others, in their order. grad: zero for what is dropped.
// Source: Liu et al. 2022 (PatchDropout).
class PatchDrop : public Layer<PatchDrop> {
 public:
  PatchDrop(Module* up, std::string_view name, double p, int prefix = 0);
  Tensor forward(const Tensor& x);
  Generator* generator() override { return &rng; }
  const double p;
  const int prefix;
  Generator rng;
};

// y = gamma * x, gamma [C].
class LayerScale : public Layer<LayerScale> {
 public:
  LayerScale(Module* up, std::string_view name, std::int64_t dim, double init);
  Tensor forward(const Tensor& x);
  Parameter gamma;
};

// fc2(act(fc1(x))).
class Mlp : public Layer<Mlp> {
 public:
  Mlp(Module* up, std::string_view name, std::int64_t dim, std::int64_t hidden, Activation act = Activation::gelu,
      double drop = 0);
  Tensor forward(const Tensor& x);
  std::int64_t width() const override { return fc2.out(); }
  Linear fc1, fc2;
  Dropout drop;
  const Activation act;
};

// Image [B, H, W, C] -> tokens [B, (H / p) (W / p), dim]. The kernel is kept as a convolution's ([dim, p, p, C]).
class PatchEmbed : public Layer<PatchEmbed> {
 public:
  PatchEmbed(Module* up, std::string_view name, int patch, std::int64_t channels, std::int64_t dim);
  Tensor forward(const Tensor& image);
  const int patch;

  // patches [B, N, p p C] -> [B, N, dim].
  struct Proj : Layer<Proj> {
    Proj(Module* up, std::string_view name, int patch, std::int64_t channels, std::int64_t dim);
    Tensor forward(const Tensor& patches);
    Parameter weight, bias;
  } proj;
};

}  // namespace capo::nn
