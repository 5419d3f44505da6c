// How a classifier is trained: every setting that its weights depend on. One list of fields serves the recipe files
// (JSON, strict), the command line, which goes before the file, and the text that a checkpoint keeps.
#pragma once

#include <capo/datasets/augment.h>
#include <capo/engine/files.h>
#include <capo/engine/json.h>
#include <capo/models/train/trainer.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

namespace capo::examples {

struct Recipe {
  std::string model = "vit_ti/8", dataset = "tinyimagenet32", optimizer = "adamw", decay = "cosine", precision = "f32",
              train_only;
  int width = 0, image = 32, epochs = 30, batch = 128, pad = -1, rand_ops = 0;
  double lr = 1e-3, min_lr = 0.01, warmup = 1, momentum = 0.9, weight_decay = -1, clip_norm = 1, label_smoothing = 0.1;
  bool nesterov = false;
  double drop_path = 0, patch_drop = 0, ema = 0, flip = 0.5, rand_strength = 0.3, erase = 0, mixup = 0, cutmix = 0;
  std::int64_t seed = 0;

  // Calls v(key, field, what it means) for texts and flags, v(key, field, low, high, what it means) for numbers.
  template <class Visitor>
  void fields(Visitor&& v) {
    v("model", model, "see --help");
    v("width", width, 0, 4096, "channels of a ResNet's first stage; 0: its own");
    v("dataset", dataset, "cifar10, cifar100, tinyimagenet32, flowers64, fashion-mnist or an image folder");
    v("image", image, 1, 4096, "input size in pixels");
    v("epochs", epochs, 1, 1'000'000, "");
    v("batch", batch, 1, 1'000'000, "images per step");
    v("optimizer", optimizer, "adamw, muon or sgd");
    v("lr", lr, 0, 1e6, "highest learning rate");
    v("min_lr", min_lr, 0, 1, "the last, as a share of it");
    v("decay", decay, "of the learning rate after the warm-up: cosine, linear or constant");
    v("warmup", warmup, 0, 1e6, "epochs of a linear ramp; a third of all makes a one-cycle schedule");
    v("momentum", momentum, 0, 0.9999, "of sgd");
    v("nesterov", nesterov, "of sgd");
    v("weight_decay", weight_decay, -1, 1e3, "-1: 0.05, with sgd 1e-4");
    v("clip_norm", clip_norm, 0, 1e9, "greatest norm of the gradients (0: any)");
    v("label_smoothing", label_smoothing, 0, 0.99, "");
    v("drop_path", drop_path, 0, 0.99, "of a ViT's last block, rising from 0");
    v("patch_drop", patch_drop, 0, 0.99, "share of a ViT's patches left out in training");
    v("ema", ema, 0, 0.999999, "decay of the averaged weights (0: off)");
    v("pad", pad, -1, 4096, "pixels around the image that crops are taken from; -1: an eighth of its size");
    v("flip", flip, 0, 1, "probability of a horizontal flip");
    v("rand_ops", rand_ops, 0, 100, "RandAugment operations per image");
    v("rand_strength", rand_strength, 0, 1, "");
    v("erase", erase, 0, 1, "probability of erasing a rectangle");
    v("mixup", mixup, 0, 100, "alpha (0: off)");
    v("cutmix", cutmix, 0, 100, "alpha (0: off)");
    v("precision", precision, "of the matrix products: f32, or bf16 (operands rounded, sums f32)");
    v("train_only", train_only,
      "a pattern of parameters or modules (tuners/spec.h), as @norm: all else keeps its initial values");
    v("seed", seed, 0, std::int64_t{1} << 53, "");
  }
};

inline std::string to_json(Recipe r) {
  nlohmann::json j;
  r.fields([&](const char* key, const auto& value, const auto&...) { j[key] = value; });
  return j.dump();
}

// Keys that the file does not hold keep what `r` has.
inline void read_recipe(Recipe& r, const std::string& path) {
  JsonFields file(read_file(path, 65536), path);
  r.fields([&](const char* key, auto& value, const auto&... more) {
    if constexpr (sizeof...(more) == 1) file.take(key, value);
    else [&](auto low, auto high, const char*) { file.take(key, value, low, high); }(more...);
  });
  file.finish();
}

// --recipe FILE, read into r, and an option for each field ("--weight-decay" for weight_decay) whose default is then
// the file's value.
inline void add_recipe(CLI::App& app, Recipe& r, int argc, char** argv) {
  static std::string path;  // CLI11 writes it again
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (word == "--recipe" && i + 1 < argc) path = argv[i + 1];
    if (word.starts_with("--recipe=")) path = word.substr(9);
  }
  app.add_option("--recipe", path, "a JSON file with any of the settings below, which go before it");
  if (!path.empty()) read_recipe(r, path);
  r.fields([&](const char* key, auto& value, const auto&... more) {
    std::string option = cat("--", key);
    std::replace(option.begin(), option.end(), '_', '-');
    if constexpr (std::is_same_v<decltype(value), bool&>)
      app.add_flag(option + ",!--no-" + option.substr(2), value, (more, ...));
    else if constexpr (sizeof...(more) == 1) app.add_option(option, value, (more, ...));
    else [&](auto low, auto high, const char* help) {
        using Number = std::remove_reference_t<decltype(value)>;
        app.add_option(option, value, help)->check(CLI::Range(static_cast<Number>(low), static_cast<Number>(high)));
      }(more...);
  });
}

inline Augment augment_of(const Recipe& r) {
  const auto share = [](double v) { return static_cast<float>(v); };
  return {.crop = Augment::Crop::pad, .pad = r.pad < 0 ? r.image / 8 : r.pad, .flip = share(r.flip),
          .rand_ops = r.rand_ops, .rand_strength = share(r.rand_strength), .erase = share(r.erase)};
}

// The trainer's part.
inline train::TrainOptions train_options(const Recipe& r) {
  train::TrainOptions o;
  o.epochs = r.epochs;
  o.optimizer = train::optimizer_kind(r.optimizer);
  const double decay = r.weight_decay >= 0 ? r.weight_decay : o.optimizer == train::OptimizerKind::sgd ? 1e-4 : 0.05;
  o.adamw.weight_decay = o.muon.weight_decay = decay;
  o.sgd = {.momentum = r.momentum, .nesterov = r.nesterov, .weight_decay = decay};
  o.schedule = {.lr = r.lr, .min_lr = r.lr * r.min_lr};
  CAPO_CHECK(r.decay == "cosine" || r.decay == "linear" || r.decay == "constant",
             "--decay: must be cosine, linear or constant, got ", r.decay);
  o.schedule.decay = r.decay == "cosine"   ? train::Decay::cosine
                     : r.decay == "linear" ? train::Decay::linear
                                           : train::Decay::constant;
  o.warmup_epochs = r.warmup;
  o.clip_norm = r.clip_norm;
  o.ema_decay = r.ema;
  o.ema_warm_up = true;
  o.seed = static_cast<std::uint64_t>(r.seed);
  o.settings = to_json(r);  // a checkpoint of another recipe is refused
  return o;
}

}  // namespace capo::examples
