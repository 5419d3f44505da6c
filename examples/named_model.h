// Classifiers by name, for programs that take --model: new ones, and those of a weight file.
#pragma once

#include <capo/models/mobilenet/mobilenet.h>
#include <capo/models/nn/model_file.h>
#include <capo/models/resnet/resnet.h>
#include <capo/models/train/trainer.h>
#include <capo/models/vit/cct.h>
#include <capo/models/vit/load.h>

#include <memory>
#include <string>
#include <utility>

namespace capo::examples {

struct NamedModel {
  std::unique_ptr<nn::Module> module;
  std::unique_ptr<train::Classifier> classifier;  // images to logits
  nn::ModelHeader texts;  // what a weight file of it says; preprocess and classes: "" unless it came from a file
  int image = 0;          // side of its input; 0: any
  DType stored = f32;     // for such a file
};

struct ModelOptions {
  std::string weights = "";  // a file to start from; "": initial values
  int classes = -1;          // -1: the file's, which must have as many otherwise
  bool new_head = false;     // one of `classes`, at random, in place of the file's
  int width = 0;             // of a ResNet's first stage; 0: its own
  int image = 0;             // 0: the file's
  double drop_path = 0, patch_drop = 0;  // a ViT's, in training
};

constexpr const char* kModelNames =
    "CIFAR's resnet20, 32, 44, 56, 110; resnet18, 34, 50, 101, 152, also se.. and ..d; wide_resnet50_2, "
    "resnext50_32x4d, ..; mobilenet_v2; cct_7_3x1, ..; vit_ti/8 (ti, s, b, l, h / patch)";

template <class M>
NamedModel named(std::unique_ptr<M> model, std::string config, const std::string& preprocess,
                 const std::string& classes) {
  auto classifier = std::make_unique<train::ClassifierOf<M>>(*model);
  return {std::move(model), std::move(classifier), {std::move(config), preprocess, classes, {}}};
}

// What to ask a loader for.
inline int head_of(const ModelOptions& o) { return o.new_head ? o.classes : -1; }

inline void check_classes(const ModelOptions& o, int classes) {
  CAPO_CHECK(o.classes < 0 || classes == o.classes, o.weights, ": must have ", o.classes, " classes, got ", classes);
}

// "vit_ti/8" at o.image pixels; "vit" is any, of a file.
inline NamedModel open_vit(const std::string& name, const ModelOptions& o, const nn::Build& build) {
  const auto slash = name.find('/');
  const int patch = slash == std::string::npos ? 0 : std::atoi(name.c_str() + slash + 1);
  CAPO_CHECK(patch > 0 || (name == "vit" && !o.weights.empty()),
             "--model: a ViT is named with its patch size, as vit_ti/8, got ", name);
  NamedModel m;
  vit::VitConfig c;
  if (o.weights.empty()) {
    c = vit::config(name.substr(0, slash), o.image, patch, o.classes);
    c.drop_path = o.drop_path, c.patch_drop = o.patch_drop;
    m = named(std::make_unique<vit::Vit>(c, build), to_json(c), "", "");
  } else {
    vit::LoadedVit file = vit::load_vit(
        o.weights,
        {.classes = head_of(o), .image = o.image, .patch = patch, .drop_path = o.drop_path, .patch_drop = o.patch_drop},
        build);
    c = file.model->config;
    const vit::VitConfig wanted = name == "vit" ? c : vit::config(name.substr(0, slash), c.image, c.patch, c.classes);
    CAPO_CHECK(c.dim == wanted.dim && c.depth == wanted.depth, "--model ", name, ": ", o.weights,
               " holds a ViT of width ", c.dim, " and ", c.depth, " blocks");
    check_classes(o, c.classes);
    m = named(std::move(file.model), to_json(c), file.preprocess, file.classes);
  }
  m.image = c.image;
  m.stored = f16;
  return m;
}

inline NamedModel open_resnet(const std::string& name, const ModelOptions& o, const nn::Build& build) {
  if (o.weights.empty()) {
    resnet::ResnetConfig c = resnet::config(name, o.classes);
    if (o.width > 0) c.width = o.width;
    return named(std::make_unique<resnet::Resnet>(c, build), to_json(c), "", "");
  }
  resnet::LoadedResnet file = resnet::load_resnet(o.weights, {.classes = head_of(o)}, build);
  resnet::ResnetConfig wanted = resnet::config(name, file.model->config.classes);
  wanted.width = file.model->config.width;
  CAPO_CHECK(o.width == 0 || o.width == wanted.width, o.weights, ": must have width ", o.width, ", got ", wanted.width);
  const std::string got = to_json(file.model->config);
  CAPO_CHECK(to_json(wanted) == got, "--model ", name, ": ", o.weights, " holds another model: ", got);
  check_classes(o, file.model->config.classes);
  return named(std::move(file.model), got, file.preprocess, file.classes);
}

inline NamedModel open_mobilenet(const ModelOptions& o, const nn::Build& build) {
  if (o.weights.empty()) {
    const mobilenet::MobilenetConfig c{.classes = o.classes, .drop = 0.2};
    return named(std::make_unique<mobilenet::Mobilenet>(c, build), to_json(c), "", "");
  }
  mobilenet::LoadedMobilenet file = mobilenet::load_mobilenet(o.weights, {.classes = head_of(o)}, build);
  const mobilenet::MobilenetConfig c = file.model->config;
  check_classes(o, c.classes);
  return named(std::move(file.model), to_json(c), file.preprocess, file.classes);
}

inline NamedModel open_cct(const std::string& name, const ModelOptions& o, const nn::Build& build) {
  vit::LoadedCct m;
  if (o.weights.empty()) {
    vit::CctConfig c = vit::cct_config(name, o.image, o.classes);
    c.drop_path = o.drop_path;
    m.model = std::make_unique<vit::Cct>(c, build);
  } else {
    m = vit::load_cct(o.weights, head_of(o), build);
    check_classes(o, m.model->config.classes);
  }
  const vit::CctConfig c = m.model->config;
  NamedModel out = named(std::move(m.model), to_json(c), m.preprocess, m.classes);
  out.image = c.image;
  return out;
}

inline NamedModel open_model(const std::string& name, const ModelOptions& o, const nn::Build& build) {
  const bool vit = name.starts_with("vit"), cct = name.starts_with("cct"), mobilenet = name == "mobilenet_v2";
  CAPO_CHECK(o.width == 0 || !(vit || cct || mobilenet), "--width: belongs to ResNets, got ", o.width, " with --model ",
             name);
  CAPO_CHECK(!o.new_head || !o.weights.empty(), "--new-head: needs --weights; a new model's head is new");
  if (mobilenet) return open_mobilenet(o, build);
  if (cct) return open_cct(name, o, build);
  return vit ? open_vit(name, o, build) : open_resnet(name, o, build);
}

}  // namespace capo::examples
