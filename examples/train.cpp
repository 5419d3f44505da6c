// Trains a vision transformer from scratch:
//   train --dataset tinyimagenet32 --size vit_ti --patch 8 --epochs 30 --out out/pretrain
// Stops cleanly on Ctrl-C and goes on where it was when started again with the same options. Writes model.safetensors
// (half precision, with configuration and preprocessing inside), curve.png and log.csv into the output folder.
#include <capo/datasets/augment.h>
#include <capo/datasets/batch_source.h>
#include <capo/datasets/open.h>
#include <capo/datasets/plot.h>
#include <capo/datasets/png.h>
#include <capo/engine/threads.h>
#include <capo/examples/progress.h>
#include <capo/models/train/trainer.h>
#include <capo/models/vit/load.h>
#include <capo/ops/matmul.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

using namespace capo;

namespace {

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const auto& n : names) out += n + "\n";
  return out;
}

// Validation accuracy of every epoch so far, earlier runs included: column 7 of the rows of kind "validation".
std::vector<double> accuracies(const std::string& csv) {
  std::ifstream in(csv);
  std::vector<double> out;
  for (std::string line; std::getline(in, line);) {
    std::vector<std::string> cells(1);
    for (char c : line) {
      if (c == ',')
        cells.emplace_back();
      else
        cells.back().push_back(c);
    }
    if (cells.size() > 6 && cells[2].rfind("val", 0) == 0) out.push_back(100 * std::stod(cells[6]));
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) try {
  std::string dataset = "tinyimagenet32", size = "vit_ti", out = "out/train", weights, optimizer = "adamw", precision = "f32";
  int patch = 8, image = 32, epochs = 30, batch = 128, threads = 0, workers = 1, stop_after = 0;
  double lr = 1e-3, decay = 0.05, warmup = 1, smoothing = 0.1, drop_path = 0, patch_drop = 0, ema = 0, mixup = 0, cutmix = 0, strength = 0.3;
  int rand_ops = 0;
  std::uint64_t seed = 0;
  CLI::App app("Trains a ViT from scratch");
  app.add_option("--dataset", dataset, "cifar10, cifar100, tinyimagenet32, flowers64, fashion-mnist or an image folder");
  app.add_option("--size", size, "vit_ti, vit_s, vit_b, vit_l, vit_h");
  app.add_option("--weights", weights, "start from this file (patch size may differ)");
  app.add_option("--patch", patch);
  app.add_option("--image", image, "input size in pixels");
  app.add_option("--epochs", epochs);
  app.add_option("--stop-after", stop_after, "end the run cleanly after this many optimiser steps in all (0: never)");
  app.add_option("--batch", batch);
  app.add_option("--lr", lr);
  app.add_option("--optimizer", optimizer, "adamw, muon or sgd");
  const CLI::Option* decay_given = app.add_option("--weight-decay", decay, "0.05, with sgd 1e-4");
  app.add_option("--warmup", warmup, "epochs");
  app.add_option("--label-smoothing", smoothing);
  app.add_option("--drop-path", drop_path);
  app.add_option("--patch-drop", patch_drop, "share of the patches left out in training");
  app.add_option("--ema", ema, "decay of the averaged weights (0: off)");
  app.add_option("--mixup", mixup, "alpha (0: off)");
  app.add_option("--cutmix", cutmix, "alpha (0: off)");
  app.add_option("--rand-ops", rand_ops, "RandAugment operations per image");
  app.add_option("--rand-strength", strength);
  app.add_option("--seed", seed);
  app.add_option("--precision", precision, "of the matrix products: f32, or bf16 (operands rounded, sums f32)")->check(CLI::IsMember({"f32", "bf16"}));
  app.add_option("--threads", threads, "0: all processors, or CAPO_THREADS");
  app.add_option("--workers", workers, "loader threads");
  app.add_option("--out", out);
  CLI11_PARSE(app, argc, argv);
  const train::OptimizerKind kind = train::optimizer_kind(optimizer);
  if (kind == train::OptimizerKind::sgd && decay_given->count() == 0) decay = 1e-4;  // its decay is L2
  if (threads > 0) set_num_threads(threads);
  set_matmul_precision(precision == "bf16" ? bf16 : f32);
  std::filesystem::create_directories(out);

  const DatasetPtr train_set = open_dataset(dataset, "", "train"), test_set = open_dataset(dataset, "", "test");
  const Preprocess preprocess = measure_preprocess(*train_set, image);
  LoaderOptions loading{.batch_size = batch, .shuffle = true, .drop_last = true, .seed = seed, .workers = workers};
  loading.augment = Augment{.crop = Augment::Crop::pad, .pad = image / 8, .rand_ops = rand_ops, .rand_strength = static_cast<float>(strength)};
  loading.mixing = {.mixup_alpha = static_cast<float>(mixup), .cutmix_alpha = static_cast<float>(cutmix)};
  LoaderSource train_source(train_set, preprocess, loading);
  LoaderSource test_source(test_set, preprocess, {.batch_size = 250, .workers = workers});

  vit::VitConfig config = vit::config(size, image, patch, train_set->num_classes());
  config.drop_path = drop_path;
  config.patch_drop = patch_drop;
  std::unique_ptr<vit::Vit> model = weights.empty() ? std::make_unique<vit::Vit>(config, nn::Build{.seed = seed})
                                                    : vit::load_vit(weights, {.image = image, .patch = patch, .drop_path = drop_path,
                                                                              .patch_drop = patch_drop}, {.seed = seed}).model;
  std::printf("%s/%d at %d px on %s: %lld parameters, %lld images, %d classes\n", size.c_str(), patch, image,
              train_set->name().c_str(), static_cast<long long>(nn::parameter_count(*model)),
              static_cast<long long>(train_set->size()), train_set->num_classes());

  train::ClassifierOf classifier(*model);
  train::ClassificationTask task(classifier, smoothing);
  train::TrainOptions options;
  options.epochs = epochs;
  options.optimizer = kind;
  options.adamw.weight_decay = options.sgd.weight_decay = options.muon.weight_decay = decay;
  options.schedule = {.lr = lr, .min_lr = lr * 0.01};
  options.warmup_epochs = warmup;
  options.clip_norm = 1.0;
  options.ema_decay = ema;
  options.ema_warm_up = true;
  options.seed = seed;
  options.settings = precision == "bf16" ? "products in bf16" : "";
  options.checkpoint_dir = out + "/checkpoint";
  options.csv = out + "/log.csv";
  options.tensorboard_dir = out + "/tensorboard";
  options.max_steps = stop_after;
  examples::ProgressBar bar(60);
  options.on_progress = examples::ProgressBar::progress;
  options.on_epoch = examples::ProgressBar::epoch;
  options.user = &bar;
  train::Trainer trainer(task, train_source, &test_source, options);
  const examples::StopOnSignal stop(trainer);
  const train::TrainResult result = trainer.run();

  const std::vector<double> curve = accuracies(options.csv);
  std::vector<double> epoch_numbers;
  for (std::size_t i = 0; i < curve.size(); ++i) epoch_numbers.push_back(static_cast<double>(i + 1));
  write_png(out + "/curve.png", plot({{.name = cat(size, "/", patch), .x = epoch_numbers, .y = curve, .markers = true}},
                                     {.title = cat("validation accuracy, ", dataset), .x_label = "epoch", .y_label = "top-1 (%)"}));
  const double top1 = curve.empty() ? 0 : curve.back();
  {
    std::unique_ptr<train::EmaScope> averaged = trainer.ema() ? std::make_unique<train::EmaScope>(*trainer.ema()) : nullptr;
    vit::save_vit(*model, out + "/model.safetensors", f16, to_json(preprocess), joined(train_set->class_names()),
                  {{"dataset", dataset}, {"top1_percent", cat(top1)}, {"epochs", cat(result.position.epoch)}});
  }
  const nlohmann::json line{{"example", "train"}, {"dataset", dataset}, {"model", cat(size, "/", patch)}, {"epochs", result.position.epoch},
                            {"stopped", result.stopped}, {"top1_percent", top1}};
  std::printf("RESULT %s\n", line.dump().c_str());
} catch (const Error& e) {
  std::fprintf(stderr, "train: %s\n", e.what());
  return 1;
}
