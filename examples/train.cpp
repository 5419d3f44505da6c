// Trains a vision transformer from scratch:
//   train --dataset tinyimagenet32 --size vit_ti --patch 8 --epochs 30 --out out/pretrain
// Stops cleanly on Ctrl-C and goes on where it was when started again with the same options. Writes model.safetensors
// (half precision, with configuration and preprocessing inside), curve.png and log.csv into the output folder.
#include <capo/datasets/augment.h>
#include <capo/datasets/batch_source.h>
#include <capo/datasets/open.h>
#include <capo/datasets/png.h>
#include <capo/engine/backend.h>
#include <capo/engine/threads.h>
#include <capo/examples/command_line.h>
#include <capo/examples/curve.h>
#include <capo/examples/show_log.h>
#include <capo/examples/step_profile.h>
#include <capo/models/train/to_device.h>
#include <capo/models/train/trainer.h>
#include <capo/models/vit/load.h>
#include <capo/ops/matmul.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

using namespace capo;

int main(int argc, char** argv) try {
  std::string dataset = "tinyimagenet32", size = "vit_ti", out = "out/train", weights, optimizer = "adamw",
              precision = "f32", device_name = "cpu", profile_file;
  int patch = 8, image = 32, epochs = 30, batch = 128, threads = 0, workers = 1, stop_after = 0, rand_ops = 0;
  double lr = 1e-3, decay = 0.05, warmup = 1, smoothing = 0.1, drop_path = 0, patch_drop = 0, ema = 0;
  float mixup = 0, cutmix = 0, strength = 0.3f;
  std::uint64_t seed = 0;
  bool graph = false;
  CLI::App app("Trains a ViT from scratch");
  app.option_defaults()->always_capture_default();
  app.add_option("--dataset", dataset, "cifar10, cifar100, tinyimagenet32, flowers64, fashion-mnist or an image folder");
  app.add_option("--size", size, "vit_ti, vit_s, vit_b, vit_l, vit_h");
  app.add_option("--weights", weights, "start from this file, which has --size and the data set's classes; its patch size may differ");
  app.add_option("--patch", patch, "side of a patch in pixels")->check(examples::at_least_one());
  app.add_option("--image", image, "input size in pixels")->check(examples::at_least_one());
  app.add_option("--epochs", epochs)->check(examples::at_least_one());
  app.add_option("--stop-after", stop_after, "end the run cleanly after this many optimiser steps in all (0: never)")->check(CLI::NonNegativeNumber);
  app.add_option("--batch", batch, "images per step")->check(examples::at_least_one());
  app.add_option("--lr", lr, "highest learning rate")->check(CLI::NonNegativeNumber);
  app.add_option("--optimizer", optimizer, "adamw, muon or sgd");
  const CLI::Option* decay_given = app.add_option("--weight-decay", decay, "0.05, with sgd 1e-4");
  app.add_option("--warmup", warmup, "epochs");
  app.add_option("--label-smoothing", smoothing)->check(CLI::Range(0.0, 0.99));
  app.add_option("--drop-path", drop_path, "of the last block, rising from 0")->check(CLI::Range(0.0, 0.99));
  app.add_option("--patch-drop", patch_drop, "share of the patches left out in training")->check(CLI::Range(0.0, 0.99));
  app.add_option("--ema", ema, "decay of the averaged weights (0: off)");
  app.add_option("--mixup", mixup, "alpha (0: off)")->check(CLI::Range(0.0, 100.0));
  app.add_option("--cutmix", cutmix, "alpha (0: off)")->check(CLI::Range(0.0, 100.0));
  app.add_option("--rand-ops", rand_ops, "RandAugment operations per image");
  app.add_option("--rand-strength", strength);
  app.add_option("--seed", seed);
  app.add_option("--precision", precision, "of the matrix products: f32, or bf16 (operands rounded, sums f32)")->check(CLI::IsMember({"f32", "bf16"}));
  app.add_option("--device", device_name, "cpu, cuda or cuda:N");
  app.add_flag("--graph", graph, "with --device cuda: replay each step as one CUDA graph, the same bits");
  app.add_option("--threads", threads, "0: all processors, or CAPO_THREADS")->check(CLI::NonNegativeNumber);
  app.add_option("--workers", workers, "loader threads");
  app.add_option("--out", out, "folder for the model, curve, log and checkpoint");
  const CLI::Option* profiled =
      app.add_option("--profile", profile_file,
                     "print where the time of 20 steps goes and write a trace (OUT/profile.json)")
          ->expected(0, 1);
  if (const int code = examples::read_command_line(app, argc, argv); code >= 0) return code;
  examples::show_log();
  const Device device = usable_device(device_name);
  CAPO_CHECK(!graph || device.is_cuda(), "--graph: a CUDA graph needs --device cuda, got ", device);
  const train::OptimizerKind kind = train::optimizer_kind(optimizer);
  if (kind == train::OptimizerKind::sgd && decay_given->count() == 0) decay = 1e-4;  // its decay is L2
  if (threads > 0) set_num_threads(threads);
  set_matmul_precision(precision == "bf16" ? bf16 : f32);
  std::filesystem::create_directories(out);

  const DatasetPtr train_set = open_dataset(dataset, "", "train"), test_set = open_dataset(dataset, "", "test");
  CAPO_CHECK(train_set->class_names() == test_set->class_names(), dataset, ": train and test must have the same classes");
  vit::VitConfig config = vit::config(size, image, patch, train_set->num_classes());
  config.drop_path = drop_path;
  config.patch_drop = patch_drop;
  std::unique_ptr<vit::Vit> model;
  std::string stored;
  if (weights.empty()) {
    model = std::make_unique<vit::Vit>(config, nn::Build{.seed = seed, .device = device});
  } else {
    vit::LoadedVit loaded =
        vit::load_vit(weights, {.image = image, .patch = patch, .drop_path = drop_path, .patch_drop = patch_drop},
                      {.seed = seed, .device = device});
    const vit::VitConfig& c = loaded.model->config;
    CAPO_CHECK(c.dim == config.dim && c.depth == config.depth && c.classes == config.classes, weights, ": must be a ", size, " with ",
               config.classes, " classes, got width ", c.dim, ", ", c.depth, " blocks and ", c.classes, " classes");
    model = std::move(loaded.model);
    stored = loaded.preprocess;
  }
  const std::string name = cat(size, "/", patch);
  std::printf("%s at %d px on %s: %lld parameters, %lld images, %d classes\n", name.c_str(), image, train_set->name().c_str(),
              static_cast<long long>(nn::parameter_count(*model)), static_cast<long long>(train_set->size()), train_set->num_classes());

  Preprocess preprocess = stored.empty() ? measure_preprocess(*train_set, image) : preprocess_from_json(stored, weights);
  preprocess.size = image;
  LoaderOptions loading{.batch_size = batch, .shuffle = true, .drop_last = true, .seed = seed, .workers = workers};
  loading.augment = Augment{.crop = Augment::Crop::pad, .pad = image / 8, .rand_ops = rand_ops, .rand_strength = strength};
  loading.mixing = {.mixup_alpha = mixup, .cutmix_alpha = cutmix};
  LoaderSource train_images(train_set, preprocess, loading), test_images(test_set, preprocess, {.batch_size = 250, .workers = workers});
  train::ToDevice train_source(train_images, device), test_source(test_images, device);

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
  // A checkpoint of other settings than these is refused.
  options.settings = cat(dataset, " batch ", batch, " smoothing ", smoothing, " drop path ", drop_path, " patch drop ", patch_drop,
                         " mixup ", mixup, " cutmix ", cutmix, " rand ops ", rand_ops, " ", strength, " products in ", precision);
  options.checkpoint_dir = out + "/checkpoint";
  options.csv = out + "/log.csv";
  options.tensorboard_dir = out + "/tensorboard";
  options.max_steps = stop_after;
  options.graph = graph;
  if (profiled->count() > 0 && profile_file.empty()) profile_file = out + "/profile.json";
  examples::StepProfile progress(profile_file, 60);
  options.on_progress = examples::StepProfile::progress;
  options.on_epoch = examples::StepProfile::epoch;
  options.user = &progress;
  train::Trainer trainer(task, train_source, &test_source, options);
  const examples::StopOnSignal stop(trainer);
  const train::TrainResult result = trainer.run();
  progress.finish();

  const Series curve = examples::validation_curve(options.csv, name);
  write_png(out + "/curve.png", plot({curve}, {.title = cat("validation accuracy, ", dataset), .x_label = "epoch", .y_label = "top-1 (%)"}));
  const double top1 = curve.y.empty() ? 0 : curve.y.back();
  {
    std::unique_ptr<train::EmaScope> averaged = trainer.ema() ? std::make_unique<train::EmaScope>(*trainer.ema()) : nullptr;
    std::string classes;
    for (const auto& c : train_set->class_names()) classes += c + "\n";
    vit::save_vit(*model, out + "/model.safetensors", f16, to_json(preprocess), classes,
                  {{"dataset", dataset}, {"top1_percent", cat(top1)}, {"epochs", cat(result.position.epoch)}});
  }
  const nlohmann::json line{{"example", "train"}, {"dataset", dataset}, {"model", name}, {"precision", precision}, {"device", to_string(device)},
                            {"epochs", result.position.epoch}, {"stopped", result.stopped}, {"top1_percent", top1}};
  std::printf("RESULT %s\n", line.dump().c_str());
} catch (const std::exception& e) {
  std::fprintf(stderr, "train: %s\n", e.what());
  return 1;
}
