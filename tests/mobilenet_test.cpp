// MobileNetV2: names and counts, configurations, files, quantised weights, taps. Values: conv_golden_test.cpp.
#include <doctest/doctest.h>

#include <capo/models/mobilenet/mobilenet.h>
#include <capo/models/nn/batch_norms.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/view.h>
#include <capo/tests/every_tap.h>
#include <capo/tests/op_test.h>
#include <capo/tests/temp_folder.h>

#include <algorithm>
#include <string>
#include <vector>

using namespace capo;
using namespace capo::testing;
using test::close;
using test::normal;
using test::same_bits;

namespace {

std::vector<nn::NamedShape> names_of(nn::Module& model) {
  std::vector<nn::NamedShape> names;
  for (nn::Parameter* p : model.parameters(true))
    names.push_back({p->path(), nn::file_shape(p->value().shape(), p->layout())});
  return names;
}

mobilenet::MobilenetConfig small() {
  mobilenet::MobilenetConfig c;
  c.width = 0.25;
  c.classes = 3;
  return c;
}

// A small file in the layout of the quantised one, of a model without norms; its list of layers is the model's.
struct Int8File {
  nn::StateDict tensors;
  std::string layers;
};
Int8File quantised(mobilenet::Mobilenet& model, std::int64_t outputs) {
  Int8File f;
  std::size_t i = 0;
  const auto add = [&](const Shape& shape, std::int64_t kernel, std::int64_t stride, int groups, const char* act) {
    const std::string name = cat("conv", i < 10 ? "0" : "", i);
    f.tensors.push_back({name + ".weight_int8", cast(normal(shape, name) * 40.0, i8)});
    f.tensors.push_back({name + ".scale", cast(normal({shape[0]}, name + "s") * 0.001 + 0.01, f32)});
    f.tensors.push_back({name + ".bias", cast(normal({shape[0]}, name + "b"), f32)});
    f.layers += cat(i++ ? ", " : "[", "{\"name\": \"", name, "\", \"kernel\": ", kernel, ", \"stride\": ", stride,
                    ", \"groups\": ", groups, ", \"out\": ", shape[0], ", \"act\": \"", act, "\"}");
  };
  for (nn::Module* m : model.modules())
    if (const auto* conv = dynamic_cast<const nn::Conv*>(m))
      add(nn::file_shape(conv->weight.value().shape(), nn::Layout::conv), conv->weight.value().size(1),
          conv->options.stride.empty() ? 1 : conv->options.stride[0], conv->options.groups,
          m->parent()->name() == "conv" ? "none" : "relu6");
  add({outputs, 1280, 1, 1}, 1, 1, 1, "none");
  f.layers += "]";
  return f;
}

}  // namespace

TEST_CASE("names, shapes and the parameter count are torchvision's") {
  mobilenet::Mobilenet model({}, {.device = kMeta});
  CHECK(nn::parameter_count(model) == 3504872);
  std::vector<std::string> lines;
  for (const auto& n : names_of(model)) lines.push_back(cat(n.name, " ", n.shape, "\n"));
  std::sort(lines.begin(), lines.end());
  std::string all;
  for (const auto& l : lines) all += l;
  CHECK(stream_of(all) == 0xaf557b53cb3d00c9ull);  // FNV-1a; torchvision 0.29.2
  CHECK(model(empty({2, 224, 224, 3}, f32, kMeta)).shape() == Shape{2, 1000});
}

TEST_CASE("configurations go through JSON and through names") {
  for (const double width : {0.35, 1.0, 1.4})
    for (const bool norms : {true, false}) {
      mobilenet::MobilenetConfig c = small();
      c.width = width;
      c.norms = norms;
      const std::string text = mobilenet::to_json(c);
      CHECK(mobilenet::to_json(mobilenet::config_from_json(text, "here")) == text);
      mobilenet::Mobilenet model(c, {.device = kMeta});
      mobilenet::Mobilenet again(mobilenet::config_from_names(names_of(model)), {.device = kMeta});
      CHECK(nn::parameter_count(again) == nn::parameter_count(model));
      CHECK(again.config.norms == norms);
    }
  const auto error = [](const char* text) { return error_of([&] { mobilenet::config_from_json(text, "here"); }); };
  CHECK(error(R"({"width": 9})") == "here: width must be a number in [0.05, 4], got 9");
  CHECK(error(R"({"blocks": []})") == "here: unknown key \"blocks\"");
  CHECK(contains(error_of([] { mobilenet::config_from_names({{"conv1.weight", {1}}}); }), "features.0.0.weight"));
  CHECK(contains(error_of([] { mobilenet::config_from_names({{"features.0.0.weight", {7, 3, 3, 3}}}); }), "no width"));
}

