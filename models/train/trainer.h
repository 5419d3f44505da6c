// The training loop: accumulation, clipping, schedule, averages, validation, logs, crash-safe checkpoints, exact
// resume.
//
//   train::ClassifierOf classifier(model);  // model: an nn::Module with Tensor operator()(const Tensor&)
//   train::ClassificationTask task(classifier, 0.1);
//   train::Trainer trainer(task, train_source, &test_source, {.epochs = 100, .schedule = {.lr = 1e-3}});
//   trainer.run();
//
// With the same options, data and thread-count-independent ops, a run that was stopped or killed anywhere and resumed
// from its checkpoint gives the same bits as one that never stopped. The library never prints: progress goes through
// callbacks (examples/progress.h draws it).
#pragma once

#include <capo/models/train/batch.h>
#include <capo/models/train/checkpoint.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace capo::train {

struct Metrics {
  double loss = 0;
  double top1 = 0, top5 = 0;  // shares in [0, 1] (classification)
  std::int64_t samples = 0;
  double score = 0;  // greater is better; what "best" compares
};

// What is trained: a module and a loss.
class Task {
 public:
  virtual ~Task() = default;
  virtual nn::Module& module() = 0;
  // The batch's mean loss, one element. Deterministic up to the module's generators.
  virtual Tensor loss(const Batch& batch) = 0;
  // One pass over the source. Called under NoGrad with the module in eval mode; the source is at (0, 0).
  virtual Metrics evaluate(BatchSource& source) = 0;
};

// Images to logits [N, K].
class Classifier {
 public:
  virtual ~Classifier() = default;
  virtual Tensor forward(const Tensor& x) = 0;
  virtual nn::Module& module() = 0;
};

// Any module with Tensor operator()(const Tensor&).
template <class M>
class ClassifierOf final : public Classifier {
 public:
  explicit ClassifierOf(M& model) : model_(model) {}
  Tensor forward(const Tensor& x) override { return model_(x); }
  nn::Module& module() override { return model_; }

 private:
  M& model_;
};

// Cross entropy, mean over the batch, against the labels or the batch's soft targets; label smoothing s mixes both with
// the uniform distribution: (1 - s) target + s / K (leave it 0 where the loader smooths its soft targets already).
// Logits in bf16 or f16 are taken to f32 first.
Tensor classification_loss(const Tensor& logits, const Batch& batch, double label_smoothing = 0);
// Loss (without smoothing), top-1 and top-5. Equal logits: the lower class wins. score = top-1.
Metrics evaluate_classifier(Classifier& classifier, BatchSource& source);

class ClassificationTask final : public Task {
 public:
  explicit ClassificationTask(Classifier& classifier, double label_smoothing = 0);
  nn::Module& module() override { return classifier_.module(); }
  Tensor loss(const Batch& batch) override {
    return classification_loss(classifier_.forward(batch.x), batch, smoothing_);
  }
  Metrics evaluate(BatchSource& source) override { return evaluate_classifier(classifier_, source); }

 private:
  Classifier& classifier_;
  double smoothing_;
};

// After each optimiser step.
struct Progress {
  std::int64_t epoch, epochs;
  std::int64_t batch, batches;  // done in this epoch, of
  std::int64_t step, steps;     // optimiser steps done, of
  double loss;                  // of this step
  double lr, grad_norm;         // the norm before clipping
  double images_per_s;          // smoothed
  double wait_share;            // of the time spent waiting for data
  double eta_seconds;           // to the end of the run, validation included once it was timed
  std::int64_t live_bytes, peak_bytes;  // of the device's allocator
};

// After each epoch.
struct EpochReport {
  std::int64_t epoch, step;
  double train_loss;
  bool validated;
  Metrics validation;
  bool best;  // the best score so far
  double seconds;
};

struct TrainOptions {
  std::int64_t epochs = 10;
  std::int64_t accumulate = 1;  // batches per optimiser step; the last step of an epoch may have fewer
  OptimizerKind optimizer = OptimizerKind::adamw;
  AdamWOptions adamw = {};
  SgdOptions sgd = {};
  MuonOptions muon = {};
  Schedule schedule = {};    // total_steps 0: all epochs' steps
  double warmup_epochs = 0;  // used when schedule.warmup_steps is 0
  double clip_norm = 0;      // 0: off
  double ema_decay = 0;      // 0: off; validation then runs on the averages
  bool ema_warm_up = false;
  // Multiplies the loss before backward, and the gradients are divided by it: for f16, whose small gradients vanish
  // otherwise. 0: off. This is where it starts (65536 is usual; a power of two): a gradient that is not finite skips
  // the step and halves it, down to 1, and 2000 steps without one double it. Losses must be f32. A skipped step counts
  // in Position::step, not in Optimizer::steps().
  double loss_scale = 0;
  // Steps as one captured graph (engine/graph.h), CUDA only: the first step runs as usual, then full steps are
  // replayed; a step with fewer batches or samples runs as usual. The same bits either way. The loss may change nothing
  // on the host and read nothing from the device; parameters must not be frozen, replaced or moved between steps.
  bool graph = false;
  std::uint64_t seed = 0;    // recorded; a checkpoint of another seed is refused
  std::string memory_plan = "";  // to_string(MemoryPlan): stands beside what is held when a step finds no memory
  std::string settings = ""; // likewise: any text that names the data, the batch size, the model, ...

