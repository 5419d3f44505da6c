// What tuning will hold, told before it runs, and how many images evaluations may take at once for that to be true.
#pragma once

#include <capo/models/train/memory_plan.h>
#include <capo/tuners/spec.h>

#include <algorithm>
#include <memory>
#include <string>

namespace capo::examples {

constexpr int kFeatureBatch = 64, kFeatureEvaluation = 250;  // rows, where the heads alone are trained

// The same model on what `features` gives.
template <class M>
struct OnFeatures : M {
  using M::M;
  Tensor operator()(const Tensor& features) { return M::classify(features); }
};

template <class M, class Config>
std::unique_ptr<M> planned(const Config& config, const std::string& spec, const nn::Build& build) {
  auto model = std::make_unique<M>(config, build);
  tuners::apply_spec(*model, spec);
  return model;
}

struct TunePlan {
  train::MemoryPlan memory;
  std::int64_t at_once = 0;  // images in an evaluation's batch
};

// 250 images of 32 x 32 pixels, or as many pixels in larger ones; 8 at least, `most` at most.
inline std::int64_t first_at_once(int side, std::int64_t most) {
  return std::min<std::int64_t>(most, std::clamp(250 * 1024 / (side * side), 8, 250));
}

// Steps of `batch` images of side x side pixels, evaluations of up to `most`: of first_at_once() as many as hold no
// more than a step does, so that an evaluation never sets the peak (where a step's own number of images would not).
template <class M, class Config>
TunePlan plan_steps(const Config& config, int side, const std::string& spec, std::int64_t batch, std::int64_t most) {
  const auto model = [&](const nn::Build& build) { return planned<M>(config, spec, build); };
  const auto plan = [&](std::int64_t evaluated) {
    return train::plan_memory(model, {batch, side, side, 3}, {.evaluation_batch = evaluated});
  };
  const std::int64_t step = plan(0).peak;
  TunePlan p{{}, first_at_once(side, most)};
  while ((p.memory = plan(p.at_once)).peak > step && p.at_once > batch) p.at_once = std::max(batch, p.at_once / 2);
  return p;
}

// Where the heads alone are trained, on features of `cached` images: no steps on images, but evaluations that leave
// these features, steps on them, and an evaluation of the whole at the end. Of first_at_once() as many images as hold,
// with the features, no more than a step that trains everything would.
template <class M, class Config>
TunePlan plan_heads(const Config& config, int side, const std::string& spec, std::int64_t batch, std::int64_t most,
                    const std::vector<std::int64_t>& cached) {
  const Shape step{batch, side, side, 3};
  const auto model = [&](const nn::Build& build) { return planned<M>(config, spec, build); };
  const auto everything = [&](const nn::Build& build) { return planned<M>(config, "**: train", build); };
  const auto heads = [&](const nn::Build& build) { return planned<OnFeatures<M>>(config, spec, build); };
  const std::int64_t limit = train::plan_memory(everything, step).peak;
  Shape shape = M(config, {.device = kMeta}).features(empty({kFeatureBatch, side, side, 3}, f32, kMeta)).shape();
  TunePlan p{train::plan_memory(heads, shape, {.evaluation_batch = kFeatureEvaluation}), first_at_once(side, most)};
  const std::int64_t on_features = p.memory.peak;
  std::int64_t bytes = 0;
  for (const std::int64_t n : cached) {
    shape[0] = n;
    bytes += static_cast<std::int64_t>(rounded_bytes(numel(shape) * sizeof(float)) +
                                       2 * rounded_bytes(n * sizeof(std::int64_t)));  // labels, an epoch's order
  }
  p.memory.input += bytes;
  const auto peak_with = [&](std::int64_t images) {
    p.memory.evaluation = train::plan_memory(model, step, {.evaluation_batch = images}).evaluation;
    return bytes + std::max(on_features, p.memory.weights + p.memory.evaluation);
  };
  while ((p.memory.peak = peak_with(p.at_once)) > limit && p.at_once > batch)
    p.at_once = std::max(batch, p.at_once / 2);
  return p;
}

}  // namespace capo::examples
