// One training and its judgement: a fold of a cross-validation, or a set with its own test cases.
#pragma once

#include <capo/datasets/nifti.h>
#include <capo/datasets/png.h>
#include <capo/engine/backend.h>
#include <capo/examples/segment_log.h>
#include <capo/examples/segment_pictures.h>
#include <capo/models/nn/model_file.h>
#include <capo/models/segment/surface.h>
#include <capo/models/train/to_device.h>

#include <filesystem>
#include <memory>

namespace capo::examples {

struct SegmentRun {
  std::string out, recipe_text;
  Device device = kCpu;
  int workers = 1;
  std::int64_t stop_after = 0;
};

// Of each held-out case.
struct CaseScore {
  std::string name;
  std::vector<double> dice;                         // by class
  double pixel_error = 0;                           // share of wrong voxels
  std::vector<double> hausdorff95;                  // by class, in the unit of the spacing; volumes only
  std::vector<segment::PartitionScores> partition;  // by threshold; empty unless flat with two classes
};

inline CaseScore score(const SegmentTask& task, const SegmentationCase& c, const Tensor& logits, const Tensor& labels,
                       const Tensor& truth) {
  CaseScore s{c.name, task.class_dice(labels, truth), segment::pixel_error(labels, truth), {}, {}};
  const bool flat = c.label.extent.z == 1;
  if (flat && s.dice.size() == 2) s.partition = threshold_scores(logits, truth);
  const auto& spacing = c.label.geometry.spacing;
  const std::vector<double> step(spacing.begin(), spacing.end());
  for (std::size_t k = 0; !flat && k < s.dice.size(); ++k)
    s.hausdorff95.push_back(segment::surface_distances(select(labels, 0, 0), select(truth, 0, 0),
                                                       static_cast<std::int64_t>(k), step)
                                .hausdorff(95));
  return s;
}

inline LabelVolume label_volume(const Tensor& labels, const LabelVolume& like) {
  LabelVolume v(like.extent, 0, like.geometry);
  const auto values = to_vector<std::int64_t>(labels);
  for (std::size_t i = 0; i < values.size(); ++i) v.voxels[i] = static_cast<std::uint8_t>(values[i]);
  return v;
}

// Mirrored windows over every case; writes overlays.png of the first 12, and predicted volumes as NIfTI.
inline std::vector<CaseScore> judge(SegmentTask& task, const SegmentationSetPtr& set, const SegmentRun& run) {
  const NoGrad off;
  task.module().train(false);
  CaseSource on_host(set);
  train::ToDevice cases(on_host, run.device);
  std::vector<CaseScore> scores;
  std::vector<Image> pictures;
  std::vector<Caption> captions;
  for (const auto& c : set->cases) {
    const train::Batch b = cases.next();
    const Tensor logits = task.predict(b.x, true), labels = argmax(logits, -1);
    CaseScore s = score(task, c, logits, labels, b.labels);
    const LabelVolume predicted = label_volume(labels, c.label);
    if (c.label.extent.z > 1) {
      std::filesystem::create_directories(run.out + "/predictions");
      write_nifti(run.out + "/predictions/" + c.name + ".nii.gz", predicted);
    }
    if (scores.size() < 12) {
      std::string caption = "Dice";
      for (std::size_t k = 1; k < s.dice.size(); ++k)
        caption += cat(k > 1 ? ", " : " ", set->class_names[k], " ",
                       static_cast<double>(std::llround(1e4 * s.dice[k])) / 100, " %");
      add_pictures(pictures, captions, c, predicted, caption);
    }
    scores.push_back(std::move(s));
  }
  write_png(run.out + "/overlays.png", contact_sheet(pictures, captions, pictures.size() > scores.size() ? 6 : 3));
  return scores;
}

// Trains on `train`, goes on where it was when it has been started before, and judges on `test`. Empty: stopped
// before the end.
inline std::vector<CaseScore> train_and_judge(const SegmentRecipe& recipe, const SegmentationSetPtr& train,
                                              const SegmentationSetPtr& test, const SegmentRun& run) {
  std::filesystem::create_directories(run.out);
  const int channels = static_cast<int>(train->cases[0].channels.size());
  unet::PlainUnet model(model_config(recipe, channels, train->num_classes()),
                        {.seed = static_cast<std::uint64_t>(recipe.seed), .device = run.device});
  std::printf("%s: U-Net of %zu stages, %lld parameters; %zu cases to train on, %zu held out\n", train->name.c_str(),
              model.config.stages.size(), static_cast<long long>(nn::parameter_count(model)), train->cases.size(),
              test->cases.size());
  std::fflush(stdout);
  PatchSource patches(train, patch_options(recipe, run.workers));
  CaseSource whole(test);
  train::ToDevice train_source(patches, run.device), test_source(whole, run.device);
  SegmentTask task(model, recipe);
  SegmentLog log(task, train->class_names, run.out + "/validation.csv");
  train::TrainOptions options = train_options(recipe);
  options.settings = run.recipe_text;  // a checkpoint of another recipe is refused
  options.checkpoint_dir = run.out + "/checkpoint";
  options.csv = run.out + "/log.csv";
  options.max_steps = run.stop_after;
  options.on_progress = SegmentLog::progress;
  options.on_epoch = SegmentLog::epoch;
  options.user = &log;
  train::Trainer trainer(task, train_source, &test_source, options);
  const StopOnSignal stop(trainer);
  if (trainer.run().stopped) return {};

  const std::unique_ptr<train::EmaScope> averaged =
      trainer.ema() ? std::make_unique<train::EmaScope>(*trainer.ema()) : nullptr;
  std::string classes;
  for (const auto& c : train->class_names) classes += c + "\n";
  nn::save_model(model, run.out + "/model.safetensors", f32, {unet::to_json(model.config), "", classes, {}},
                 {{"recipe", run.recipe_text}});
  write_png(
      run.out + "/curve.png",
      plot(log.curves(), {.title = cat("validation Dice, ", train->name), .x_label = "epoch", .y_label = "Dice (%)"}));
  return judge(task, test, run);
}

}  // namespace capo::examples
