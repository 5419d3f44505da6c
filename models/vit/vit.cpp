#include <capo/models/vit/vit.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>
#include <capo/ops/reduce.h>
#include <capo/ops/view.h>

#include <cmath>
#include <utility>

namespace capo::vit {
namespace {

std::unique_ptr<nn::Parameter> token(nn::Module* up, const char* name, bool wanted, std::int64_t n, std::int64_t dim,
                                     double std) {
  return wanted ? std::make_unique<nn::Parameter>(up, name, Shape{1, n, dim}, nn::Init::normal(std)) : nullptr;
}

Tensor for_each(const Tensor& t, std::int64_t batch) { return expand(t, {batch, t.size(1), t.size(2)}); }

VitConfig checked(const VitConfig& c) {
  CAPO_CHECK(c.image > 0 && c.patch > 0 && c.image % c.patch == 0, "vit: image must be a multiple of patch, got ",
             c.image, " and ", c.patch);
  CAPO_CHECK(c.dim > 0 && c.depth >= 0 && c.heads > 0 && c.dim % c.heads == 0,
             "vit: dim must be a multiple of heads, got ", c.dim, " and ", c.heads);
  CAPO_CHECK(c.class_token || c.pool == Pool::mean, "vit: without a class token the pool must be mean");
  CAPO_CHECK(!c.distilled || c.class_token, "vit: a distillation token needs a class token");
  CAPO_CHECK(!c.distilled || c.pool == Pool::token, "vit: with a distillation token the pool must be token");
  CAPO_CHECK(c.channels > 0 && c.registers >= 0 && c.classes >= 0 && c.mlp_ratio > 0,
             "vit: channels and mlp_ratio must be positive, registers and classes not negative, got ", c.channels, ", ",
             c.mlp_ratio, ", ", c.registers, " and ", c.classes);
  CAPO_CHECK(c.checkpoint >= 0 && c.checkpoint <= 1, "vit: checkpoint is a share of the blocks, 0 to 1, got ",
             c.checkpoint);
  return c;
}

}  // namespace

Block::Block(nn::Module* up, std::string_view name, const VitConfig& c, double drop)
    : Layer(up, name),
      norm1(this, "norm1", c.dim, c.norm_eps),
      attn(this, "attn", {c.dim, c.heads, c.qkv_bias, c.qk_norm, c.drop, c.norm_eps}),
      ls1(c.layer_scale ? std::make_unique<nn::LayerScale>(this, "ls1", c.dim, c.layer_scale) : nullptr),
      drop_path1(this, "drop_path1", drop),
      norm2(this, "norm2", c.dim, c.norm_eps),
      mlp(this, "mlp", c.dim, static_cast<std::int64_t>(std::llround(static_cast<double>(c.dim) * c.mlp_ratio)),
          Activation::gelu, c.drop),
      ls2(c.layer_scale ? std::make_unique<nn::LayerScale>(this, "ls2", c.dim, c.layer_scale) : nullptr),
      drop_path2(this, "drop_path2", drop) {
  attn.set_pre_norm(&norm1);
}

Tensor Stream::sum() const { return r.defined() ? x + cast(r, x.dtype()) : x; }

// Handles are dropped at once: what no graph keeps (in evaluation, all of it) is then free for what follows.
Stream Block::step(Stream in) {
  AddNorm at = in.r.defined() ? norm1.add(in.x, in.r) : AddNorm{in.x, norm1(in.x)};
  in = {};
  Tensor a = attn.call(at.sum, at.y);
  at.y = {};
  if (ls1) a = (*ls1)(a);
  at = norm2.add(at.sum, drop_path1(a));
  a = {};
  Tensor f = mlp.call(at.sum, at.y);
  at.y = {};
  if (ls2) f = (*ls2)(f);
  return {std::move(at.sum), drop_path2(f)};
}

Vit::Vit(const VitConfig& c, const nn::Build& build)
    : Layer(build),
      config(checked(c)),
      patch_embed(this, "patch_embed", c.patch, c.channels, c.dim),
      cls_token(token(this, "cls_token", c.class_token, 1, c.dim, 1e-6)),
      dist_token(token(this, "dist_token", c.distilled, 1, c.dim, 0.02)),
      reg_token(token(this, "reg_token", c.registers > 0, c.registers, c.dim, 1e-6)),
      pos_embed(this, "pos_embed", {1, c.tokens() + c.placed_prefix(), c.dim}, nn::Init::trunc_normal(0.02)),
      pos_drop(this, "pos_drop", c.drop),
      patch_drop(c.patch_drop == 0
                     ? nullptr
                     : std::make_unique<nn::PatchDrop>(this, "patch_drop", c.patch_drop, c.prefix_tokens())),
      blocks(this, "blocks") {
  for (int i = 0; i < c.depth; ++i) blocks.add(c, c.depth > 1 ? c.drop_path * i / (c.depth - 1) : 0.0);
  (c.pool == Pool::mean ? fc_norm : norm) =
      std::make_unique<nn::LayerNorm>(this, c.pool == Pool::mean ? "fc_norm" : "norm", c.dim, c.norm_eps);
  const auto classifier = [&](const char* name) {
    return std::make_unique<nn::Head>(this, name, c.dim, c.classes, nn::Init::trunc_normal(0.02), nn::Init::zero());
  };
  if (c.classes > 0) head = classifier("head");
  if (c.classes > 0 && c.distilled) head_dist = classifier("head_dist");
}

Tensor Vit::embedded(const Tensor& image) {
  CAPO_CHECK(image.rank() == 4 && image.size(1) == config.image && image.size(2) == config.image &&
                 image.size(3) == config.channels,
             "vit: image must be [B, ", config.image, ", ", config.image, ", ", config.channels, "], got ",
             image.shape());
  const std::int64_t batch = image.size(0);
  const auto in_stream = [this](const Tensor& t) { return config.f32_stream && is_half(t.dtype()) ? cast(t, f32) : t; };
  Tensor x = in_stream(patch_embed(image));
  if (config.no_embed_class) x = x + in_stream(pos_embed);
  std::vector<Tensor> parts;
  for (const auto* t : {&cls_token, &dist_token, &reg_token})
    if (*t) parts.push_back(for_each(in_stream(**t), batch));
  parts.push_back(x);
  if (parts.size() > 1) x = concat(parts, 1);
  parts.clear();
  if (!config.no_embed_class) x = x + in_stream(pos_embed);
  x = pos_drop(x);
  return patch_drop ? (*patch_drop)(x) : x;
}

Stream Vit::block_step(int i, Stream s) {
  Block& block = blocks[i];
  // The first blocks: their second forward comes when the backward pass has freed what the last ones kept.
  if (grad_enabled() && i < std::llround(config.checkpoint * config.depth)) {
    std::vector<Tensor> trainable;
    for (nn::Parameter* p : block.parameters())
      if (p->trainable()) trainable.push_back(p->value());
    const auto run = [b = &block](const std::vector<Tensor>& in) { return std::vector<Tensor>{(*b)(in[0])}; };
    return {checkpoint(run, {s.sum()}, trainable)[0], {}};
  }
  if (block.tapped()) return {block(s.sum()), {}};
  const ModuleScope scope(&block.path());
  return block.step(std::move(s));
}

Tensor Vit::stream(const Tensor& image) {
  Stream s{embedded(image), {}};
  for (int i = 0; i < blocks.size(); ++i) s = block_step(i, std::move(s));
  return s.sum();
}

std::vector<Tensor> Vit::block_tokens(const Tensor& image, const std::vector<int>& chosen) {
  for (std::size_t k = 0; k < chosen.size(); ++k)
    CAPO_CHECK(chosen[k] >= 0 && chosen[k] < blocks.size() && (k == 0 || chosen[k] > chosen[k - 1]),
               "vit: blocks must be chosen in [0, ", blocks.size(), ") and ascending, got ", chosen[k], " at place ",
               k);
  std::vector<Tensor> out;
  Stream s{embedded(image), {}};
  for (int i = 0; out.size() < chosen.size(); ++i) {
    s = block_step(i, std::move(s));
    if (i != chosen[out.size()]) continue;
    s = {s.sum(), {}};
    out.push_back(s.x);
  }
  return out;
}

Tensor Vit::tokens(const Tensor& image) {
  const Tensor x = stream(image);
  return norm ? (*norm)(x) : x;
}

Tensor Vit::features(const Tensor& image) {
  const Tensor x = stream(image);
  if (config.pool == Pool::mean) return (*fc_norm)(mean(slice(x, 1, config.prefix_tokens(), x.size(1)), {1}));
  // The norm works on each token alone: only those that the head reads are normalised, and kept for its gradient.
  const Tensor read = (*norm)(slice(x, 1, 0, config.distilled ? 2 : 1));
  return config.distilled ? read : select(read, 1, 0);
}

Tensor Vit::classify(const Tensor& f) {
  if (!head) return f;
  if (!head_dist) return (*head)(f);
  const Tensor a = (*head)(select(f, 1, 0)), b = (*head_dist)(select(f, 1, 1));
  return (a + b) * 0.5;
}

}  // namespace capo::vit
