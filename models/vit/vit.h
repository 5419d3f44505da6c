// Vision transformers: Ti, S, B, L, H at any patch and image size, with timm's names and shapes.
// Source of the architecture: Dosovitskiy et al. 2021 (ViT), Touvron et al. 2021 (DeiT: distillation token).
#pragma once

#include <capo/models/nn/attention.h>
#include <capo/models/nn/head.h>

namespace capo::vit {

enum class Pool { token, mean };

struct VitConfig {
  int image = 224;          // square input, pixels
  int patch = 16;
  int channels = 3;
  std::int64_t dim = 768;
  int depth = 12;
  int heads = 12;
  double mlp_ratio = 4;
  int classes = 1000;       // 0: no head, features come out
  Pool pool = Pool::token;  // mean: average of patch tokens, then fc_norm (timm's global_pool='avg')
  bool class_token = true;
  bool distilled = false;   // a second token with a head of its own; eval averages the two
  int registers = 0;        // register tokens after the class token
  bool no_embed_class = false;  // position embeddings for the patches alone (DINOv2 with registers, as timm stores it)
  bool qkv_bias = true;
  bool qk_norm = false;
  double layer_scale = 0;   // initial gamma; 0: none
  double drop_path = 0;     // of the last block; grows linearly over depth
  double drop = 0;
  double patch_drop = 0;    // share of the patches that training leaves out, drawn for each sample; prefix tokens stay
  double norm_eps = 1e-6;
  double checkpoint = 0;    // share of the blocks, from the first on, that the backward pass computes again; 1: all
  bool f32_stream = false;  // bf16 and f16 models: the tokens between blocks stay f32, norms and products 16-bit

  int tokens() const { return (image / patch) * (image / patch); }
  // Rows of pos_embed that are no patch's.
  int placed_prefix() const { return no_embed_class ? 0 : prefix_tokens(); }
  int prefix_tokens() const { return (class_token ? 1 : 0) + (distilled ? 1 : 0) + registers; }
};

// "vit_ti", "vit_s", "vit_b", "vit_l", "vit_h": dim, depth and heads of the published sizes; the rest is yours.
VitConfig config(std::string_view size, int image, int patch, int classes);
// The same as JSON text, and back (strict: unknown keys throw).
std::string to_json(const VitConfig& c);
VitConfig config_from_json(std::string_view text, const std::string& source);
// Reads what a timm state dict's names and shapes tell (depth, dim, patch, tokens, head, layer-scale, qk-norm,
// registers, distillation). What they do not tell: heads, when 0 taken as 16 for the widths of ViT-so400m, H, g and G
// (1152, 1280, 1408, 1664), dim / 64 for others.
struct NamedShape {
  std::string name;
  Shape shape;
};
VitConfig config_from_names(const std::vector<NamedShape>& names, int heads = 0);

// The tokens between blocks: x, or x + r while the sum waits for the norm that it is fused with. r is of x's dtype, or
// 16-bit beside an f32 x.
struct Stream {
  Tensor x, r;  // r: or undefined
  Tensor sum() const;
};

// x + drop_path(ls1(attn(norm1(x)))), then the same with the MLP.
class Block : public nn::Layer<Block> {
 public:
  Block(nn::Module* up, std::string_view name, const VitConfig& c, double drop_path);
  Tensor forward(const Tensor& x) { return step({x, {}}).sum(); }
  // The same, its last sum left open for the next block's norm1. Runs the children's taps, not this module's.
  Stream step(Stream in);
  int heads() const override { return attn.config.heads; }
  std::int64_t width() const override { return attn.config.dim; }

  nn::LayerNorm norm1;
  nn::Attention attn;
  std::unique_ptr<nn::LayerScale> ls1;
  nn::DropPath drop_path1;
  nn::LayerNorm norm2;
  nn::Mlp mlp;
  std::unique_ptr<nn::LayerScale> ls2;
  nn::DropPath drop_path2;
};

class Vit : public nn::Layer<Vit> {
 public:
  explicit Vit(const VitConfig& config, const nn::Build& build = {});

  // image [B, image, image, channels] -> logits [B, classes] (features [B, dim] when classes is 0).
  Tensor forward(const Tensor& image) { return classify(features(image)); }
  // Tokens after the last block and norm: [B, prefix + patches, dim] (in training: the patches kept).
  Tensor tokens(const Tensor& image);
  // Tokens after chosen blocks (numbers from 0, ascending), before any norm: what a decoder or a probe reads. Blocks
  // behind the last chosen one do not run.
  std::vector<Tensor> block_tokens(const Tensor& image, const std::vector<int>& chosen);
  // What the head reads: [B, dim], or [B, 2, dim] when distilled.
  Tensor features(const Tensor& image);
  Tensor classify(const Tensor& features);

  int heads() const override { return config.heads; }
  std::int64_t width() const override { return config.dim; }

  const VitConfig config;
  nn::PatchEmbed patch_embed;
  std::unique_ptr<nn::Parameter> cls_token, dist_token, reg_token;  // [1, 1, dim], [1, 1, dim], [1, n, dim]
  nn::Parameter pos_embed;                                            // [1, placed_prefix + patches, dim]
  nn::Dropout pos_drop;
  std::unique_ptr<nn::PatchDrop> patch_drop;
  nn::List<Block> blocks;
  std::unique_ptr<nn::LayerNorm> norm, fc_norm;
  std::unique_ptr<nn::Head> head, head_dist;

 private:
  Tensor embedded(const Tensor& image);  // before the first block
  Stream block_step(int i, Stream s);
  Tensor stream(const Tensor& image);  // after the last block, before the norm
};

// Position embeddings [1, prefix + n*n, C] for another grid m: bicubic with antialias, prefix rows kept (timm's rule).
Tensor resize_pos_embed(const Tensor& pos, int prefix, int grid);

}  // namespace capo::vit
