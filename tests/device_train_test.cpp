// A whole run on a device, the host shim's or a GPU: what is trained, validated, stored, resumed and predicted there
// follows the CPU within f32's rounding, and repeats to the bit.
#include <capo/engine/backend.h>
#include <capo/models/train/memory_plan.h>
#include <capo/models/train/tensor_source.h>
#include <capo/models/vit/load.h>
#include <capo/ops/copy.h>
#include <capo/ops/index.h>
#include <capo/ops/softmax.h>
#include <capo/tests/temp_folder.h>
#include <capo/tests/tiny_model.h>
#include <capo/tuners/artifact.h>

#include <doctest/doctest.h>

#include <cstdio>

using namespace capo;
using namespace capo::testing;

namespace {

constexpr Device kCuda{DeviceType::cuda, 0};
constexpr const char* kUTuning =
    "blocks.*.attn: u_prefix(length=2); blocks.*.mlp: u_adapter(dim=4, on=x); head*: train";

bool no_device() {
  if (device_count() > 0) return false;
  std::puts("ALL SKIPPED: no device beside the CPU");
  return true;
}

vit::VitConfig tiny_vit() {
  vit::VitConfig c;
  c.image = 8;
  c.patch = 4;
  c.dim = 16;
  c.depth = 2;
  c.heads = 2;
  c.classes = 4;
  c.drop = 0.1;
  c.drop_path = 0.1;
  return c;
}

// Images whose quadrant shows the class, with noise.
train::TensorSource images(std::int64_t n, std::int64_t batch, std::uint64_t seed, Device device) {
  Generator rng(seed, 0);
  std::vector<float> x = to_vector<float>(rand_normal({n, 8, 8, 3}, rng, 0, 0.3));
  std::vector<std::int64_t> labels;
  for (std::int64_t i = 0; i < n; ++i) {
    labels.push_back(i % 4);
    for (std::int64_t k = 0; k < 16 * 3; ++k)
      x[static_cast<std::size_t>(((i * 8 + i % 4 / 2 * 4 + k / 12) * 8 + i % 2 * 4) * 3 + k % 12)] += 1.5f;
  }
  return {to(from_vector(x, {n, 8, 8, 3}), device), to(from_vector(labels, {n}), device), batch, seed};
}

struct Run {
  std::vector<double> losses;  // by step
  train::TrainResult result;
  std::string bits;         // everything that the run left
  nn::StateDict trained;    // on the host
  std::vector<float> probabilities;
};

struct Setting {
  std::string spec = kUTuning;
  train::OptimizerKind optimizer = train::OptimizerKind::adamw;
  std::string checkpoints = "", tuner = "";
  std::int64_t max_steps = 0;
};

std::vector<float> predict(vit::Vit& model, Device device) {
  const NoGrad off;
  model.train(false);
  train::TensorSource source = images(6, 6, 9, device);
  return to_vector<float>(softmax(model(source.next().x)));
}

Run run(Device device, const Setting& setting) {
  vit::Vit model(tiny_vit(), {.seed = 3, .device = device});
  const std::string base = nn::base_hash(model);
  tuners::apply_spec(model, setting.spec);
  train::ClassifierOf classifier(model);
  train::ClassificationTask task(classifier, 0.1);
  train::TensorSource data = images(16, 4, 5, device), held_out = images(8, 8, 6, device);
  train::TrainOptions o;
  o.epochs = 2;
  o.accumulate = 2;
  o.optimizer = setting.optimizer;
  o.schedule.lr = 0.02;
  o.clip_norm = 0.5;
  o.ema_decay = 0.8;
  o.seed = 3;
  o.checkpoint_dir = setting.checkpoints;
  o.max_steps = setting.max_steps;
  Run r;
  o.on_progress = [](const train::Progress& p, void* user) { static_cast<Run*>(user)->losses.push_back(p.loss); };
  o.user = &r;
  train::Trainer trainer(task, data, &held_out, o);
  r.result = trainer.run();
  for (nn::Parameter* p : model.parameters())
    if (p->trainable()) r.trained.push_back({p->path(), train::to_host(p->value())});
  r.bits = bytes_of(r.trained) + bytes_of(trainer.optimizer().state()) + bytes_of(trainer.ema()->state());
  r.probabilities = predict(model, device);
  if (!setting.tuner.empty())
    tuners::save_tuner(setting.tuner, model, {setting.spec, base, vit::to_json(model.config), "", {}, {}});
  return r;
}

void check_follows(const Run& there, const Run& here, double tolerance) {
  REQUIRE(there.losses.size() == here.losses.size());
  for (std::size_t i = 0; i < here.losses.size(); ++i)
    CHECK(there.losses[i] == doctest::Approx(here.losses[i]).epsilon(tolerance));
  REQUIRE(there.trained.size() == here.trained.size());
  for (std::size_t i = 0; i < here.trained.size(); ++i) {
    CAPTURE(here.trained[i].name);
    CHECK(!(relative_error(there.trained[i].value, here.trained[i].value) > tolerance));
  }
  REQUIRE(there.result.epochs.size() == here.result.epochs.size());
  for (std::size_t i = 0; i < here.result.epochs.size(); ++i) {
    CHECK(there.result.epochs[i].validation.loss ==
          doctest::Approx(here.result.epochs[i].validation.loss).epsilon(tolerance));
    CHECK(there.result.epochs[i].validation.top1 == here.result.epochs[i].validation.top1);
  }
  for (std::size_t i = 0; i < here.probabilities.size(); ++i)
    CHECK(there.probabilities[i] == doctest::Approx(here.probabilities[i]).epsilon(tolerance));
}

}  // namespace

