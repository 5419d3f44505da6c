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
  check_json_object(text, source + ": the model configuration", 2);
  const nlohmann::json j = nlohmann::json::parse(text);
  VitConfig c;
  const auto number = [&](const nlohmann::json& v, const std::string& key, double low, double high) {
    CAPO_CHECK(v.is_number() && v.get<double>() >= low && v.get<double>() <= high, source, ": ", key,
               " must be a number in [", low, ", ", high, "], got ", v.dump());
    return v.get<double>();
  };
  const auto whole = [&](const nlohmann::json& v, const std::string& key, double low, double high) {
    CAPO_CHECK(v.is_number_integer(), source, ": ", key, " must be a whole number, got ", v.dump());
    return static_cast<int>(number(v, key, low, high));
  };
  const auto flag = [&](const nlohmann::json& v, const std::string& key) {
    CAPO_CHECK(v.is_boolean(), source, ": ", key, " must be true or false, got ", v.dump());
    return v.get<bool>();
  };
  for (const auto& [key, v] : j.items()) {
    if (key == "image") c.image = whole(v, key, 1, 4096);
    else if (key == "patch") c.patch = whole(v, key, 1, 256);
    else if (key == "channels") c.channels = whole(v, key, 1, 64);
    else if (key == "dim") c.dim = whole(v, key, 1, 65536);
    else if (key == "depth") c.depth = whole(v, key, 0, 1000);
    else if (key == "heads") c.heads = whole(v, key, 1, 1024);
    else if (key == "mlp_ratio") c.mlp_ratio = number(v, key, 0.01, 64);
    else if (key == "classes") c.classes = whole(v, key, 0, 10'000'000);
    else if (key == "pool") {
      CAPO_CHECK(v == "mean" || v == "token", source, ": pool must be \"mean\" or \"token\", got ", v.dump());
      c.pool = v == "mean" ? Pool::mean : Pool::token;
    }
    else if (key == "class_token") c.class_token = flag(v, key);
    else if (key == "distilled") c.distilled = flag(v, key);
    else if (key == "registers") c.registers = whole(v, key, 0, 64);
    else if (key == "no_embed_class") c.no_embed_class = flag(v, key);
    else if (key == "qkv_bias") c.qkv_bias = flag(v, key);
    else if (key == "qk_norm") c.qk_norm = flag(v, key);
    else if (key == "layer_scale") c.layer_scale = number(v, key, 0, 100);
    else if (key == "norm_eps") c.norm_eps = number(v, key, 1e-20, 1);
    else detail::fail(source, ": unknown key \"", key, "\" in the model configuration");
  }
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
