// One method on one task: builds the pre-trained model, attaches the tuner, says what memory a step will hold, trains,
// tests once. The part of examples/tune.cpp that shows the library at work.
#pragma once

#include <capo/engine/files.h>
#include <capo/examples/backbone.h>
#include <capo/examples/step_profile.h>
#include <capo/examples/tune_pictures.h>
#include <capo/models/nn/state.h>
#include <capo/models/train/memory_plan.h>
#include <capo/models/train/tensor_source.h>
#include <capo/models/train/to_device.h>
#include <capo/tuners/artifact.h>
#include <capo/tuners/presets.h>
#include <capo/tuners/select.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>

namespace capo::examples {

struct TuneOptions {
  std::string dataset = "fashion-mnist", data, family = "vit", weights = CAPO_SHIPPED_WEIGHTS, preprocess, method = "u-tuning", out = "out/tune",
              precision = "f32", profile;
  Device device = kCpu;
  int train_images = 1000, test_images = 0, epochs = 8, batch = 16, image = 0, threads = 0;
  double lr = 0;
  std::uint64_t seed = 0;
  bool compare = false, graph = false;
};

struct TuneData {
  DatasetPtr train, validation, test;
};

struct TuneResult {
  std::string method;
  double accuracy = 0, seconds = 0, images_per_s = 0;
  std::int64_t trainable = 0, total = 0, planned_bytes = 0, peak_bytes = 0;
  std::vector<double> epoch = {}, curve = {};  // held-out accuracy, %
};

// What the weights were trained to see: told on the command line, or by the file. side: of the input, 0: any.
inline Preprocess preprocess_of(const TuneOptions& o, const std::string& stated, int side) {
  Preprocess p;
  if (!o.preprocess.empty())
    p = preprocess_from_json(read_file(o.preprocess, 4096), o.preprocess);
  else if (!stated.empty())
    p = preprocess_from_json(stated, o.weights);
  else
    log(LogLevel::warning, cat(o.weights, ": states no preprocessing (see --preprocess); taken as ", to_json(p)));
  if (o.image > 0) p.size = o.image;
  if (side > 0) p.size = side;
  return p;
}

// Everything before the head, computed once: what a linear probe trains on.
template <class M>
train::TensorSource cached_features(M& model, train::BatchSource& source, std::int64_t batch, std::uint64_t seed) {
  const NoGrad off;
  std::vector<Tensor> features, labels;
  source.seek(0, 0);
  for (std::int64_t i = 0; i < source.batches_per_epoch(); ++i) {
    const train::Batch b = source.next();
    features.push_back(model.features(b.x));
    labels.push_back(b.labels);
  }
  return {concat(features, 0), concat(labels, 0), batch, seed};
}

// The heads, on such features.
template <class M>
class Heads final : public train::Classifier {
 public:
  explicit Heads(M& model) : model_(model) {}
  Tensor forward(const Tensor& features) override { return model_.classify(features); }
  nn::Module& module() override { return model_; }

