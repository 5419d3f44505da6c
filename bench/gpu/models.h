// The training steps that are measured, by name; bench/gpu/peer.py has the same in PyTorch.
#pragma once

#include <capo/bench/gpu/harness.h>
#include <capo/engine/graph.h>
#include <capo/models/train/optim.h>
#include <capo/models/vit/vit.h>

#include <memory>

namespace capo::bench {

struct Row {
  const char *name, *size;
  int image, patch, classes, batch;
  const char* spec;  // tuners/spec.h
  bool checkpoint;
};
inline constexpr const char* kUTuning = "blocks.*.attn: u_prefix(length=10); blocks.*.mlp: u_adapter(dim=40, on=x); head: train";
inline constexpr Row kRows[] = {
    {"vit_b16", "vit_b", 224, 16, 1000, 256, "full", false},
    {"vit_s16", "vit_s", 224, 16, 1000, 256, "full", false},
    {"vit_ti4", "vit_ti", 32, 4, 200, 128, "full", false},
    {"u_tuning_b16", "vit_b", 224, 16, 100, 256, kUTuning, false},
    {"u_tuning_b16_checkpointed", "vit_b", 224, 16, 100, 256, kUTuning, true},
};
// Throws for other names.
const Row& row(const std::string& name);

// A model, its optimiser and a batch of random images.
class TrainStep {
 public:
  // tiny: two blocks of the smallest width, 32 px, batch 4.
  TrainStep(const Row& row, DType dtype, Device device, bool tiny, int batch = 0);
  void run();  // forward, loss, backward, AdamW; returns before the device is done
  // From now on run() replays the step as one graph, as the Trainer's graph option does, but for reading the loss. CUDA only, after
  // a first run().
  void capture();
  // From now on run() is the forward pass alone, in evaluation mode and unrecorded; the loss is still there.
  void infer();
  double loss();  // of the newest step; waits

  std::int64_t batch() const { return images_.size(0); }
  std::int64_t parameters(bool trainable);
  // 6 x the multiply-adds of one image's forward pass, products and attention alone.
  double flops_per_image() const;

 private:
  vit::VitConfig config_;
  vit::Vit model_;
  Tensor forward_backward();  // the loss
  std::unique_ptr<train::AdamW> optimizer_;
  Tensor images_, labels_, loss_;
  bool forward_only_ = false;
  std::unique_ptr<Graph> graph_;
  GradVerdict verdict_;
};

}  // namespace capo::bench
