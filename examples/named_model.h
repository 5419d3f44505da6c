// Classifiers by name, for programs that take --model: new ones, and those of a weight file.
#pragma once

#include <capo/models/nn/model_file.h>
#include <capo/models/resnet/resnet.h>
#include <capo/models/train/trainer.h>
#include <capo/models/vit/load.h>

#include <memory>
#include <string>
#include <utility>

namespace capo::examples {

struct NamedModel {
  std::unique_ptr<nn::Module> module;
  std::unique_ptr<train::Classifier> classifier;  // images to logits
  std::string config;                             // as JSON, what a weight file needs beside the tensors
  std::string preprocess, classes;                // of the weight file, or ""
  int image = 0;                                  // side of its input; 0: any
};

template <class M>
NamedModel named(std::unique_ptr<M> model, std::string config, std::string preprocess = "", std::string classes = "", int image = 0) {
  auto classifier = std::make_unique<train::ClassifierOf<M>>(*model);
  return {std::move(model), std::move(classifier), std::move(config), std::move(preprocess), std::move(classes), image};
}

constexpr const char* kModelNames =
    "resnet20/32/44/56/110 (CIFAR), resnet18/34/50/101/152, wide_.., resnext.., se.., resnet50d; vit_ti/s/b/l/h/PATCH";

// "vit_ti/8" -> {"vit_ti", 8}.
inline std::pair<std::string, int> vit_name(const std::string& name) {
  const auto slash = name.find('/');
  const int patch = slash == std::string::npos ? 0 : std::atoi(name.c_str() + slash + 1);
  CAPO_CHECK(patch > 0, "--model: a ViT is named with its patch size, as vit_ti/8, got ", name);
  return {name.substr(0, slash), patch};
}

// image: side of the input, for models of a fixed one.
inline NamedModel make_model(const std::string& name, int classes, int image, const nn::Build& build) {
  if (name.starts_with("vit")) {
    const auto [size, patch] = vit_name(name);
    const vit::VitConfig c = vit::config(size, image, patch, classes);
    return named(std::make_unique<vit::Vit>(c, build), to_json(c), "", "", image);
  }
  const resnet::ResnetConfig c = resnet::config(name, classes);
  return named(std::make_unique<resnet::Resnet>(c, build), to_json(c));
}

// classes as in the models' LoadOptions: -1 takes the file's head. Throws when the file holds another model than `name`
// says; "vit" is any ViT.
inline NamedModel load_model(const std::string& name, const std::string& weights, int classes, const nn::Build& build) {
  const auto agree = [&](const std::string& wanted, const std::string& got) {
    CAPO_CHECK(wanted == got, "--model ", name, ": ", weights, " holds another model, its configuration is ", got);
  };
  if (name.starts_with("vit")) {
    vit::LoadedVit loaded = vit::load_vit(weights, {.classes = classes}, build);
    vit::VitConfig c = loaded.model->config;
    if (name != "vit") {
      const auto [size, patch] = vit_name(name);
      vit::VitConfig wanted = c;
      const vit::VitConfig of_name = vit::config(size, c.image, patch, c.classes);
      wanted.dim = of_name.dim, wanted.depth = of_name.depth, wanted.heads = of_name.heads, wanted.patch = patch;
      agree(to_json(wanted), to_json(c));
    }
    return named(std::move(loaded.model), to_json(c), loaded.preprocess, loaded.classes, c.image);
  }
  resnet::LoadedResnet loaded = resnet::load_resnet(weights, {.classes = classes}, build);
  const resnet::ResnetConfig c = loaded.model->config;
  agree(to_json(resnet::config(name, c.classes)), to_json(c));
  return named(std::move(loaded.model), to_json(c), loaded.preprocess, loaded.classes);
}

}  // namespace capo::examples
