// What a training step will hold, told before it runs.
//
//   const MemoryPlan plan = train::plan_memory([](const nn::Build& b) { return make_vit(b); }, {64, 224, 224, 3});
//   plan.peak, plan.weights, plan.activations, ...
//
// The plan is the real forward, backward and optimiser step, run on the meta device: the same ops ask the same sizes of
// an allocator that only counts. Run on the CPU, the same function measures.
#pragma once

#include <capo/models/train/trainer.h>

#include <memory>
#include <string>
#include <vector>

namespace capo::train {

struct MemoryPlan {
  std::int64_t weights = 0;      // parameters and buffers, trainable or not
  std::int64_t gradients = 0;
  std::int64_t optimizer = 0;    // moments and masters
  std::int64_t input = 0;        // the batch
  std::int64_t activations = 0;  // kept by the tape between forward and backward, the batch's included where it is kept
  std::int64_t evaluation = 0;   // highest live bytes of an evaluation, without weights and optimizer; 0: not asked for
  std::int64_t peak = 0;         // highest live bytes of a step, or of the evaluation, with all that is live then
  std::vector<SavedBytes::Row> rows;  // of activations: per module path and op
};
// A table of the sums and the `most` largest modules.
std::string to_string(const MemoryPlan& plan, int most = 12);

struct MemoryOptions {
  OptimizerKind optimizer = OptimizerKind::adamw;
  std::int64_t accumulate = 1;
  std::int64_t evaluation_batch = 0;  // > 0: between steps the trainer evaluates, so many samples at once
  Device device = kMeta;  // kMeta: plan. kCpu, cuda: measure; nothing else should allocate there meanwhile
  DType dtype = f32;      // of the model and the input
  std::uint64_t seed = 0;
};

// A model that the factory built, with whatever it hangs on (tuners, freezes).
class PlannedModel {
 public:
  virtual ~PlannedModel() = default;
  virtual Classifier& classifier() = 0;
};
using ModelFactory = std::unique_ptr<PlannedModel> (*)(const nn::Build& build, void* user);

// Two steps of cross entropy on a batch of zeros with shape x (the second one finds the optimiser's state warm), and a
// forward in eval mode under NoGrad where evaluation_batch asks for one.
MemoryPlan run_memory(ModelFactory make, void* user, const Shape& x, const MemoryOptions& options);

// make: std::unique_ptr<M>(const nn::Build&), M an nn::Module with Tensor operator()(const Tensor&).
template <class Make>
MemoryPlan plan_memory(Make&& make, const Shape& x, const MemoryOptions& options = {}) {
  using Owner = decltype(make(nn::Build{}));
  using M = typename Owner::element_type;
  struct Planned final : PlannedModel {
    explicit Planned(Owner m) : model(std::move(m)), adapter(*model) {}
    Classifier& classifier() override { return adapter; }
    Owner model;
    ClassifierOf<M> adapter;
  };
  return run_memory(
      [](const nn::Build& build, void* user) -> std::unique_ptr<PlannedModel> {
        return std::make_unique<Planned>((*static_cast<std::remove_reference_t<Make>*>(user))(build));
      },
      const_cast<void*>(static_cast<const void*>(&make)), x, options);
}

}  // namespace capo::train
