// Where batches come from: declared here, implemented by datasets/ (batch_source.h) or by whoever has data.
#pragma once

#include <capo/engine/tensor.h>

#include <cstdint>

namespace capo::train {

struct Batch {
  Tensor x;       // [N, ...], on the model's device
  Tensor labels;  // i64 [N], same device
  Tensor soft;    // optional [N, K]: mixed targets, used in place of the labels
  std::int64_t size() const { return x.size(0); }
};

// Batches leave in order: (0, 0), (0, 1), ..., (1, 0), ... without end, and depend on (epoch, batch) alone.
class BatchSource {
 public:
  virtual ~BatchSource() = default;
  virtual std::int64_t batches_per_epoch() const = 0;
  virtual Batch next() = 0;
  // next() goes on with this batch; 0 <= batch < batches_per_epoch().
  virtual void seek(std::int64_t epoch, std::int64_t batch) = 0;
};

}  // namespace capo::train
