// Batches from tensors held in memory: small sets, cached features.
#pragma once

#include <capo/models/train/batch.h>

namespace capo::train {

// Rows of x [N, ...] and labels i64 [N] in batches, shuffled anew each epoch from (seed, epoch) unless seed is 0;
// on the device that holds them.
class TensorSource final : public BatchSource {
 public:
  TensorSource(const Tensor& x, const Tensor& labels, std::int64_t batch_size, std::uint64_t shuffle_seed = 0);
  std::int64_t batches_per_epoch() const override;
  Batch next() override;
  void seek(std::int64_t epoch, std::int64_t batch) override;

 private:
  void order_epoch();
  Tensor x_, labels_, order_;
  std::int64_t batch_size_, epoch_ = 0, batch_ = 0;
  std::uint64_t seed_;
};

}  // namespace capo::train
