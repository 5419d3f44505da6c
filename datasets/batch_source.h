// A Loader's host batches as the trainer's tensors.
#pragma once

#include <capo/datasets/loader.h>
#include <capo/models/train/batch.h>

namespace capo {

// x [N, H, W, C] in `dtype` on `device`, labels i64 [N], soft [N, K] f32 when the loader mixes.
class LoaderSource final : public train::BatchSource {
 public:
  LoaderSource(DatasetPtr set, const Preprocess& preprocess, const LoaderOptions& options, Device device = kCpu,
               DType dtype = f32);

  std::int64_t batches_per_epoch() const override { return loader_.batches_per_epoch(); }
  train::Batch next() override;
  void seek(std::int64_t epoch, std::int64_t batch) override { loader_.seek(epoch, batch); }
  Loader& loader() { return loader_; }

 private:
  Loader loader_;
  Device device_;
  DType dtype_;
};

}  // namespace capo
