// The memory plan against what a step really holds, per tuner; and what tuning does not keep.
#include <doctest/doctest.h>

#include <capo/engine/allocator.h>
#include <capo/models/train/memory_plan.h>
#include <capo/models/train/optim.h>
#include <capo/models/vit/vit.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>
#include <capo/tuners/presets.h>
#include <capo/tuners/spec.h>

#include <cmath>
#include <memory>
#include <string>

using namespace capo;

namespace {

// ViT-S, two blocks: small enough for CI, large enough that no rounding decides.
vit::VitConfig config() {
  vit::VitConfig c = vit::config("vit_s", 112, 16, 100);
  c.depth = 2;
  return c;
}
constexpr std::int64_t kBatch = 8;

train::MemoryPlan plan(const std::string& spec, Device device, double checkpointed = 0) {
  train::MemoryOptions options;
  options.device = device;
  return train::plan_memory(
      [&](const nn::Build& build) {
        vit::VitConfig c = config();
        c.checkpoint = checkpointed;
        auto model = std::make_unique<vit::Vit>(c, build);
        tuners::apply_spec(*model, spec);
        return model;
      },
      {kBatch, 112, 112, 3}, options);
}

}  // namespace

TEST_CASE("the plan is what happens") {
  for (const auto& method : tuners::kMethods) {
    for (const double checkpointed : {0.0, 0.5, 1.0}) {
      if (checkpointed > 0 && std::string(method.name) != "full" && std::string(method.name) != "lora") continue;
      const train::MemoryPlan told = plan(method.spec, kMeta, checkpointed),
                              held = plan(method.spec, kCpu, checkpointed);
      const std::string name = cat(method.name, " checkpointed ", checkpointed);
      CHECK_MESSAGE(told.weights == held.weights, name);
      CHECK_MESSAGE(told.gradients == held.gradients, name);
      CHECK_MESSAGE(told.optimizer == held.optimizer, name);
      CHECK_MESSAGE(told.input == held.input, name);
      CHECK_MESSAGE(told.activations == held.activations, name);
      CHECK_MESSAGE(std::abs(static_cast<double>(told.peak - held.peak)) <= 0.05 * static_cast<double>(held.peak),
                    name << ": planned " << told.peak << ", held " << held.peak);
    }
  }
}

TEST_CASE("linear tuning keeps nothing in the backbone") {
  const train::MemoryPlan p = plan("linear", kMeta);
  for (const auto& row : p.rows)
    CHECK_MESSAGE((row.bytes == 0 || row.module.empty() || row.module == "head"), row.module << " " << row.op);
  CHECK(p.activations < 2 * kBatch * (384 + 100) * 4 + 1024);
  CHECK(p.gradients <= (384 * 100 + 100) * 5);  // 4 bytes each, rounded to the allocator's sizes
}

TEST_CASE("parameter-efficient tuning keeps less than full tuning") {
  const train::MemoryPlan full = plan("full", kMeta);
  for (const char* name : {"lora", "adapter-ffn", "prefix-attn", "u-tuning", "bitfit"}) {
    const train::MemoryPlan p = plan(tuners::find_method(name)->spec, kMeta);
    CHECK_MESSAGE(p.activations < full.activations, std::string(name));
    CHECK_MESSAGE(p.peak < full.peak, std::string(name));
    CHECK_MESSAGE((p.gradients + p.optimizer) * 4 < full.gradients + full.optimizer, std::string(name));
  }
}

TEST_CASE("a warm training step takes nothing from the system: every block comes out of the cache") {
  for (const DType dtype : {f32, bf16}) {
    allocator(kCpu).release_all();
    vit::Vit model(config(), {.dtype = dtype});
    model.train();
    train::AdamW optimizer(model);
    Generator rng(1);
    const Tensor x = cast(rand_normal({kBatch, 112, 112, 3}, rng), dtype);
    const Tensor labels = from_vector(std::vector<std::int64_t>(kBatch, 3), {kBatch});
    const auto fresh = [] {
      const MemoryStats s = allocator(kCpu).stats();
      return s.allocations - s.cache_hits;
    };
    std::int64_t before = 0, first = 0;
    for (int step = 0; step < 5; ++step) {
      if (step == 2) before = fresh();
      if (step == 0) first = fresh();
      backward(cross_entropy(model(x), labels));
      optimizer.step(1e-4);
      optimizer.zero_grad();
      if (step == 0) CHECK(fresh() > first);  // the count can tell
    }
    CHECK_MESSAGE(fresh() == before, to_string(dtype));
  }
}

TEST_CASE("the backbone's memory comes back when the model goes") {
  const std::int64_t before = allocator(kCpu).stats().live_bytes;
  {
    vit::Vit model(config());
    tuners::apply_spec(model, "blocks.*.attn: lora(slices=qv); blocks.*.mlp: u_adapter(); head: train");
    tuners::detach_tuners(model);
    tuners::apply_spec(model, "blocks.*.attn: lora(slices=qv); head: train");
    backward(cross_entropy(model(zeros({2, 112, 112, 3})), zeros({2}, i64)));
    tuners::merge_tuners(model);
  }
  CHECK(allocator(kCpu).stats().live_bytes == before);
}
