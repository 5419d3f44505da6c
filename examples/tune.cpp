// Tunes a pre-trained vision transformer on a few images:
//   tune                                          1,000 Fashion-MNIST images, U-Tuning
//   tune --compare                                the same with a linear probe, U-Tuning and full fine-tuning
//   tune --method "blocks.*.attn: lora(rank=4, slices=qv); head: train" --dataset cifar100
//   tune --data my_photos --weights vit_base_patch16_224.safetensors       (my_photos/{train,test}/<class>/*.jpg)
// Prints the memory plan, then accuracy, parameters, peak bytes and images/s; writes curves, a sheet of predictions and an
// attention map as PNG, and the tuner alone, for `predict`.
#include <capo/engine/threads.h>
#include <capo/examples/progress.h>
#include <capo/examples/tune_pictures.h>
#include <capo/models/nn/state.h>
#include <capo/models/train/memory_plan.h>
#include <capo/models/train/tensor_source.h>
#include <capo/tuners/artifact.h>
#include <capo/tuners/presets.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

using namespace capo;

namespace {

struct Options {
  std::string dataset = "fashion-mnist", data, weights = CAPO_SHIPPED_WEIGHTS, method = "u-tuning", out = "out/tune", device = "cpu";
  int train_images = 1000, test_images = 0, epochs = 8, image = 0, threads = 0;
  double lr = 0;
  std::uint64_t seed = 0;
  bool compare = false;
};

struct Data {
  DatasetPtr train, validation, test;
};

struct Result {
  std::string method;
  double accuracy = 0, seconds = 0, images_per_s = 0;
  std::int64_t trainable = 0, total = 0, peak_bytes = 0;
  std::vector<double> curve = {};
};

// Everything before the head, computed once: what a linear probe trains on.
train::TensorSource cached_features(vit::Vit& model, train::BatchSource& source, std::int64_t batch, std::uint64_t seed) {
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

Result run(const Options& o, const std::string& name, const Data& data, bool last) {
  const tuners::Method* method = tuners::find_method(name);
  const std::string spec = method ? method->spec : name;
  const auto& [train_set, validation_set, test_set] = data;
  const int classes = train_set->num_classes();
  vit::LoadedVit loaded = vit::load_vit(o.weights, {.classes = classes, .image = o.image}, {.seed = o.seed});
  vit::Vit& model = *loaded.model;
  Preprocess preprocess = loaded.preprocess.empty() ? Preprocess{} : preprocess_from_json(loaded.preprocess, o.weights);
  preprocess.size = model.config.image;
  const std::string base = nn::base_hash(model);
  tuners::apply_spec(model, spec);

  LoaderOptions loading{.batch_size = 64, .shuffle = true, .seed = o.seed + 1};
  loading.augment = Augment{.crop = Augment::Crop::pad, .pad = preprocess.size / 16};
  LoaderSource train_source(train_set, preprocess, loading);
  LoaderSource plain_source(train_set, preprocess, {.batch_size = 250});
  LoaderSource held_out(validation_set, preprocess, {.batch_size = 250});
  LoaderSource test_source(test_set, preprocess, {.batch_size = 250});
  train::TrainOptions options;
  options.epochs = o.epochs;
  options.adamw.weight_decay = method ? method->weight_decay : 1e-4;
  options.schedule.lr = o.lr > 0 ? o.lr : method ? method->lr : 2e-3;
  options.warmup_epochs = 1;
  options.clip_norm = 1;
  options.seed = o.seed;
  examples::ProgressBar bar;
  options.on_progress = examples::ProgressBar::progress;
  options.on_epoch = examples::ProgressBar::epoch;
  options.user = &bar;

  const auto planned = [&](const nn::Build& build) {
    auto copy = std::make_unique<vit::Vit>(model.config, build);
    tuners::apply_spec(*copy, spec);
    return copy;
  };
  const train::MemoryPlan plan = train::plan_memory(planned, {64, preprocess.size, preprocess.size, 3});
  const auto mib = [](std::int64_t bytes) { return static_cast<double>(bytes) / 1048576.0; };
  std::printf("%s: a step of 64 images will hold at most %.1f MiB: weights %.1f, gradients %.1f, optimizer %.1f, activations %.1f\n", name.c_str(),
              mib(plan.peak), mib(plan.weights), mib(plan.gradients), mib(plan.optimizer), mib(plan.activations));

  Result r{.method = name, .trainable = nn::parameter_count(model, true), .total = nn::parameter_count(model)};
  allocator(kCpu).reset_peak();
  const auto start = std::chrono::steady_clock::now();
  train::TrainResult trained;
  train::Metrics tested;
  const auto fit = [&](train::Classifier& classifier, train::BatchSource& images, train::BatchSource& validation, train::BatchSource& test) {
    train::ClassificationTask task(classifier, 0.1);
    trained = train::Trainer(task, images, &validation, options).run();
    const NoGrad off;
    model.train(false);
    tested = task.evaluate(test);  // once
  };
  if (spec == "head: train") {  // the backbone never changes: one pass over the images, then epochs of nothing but the head
    options.epochs = o.epochs * 5;
    train::TensorSource train_features = cached_features(model, plain_source, 64, o.seed + 1);
    train::TensorSource held_features = cached_features(model, held_out, 250, 0), test_features = cached_features(model, test_source, 250, 0);
    train::ClassifierOf head(*model.head);
    fit(head, train_features, held_features, test_features);
  } else {
    train::ClassifierOf whole(model);
    fit(whole, train_source, held_out, test_source);
  }
  r.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  r.accuracy = tested.top1;
  r.peak_bytes = allocator(kCpu).stats().peak_bytes;
  double epoch_seconds = 0;
  for (const auto& e : trained.epochs) {
    r.curve.push_back(100 * e.validation.top1);
    epoch_seconds += e.seconds;
  }
  r.images_per_s = static_cast<double>(train_set->size()) * static_cast<double>(trained.epochs.size()) / epoch_seconds;
  if (last) {
    examples::prediction_sheet(model, *test_set, preprocess, o.out + "/predictions.png");
    examples::attention_picture(model, *test_set, preprocess, o.out + "/attention.png");
    tuners::save_tuner(o.out + "/tuner", model, {spec, base, vit::to_json(model.config), to_json(preprocess), train_set->class_names(),
                       {{"weights", std::filesystem::absolute(o.weights)}, {"accuracy", cat(r.accuracy)}, {"dataset", train_set->name()}}});
  }
  return r;
}

}  // namespace

int main(int argc, char** argv) try {
  Options o;
  CLI::App app("Tunes a pre-trained vision transformer on a few images");
  app.add_option("--dataset", o.dataset, "cifar10, cifar100, flowers64, fashion-mnist, ...");
  app.add_option("--data", o.data, "an image folder: FOLDER/train/<class>/*.jpg and FOLDER/test/...");
  app.add_option("--weights", o.weights, "a ViT in safetensors: ours or timm's");
  app.add_option("--method", o.method, "a named method (tuners/presets.h) or a spec (tuners/spec.h)");
  app.add_flag("--compare", o.compare, "linear probe, U-Tuning and full fine-tuning, one after another");
  app.add_option("--train-images", o.train_images, "class-balanced, drawn by seed; 0: all");
  app.add_option("--test-images", o.test_images, "0: all");
  app.add_option("--epochs", o.epochs);
  app.add_option("--lr", o.lr, "0: the method's");
  app.add_option("--image", o.image, "input size in pixels; 0: the weights' own");
  app.add_option("--seed", o.seed);
  app.add_option("--threads", o.threads, "0: all processors");
  app.add_option("--device", o.device);
  app.add_option("--out", o.out);
  CLI11_PARSE(app, argc, argv);
  if (o.threads > 0) set_num_threads(o.threads);
  CAPO_CHECK(parse_device(o.device).is_cpu(), "--device ", o.device, ": this build has no kernels for it");
  std::filesystem::create_directories(o.out);

  const std::string source = o.data.empty() ? o.dataset : o.data;
  const auto [pool, rest] = split_dataset(open_dataset(source, "", "train"), 0.1, 1);
  Data data{pool, balanced_subset(rest, std::min<std::int64_t>(rest->size(), 1000), 1), open_dataset(source, "", "test")};
  if (o.train_images > 0 && o.train_images < pool->size()) data.train = balanced_subset(pool, o.train_images, o.seed);
  if (o.test_images > 0 && o.test_images < data.test->size()) data.test = balanced_subset(data.test, o.test_images, 1);
  std::printf("%s: %lld training, %lld validation, %lld test images, %d classes\n", data.train->name().c_str(), static_cast<long long>(data.train->size()),
              static_cast<long long>(data.validation->size()), static_cast<long long>(data.test->size()), data.train->num_classes());

  std::vector<std::string> methods{o.method};
  if (o.compare) methods = {"linear", "full", "u-tuning"};
  std::vector<Series> curves;
  nlohmann::json results = nlohmann::json::object();
  for (const auto& name : methods) {
    const Result r = run(o, name, data, name == methods.back());
    std::printf("%-12s accuracy %.2f %%, %lld of %lld parameters trained (%.2f %%), peak %.1f MiB, %.0f images/s, %.0f s\n", r.method.c_str(),
                100 * r.accuracy, static_cast<long long>(r.trainable), static_cast<long long>(r.total),
                100.0 * static_cast<double>(r.trainable) / static_cast<double>(r.total), static_cast<double>(r.peak_bytes) / 1048576.0, r.images_per_s, r.seconds);
    std::fflush(stdout);
    if (name != "linear" || methods.size() == 1) curves.push_back({.name = r.method, .y = r.curve, .markers = true});
    results[r.method] = {{"accuracy", r.accuracy}, {"trainable_parameters", r.trainable}, {"peak_bytes", r.peak_bytes}, {"images_per_s", r.images_per_s}};
  }
  write_png(o.out + "/accuracy.png", plot(curves, {.title = "accuracy on held-out training images", .x_label = "epoch", .y_label = "%"}));
  std::printf("accuracy.png, predictions.png, attention.png and the tuner are in %s\n", o.out.c_str());
  std::printf("RESULT %s\n", nlohmann::json{{"example", "tune"}, {"dataset", source}, {"methods", results}}.dump().c_str());
} catch (const Error& e) {
  std::fprintf(stderr, "tune: %s\n", e.what());
  return 1;
}