  std::string checkpoint_dir = "";   // empty: none
  double checkpoint_seconds = 600;   // between checkpoints inside an epoch; one follows each epoch anyway
  bool resume = true;                // from checkpoint_dir, when it holds one
  std::int64_t validate_every = 1;   // epochs
  std::int64_t log_every = 10;       // steps between rows of the files below
  std::string csv = "";              // step,epoch,kind,lr,loss,grad_norm,top1,top5,images_per_s
  std::string tensorboard_dir = "";
  std::int64_t max_steps = 0;        // > 0: stop (saved, resumable) once so many optimiser steps are done in all

  void (*on_progress)(const Progress&, void* user) = nullptr;
  void (*on_epoch)(const EpochReport&, void* user) = nullptr;
  void* user = nullptr;
};

struct TrainResult {
  bool stopped = false;  // by request_stop() or max_steps, before the end
  Position position;
  std::vector<EpochReport> epochs;  // of this call
  std::string resumed_from = "";    // a file, or empty
};

class Trainer {
 public:
  // validation may be null. Task and sources must outlive the trainer.
  Trainer(Task& task, BatchSource& train, BatchSource* validation, const TrainOptions& options);
  ~Trainer();

  // To the end, or until stopped; then saved. May be called once. An OutOfMemory names what the step holds, by module.
  // A loss or gradient that is not finite throws before the step is taken, naming the step and the first op (and its
  // module) whose output is not finite, or the first parameter whose gradient is not.
  TrainResult run();

  // Finishes the step, saves and returns from run(). Async-signal-safe; from any thread.
  void request_stop() noexcept { stop_.store(true, std::memory_order_relaxed); }

  Optimizer& optimizer() { return *optimizer_; }
  Ema* ema() { return ema_.get(); }
  const Schedule& schedule() const { return schedule_; }

 private:
  struct Logs;
  struct Captured;
  TrainState state();
  void save();
  // `count` batches and one optimiser step; returns the mean loss.
  double step(std::int64_t count);
  Batch next_batch(double& waited);
  void account(const Batch& batch, double loss);
  bool scaling() const { return options_.loss_scale > 0; }
  // Forward and backward of one of `count` batches; returns its loss. grad_norm_ is that of the gradients so far.
  double forward_backward(const Batch& batch, std::int64_t count);
  void update();                 // the optimiser and the averages, from the gradients in the slots
  void next_loss_scale(bool clean);
  bool take_graph(const std::vector<Batch>& batches);
  void capture(const std::vector<Batch>& batches);
  double replay(const std::vector<Batch>& batches);  // returns the sum of the losses
  void end_epoch(TrainResult& result);
  [[noreturn]] void fail_out_of_memory(const OutOfMemory& error);
  [[noreturn]] void fail_not_finite(const char* what, double value, const Batch& batch,
                                    const std::vector<std::uint64_t>& offsets);

  Task& task_;
  BatchSource& train_;
  BatchSource* validation_;
  const TrainOptions options_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<Ema> ema_;
  Schedule schedule_;
  std::string settings_;
  std::vector<std::pair<std::string, Generator*>> generators_;
  std::unique_ptr<Checkpointer> checkpointer_;
  std::unique_ptr<Logs> logs_;
  std::unique_ptr<Captured> captured_;
  std::vector<Shape> warm_;     // of the largest step that ran as usual: what a capture needs to have seen
  Position at_;
  bool ran_ = false;
  std::atomic<bool> stop_{false};
  static_assert(std::atomic<bool>::is_always_lock_free);

  double lr_ = 0, grad_norm_ = 0;           // of the newest step
  double step_seconds_ = 0, wait_seconds_ = 0, images_ = 0;  // smoothed, per step
  double validation_seconds_ = 0;
  double epoch_seconds_ = 0;
};

}  // namespace capo::train