 private:
  M& model_;
};

// The same as a model of its own.
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

constexpr int kFeatureBatch = 64, kFeatureEvaluation = 250;

// What tuning will hold: steps of `batch` images, evaluations of `plain`. Where the heads alone are trained there are no such
// steps, but evaluations of all images that leave their features, and steps on those.
template <class M, class Config>
train::MemoryPlan plan_tuning(const Config& config, int side, const std::string& spec, bool heads_alone, std::int64_t batch, std::int64_t plain, const TuneData& data) {
  const auto whole = [&](const nn::Build& build) { return planned<M>(config, spec, build); };
  const train::MemoryPlan images = train::plan_memory(whole, {batch, side, side, 3}, {.evaluation_batch = plain});
  if (!heads_alone) return images;
  const Shape shape = M(config, {.device = kMeta}).features(empty({kFeatureBatch, side, side, 3}, f32, kMeta)).shape();
  const auto heads = [&](const nn::Build& build) { return planned<OnFeatures<M>>(config, spec, build); };
  train::MemoryPlan plan = train::plan_memory(heads, shape, {.evaluation_batch = kFeatureEvaluation});
  const std::int64_t row = numel(shape) / kFeatureBatch * 4 + 8;  // an image's features and label
  std::int64_t cached = 0, most = 0;
  for (const DatasetPtr& set : {data.train, data.validation, data.test}) {
    cached += set->size() * row;
    most = std::max(most, cached + std::max(images.evaluation, set->size() * row));  // the last batch; then all are joined
  }
  plan.input += cached;
  plan.evaluation = images.evaluation;
  plan.peak = std::max(plan.weights + most, cached + plan.peak);
  return plan;
}

template <class M>
TuneResult tune_with(const TuneOptions& o, const std::string& name, const TuneData& data, bool last) {
  const tuners::Method* method = tuners::find_method(name);
  CAPO_CHECK(method || name.find(':') != name.npos, "--method: there is no method \"", name, "\"; give ", tuners::method_names(), " or a spec");
  const std::string spec = method ? method->spec : name;
  const auto& [train_set, validation_set, test_set] = data;
  const int classes = train_set->num_classes();
  const auto loaded = Backbone<M>::open(o.weights, classes, o.image, {.seed = o.seed, .device = o.device});
  M& model = *loaded.model;
  const Preprocess preprocess = preprocess_of(o, loaded.preprocess, Backbone<M>::side(model));
  const std::string base = nn::base_hash(model);
  tuners::apply_spec(model, spec);
  for (nn::Module* head : tuners::select(model, "@head"))
    for (const nn::Parameter* p : head->parameters())
      CAPO_CHECK(p->trainable(), "--method ", name, ": must train ", p->path(), ", which starts at random");
  bool heads_alone = true;
  for (const nn::Parameter* p : model.parameters()) heads_alone &= !p->trainable() || p->kind() == nn::Kind::head;

  LoaderOptions loading{.batch_size = o.batch, .shuffle = true, .seed = o.seed + 1};
  loading.augment = Augment{};  // flips only: a few epochs on a few images leave no room for more
  // Where nothing is trained: 250 images of 32 x 32 pixels at once, fewer of larger ones.
  const LoaderOptions plain{.batch_size = std::clamp(250 * 1024 / (preprocess.size * preprocess.size), 8, 250)};
  LoaderSource held_images(validation_set, preprocess, plain), test_images(test_set, preprocess, plain);
  train::ToDevice held_out(held_images, o.device), test_source(test_images, o.device);
  train::TrainOptions options;
  options.epochs = o.epochs;
  options.adamw.weight_decay = method ? method->weight_decay : 1e-4;
  options.schedule.lr = o.lr > 0 ? o.lr : method ? method->lr : 2e-3;
  options.warmup_epochs = 1;
  options.clip_norm = 1;
  options.graph = o.graph;
  options.seed = o.seed;
  StepProfile progress(o.profile, 10);
  options.on_progress = StepProfile::progress;
  options.on_epoch = StepProfile::epoch;
  options.user = &progress;

  const std::int64_t largest = std::max({train_set->size(), validation_set->size(), test_set->size()});
  const train::MemoryPlan plan = plan_tuning<M>(model.config, preprocess.size, spec, heads_alone, o.batch, std::min(plain.batch_size, largest), data);
  options.memory_plan = to_string(plan);
  const auto mib = [](std::int64_t bytes) { return static_cast<double>(bytes) / 1048576.0; };
  std::printf("%s: will hold at most %.1f MiB: weights %.1f, gradients %.1f, optimizer %.1f, activations %.1f, %s %.1f; in evaluation %.1f\n", name.c_str(), mib(plan.peak),
              mib(plan.weights), mib(plan.gradients), mib(plan.optimizer), mib(plan.activations), heads_alone ? "features" : "images", mib(plan.input), mib(plan.evaluation));

  TuneResult r{.method = name, .trainable = nn::parameter_count(model, true), .total = nn::parameter_count(model)};
  allocator(o.device).reset_peak();
  const auto start = std::chrono::steady_clock::now();
  train::TrainResult trained;
  train::Metrics tested;
  const auto fit = [&](train::Classifier& classifier, train::BatchSource& images, train::BatchSource& validation, train::BatchSource& test) {
    train::ClassificationTask task(classifier, 0.1);
    trained = train::Trainer(task, images, &validation, options).run();
    progress.finish();
    const NoGrad off;
    model.train(false);
    tested = task.evaluate(test);  // once
  };
  if (heads_alone) {  // the backbone never changes: one pass over the images, then epochs of nothing but the heads
    options.epochs = o.epochs * 5;
    LoaderSource train_images(train_set, preprocess, plain);
    train::ToDevice train_source(train_images, o.device);
    train::TensorSource train_features = cached_features(model, train_source, kFeatureBatch, o.seed + 1);
    train::TensorSource held_features = cached_features(model, held_out, kFeatureEvaluation, 0);
    train::TensorSource test_features = cached_features(model, test_source, kFeatureEvaluation, 0);
    Heads<M> heads(model);
    fit(heads, train_features, held_features, test_features);
  } else {
    LoaderSource train_images(train_set, preprocess, loading);
    train::ToDevice train_source(train_images, o.device);
    train::ClassifierOf<M> whole(model);
    fit(whole, train_source, held_out, test_source);
  }
  r.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  r.accuracy = tested.top1;
  r.planned_bytes = plan.peak;
  r.peak_bytes = allocator(o.device).stats().peak_bytes;
  double epoch_seconds = 0;
  for (const auto& e : trained.epochs) {
    r.epoch.push_back(static_cast<double>(e.epoch + 1));
    r.curve.push_back(100 * e.validation.top1);
    epoch_seconds += e.seconds;
  }
  r.images_per_s = static_cast<double>(train_set->size()) * static_cast<double>(trained.epochs.size()) / epoch_seconds;
  if (last) {
    prediction_sheet(model, *test_set, preprocess, o.out + "/predictions.png");
    where_picture(model, *test_set, preprocess, o.out + "/attention.png");
    tuners::save_tuner(o.out + "/tuner", model, {spec, base, to_json(model.config), to_json(preprocess), train_set->class_names(),
                       {{"family", Backbone<M>::kFamily}, {"weights", std::filesystem::absolute(o.weights)}, {"accuracy", cat(r.accuracy)}, {"dataset", train_set->name()}, {"precision", o.precision}}});
  }
  return r;
}

}  // namespace capo::examples
