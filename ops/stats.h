// Extremes, moments, norms and running sums over axes. Axes and keepdim as in reduce.h: none named means all.
//
// dtypes  f32, f64; bf16 and f16 through f32 (max, min and cumsum: CPU only); max, min and cumsum also i32, i64.
//         Gradients are made of ops: all orders, except where a tie or a zero leaves none.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

// NaN when one is in the set; an empty set throws. grad: shared evenly among equals (torch.amax, amin).
Tensor max(const Tensor& x, const Dims& axes = {}, bool keepdim = false);
Tensor min(const Tensor& x, const Dims& axes = {}, bool keepdim = false);

// sum((x - mean)^2) / (n - correction), in two passes: safe for a large mean. NaN or infinite when n <= correction.
// grad: 2 (x - mean) / (n - correction); keeps x.
Tensor var(const Tensor& x, const Dims& axes = {}, bool keepdim = false, double correction = 1);

// log(sum(exp(x))), shifted by the maximum; -inf when all are -inf (gradient zero there) or the set is empty.
// grad: exp(x - y); keeps x and y.
Tensor logsumexp(const Tensor& x, const Dims& axes = {}, bool keepdim = false);

// sum(|x|), sqrt(sum(x^2)) or max(|x|) for p = 1, 2 or infinity. grad: at 0 zero; infinity shares as max does.
Tensor norm(const Tensor& x, double p = 2, const Dims& axes = {}, bool keepdim = false);

// y[i] = x[0] + .. + x[i] along the axis; reverse: x[i] + .. + x[n-1]. f32 and less is summed in f64.
// grad: the other direction.
Tensor cumsum(const Tensor& x, std::int64_t axis, bool reverse = false);

// One item per 64 columns of [outer, size, inner], contiguous: outer x ceil(inner / 64).
struct CumsumArgs {
  DType dtype;
  const void* x;
  void* y;
  std::int64_t size, inner;
  bool reverse;
};

}  // namespace capo
