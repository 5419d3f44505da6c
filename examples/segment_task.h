// A U-Net, its loss and its judgement on whole cases, for train::Trainer.
#pragma once

#include <capo/examples/segment_recipe.h>
#include <capo/models/segment/losses.h>
#include <capo/models/segment/overlap.h>
#include <capo/models/segment/partition.h>
#include <capo/ops/copy.h>
#include <capo/ops/index.h>
#include <capo/ops/softmax.h>
#include <capo/ops/view.h>

#include <cmath>
#include <vector>

namespace capo::examples {

class SegmentTask final : public train::Task {
 public:
  SegmentTask(unet::PlainUnet& model, const SegmentRecipe& recipe) : model_(model), recipe_(recipe) {}

  nn::Module& module() override { return model_; }
  Tensor loss(const train::Batch& b) override {
    const segment::DiceCeOptions options{.dice = {.batch = true, .background = recipe_.dice_background}};
    const auto one = [&](const Tensor& logits, const Tensor& labels) {
      return segment::dice_ce_loss(logits, labels, options);
    };
    return recipe_.deep_supervision ? segment::deep_supervision_loss(model_.outputs(b.x), b.labels, one)
                                    : one(model_(b.x), b.labels);
  }
  // Cases one by one (CaseSource), in windows without mirroring. top1: share of right voxels; score: mean foreground
  // Dice.
  train::Metrics evaluate(train::BatchSource& cases) override {
    train::Metrics m;
    dice.clear();
    for (m.samples = 0; m.samples < cases.batches_per_epoch(); ++m.samples) {
      const train::Batch b = cases.next();
      const Tensor logits = predict(b.x, false), labels = argmax(logits, -1);
      m.loss += segment::dice_ce_loss(logits, b.labels).item();
      m.top1 += 1 - segment::pixel_error(labels, b.labels);
      dice.push_back(class_dice(labels, b.labels));
    }
    m.loss /= static_cast<double>(m.samples);
    m.top1 /= static_cast<double>(m.samples);
    m.score = foreground_dice();
    return m;
  }

  Tensor predict(const Tensor& x, bool mirrored) {
    return segment::sliding_window(model_, x, windows(recipe_, mirrored));
  }
  std::vector<double> class_dice(const Tensor& labels, const Tensor& truth) const {
    std::vector<double> d;
    for (const auto& o : segment::overlap(labels, truth, model_.config.classes)) d.push_back(o.dice());
    return d;
  }
  // Mean over cases of each class, then over the classes above 0.
  double foreground_dice() const {
    std::vector<double> means;
    for (std::size_t k = 1; k < static_cast<std::size_t>(model_.config.classes); ++k) means.push_back(mean_dice(k));
    return segment::mean_of_defined(means);
  }
  double mean_dice(std::size_t k) const {
    std::vector<double> values;
    for (const auto& d : dice) values.push_back(d[k]);
    return segment::mean_of_defined(values);
  }

  std::vector<std::vector<double>> dice;  // [case][class], of the newest evaluation

 private:
  unet::PlainUnet& model_;
  const SegmentRecipe& recipe_;
};

// The scores of the membrane challenge for flat cases of two classes, by threshold of the second one's probability.
constexpr int kThresholds = 10;
inline std::vector<segment::PartitionScores> threshold_scores(const Tensor& logits, const Tensor& truth) {
  const std::vector<float> z = to_vector<float>(logits);
  std::vector<segment::PartitionScores> scores;
  for (int t = 0; t < kThresholds; ++t) {
    std::vector<std::int64_t> mask(z.size() / 2);
    for (std::size_t i = 0; i < mask.size(); ++i)
      mask[i] = 1 / (1 + std::exp(z[2 * i] - z[2 * i + 1])) > static_cast<float>(t) / kThresholds;
    const Dims size{truth.size(1), truth.size(2)};
    scores.push_back(segment::membrane_scores(from_vector(mask, size), reshape(truth, size)));
  }
  return scores;
}

}  // namespace capo::examples
