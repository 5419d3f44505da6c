// Trains a classifier from scratch, or from a weight file on:
//   train --recipe recipes/resnet20_cifar10_short.json --out out/resnet20
//   train --model vit_ti/8 --dataset tinyimagenet32 --epochs 30 --out out/pretrain
// Stops cleanly on Ctrl-C and goes on where it was when started again with the same options. Writes model.safetensors
// (with configuration, preprocessing and class names inside; ViTs in half precision), recipe.json, curve.png and
// log.csv into the output folder.
#include <capo/datasets/batch_source.h>
#include <capo/datasets/open.h>
#include <capo/datasets/png.h>
#include <capo/engine/backend.h>
#include <capo/engine/threads.h>
#include <capo/examples/command_line.h>
#include <capo/examples/curve.h>
#include <capo/examples/named_model.h>
#include <capo/examples/recipe.h>
#include <capo/examples/show_log.h>
#include <capo/examples/step_profile.h>
#include <capo/models/train/to_device.h>
#include <capo/ops/matmul.h>
#include <capo/tuners/spec.h>

#include <cstdio>
#include <filesystem>

using namespace capo;

int main(int argc, char** argv) try {
  examples::Recipe recipe;
  std::string out = "out/train", weights, device_name = "cpu", profile_file;
  int threads = 0, workers = 1, stop_after = 0;
  bool graph = false, new_head = false;
  CLI::App app("Trains a classifier");
  app.option_defaults()->always_capture_default();
  examples::add_recipe(app, recipe, argc, argv);
  app.get_option("--model")->description(examples::kModelNames);
  app.add_option("--weights", weights,
                 "start from this file, which has the same model and, without --new-head, the same classes; a ViT's "
                 "patch and image size may differ");
  app.add_flag("--new-head", new_head, "with --weights: a new head for this data set's classes");
  app.add_option("--stop-after", stop_after, "end the run cleanly after this many optimiser steps in all (0: never)")
      ->check(CLI::NonNegativeNumber);
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
  CAPO_CHECK(recipe.precision == "f32" || recipe.precision == "bf16", "--precision: must be f32 or bf16, got ",
             recipe.precision);
  train::TrainOptions options = examples::train_options(recipe);
  if (threads > 0) set_num_threads(threads);
  set_matmul_precision(recipe.precision == "bf16" ? bf16 : f32);
  std::filesystem::create_directories(out);

  const DatasetPtr train_set = open_dataset(recipe.dataset, "", "train"),
                   test_set = open_dataset(recipe.dataset, "", "test");
  CAPO_CHECK(train_set->class_names() == test_set->class_names(), recipe.dataset,
             ": train and test must have the same classes");
  examples::NamedModel model = examples::open_model(
      recipe.model,
      {.weights = weights, .classes = train_set->num_classes(), .new_head = new_head, .width = recipe.width,
       .image = recipe.image, .drop_path = recipe.drop_path, .patch_drop = recipe.patch_drop},
      {.seed = options.seed, .device = device});
  if (!recipe.train_only.empty()) tuners::apply_spec(*model.module, recipe.train_only + ": train");
  std::printf("%s at %d px on %s: %lld parameters, of which %lld are trained, %lld images, %d classes\n",
              recipe.model.c_str(), recipe.image, train_set->name().c_str(),
              static_cast<long long>(nn::parameter_count(*model.module)),
              static_cast<long long>(nn::parameter_count(*model.module, true)),
              static_cast<long long>(train_set->size()), train_set->num_classes());

  Preprocess preprocess = model.texts.preprocess.empty() ? measure_preprocess(*train_set, recipe.image)
                                                         : preprocess_from_json(model.texts.preprocess, weights);
  preprocess.size = recipe.image;
  LoaderOptions loading{
      .batch_size = recipe.batch, .shuffle = true, .drop_last = true, .seed = options.seed, .workers = workers};
  loading.augment = examples::augment_of(recipe);
  loading.mixing = {.mixup_alpha = static_cast<float>(recipe.mixup), .cutmix_alpha = static_cast<float>(recipe.cutmix)};
  LoaderSource train_images(train_set, preprocess, loading),
      test_images(test_set, preprocess, {.batch_size = 250, .workers = workers});
  train::ToDevice train_source(train_images, device), test_source(test_images, device);

  train::ClassificationTask task(*model.classifier, recipe.label_smoothing);
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

  const Series curve = examples::validation_curve(options.csv, recipe.model);
  write_png(out + "/curve.png", plot({curve}, {.title = cat("validation accuracy, ", recipe.dataset),
                                               .x_label = "epoch", .y_label = "top-1 (%)"}));
  write_file_atomic(out + "/recipe.json", examples::to_json(recipe) + "\n");
  const double top1 = curve.y.empty() ? 0 : curve.y.back();
  {
    std::unique_ptr<train::EmaScope> averaged =
        trainer.ema() ? std::make_unique<train::EmaScope>(*trainer.ema()) : nullptr;
    model.texts.preprocess = to_json(preprocess);
    model.texts.classes.clear();
    for (const auto& c : train_set->class_names()) model.texts.classes += c + "\n";
    nn::save_model(*model.module, out + "/model.safetensors", model.stored, model.texts,
                   {{"dataset", recipe.dataset}, {"top1_percent", cat(top1)}, {"epochs", cat(result.position.epoch)}});
  }
  const nlohmann::json line{{"example", "train"}, {"dataset", recipe.dataset}, {"model", recipe.model},
                            {"precision", recipe.precision}, {"device", to_string(device)},
                            {"epochs", result.position.epoch}, {"stopped", result.stopped}, {"top1_percent", top1}};
  std::printf("RESULT %s\n", line.dump().c_str());
} catch (const std::exception& e) {
  std::fprintf(stderr, "train: %s\n", e.what());
  return 1;
}
