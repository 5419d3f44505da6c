// Named sizes, JSON and what a state dict's names tell.
#include <capo/engine/json.h>
#include <capo/models/resnet/resnet.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

namespace capo::resnet {
namespace {

struct Row {
  const char* name;
  std::vector<int> blocks;
  bool bottleneck;
  int groups, width_per_group;
};

const std::vector<Row>& imagenet_rows() {
  static const std::vector<Row> rows{
      {"resnet18", {2, 2, 2, 2}, false, 1, 64},
      {"resnet34", {3, 4, 6, 3}, false, 1, 64},
      {"resnet50", {3, 4, 6, 3}, true, 1, 64},
      {"resnet101", {3, 4, 23, 3}, true, 1, 64},
      {"resnet152", {3, 8, 36, 3}, true, 1, 64},
      {"wide_resnet50_2", {3, 4, 6, 3}, true, 1, 128},
      {"wide_resnet101_2", {3, 4, 23, 3}, true, 1, 128},
      {"resnext50_32x4d", {3, 4, 6, 3}, true, 32, 4},
      {"resnext101_32x8d", {3, 4, 23, 3}, true, 32, 8},
      {"resnext101_64x4d", {3, 4, 23, 3}, true, 64, 4},
  };
  return rows;
}

}  // namespace

ResnetConfig config(std::string_view name, int classes) {
  ResnetConfig c;
  c.classes = classes;
  for (int n : {3, 5, 7, 9, 18})
    if (name == cat("resnet", 6 * n + 2)) {
      c.blocks = {n, n, n};
      c.width = 16;
      c.stem = Stem::cifar;
      c.shortcut = Shortcut::pad;
      return c;
    }
  std::string_view base = name;
  if (base.starts_with("se")) base.remove_prefix(2);
  const bool deep = base.ends_with("d") && base.starts_with("resnet");
  if (deep) base.remove_suffix(1);
  for (const Row& r : imagenet_rows())
    if (base == r.name) {
      c.blocks = r.blocks;
      c.bottleneck = r.bottleneck;
      c.groups = r.groups;
      c.width_per_group = r.width_per_group;
      c.squeeze = base.size() + (deep ? 1 : 0) < name.size();
      if (deep) c.stem = Stem::deep, c.shortcut = Shortcut::pool;
      return c;
    }
  std::string all = "resnet20, resnet32, resnet44, resnet56, resnet110";
  for (const Row& r : imagenet_rows()) all += cat(", ", r.name);
  detail::fail("resnet: name must be one of ", all, ", \"se\" before or \"d\" behind an ImageNet one, got \"", name,
               "\"");
}

namespace {
constexpr std::initializer_list<const char*> kStems = {"conv7", "deep", "cifar"};
constexpr std::initializer_list<const char*> kShortcuts = {"conv", "pool", "pad"};
const char* name_of(std::initializer_list<const char*> names, int i) { return names.begin()[i]; }
}  // namespace

std::string to_json(const ResnetConfig& c) {
  return nlohmann::json{{"blocks", c.blocks},
                        {"bottleneck", c.bottleneck},
                        {"width", c.width},
                        {"groups", c.groups},
                        {"width_per_group", c.width_per_group},
                        {"stem", name_of(kStems, static_cast<int>(c.stem))},
                        {"shortcut", name_of(kShortcuts, static_cast<int>(c.shortcut))},
                        {"squeeze", c.squeeze},
                        {"channels", c.channels},
                        {"classes", c.classes}}
      .dump();
}

ResnetConfig config_from_json(std::string_view text, const std::string& source) {
  JsonFields f(text, source);
  ResnetConfig c;
  f.take("blocks", c.blocks, 1, 1000);
  f.take("bottleneck", c.bottleneck);
  f.take("width", c.width, 1, 65536);
  f.take("groups", c.groups, 1, 65536);
  f.take("width_per_group", c.width_per_group, 1, 65536);
  f.choose("stem", c.stem, kStems);
  f.choose("shortcut", c.shortcut, kShortcuts);
  f.take("squeeze", c.squeeze);
  f.take("channels", c.channels, 1, 64);
  f.take("classes", c.classes, 0, 10'000'000);
  f.finish();
  return c;
}

ResnetConfig config_from_names(const std::vector<nn::NamedShape>& names) {
  std::map<std::string, Shape> shapes;
  for (const auto& n : names) shapes[n.name] = n.shape;
  const auto has = [&](const std::string& name) { return shapes.count(name) > 0; };
  const auto conv = [&](const std::string& name) -> const Shape& {
    CAPO_CHECK(has(name) && shapes[name].size() == 4, "resnet: a state dict has ", name, " of rank 4, this one ",
               has(name) ? cat("has it as ", shapes[name]) : std::string("has not"));
    for (auto n : shapes[name]) CAPO_CHECK(n > 0, "resnet: ", name, " must not be empty, got ", shapes[name]);
    return shapes[name];
  };
  ResnetConfig c;
  if (has("conv1.0.weight")) {
    c.stem = Stem::deep;
    c.channels = static_cast<int>(conv("conv1.0.weight")[1]);
  } else {
    const Shape& first = conv("conv1.weight");
    c.stem = first[2] == 3 ? Stem::cifar : Stem::conv7;
    c.channels = static_cast<int>(first[1]);
  }
  c.blocks.clear();
  for (int s = 1; has(cat("layer", s, ".0.conv1.weight")); ++s) {
    int n = 0;
    while (has(cat("layer", s, ".", n, ".conv1.weight"))) ++n;
    c.blocks.push_back(n);
  }
  CAPO_CHECK(!c.blocks.empty(), "resnet: a state dict has layer1.0.conv1.weight, this one has not");
  const Shape& inner = conv("layer1.0.conv2.weight");
  c.bottleneck = has("layer1.0.conv3.weight");
  c.width = c.bottleneck ? conv("layer1.0.conv3.weight")[0] / 4 : inner[0];
  c.groups = static_cast<int>(inner[0] / inner[1]);
  CAPO_CHECK(c.width > 0, "resnet: layer1.0.conv3.weight must have at least 4 outputs, got ",
             shapes["layer1.0.conv3.weight"]);
  if (c.bottleneck) c.width_per_group = static_cast<int>(inner[1] * 64 / c.width);
  c.squeeze = has("layer1.0.se.fc1.weight");
  bool downsampled = false, behind_pool = false;
  for (std::size_t s = 1; s <= c.blocks.size(); ++s) {
    downsampled |= has(cat("layer", s, ".0.downsample.0.weight"));
    behind_pool |= has(cat("layer", s, ".0.downsample.1.weight")) && has(cat("layer", s, ".0.downsample.2.weight"));
  }
  c.shortcut = behind_pool ? Shortcut::pool : downsampled || c.bottleneck ? Shortcut::conv : Shortcut::pad;
  const std::string head = c.stem == Stem::cifar ? "linear.weight" : "fc.weight";
  c.classes = has(head) ? static_cast<int>(shapes[head].empty() ? 0 : shapes[head][0]) : 0;
  return c;
}

LoadedResnet load_resnet(const std::string& path, const LoadOptions& load, const nn::Build& build) {
  const nn::ModelHeader header = nn::read_model_header(path);
  ResnetConfig c = header.config.empty() ? config_from_names(header.tensors) : config_from_json(header.config, path);
  const bool other_head = load.classes >= 0;
  if (other_head) c.classes = load.classes;
  const char* const unread = !other_head ? "" : c.stem == Stem::cifar ? "linear.*" : "fc.*";
  return {nn::load_model<Resnet>(path, c, unread, build), header.preprocess, header.classes};
}

}  // namespace capo::resnet
