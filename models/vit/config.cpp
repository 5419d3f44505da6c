// Named sizes, JSON and what a checkpoint's names tell.
#include <capo/engine/json.h>
#include <capo/models/vit/vit.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

namespace capo::vit {

VitConfig config(std::string_view size, int image, int patch, int classes) {
  struct Row {
    const char* name;
    std::int64_t dim;
    int depth, heads;
  };
  constexpr Row rows[] = {{"vit_ti", 192, 12, 3},
                          {"vit_s", 384, 12, 6},
                          {"vit_b", 768, 12, 12},
                          {"vit_l", 1024, 24, 16},
                          {"vit_h", 1280, 32, 16}};
  for (const auto& r : rows)
    if (size == r.name) {
      VitConfig c;
      c.image = image;
      c.patch = patch;
      c.classes = classes;
      c.dim = r.dim;
      c.depth = r.depth;
      c.heads = r.heads;
      return c;
    }
  detail::fail("vit: size must be vit_ti, vit_s, vit_b, vit_l or vit_h, got \"", size, "\"");
}

std::string to_json(const VitConfig& c) {
  return nlohmann::json{{"image", c.image},
                        {"patch", c.patch},
                        {"channels", c.channels},
                        {"dim", c.dim},
                        {"depth", c.depth},
                        {"heads", c.heads},
                        {"mlp_ratio", c.mlp_ratio},
                        {"classes", c.classes},
                        {"pool", c.pool == Pool::mean ? "mean" : "token"},
                        {"class_token", c.class_token},
                        {"distilled", c.distilled},
                        {"registers", c.registers},
                        {"no_embed_class", c.no_embed_class},
                        {"qkv_bias", c.qkv_bias},
                        {"qk_norm", c.qk_norm},
                        {"layer_scale", c.layer_scale},
                        {"norm_eps", c.norm_eps}}
      .dump();
}

VitConfig config_from_json(std::string_view text, const std::string& source) {
  JsonFields f(text, source + ": the model configuration");
  VitConfig c;
  f.take("image", c.image, 1, 4096);
  f.take("patch", c.patch, 1, 256);
  f.take("channels", c.channels, 1, 64);
  f.take("dim", c.dim, 1, 65536);
  f.take("depth", c.depth, 0, 1000);
  f.take("heads", c.heads, 1, 1024);
  f.take("mlp_ratio", c.mlp_ratio, 0.01, 64);
  f.take("classes", c.classes, 0, 10'000'000);
  f.choose("pool", c.pool, {"token", "mean"});  // Pool's order
  f.take("class_token", c.class_token);
  f.take("distilled", c.distilled);
  f.take("registers", c.registers, 0, 64);
  f.take("no_embed_class", c.no_embed_class);
  f.take("qkv_bias", c.qkv_bias);
  f.take("qk_norm", c.qk_norm);
  f.take("layer_scale", c.layer_scale, 0, 100);
  f.take("norm_eps", c.norm_eps, 1e-20, 1);
  f.finish();
  return c;
}

VitConfig config_from_names(const std::vector<NamedShape>& names, int heads) {
  std::map<std::string, Shape> shapes;
  for (const auto& n : names) shapes[n.name] = n.shape;
  const auto has = [&](const std::string& name) { return shapes.count(name) > 0; };
  const auto rank = [&](const std::string& name, int r) -> const Shape& {
    CAPO_CHECK(has(name) && shapes[name].size() == r, "vit: a timm state dict has ", name, " of rank ", r,
               ", this one ", has(name) ? cat("has it as ", shapes[name]) : std::string("has not"));
    return shapes[name];
  };
  VitConfig c;
  const Shape proj = rank("patch_embed.proj.weight", 4);
  CAPO_CHECK(proj[0] > 0 && proj[1] > 0 && proj[2] > 0 && proj[2] == proj[3],
             "vit: patch_embed.proj.weight must be [dim, channels, patch, patch], got ", proj);
  c.dim = proj[0];
  c.channels = static_cast<int>(proj[1]);
  c.patch = static_cast<int>(proj[2]);
  c.class_token = has("cls_token");
  c.distilled = has("dist_token");
  if (has("reg_token")) c.registers = static_cast<int>(rank("reg_token", 3)[1]);
  const std::int64_t places = rank("pos_embed", 3)[1];
  const auto side = [](std::int64_t n) {  // of a square grid of n patches; 0: it is none
    const auto s = std::llround(std::sqrt(static_cast<double>(std::max<std::int64_t>(n, 0))));
    return s * s == n ? static_cast<int>(s) : 0;
  };
  c.no_embed_class = side(places - c.prefix_tokens()) == 0;
  const int grid = side(places - c.placed_prefix());
  CAPO_CHECK(grid > 0, "vit: pos_embed ", shapes["pos_embed"], " is no square grid, with or without ",
             c.prefix_tokens(), " more tokens");
  c.image = grid * c.patch;
  c.depth = 0;
  while (has(cat("blocks.", c.depth, ".norm1.weight"))) ++c.depth;
  CAPO_CHECK(heads > 0 || c.dim % 64 == 0, "vit: dim ", c.dim, " is no multiple of 64; say how many heads");
  const bool sixteen = c.dim == 1152 || c.dim == 1280 || c.dim == 1408 || c.dim == 1664;  // timm's so400m, H, g, G
  c.heads = heads > 0 ? heads : sixteen ? 16 : static_cast<int>(c.dim / 64);
  if (c.depth > 0) {
    c.mlp_ratio = static_cast<double>(rank("blocks.0.mlp.fc1.weight", 2)[0]) / static_cast<double>(c.dim);
    c.qkv_bias = has("blocks.0.attn.qkv.bias");
    c.qk_norm = has("blocks.0.attn.q_norm.weight");
    c.layer_scale = has("blocks.0.ls1.gamma") ? 1e-5 : 0;
  }
  c.pool = has("fc_norm.weight") ? Pool::mean : Pool::token;
  c.classes = has("head.weight") ? static_cast<int>(rank("head.weight", 2)[0]) : 0;
  return c;
}

}  // namespace capo::vit