TEST_CASE("initial values, hashes and files are the same on every device") {
  if (no_device()) return;
  vit::Vit here(tiny_vit(), {.seed = 3}), there(tiny_vit(), {.seed = 3, .device = kCuda});
  CHECK(there.patch_embed.proj.weight.value().device() == kCuda);
  CHECK(nn::base_hash(there) == nn::base_hash(here));
  const TempFolder t;
  nn::save_weights(there, t / "w.safetensors", f32);
  vit::Vit loaded(tiny_vit(), {.seed = 4, .device = kCuda});
  CHECK(nn::base_hash(loaded) != nn::base_hash(here));
  nn::load_weights(loaded, t / "w.safetensors");
  CHECK(nn::base_hash(loaded) == nn::base_hash(here));

  nn::freeze(here, "blocks.**");
  here.move_to(kCuda);
  CHECK(here.build().device == kCuda);
  CHECK(here.blocks[0].build().device == kCuda);
  CHECK(here.head->weight.trainable());
  CHECK(!here.blocks[0].norm1.weight.trainable());
  CHECK(predict(here, kCuda) == predict(there, kCuda));
  here.move_to(kCpu);
  CHECK(nn::base_hash(here) == nn::base_hash(there));
  CHECK(starts_with(error_of([&] { here.blocks[0].move_to(kCuda); }), "blocks.0: only a whole model moves"));
}

TEST_CASE("U-Tuning, full fine-tuning with Muon and with SGD on a device follow the CPU") {
  if (no_device()) return;
  const Run here = run(kCpu, {}), there = run(kCuda, {});
  CHECK(here.losses.size() == 4);
  check_follows(there, here, 1e-4);
  CHECK(run(kCuda, {}).bits == there.bits);
  for (const auto kind : {train::OptimizerKind::muon, train::OptimizerKind::sgd}) {
    const Setting full{.spec = "**: train", .optimizer = kind, .max_steps = 2};
    check_follows(run(kCuda, full), run(kCpu, full), 1e-3);
  }
}

TEST_CASE("a run on a device stops, resumes to the bit, and its checkpoint goes on on the CPU") {
  if (no_device()) return;
  const Run straight = run(kCuda, {});
  const TempFolder t, copy;
  Setting setting{.checkpoints = t.path(), .max_steps = 3};
  CHECK(run(kCuda, setting).result.stopped);
  std::filesystem::copy(t.path(), copy.path(), std::filesystem::copy_options::recursive);
  setting.max_steps = 0;
  const Run resumed = run(kCuda, setting);
  CHECK(resumed.result.resumed_from == t / "last.safetensors");
  CHECK(resumed.bits == straight.bits);
  setting.checkpoints = copy.path();
  const Run elsewhere = run(kCpu, setting);
  CHECK(!elsewhere.result.resumed_from.empty());
  for (std::size_t i = 0; i < straight.trained.size(); ++i)
    CHECK(!(relative_error(elsewhere.trained[i].value, straight.trained[i].value) > 1e-4));
}

TEST_CASE("a tuner saved on a device predicts there and on the CPU") {
  if (no_device()) return;
  const TempFolder t;
  const Run trained = run(kCuda, {.tuner = t / "tuner"});
  for (const Device device : {kCuda, kCpu}) {
    vit::Vit model(tiny_vit(), {.seed = 3, .device = device});
    model.head->weight.set(to(zeros({4, 16}), device));  // the file brings the head
    tuners::load_tuner(t / "tuner", model);
    const std::vector<float> p = predict(model, device);
    for (std::size_t i = 0; i < p.size(); ++i) CHECK(p[i] == doctest::Approx(trained.probabilities[i]).epsilon(1e-4));
  }
}

TEST_CASE("the plan made on meta is what a device is asked for") {
  if (no_device()) return;
  const auto make = [](const nn::Build& build) {
    auto model = std::make_unique<vit::Vit>(tiny_vit(), build);
    tuners::apply_spec(*model, kUTuning);
    return model;
  };
  const train::MemoryPlan plan = train::plan_memory(make, {4, 8, 8, 3}, {.evaluation_batch = 8});
  const train::MemoryPlan there = train::plan_memory(make, {4, 8, 8, 3}, {.evaluation_batch = 8, .device = kCuda});
  CHECK(there.weights == plan.weights);
  CHECK(there.gradients == plan.gradients);
  CHECK(there.optimizer == plan.optimizer);
  // drop_path keeps its draws on the CPU and on meta, their counter on the device.
  CHECK(there.activations <= plan.activations);
  CHECK(static_cast<double>(there.activations) >= 0.98 * static_cast<double>(plan.activations));
  CHECK(static_cast<double>(there.peak) <= 1.1 * static_cast<double>(plan.peak));
}

TEST_CASE("a tensor of another device than the model is an error that names both") {
  if (no_device()) return;
  vit::Vit model(tiny_vit(), {.device = kCuda});
  const NoGrad off;
  const std::string text = error_of([&] { model(zeros({1, 8, 8, 3})); });
  CHECK(contains(text, "cuda:0"));
  CHECK(contains(text, "cpu"));
}
