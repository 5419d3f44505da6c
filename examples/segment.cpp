// Trains a U-Net to segment images or volumes and judges it on cases that it has not seen:
//   segment --recipe recipes/isbi2012_unet.json       five folds over the 30 slices (--fold 0: the first alone)
//   segment --recipe recipes/hippocampus_unet.json    80 volumes to train on, 20 to judge
// Stops cleanly on Ctrl-C and goes on where it was when started again. Each fold's folder gets model.safetensors,
// validation.csv, curve.png and overlays.png: contours of the truth in white, of the prediction in colour.
#include <capo/engine/threads.h>
#include <capo/examples/command_line.h>
#include <capo/examples/segment_fold.h>
#include <capo/examples/show_log.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

using namespace capo;
using examples::CaseScore;

namespace {

// Of the values that are not NaN.
nlohmann::json mean_and_sd(const std::vector<double>& values) {
  const double mean = segment::mean_of_defined(values);
  std::vector<double> squares;
  for (const double v : values) squares.push_back((v - mean) * (v - mean));
  return {{"mean", mean}, {"sd", std::sqrt(segment::mean_of_defined(squares))}};
}

template <class F>
nlohmann::json over_cases(const std::vector<CaseScore>& cases, F&& value) {
  std::vector<double> values;
  for (const auto& c : cases) values.push_back(value(c));
  return mean_and_sd(values);
}

double foreground(const CaseScore& c) { return segment::mean_of_defined({c.dice.begin() + 1, c.dice.end()}); }

// The challenge's rule: the threshold with the best mean.
nlohmann::json best_threshold(const std::vector<CaseScore>& cases, double segment::PartitionScores::*score) {
  nlohmann::json best;
  for (std::size_t t = 0; t < examples::kThresholds; ++t) {
    nlohmann::json at = over_cases(cases, [&](const CaseScore& c) { return c.partition[t].*score; });
    at["threshold"] = static_cast<double>(t) / examples::kThresholds;
    if (best.is_null() || at["mean"] > best["mean"]) best = std::move(at);
  }
  return best;
}

nlohmann::json summary(const std::vector<CaseScore>& cases, const std::vector<std::string>& classes) {
  nlohmann::json j{{"cases", cases.size()}, {"mean_foreground_dice", over_cases(cases, foreground)}};
  j["pixel_error"] = over_cases(cases, [](const CaseScore& c) { return c.pixel_error; });
  for (std::size_t k = 0; k < classes.size(); ++k) {
    j["dice"][classes[k]] = over_cases(cases, [&](const CaseScore& c) { return c.dice[k]; });
    if (cases[0].hausdorff95.empty()) continue;
    j["hausdorff95"][classes[k]] = over_cases(cases, [&](const CaseScore& c) { return c.hausdorff95[k]; });
  }
  if (cases[0].partition.empty()) return j;
  j["v_rand"] = best_threshold(cases, &segment::PartitionScores::rand);
  j["v_info"] = best_threshold(cases, &segment::PartitionScores::info);
  return j;
}

// A minute's run that goes through every part.
void make_quick(examples::SegmentRecipe& r, SegmentationSet& train, SegmentationSet& test) {
  r.base = 4;
  r.epochs = 2;
  r.batches_per_epoch = 4;
  r.folds = r.folds ? 2 : 0;
  r.patch = r.flat() ? std::vector<int>{1, 64, 64} : std::vector<int>{16, 24, 16};
  const std::int64_t few = r.flat() ? 2 : 4;
  for (SegmentationSet* set : {&train, &test})
    if (!set->cases.empty()) set->cases.resize(static_cast<std::size_t>(few));
}

}  // namespace

