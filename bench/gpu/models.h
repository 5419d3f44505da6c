// The training steps that are measured, by name; bench/gpu/peer.py has the same in PyTorch.
#pragma once

#include <capo/bench/gpu/harness.h>
#include <capo/engine/graph.h>
#include <capo/models/train/optim.h>
#include <capo/models/nn/module.h>

#include <functional>
#include <memory>
#include <string>

namespace capo::bench {

struct Row {
  // model: vit_b/16; resnet50; mobilenet_v2; unet2d, unet3d: nnU-Net's topology for a patch of `image`, base width 32
  const char *name, *model;
  int image, classes, batch;
  const char* spec;  // tuners/spec.h
  double checkpoint = 0;  // share of the blocks
};
inline constexpr const char* kUTuning =
    "blocks.*.attn: u_prefix(length=10); blocks.*.mlp: u_adapter(dim=40, on=x); head: train";
inline constexpr Row kRows[] = {
    {"vit_b16", "vit_b/16", 224, 1000, 256, "full"},
    {"vit_s16", "vit_s/16", 224, 1000, 256, "full"},
    {"vit_ti4", "vit_ti/4", 32, 200, 128, "full"},
    {"u_tuning_b16", "vit_b/16", 224, 100, 256, kUTuning},
    {"u_tuning_b16_checkpointed", "vit_b/16", 224, 100, 256, kUTuning, 1},
    {"u_tuning_b16_partly_checkpointed", "vit_b/16", 224, 100, 256, kUTuning, 0.6},
    {"resnet18_32", "resnet18", 32, 100, 1024, "full"},  // CIFAR's stem: one 3x3, no pooling
    {"resnet50", "resnet50", 224, 1000, 256, "full"},
    {"mobilenet_v2", "mobilenet_v2", 224, 1000, 256, "full"},
    {"unet2d", "unet2d", 256, 2, 32, "full"},
    {"unet3d", "unet3d", 64, 3, 8, "full"},
};
// Throws for other names.
const Row& row(const std::string& name);

// A model, its optimiser and a batch of random images.
class TrainStep {
 public:
  // tiny: a small model of the row's family, 32 px, batch 4.
  TrainStep(const Row& row, DType dtype, Device device, bool tiny, int batch = 0);
  void run();  // forward, loss, backward, AdamW; returns before the device is done
  // From now on run() replays the step as one graph, as the Trainer's graph option does, but for reading the loss. CUDA
  // only, after a first run().
  void capture();
  // From now on run() is the forward pass alone, in evaluation mode and unrecorded, batch norms worked into their
  // convolutions (nn::fold_batch_norms; torch.compile with freezing does that too); the loss is still there.
  void infer();
  double loss();  // of the newest step; waits

  std::int64_t batch() const { return images_.size(0); }
  std::int64_t parameters(bool trainable);
  // 6 x the multiply-adds of one image's forward pass, products, convolutions and attention alone.
  double flops_per_image() const { return flops_; }

 private:
  Tensor forward_loss();
  Tensor forward_backward();  // the loss

  std::unique_ptr<nn::Module> model_;
  std::function<Tensor(const Tensor&)> forward_;  // images to logits, one row a label
  double flops_ = 0;
  std::unique_ptr<train::AdamW> optimizer_;
  Tensor images_, labels_, loss_;
  bool forward_only_ = false;
  std::unique_ptr<Graph> graph_;
  GradVerdict verdict_;
};

}  // namespace capo::bench
