// Batches from labelled volumes: patches to train on, prepared ahead by worker threads, and whole cases.
#pragma once

#include <capo/datasets/segmentation.h>
#include <capo/datasets/volume_augment.h>
#include <capo/models/train/batch.h>

#include <memory>
#include <optional>

namespace capo {

// Where patches are taken: nnU-Net's rule. Of a batch of n the last n - round(n (1 - foreground)) have a voxel of
// some class above 0 at their centre, or as near to it as the border allows (the class drawn among those the case
// has, then the voxel among at most 10,000 of them); all others lie anywhere. Patches stay inside the volume along
// each axis that is long enough; along shorter ones the volume is centred, and what is beyond it is up to
// VolumeAugment::border.
class PatchSampler {
 public:
  // foreground in [0, 1]; the set as check_segmentation_set wants it.
  PatchSampler(SegmentationSetPtr set, const Extent& patch, double foreground);

  struct Place {
    std::int64_t index = 0;   // of the case
    Extent start;             // of the patch's first voxel; may be negative where it is padded
    bool foreground = false;  // chosen by a labelled voxel
  };
  // For sample `i` of batch number `batch` of `n` each, all batches counted from 0. Each case comes once before one
  // comes again, in an order drawn anew each time.
  Place place(std::uint64_t seed, std::int64_t batch, std::int64_t i, std::int64_t n) const;

  const SegmentationSet& set() const { return *set_; }
  const Extent& patch() const { return patch_; }

 private:
  SegmentationSetPtr set_;
  Extent patch_;
  double foreground_;
  std::vector<std::vector<std::vector<std::int32_t>>> voxels_;  // [case][class that it has][place]
};

struct PatchOptions {
  Extent patch{1, 256, 256};  // z = 1: flat batches
  std::int64_t batch_size = 2;
  std::int64_t batches_per_epoch = 250;  // an epoch is as long as one likes, patches are drawn
  double foreground = 1.0 / 3;
  VolumeAugment augment = {};  // none by default
  std::uint64_t seed = 0;
  int workers = 1;   // threads; 0 prepares each batch inside next()
  int prefetch = 4;  // batches ready or in work at most, at least 1
};

// x f32 [N, D, H, W, C], or [N, H, W, C] for flat patches; labels i64 [N, D, H, W] or [N, H, W]; on the CPU
// (train::ToDevice takes them further). Bits depend on the set, the options and (epoch, batch) alone, never on
// `workers` or `prefetch`. Intensities are taken as they are: normalize_zscore the set first.
class PatchSource final : public train::BatchSource {
 public:
  // Throws when the set is unsound or an option out of range.
  PatchSource(SegmentationSetPtr set, const PatchOptions& options);
  ~PatchSource() override;

  std::int64_t batches_per_epoch() const override;
  train::Batch next() override;
  void seek(std::int64_t epoch, std::int64_t batch) override;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Whole cases one by one, for validation: x f32 [1, D, H, W, C] with labels i64 [1, D, H, W], or without D when the
// case is one slice. An epoch is every case in the set's order; sizes differ from case to case.
class CaseSource final : public train::BatchSource {
 public:
  explicit CaseSource(SegmentationSetPtr set);

  std::int64_t batches_per_epoch() const override { return static_cast<std::int64_t>(set_->cases.size()); }
  train::Batch next() override;
  void seek(std::int64_t epoch, std::int64_t batch) override;

 private:
  SegmentationSetPtr set_;
  std::int64_t at_ = 0;
};

}  // namespace capo
