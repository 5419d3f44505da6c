// Configurations and weight files.
#include <capo/engine/json.h>
#include <capo/models/mobilenet/mobilenet.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/view.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

namespace capo::mobilenet {

std::string to_json(const MobilenetConfig& c) {
  return nlohmann::json{{"width", c.width},
                        {"channels", c.channels},
                        {"classes", c.classes},
                        {"norms", c.norms},
                        {"pad_after_only", c.pad_after_only}}
      .dump();
}

MobilenetConfig config_from_json(std::string_view text, const std::string& source) {
  JsonFields f(text, source);
  MobilenetConfig c;
  f.take("width", c.width, 0.05, 4);
  f.take("channels", c.channels, 1, 64);
  f.take("classes", c.classes, 0, 10'000'000);
  f.take("norms", c.norms);
  f.take("pad_after_only", c.pad_after_only);
  f.finish();
  return c;
}

MobilenetConfig config_from_names(const std::vector<nn::NamedShape>& names) {
  std::map<std::string, Shape> shapes;
  for (const auto& n : names) shapes[n.name] = n.shape;
  const auto first = shapes.find("features.0.0.weight"), head = shapes.find("classifier.1.weight");
  CAPO_CHECK(first != shapes.end() && first->second.size() == 4 && first->second[1] > 0 && first->second[1] <= 64,
             "mobilenet: a state dict has features.0.0.weight [out, channels, 3, 3], this one ",
             first == shapes.end() ? std::string("has not") : cat("has it as ", first->second));
  MobilenetConfig c;
  c.channels = static_cast<int>(first->second[1]);
  c.classes = head == shapes.end() || head->second.empty() ? 0 : static_cast<int>(head->second[0]);
  c.norms = shapes.count("features.0.1.weight") > 0;
  for (int step = 1; step <= 80; ++step) {
    c.width = step == 20 ? 1.0 : 0.05 * step;
    Mobilenet model(c, {.device = kMeta});
    bool fits = true;
    for (nn::Parameter* p : model.body.parameters()) {
      const auto there = shapes.find(p->path());
      fits &= there != shapes.end() && there->second == nn::file_shape(p->value().shape(), p->layout());
    }
    if (fits) return c;
  }
  detail::fail("mobilenet: no width in steps of 0.05 has these names and shapes");
}

namespace {

// One line of the list of layers that comes with INT8 weights.
std::string line_of(const nn::Conv& conv, const std::string& name, const char* activation) {
  const nlohmann::json line{{"name", name},
                            {"kernel", conv.weight.value().size(1)},
                            {"stride", conv.options.stride.empty() ? 1 : conv.options.stride[0]},
                            {"groups", conv.options.groups},
                            {"out", conv.width()},
                            {"act", activation}};
  return line.dump();
}

std::string numbered(std::size_t i) {
  char text[24];
  std::snprintf(text, sizeof text, "conv%02zu", i);
  return text;
}

// The list must be the model's: 52 convolutions, then the classifier as one of 1x1. Returns its outputs.
int check_layers(const std::string& path, const std::string& text, Mobilenet& model) {
  CAPO_CHECK(text.size() <= 65536 && nlohmann::json::accept(text), path,
             ": the metadata \"layers\" must be a JSON list");
  const nlohmann::json layers = nlohmann::json::parse(text);
  std::vector<std::string> wanted;
  for (nn::Module* m : model.modules())
    if (const auto* conv = dynamic_cast<const nn::Conv*>(m)) {
      const bool linear = m->parent()->name() == "conv";  // a block's last convolution
      wanted.push_back(line_of(*conv, numbered(wanted.size()), linear ? "none" : "relu6"));
    }
  CAPO_CHECK(layers.is_array() && layers.size() == wanted.size() + 1, path, ": must list ", wanted.size() + 1,
             " layers, got ", layers.size());
  for (std::size_t i = 0; i < wanted.size(); ++i)
    CAPO_CHECK(layers[i].dump() == wanted[i], path, ": layer ", i, " must be ", wanted[i], ", got ",
               layers[i].dump().substr(0, 200));
  const nlohmann::json& last = layers.back();
  const bool whole = last.is_object() && last.contains("out") && last["out"].is_number_unsigned();
  CAPO_CHECK(whole && last["out"].get<std::uint64_t>() <= 10'000'000, path, ": the last layer must have outputs, got ",
             last.dump().substr(0, 200));
  return last["out"].get<int>();
}

// convNN.weight_int8, scale and bias as the state dict of a model without norms.
nn::StateDict dequantised(const std::string& path, nn::StateDict dict, Mobilenet& model) {
  std::map<std::string, Tensor> stored;
  for (auto& t : dict) stored[t.name] = t.value;
  const auto take = [&](const std::string& name, DType dtype) {
    const auto it = stored.find(name);
    CAPO_CHECK(it != stored.end() && it->second.dtype() == dtype, path, ": must hold ", name, " in ", dtype,
               it == stored.end() ? ", which is missing" : ", got ",
               it == stored.end() ? std::string() : describe(it->second));
    const Tensor t = it->second;
    stored.erase(it);
    return t;
  };
  nn::StateDict out;
  std::size_t i = 0;
  const auto layer = [&](nn::Module& m, bool is_head) {
    const std::string name = numbered(i++);
    const Tensor w = take(name + ".weight_int8", i8), scale = take(name + ".scale", f32);
    CAPO_CHECK(w.rank() == 4 && scale.shape() == Shape{w.size(0)}, path, ": ", name,
               " must have four axes and a scale for each output, got ", w.shape(), " and ", scale.shape());
    const Tensor weight = cast(w, f32) * reshape(scale, {w.size(0), 1, 1, 1});
    out.push_back({m.path() + ".weight",
                   is_head ? reshape(weight, {w.size(0), w.numel() / std::max<std::int64_t>(w.size(0), 1)}) : weight});
    out.push_back({m.path() + ".bias", take(name + ".bias", f32)});
  };
  for (nn::Module* m : model.modules())
    if (dynamic_cast<nn::Conv*>(m)) layer(*m, false);
  layer(*model.head, true);
  CAPO_CHECK(stored.empty(), path, ": unexpected tensor ", stored.begin()->first);
  return out;
}

LoadedMobilenet load_int8(const std::string& path, const std::string& layers, const LoadOptions& load,
                          const nn::Build& build) {
  const NoGrad off;
  MobilenetConfig c;
  c.norms = false;
  c.pad_after_only = true;
  Mobilenet shapes(c, {.dtype = build.dtype, .device = kMeta});
  c.classes = check_layers(path, layers, shapes);
  Mobilenet of_file(c, {.dtype = build.dtype, .device = kMeta});
  nn::StateDict dict = dequantised(path, nn::read_tensors(path), of_file);
  try {
    nn::check_state(of_file, dict);
  } catch (const Error& e) {
    throw Error(cat(path, ": ", e.what()));
  }
  const bool other_head = load.classes >= 0;
  if (other_head) {
    c.classes = load.classes;
    std::erase_if(dict, [](const nn::NamedTensor& t) { return nn::matches("classifier.*.*", t.name); });
  }
  auto model = std::make_unique<Mobilenet>(c, build);
  nn::load_state(*model, dict, {.skip = {other_head ? "classifier.1.*" : ""}});
  return {std::move(model),
          R"({"size":224,"mean":[0.5,0.5,0.5],"std":[0.5,0.5,0.5],"crop_pct":0.875,"interpolation":"bicubic"})", ""};
}

}  // namespace

LoadedMobilenet load_mobilenet(const std::string& path, const LoadOptions& load, const nn::Build& build) {
  const std::string layers = SafetensorsReader(path).metadata("layers");
  if (!layers.empty()) return load_int8(path, layers, load, build);
  const nn::ModelHeader header = nn::read_model_header(path);
  MobilenetConfig c = header.config.empty() ? config_from_names(header.tensors) : config_from_json(header.config, path);
  const bool other_head = load.classes >= 0;
  if (other_head) c.classes = load.classes;
  return {nn::load_model<Mobilenet>(path, c, other_head ? "classifier.1.*" : "", build), header.preprocess,
          header.classes};
}

}  // namespace capo::mobilenet
