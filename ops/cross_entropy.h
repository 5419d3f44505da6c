// Cross entropy of logits against class indices or class probabilities. PyTorch's definitions.
//
//   loss(row) = -sum_c q_c log_softmax(logits)_c,    q = (1 - smoothing) target + smoothing / C
//
// logits   [..., C]; f32, f64; bf16 and f16 computed in f32 and rounded once (CPU: rows of more than 4,096 classes, and
//          a soft target that needs a gradient, by casting whole tensors)
// labels   i64 [...], the logits' shape without its last axis; each in [0, C) or ignore_index. On the CPU any other
//          value throws, on CUDA its row becomes NaN.
// target   [..., C], the logits' dtype; cross_entropy_soft only
// result   none: [...]; sum, mean: a scalar. Ignored rows give 0 and no gradient; mean divides by the number of rows
//          that are not ignored, so that it is NaN when all are.
// grad     logits; computed in the forward pass, (softmax - q) per row is kept instead of the logits: the second
//          derivative throws by name, use log_softmax for it. 16-bit logits on the CPU are kept instead, and the
//          gradient is computed in the backward pass, to be rounded once. cross_entropy_soft with a target that needs a
//          gradient is made of ops (both gradients, any order).
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

enum class Reduction : int { none, mean, sum, batchmean };  // batchmean: sum / size of the first axis, kl_div only

struct CrossEntropyOptions {
  double label_smoothing = 0;  // in [0, 1]
  std::int64_t ignore_index = -100;
  Reduction reduction = Reduction::mean;
};
Tensor cross_entropy(const Tensor& logits, const Tensor& labels, const CrossEntropyOptions& options = {});

// options.ignore_index is not used.
Tensor cross_entropy_soft(const Tensor& logits, const Tensor& target, const CrossEntropyOptions& options = {});

// Work item: one row.
struct CrossEntropyArgs {
  DType dtype;                // of logits, target and dlogits; loss and counted are f32 (f64 for f64)
  const void* logits;
  const std::int64_t* labels; // either labels
  const void* target;         // or target
  void* loss;                 // [rows]; on the CPU or null
  void* dlogits;              // [rows, columns]: the gradient of each row's loss; or null
  void* counted;              // [rows]: 0 for ignored rows, else 1; or null
  std::int64_t rows, columns, ignore_index;
  double smoothing;
  // CPU: what dlogits is multiplied by before it is rounded, of loss's type, row r's at r * upstream_step; or null.
  const void* upstream;
  std::int64_t upstream_step;
};

}  // namespace capo
