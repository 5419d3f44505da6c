#include <capo/models/train/memory_plan.h>
#include <capo/ops/copy.h>

#include <algorithm>
#include <cstdio>
#include <map>

namespace capo::train {
namespace {

std::int64_t live(Device device) { return allocator(device).stats().live_bytes; }

std::int64_t grad_bytes(const Optimizer& optimizer) {
  std::int64_t bytes = 0;
  for (const nn::Parameter* p : optimizer.parameters())
    if (const Tensor g = grad_of(p->value()); g.defined())
      bytes += static_cast<std::int64_t>(rounded_bytes(g.storage()->bytes()));
  return bytes;
}

}  // namespace

MemoryPlan run_memory(ModelFactory make, void* user, const Shape& x, const MemoryOptions& options) {
  const Device device = options.device;
  MemoryPlan plan;
  const std::int64_t base = live(device);
  nn::Build build;
  build.seed = options.seed;
  build.dtype = options.dtype;
  build.device = device;
  const auto model = make(build, user);
  plan.weights = live(device) - base;
  nn::Module& module = model->classifier().module();
  module.train(true);
  std::vector<Tensor> weights;
  for (nn::Parameter* p : module.parameters(true)) weights.push_back(p->value());

  const std::unique_ptr<Optimizer> optimizer = make_optimizer(options.optimizer, module);
  plan.optimizer = optimizer->state_bytes();

  for (int step = 0; step < 2; ++step) {
    allocator(device).reset_peak();
    for (std::int64_t i = 0; i < options.accumulate; ++i) {
      const std::int64_t before = live(device);
      const Batch batch{zeros(x, options.dtype, device), zeros({x[0]}, i64, device), {}};
      plan.input = live(device) - before;
      Tensor loss;
      {
        const SavedBytes saved(weights);
        loss = classification_loss(model->classifier().forward(batch.x), batch);
        plan.activations = saved.total();
        plan.rows = saved.rows();
      }
      backward(loss, options.accumulate == 1 ? Tensor() : full(loss.shape(), 1, loss.dtype(), device));
    }
    plan.gradients = grad_bytes(*optimizer);
    optimizer->step(0.0);
    optimizer->zero_grad();
    plan.peak = allocator(device).stats().peak_bytes - base;
  }
  if (options.evaluation_batch > 0) {
    const NoGrad off;
    module.train(false);
    allocator(device).reset_peak();
    const std::int64_t before = live(device);
    Shape shape = x;
    shape[0] = options.evaluation_batch;
    const Batch batch{zeros(shape, options.dtype, device), zeros({shape[0]}, i64, device), {}};
    model->classifier().forward(batch.x);
    const std::int64_t peak = allocator(device).stats().peak_bytes;
    plan.evaluation = peak - before;
    plan.peak = std::max(plan.peak, peak - base);
  }
  return plan;
}

std::string to_string(const MemoryPlan& plan, int most) {
  std::string out;
  char line[256];
  const auto add = [&](const char* name, std::int64_t bytes) {
    std::snprintf(line, sizeof line, "%-48s %12.2f MiB\n", name, static_cast<double>(bytes) / 1048576.0);
    out += line;
  };
  add("weights", plan.weights);
  add("gradients", plan.gradients);
  add("optimizer state", plan.optimizer);
  add("input", plan.input);
  add("activations kept for backward", plan.activations);
  std::map<std::string, std::int64_t> modules;
  for (const auto& row : plan.rows) modules[row.module] += row.bytes;
  std::vector<std::pair<std::string, std::int64_t>> sorted(modules.begin(), modules.end());
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
  for (std::size_t i = 0; i < sorted.size() && i < static_cast<std::size_t>(most); ++i)
    add(cat("  ", sorted[i].first.empty() ? "(model)" : sorted[i].first).c_str(), sorted[i].second);
  if (plan.evaluation > 0) add("evaluation", plan.evaluation);
  add(plan.evaluation > 0 ? "peak of a step or the evaluation" : "peak of a step", plan.peak);
  return out;
}

}  // namespace capo::train