int main(int argc, char** argv) try {
  std::string recipe_file, out = "out/segment", data, device_name = "cpu";
  int fold = -1, epochs = 0, threads = 0;
  bool quick = false, stopped = false;
  examples::SegmentRun run;
  CLI::App app("Trains a U-Net and judges it on held-out cases");
  app.option_defaults()->always_capture_default();
  app.add_option("--recipe", recipe_file, "a JSON file, see docs/segmentation.md")->required();
  app.add_option("--fold", fold, "of the recipe's cross-validation; -1: one after another")->check(CLI::Range(-1, 99));
  app.add_option("--epochs", epochs, "0: the recipe's")->check(CLI::NonNegativeNumber);
  app.add_option("--data", data, "folder with the data sets; empty: CAPO_DATA, or ~/.cache/capo");
  app.add_option("--stop-after", run.stop_after, "end each training cleanly after this many steps in all (0: never)")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--device", device_name, "cpu, cuda or cuda:N");
  app.add_option("--threads", threads, "0: all processors, or CAPO_THREADS")->check(CLI::NonNegativeNumber);
  app.add_option("--workers", run.workers, "loader threads")->check(CLI::NonNegativeNumber);
  app.add_option("--out", out, "folder for models, pictures, logs and checkpoints");
  app.add_flag("--quick", quick, "a tiny model, a few cases and steps: does it run?");
  if (const int code = examples::read_command_line(app, argc, argv); code >= 0) return code;
  examples::show_log();
  run.device = usable_device(device_name);
  if (threads > 0) set_num_threads(threads);

  examples::SegmentRecipe recipe = examples::read_segment_recipe(recipe_file);
  if (epochs > 0) recipe.epochs = epochs;
  SegmentationSet train = open_segmentation(recipe.dataset, data, "train"), test;
  if (recipe.folds == 0) test = open_segmentation(recipe.dataset, data, "test");
  if (quick) make_quick(recipe, train, test);
  normalize_zscore(train);
  normalize_zscore(test);
  nlohmann::json stated = nlohmann::json::parse(read_file(recipe_file, 65536));
  stated["epochs"] = recipe.epochs;
  if (quick) stated["quick"] = true;
  run.recipe_text = stated.dump();
  CAPO_CHECK(fold < std::max(recipe.folds, 1), "--fold: the recipe has ", recipe.folds, " folds, got ", fold);

  std::vector<CaseScore> all;
  nlohmann::json folds = nlohmann::json::array();
  for (int k = std::max(fold, 0); k < (fold >= 0 ? fold + 1 : std::max(recipe.folds, 1)); ++k) {
    const auto n = static_cast<std::int64_t>(train.cases.size());
    std::vector<std::int64_t> kept, held;
    if (recipe.folds > 0) held = held_out(n, recipe.folds, k);
    for (std::int64_t i = 0; i < n; ++i)
      if (std::find(held.begin(), held.end(), i) == held.end()) kept.push_back(i);
    run.out = recipe.folds > 0 ? cat(out, "/fold", k) : out;
    const auto scores = examples::train_and_judge(
        recipe, std::make_shared<const SegmentationSet>(select_cases(train, kept)),
        std::make_shared<const SegmentationSet>(recipe.folds > 0 ? select_cases(train, held) : test), run);
    stopped = scores.empty();
    if (stopped) break;
    folds.push_back(summary(scores, train.class_names));
    std::printf("%s: %s\n", run.out.c_str(), folds.back().dump().c_str());
    std::fflush(stdout);
    all.insert(all.end(), scores.begin(), scores.end());
  }
  nlohmann::json line{{"example", "segment"},
                      {"dataset", recipe.dataset},
                      {"device", to_string(run.device)},
                      {"folds", folds.size()},
                      {"stopped", stopped}};
  if (!all.empty()) line.update(summary(all, train.class_names));
  if (folds.size() > 1) {
    std::vector<double> means;
    for (const auto& f : folds) means.push_back(f["mean_foreground_dice"]["mean"]);
    line["mean_foreground_dice_of_folds"] = mean_and_sd(means);
  }
  std::printf("RESULT %s\n", line.dump().c_str());
} catch (const std::exception& e) {
  std::fprintf(stderr, "segment: %s\n", e.what());
  return 1;
}
