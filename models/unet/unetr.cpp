#include <capo/engine/json.h>
#include <capo/models/unet/unetr.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>
#include <capo/ops/view.h>

#include <nlohmann/json.hpp>

namespace capo::unet {
namespace {

const Dims kTwo{2, 2}, kThree{3, 3}, kOne{1, 1};

int levels_of(const vit::VitConfig& c) {
  int levels = 0;
  while ((1 << levels) < c.patch) ++levels;
  CAPO_CHECK(levels >= 1 && 1 << levels == c.patch,
             "unetr: the encoder's patch must be a power of two, 2 or more, got ", c.patch);
  CAPO_CHECK(c.depth >= levels, "unetr: patch ", c.patch, " needs an encoder of ", levels, " blocks or more, got ",
             c.depth);
  CAPO_CHECK(c.patch_drop == 0, "unetr: the encoder must keep every patch (patch_drop 0)");
  return levels;
}

UnetrConfig filled(UnetrConfig c, const vit::VitConfig& encoder) {
  const int levels = levels_of(encoder);
  CAPO_CHECK(c.classes > 0 && c.base > 0, "unetr: classes and base must be positive, got ", c.classes, " and ", c.base);
  if (c.blocks.empty())
    for (int k = 1; k <= levels; ++k) c.blocks.push_back(encoder.depth * k / levels - 1);
  CAPO_CHECK(static_cast<int>(c.blocks.size()) == levels, "unetr: patch ", encoder.patch, " needs ", levels,
             " blocks, got ", c.blocks.size());
  return c;
}

}  // namespace

Unetr::Rise::Rise(nn::Module* parent, std::string_view name, const BlockStyle& style, std::int64_t in,
                  std::int64_t features)
    : Module(parent, name),
      up(this, "up", in, features, kTwo, {.stride = {2}}, style.bias, he_normal(4 * features), nn::Init::zero()),
      conv(this, "conv", style, features, features, kThree, kOne) {}

Unetr::Join::Join(nn::Module* parent, std::string_view name, const BlockStyle& style, std::int64_t in,
                  std::int64_t features)
    : Module(parent, name),
      up(this, "up", in, features, kTwo, {.stride = {2}}, style.bias, he_normal(4 * features), nn::Init::zero()),
      convs(this, "convs", style, 2, 2 * features, features, kThree, kOne) {}

Tensor Unetr::Join::operator()(const Tensor& below, const Tensor& side) { return convs(concat({up(below), side}, -1)); }

Unetr::Unetr(vit::Vit& encoder, const UnetrConfig& c, const nn::Build& build)
    : Layer(build),
      config(filled(c, encoder.config)),
      image(this, "image", c.block, 2, encoder.config.channels, c.base, kThree, kOne),
      joins(this, "joins"),
      out(this, "out", c.base, c.classes, kOne, {}, true, he_normal(c.base), nn::Init::zero()),
      encoder_(encoder) {
  const int levels = static_cast<int>(config.blocks.size());
  const std::int64_t dim = encoder.config.dim;
  for (int k = 0; k + 1 < levels; ++k) {  // block k's map belongs at level k + 1, `levels` being that of the tokens
    rises.push_back(std::make_unique<nn::List<Rise>>(this, cat("rise", k)));
    for (int level = levels - 1; level > k; --level)
      rises.back()->add(c.block, level == levels - 1 ? dim : c.base << (level + 1), c.base << level);
  }
  for (int level = levels - 1; level >= 0; --level)
    joins.add(c.block, level == levels - 1 ? dim : c.base << (level + 1), c.base << level);
}

Tensor Unetr::forward(const Tensor& x) {
  const vit::VitConfig& v = encoder_.config;
  const std::int64_t grid = v.image / v.patch;
  std::vector<Tensor> maps = encoder_.block_tokens(x, config.blocks);
  for (Tensor& t : maps) t = reshape(slice(t, 1, v.prefix_tokens(), t.size(1)), {t.size(0), grid, grid, v.dim});
  Tensor h = maps.back();
  for (int i = 0; i < joins.size(); ++i) {
    const std::size_t level = static_cast<std::size_t>(joins.size() - 1 - i);
    Tensor side;
    if (level == 0) {
      side = image(x);
    } else {
      side = maps[level - 1];
      for (auto& rise : *rises[level - 1]) side = (*rise)(side);
    }
    h = joins[i](h, side);
  }
  return out(h);
}

std::string to_json(const UnetrConfig& c) {
  nlohmann::json j{{"classes", c.classes},
                   {"base", c.base},
                   {"bias", c.block.bias},
                   {"slope", c.block.slope},
                   {"norm_eps", c.block.norm_eps}};
  if (!c.blocks.empty()) j["blocks"] = c.blocks;
  return j.dump();
}

UnetrConfig unetr_config_from_json(std::string_view text, const std::string& source) {
  JsonFields f(text, source);
  UnetrConfig c;
  f.take("classes", c.classes, 1, 65536);
  f.take("blocks", c.blocks, 0, 999);
  f.take("base", c.base, 1, 4096);
  f.take("bias", c.block.bias);
  f.take("slope", c.block.slope, 0, 1);
  f.take("norm_eps", c.block.norm_eps, 1e-20, 1);
  f.finish();
  return c;
}

}  // namespace capo::unet