TEST_CASE("any size of image, files, another head, norms folded") {
  const TempFolder folder;
  const std::string path = folder.path() + "/model.safetensors";
  mobilenet::Mobilenet model(small(), {.seed = 1});
  const NoGrad off;
  for (nn::BatchNorm* norm : nn::batch_norms(model)) {
    const Shape s = norm->running_mean.value().shape();
    norm->running_mean.set(cast(normal(s, norm->path()) * 0.1, f32));
    norm->running_var.set(cast(normal(s, norm->path() + "v") * 0.1 + 1.0, f32));
  }
  for (std::int64_t side : {1, 33, 64})
    CHECK(model(cast(normal({2, side, side + 3, 3}, "x"), f32)).shape() == Shape{2, 3});
  CHECK(contains(error_of([&] { model(zeros({1, 32, 32, 1})); }), "mobilenet: image must be [B, H, W, 3]"));
  const Tensor x = cast(normal({2, 48, 48, 3}, "x"), f32);
  nn::save_model(model, path, f32, {mobilenet::to_json(model.config), "", "", {}});
  CHECK(same_bits((*mobilenet::load_mobilenet(path).model)(x), model(x)));
  CHECK((*mobilenet::load_mobilenet(path, {.classes = 9}).model)(x).shape() == Shape{2, 9});
  CHECK(same_bits((*mobilenet::load_mobilenet(path, {.classes = 0}).model)(x), model.features(x)));
  nn::save_tensors(path, nn::state_dict(model));
  CHECK(same_bits((*mobilenet::load_mobilenet(path).model)(x), model(x)));
  const Tensor before = model(x);
  CHECK(nn::fold_batch_norms(model) == 52);
  CHECK(relative_error(model(x), before) < 1e-4);
  check_every_tap(model, x, 1e-4);
}

TEST_CASE("taps fire on every module, with the same result") {
  mobilenet::Mobilenet model(small(), {.seed = 2, .dtype = f64});
  check_every_tap(model, normal({2, 32, 32, 3}, "x"), 1e-13);
}

TEST_CASE("quantised weights: scaled, padded after only, and strict") {
  const TempFolder folder;
  const std::string path = folder.path() + "/int8.safetensors";
  mobilenet::MobilenetConfig c;
  c.norms = false, c.pad_after_only = true, c.classes = 7;
  mobilenet::Mobilenet want(c);
  const Int8File file = quantised(want, 7);
  nn::save_tensors(path, file.tensors, {{"layers", file.layers}});
  const auto loaded = mobilenet::load_mobilenet(path);
  CHECK(contains(loaded.preprocess, "\"mean\":[0.5,0.5,0.5]"));
  nn::Conv& conv = loaded.model->blocks[0]->depthwise.conv;  // conv01: [32, 1, 3, 3]
  CHECK(same_bits(nn::to_file_layout(conv.weight.value().detach(), nn::Layout::conv),
                  cast(file.tensors[3].value, f32) * reshape(file.tensors[4].value, {32, 1, 1, 1})));
  CHECK(same_bits(loaded.model->head->bias.value().detach(), file.tensors.back().value));
  const NoGrad off;
  // Of even sides only the last row and column are padding: what lies in front of them moves with the image.
  const Tensor x = cast(normal({1, 8, 8, 3}, "x"), f32);
  const Tensor whole = loaded.model->stem(x), part = loaded.model->stem(slice(slice(x, 1, 2, 8), 2, 2, 8));
  CHECK(close(slice(slice(whole, 1, 1, 4), 2, 1, 4), part, 1e-6));
  CHECK((*mobilenet::load_mobilenet(path, {.classes = 2}).model)(zeros({1, 32, 32, 3})).shape() == Shape{1, 2});

  const auto refused = [&](nn::StateDict tensors, std::string layers) {
    nn::save_tensors(path, tensors, {{"layers", layers}});
    return error_of([&] { mobilenet::load_mobilenet(path); });
  };
  CHECK(contains(refused(file.tensors, "no list"), "\"layers\" must be a JSON list"));
  CHECK(contains(refused(file.tensors, "[1, 2]"), "must list 53 layers, got 2"));
  std::string other = file.layers;
  other.replace(other.find("\"stride\": 2"), 11, "\"stride\": 1");
  CHECK(contains(refused(file.tensors, other), "layer 0 must be"));
  auto tensors = file.tensors;
  tensors.pop_back();
  CHECK(contains(refused(tensors, file.layers), "conv52.bias in f32, which is missing"));
  tensors = file.tensors;
  tensors[1].value = zeros({3});
  CHECK(contains(refused(tensors, file.layers), "a scale for each output"));
  tensors = file.tensors;
  tensors.push_back({"conv53.bias", zeros({1})});
  CHECK(contains(refused(tensors, file.layers), "unexpected tensor conv53.bias"));
}
