#include <capo/models/nn/state.h>
#include <capo/models/vit/load.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/resize.h>
#include <capo/ops/view.h>

namespace capo::vit {

Tensor resize_patch_embed(const Tensor& weight, int patch) {
  CAPO_CHECK(weight.rank() == 4 && weight.size(2) == weight.size(3), "resize_patch_embed: needs [O, I, p, p], got ",
             weight.shape());
  const std::int64_t before = weight.size(2);
  if (before == patch) return weight;
  const Tensor images = contiguous(permute(weight, {0, 2, 3, 1}));  // [O, p, p, I]
  const Tensor resized = resize(images, {patch, patch}, ResizeMode::bicubic, true);
  const double share = static_cast<double>(before * before) / static_cast<double>(patch * patch);
  return contiguous(permute(resized * share, {0, 3, 1, 2}));
}

LoadedVit load_vit(const std::string& path, const LoadOptions& options, const nn::Build& build) {
  const NoGrad off;
  const SafetensorsReader header(path);
  VitConfig c;
  const std::string stored = header.metadata("model");
  if (!stored.empty()) {
    c = config_from_json(stored, path);
  } else {
    std::vector<NamedShape> names;
    for (const auto& e : header.entries()) names.push_back({e.name, e.shape});
    c = config_from_names(names, options.heads);
  }
  const int file_grid = c.image / c.patch;
  if (options.classes >= 0) c.classes = options.classes;
  if (options.patch > 0) c.patch = options.patch;
  if (options.image > 0) c.image = options.image;
  c.drop_path = options.drop_path, c.patch_drop = options.patch_drop;
  // Checked before a size that only the text claims is allocated.
  Vit shapes(c, {.dtype = build.dtype, .device = kMeta});
  nn::StateDict dict = nn::read_tensors(path);
  for (auto& t : dict) {
    if (t.name == "pos_embed" && c.image / c.patch != file_grid)
      t.value = resize_pos_embed(cast(t.value, f32), c.placed_prefix(), c.image / c.patch);
    if (t.name == "patch_embed.proj.weight") t.value = resize_patch_embed(cast(t.value, f32), c.patch);
  }
  nn::LoadOptions load;
  if (options.classes >= 0) {
    load.skip = {"head.*", "head_dist.*"};
    std::erase_if(dict, [](const nn::NamedTensor& t) {
      return nn::matches("head.*", t.name) || nn::matches("head_dist.*", t.name);
    });
  }
  try {
    nn::check_state(shapes, dict, load);
  } catch (const Error& e) {
    throw Error(cat(path, ": ", e.what()));
  }
  LoadedVit out{std::make_unique<Vit>(c, build), header.metadata("preprocess"), header.metadata("classes")};
  nn::load_state(*out.model, dict, load);
  return out;
}

void save_vit(Vit& model, const std::string& path, DType dtype, const std::string& preprocess,
              const std::string& classes, const Metadata& more) {
  Metadata metadata = more;
  metadata["model"] = to_json(model.config);
  if (!preprocess.empty()) metadata["preprocess"] = preprocess;
  if (!classes.empty()) metadata["classes"] = classes;
  nn::save_weights(model, path, dtype, metadata);
}

}  // namespace capo::vit
