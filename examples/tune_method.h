// One method on one task: builds the pre-trained model, attaches the tuner, says what memory a step will hold, trains,
// tests once. The part of examples/tune.cpp that shows the library at work.
#pragma once

#include <capo/engine/files.h>
#include <capo/examples/backbone.h>
#include <capo/examples/step_profile.h>
#include <capo/examples/tune_pictures.h>
#include <capo/examples/tune_plan.h>
#include <capo/models/nn/state.h>
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
  std::string dataset = "fashion-mnist", data, family = "vit", weights = CAPO_SHIPPED_WEIGHTS, preprocess,
              method = "u-tuning", out = "out/tune", precision = "f32", profile;
  Device device = kCpu;
  int train_images = 1000, test_images = 0, epochs = 8, batch = 16, image = 0, threads = 0;
  double lr = 0, head_lr = 0;
  std::uint64_t seed = 0;
  bool compare = false, graph = false, held_out = false;
};

struct TuneData {
  DatasetPtr train, validation, test;
};

struct TuneResult {
  std::string method;
  double accuracy = 0, seconds = 0, images_per_s = 0, lr = 0;
  int epochs = 0;
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

// Everything before the head of `images` images, computed once: what a linear probe trains on.
template <class M>
train::TensorSource cached_features(M& model, train::BatchSource& source, std::int64_t images, std::int64_t batch,
                                    std::uint64_t seed) {
  const NoGrad off;
  Tensor features, labels;
  source.seek(0, 0);
  for (std::int64_t at = 0; at < images;) {
    const train::Batch b = source.next();
    const Tensor f = model.features(b.x);
    if (at == 0) {
      Shape shape = f.shape();
      shape[0] = images;
      features = empty(shape, f.dtype(), f.device());
      labels = empty({images}, i64, f.device());
    }
    copy_into(slice(features, 0, at, at + b.size()), f);
    copy_into(slice(labels, 0, at, at + b.size()), b.labels);
    at += b.size();
  }
  return {features, labels, batch, seed};
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

template <class M>
TuneResult tune_with(const TuneOptions& o, const std::string& name, const TuneData& data, bool last) {
  const tuners::Method* method = tuners::find_method(name);
  CAPO_CHECK(method || name.find(':') != name.npos, "--method: there is no method \"", name, "\"; give ",
             tuners::method_names(), " or a spec");
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
  const std::int64_t largest = std::max({train_set->size(), validation_set->size(), test_set->size()});
  const auto& config = model.config;
  const TunePlan planned = heads_alone ? plan_heads<M>(config, preprocess.size, spec, o.batch, largest,
                                                       {train_set->size(), validation_set->size()})
                                       : plan_steps<M>(config, preprocess.size, spec, o.batch, largest);
  const train::MemoryPlan& plan = planned.memory;
  const LoaderOptions plain{.batch_size = static_cast<int>(planned.at_once)};  // where nothing is trained
  LoaderSource held_images(validation_set, preprocess, plain), test_images(test_set, preprocess, plain);
  train::ToDevice held_out(held_images, o.device), test_source(test_images, o.device);
  train::TrainOptions options;
  options.epochs = o.epochs;
  options.adamw.weight_decay = method ? method->weight_decay : 1e-4;
  options.schedule.lr = o.lr > 0 ? o.lr : method ? method->lr : 2e-3;
  if (o.head_lr > 0)
    for (const nn::Module* head : tuners::select(model, "@head"))
      options.adamw.rules.push_back({head->path(), o.head_lr / options.schedule.lr});
  options.warmup_epochs = 1;
  options.clip_norm = 1;
  options.graph = o.graph;
  options.seed = o.seed;
  StepProfile progress(o.profile, 10);
  options.on_progress = StepProfile::progress;
  options.on_epoch = StepProfile::epoch;
  options.user = &progress;

  options.memory_plan = to_string(plan);
  const auto mib = [](std::int64_t bytes) { return static_cast<double>(bytes) / 1048576.0; };
  std::printf(
      "%s: will hold at most %.1f MiB: weights %.1f, gradients %.1f, optimizer %.1f, activations %.1f, %s %.1f; in "
      "evaluation %.1f\n",
      name.c_str(), mib(plan.peak), mib(plan.weights), mib(plan.gradients), mib(plan.optimizer), mib(plan.activations),
      heads_alone ? "features" : "images", mib(plan.input), mib(plan.evaluation));

  TuneResult r{.method = name, .trainable = nn::parameter_count(model, true), .total = nn::parameter_count(model)};
  allocator(o.device).reset_peak();
  const auto start = std::chrono::steady_clock::now();
  train::TrainResult trained;
  const auto fit = [&](train::Classifier& classifier, train::BatchSource& images, train::BatchSource& validation) {
    train::ClassificationTask task(classifier, 0.1);
    trained = train::Trainer(task, images, &validation, options).run();
    progress.finish();
    const NoGrad off;
    model.train(false);
    train::ClassifierOf<M> whole(model);
    r.accuracy = train::evaluate_classifier(whole, test_source).top1;  // once
  };
  if (heads_alone) {  // the backbone never changes: one pass over the images, then epochs of nothing but the heads
    options.epochs = o.epochs * 5;
    LoaderSource train_images(train_set, preprocess, plain);
    train::ToDevice train_source(train_images, o.device);
    train::TensorSource train_features =
        cached_features(model, train_source, train_set->size(), kFeatureBatch, o.seed + 1);
    train::TensorSource held_features = cached_features(model, held_out, validation_set->size(), kFeatureEvaluation, 0);
    Heads<M> heads(model);
    fit(heads, train_features, held_features);
  } else {
    LoaderSource train_images(train_set, preprocess, loading);
    train::ToDevice train_source(train_images, o.device);
    train::ClassifierOf<M> whole(model);
    fit(whole, train_source, held_out);
  }
  r.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  r.lr = options.schedule.lr;
  r.epochs = options.epochs;
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
    tuners::save_tuner(o.out + "/tuner", model,
                       {spec,
                        base,
                        to_json(model.config),
                        to_json(preprocess),
                        train_set->class_names(),
                        {{"family", Backbone<M>::kFamily},
                         {"weights", std::filesystem::absolute(o.weights)},
                         {"accuracy", cat(r.accuracy)},
                         {"dataset", train_set->name()},
                         {"precision", o.precision}}});
  }
  return r;
}

}  // namespace capo::examples
