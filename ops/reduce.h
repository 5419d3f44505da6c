// Reductions over any set of axes. Empty `axes` means all. Negatives allowed; a repeated axis throws.
//
// dtypes  f32, f64; bf16, f16 summed in f32; sum also i32, i64, in that width, wrapping around. Accumulation in
//         chunks of fixed size, so the bits do not depend on the thread count.
// keepdim leaves reduced axes with size 1. The sum of nothing is 0, its mean NaN.
// grad    dy (mean: dy / count) at each element, any order; keeps nothing.
// max, min and the other statistics are in ops/stats.h, argmax and argmin in ops/index.h.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

Tensor sum(const Tensor& x, const Dims& axes = {}, bool keepdim = false);
Tensor mean(const Tensor& x, const Dims& axes = {}, bool keepdim = false);

// max and min give NaN when one is in the set; of an empty set the lowest or highest value.
enum class ReduceKind : int { sum, max, min };
// The values alone, not recorded, any ReduceKind; f32, f64, i32, i64. op names the caller in errors (ops/stats.h).
Tensor reduce_values(const char* op, ReduceKind kind, const Tensor& x, const Dims& axes, bool keepdim);

// One item per result and, on the CPU, part.
struct ReduceArgs {
  ReduceKind kind;
  DType dtype;                                          // of x; y's is the same, on the CPU f32 for 16-bit x
  const void* x;
  void* y;                                              // contiguous over the kept axes
  int kept, reduced;                                    // ranks, each >= 1 after padding with size 1
  std::int64_t kept_shape[kMaxDims], kept_strides[kMaxDims];
  std::int64_t reduced_shape[kMaxDims], reduced_strides[kMaxDims];
  std::int64_t count;                                   // elements reduced into one
  // Part k reduces elements [k length, (k + 1) length) of each output. CPU: y is [parts, outputs], one item per value;
  // the parts are joined by another launch.
  std::int64_t parts, length;
  // CUDA alone (plan_on_device in reduce.cpp).
  double scale;                                         // of a floating result
  bool columns, packed;                                 // threads run along the outputs first; reads of 16 bytes
  int across;                                           // columns: threads of a block side by side, a power of two
  void* work;                                           // [outputs, parts] when parts > 1; f32 for 16-bit x
};

}  // namespace capo
