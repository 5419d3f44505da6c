#include <capo/engine/json.h>
#include <capo/models/vit/cct.h>
#include <capo/ops/binary.h>
#include <capo/ops/pool.h>
#include <capo/ops/softmax.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>

#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

namespace capo::vit {
namespace {

constexpr std::int64_t kHidden = 64;  // channels between the tokeniser's convolutions

CctConfig checked(const CctConfig& c) {
  CAPO_CHECK(c.dim > 0 && c.depth >= 0 && c.heads > 0 && c.dim % c.heads == 0,
             "cct: dim must be a multiple of heads, got ", c.dim, " and ", c.heads);
  CAPO_CHECK(c.convs > 0 && c.kernel > 0 && c.kernel % 2 == 1 && c.channels > 0 && c.classes >= 0 && c.mlp_ratio > 0,
             "cct: convs, channels and mlp_ratio must be positive, the kernel odd, classes not negative, got ", c.convs,
             ", ", c.channels, ", ", c.mlp_ratio, ", ", c.kernel, " and ", c.classes);
  CAPO_CHECK(c.image > 0, "cct: image must be positive, got ", c.image);
  return c;
}

VitConfig blocks_config(const CctConfig& c) {
  VitConfig v;
  v.dim = c.dim;
  v.heads = c.heads;
  v.mlp_ratio = c.mlp_ratio;
  v.norm_eps = c.norm_eps;
  return v;
}

}  // namespace

int CctConfig::grid() const {
  int side = image;
  for (int i = 0; i < convs; ++i) {
    side = (side - 1) / stride() + 1;  // the padding is half a kernel
    side = (side - 1) / 2 + 1;
  }
  return side;
}

CctConfig cct_config(std::string_view name, int image, int classes) {
  CctConfig c;
  int end = 0;
  const std::string text(name);
  const bool read = std::sscanf(text.c_str(), "cct_%d_%dx%d%n", &c.depth, &c.kernel, &c.convs, &end) == 3 &&
                    static_cast<std::size_t>(end) == text.size();
  struct Row {
    int depth;
    std::int64_t dim;
    int heads;
    double mlp_ratio;
  };
  constexpr Row rows[] = {{2, 128, 2, 1}, {4, 128, 2, 1}, {6, 256, 4, 2}, {7, 256, 4, 2}, {14, 384, 6, 3}};
  for (const Row& r : rows)
    if (read && r.depth == c.depth && c.kernel % 2 == 1 && c.kernel > 0 && c.kernel <= 31 && c.convs > 0 &&
        c.convs <= 8) {
      c.dim = r.dim, c.heads = r.heads, c.mlp_ratio = r.mlp_ratio;
      c.image = image, c.classes = classes;
      return c;
    }
  detail::fail("cct: name must be cct_BLOCKS_KERNELxCONVS with 2, 4, 6, 7 or 14 blocks, as cct_7_3x1, got \"", name,
               "\"");
}

std::string to_json(const CctConfig& c) {
  return nlohmann::json{{"image", c.image},     {"channels", c.channels},   {"dim", c.dim},     {"depth", c.depth},
                        {"heads", c.heads},     {"mlp_ratio", c.mlp_ratio}, {"convs", c.convs}, {"kernel", c.kernel},
                        {"classes", c.classes}, {"norm_eps", c.norm_eps}}
      .dump();
}

CctConfig cct_from_json(std::string_view text, const std::string& source) {
  JsonFields f(text, source);
  CctConfig c;
  f.take("image", c.image, 1, 4096);
  f.take("channels", c.channels, 1, 64);
  f.take("dim", c.dim, 1, 65536);
  f.take("depth", c.depth, 0, 1000);
  f.take("heads", c.heads, 1, 1024);
  f.take("mlp_ratio", c.mlp_ratio, 0.01, 64);
  f.take("convs", c.convs, 1, 8);
  f.take("kernel", c.kernel, 1, 31);
  f.take("classes", c.classes, 0, 10'000'000);
  f.take("norm_eps", c.norm_eps, 1e-20, 1);
  f.finish();
  return c;
}

ConvTokenizer::Step::Step(nn::Module* up, std::string_view name, const CctConfig& c, std::int64_t in, std::int64_t out)
    : Module(up, name),
      conv(this, "0", in, out, {c.kernel, c.kernel}, {.stride = {c.stride()}, .pad_before = {c.kernel / 2}}, false,
           nn::Init::normal(std::sqrt(2.0 / static_cast<double>(in * c.kernel * c.kernel)))) {}

ConvTokenizer::ConvTokenizer(nn::Module* up, std::string_view name, const CctConfig& c)
    : Layer(up, name), conv_layers(this, "conv_layers") {
  for (int i = 0; i < c.convs; ++i)
    conv_layers.add(c, i == 0 ? c.channels : kHidden, i + 1 == c.convs ? c.dim : kHidden);
}

Tensor ConvTokenizer::forward(const Tensor& image) {
  Tensor x = image;
  for (auto& step : conv_layers) x = max_pool2d(relu(step->conv(x)), 3, 2, 1);
  return x;
}

Cct::Cct(const CctConfig& c, const nn::Build& build)
    : Layer(build),
      config(checked(c)),
      tokenizer(this, "tokenizer", c),
      pos_embed(this, "pos_embed", {1, std::int64_t{c.grid()} * c.grid(), c.dim}, nn::Init::trunc_normal(0.2)),
      blocks(this, "blocks"),
      norm(this, "norm", c.dim, c.norm_eps),
      attention_pool(this, "attention_pool", c.dim, 1) {
  for (int i = 0; i < c.depth; ++i) blocks.add(blocks_config(c), c.depth > 1 ? c.drop_path * i / (c.depth - 1) : 0.0);
  if (c.classes > 0)
    head = std::make_unique<nn::Head>(this, "head", c.dim, c.classes, nn::Init::trunc_normal(0.02), nn::Init::zero());
}

Tensor Cct::tokens(const Tensor& image) {
  CAPO_CHECK(image.rank() == 4 && image.size(1) == config.image && image.size(2) == config.image &&
                 image.size(3) == config.channels,
             "cct: image must be [B, ", config.image, ", ", config.image, ", ", config.channels, "], got ",
             image.shape());
  Tensor x = flatten(tokenizer(image), 1, 2) + pos_embed.value();
  for (auto& block : blocks) x = (*block)(x);
  return norm(x);
}

Tensor Cct::features(const Tensor& image) {
  const Tensor x = tokens(image);
  const Tensor weights = softmax(transpose(attention_pool(x), 1, 2));  // [B, 1, N]
  return squeeze(matmul(weights, x), 1);
}

LoadedCct load_cct(const std::string& path, int classes, const nn::Build& build) {
  const nn::ModelHeader header = nn::read_model_header(path);
  CAPO_CHECK(!header.config.empty(), path, ": states no configuration in the metadata \"model\"");
  CctConfig c = cct_from_json(header.config, path);
  if (classes >= 0) c.classes = classes;
  return {nn::load_model<Cct>(path, c, classes >= 0 ? "head.*" : "", build), header.preprocess, header.classes};
}

}  // namespace capo::vit
