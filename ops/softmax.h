// softmax and log_softmax along one axis, any axis.
//
//   softmax      y = exp(x - max) / sum exp(x - max)
//   log_softmax  y = x - max - log sum exp(x - max)
//
// x        any rank >= 1 and strides; the last axis needs no copy, others are moved there and back
// dtypes   f32, f64; bf16 and f16, computed in f32
// grad     softmax: dx = y (dy - sum(dy y)); log_softmax: dx = dy - exp(y) sum(dy). Keeps y only. Second order through
//          the same formulas as ops.
// A row that is all -infinity, or holds NaN or +infinity, gives NaN, as PyTorch.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

Tensor softmax(const Tensor& x, std::int64_t axis = -1);
Tensor log_softmax(const Tensor& x, std::int64_t axis = -1);

// Work item: one row.
struct SoftmaxArgs {
  DType dtype;
  bool log;
  const void* x;   // forward: x; backward: y
  const void* dy;  // backward only, else null
  void* y;         // forward: y; backward: dx
  std::int64_t rows, columns;
};

}  // namespace capo
