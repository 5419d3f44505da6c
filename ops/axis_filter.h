// y = A x along one axis, with a sparse A that a few numbers describe: interpolation, sliding averages, bins. Resizing
// and average pooling apply one per image axis.
//
// dtypes  f32, f64; bf16 and f16 through f32 (CPU). Weights are computed in f64 on the host: for every call, or once
//         per filter and CUDA device, where they stay.
// grad    the transposed filter, which is an axis_filter again: all orders, nothing kept. Each output is summed by one
//         thread in the order of its taps.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

enum class FilterKind : int {
  nearest,  // x[floor(i in / out)], the product in f32 as in PyTorch
  linear,   // half-pixel centres (or align_corners); antialias: a triangle stretched by in / out when that is > 1
  cubic,    // Keys' kernel, a = -0.75, edges repeated; antialias: a = -0.5, stretched, renormalised at the edges
  window,   // mean of x[i stride - padding : + kernel]; count_padding: divided by kernel, else by the part inside
  bins      // mean of x[floor(i in / out) : ceil((i + 1) in / out)]
};

struct AxisFilter {
  FilterKind kind = FilterKind::nearest;
  std::int64_t in = 0, out = 0;  // A is [out, in]
  bool antialias = false, align_corners = false;
  std::int64_t kernel = 0, stride = 0, padding = 0;
  bool count_padding = true;
  bool transposed = false;  // apply A^T: [in, out]
};

// x has A's columns on the axis, y its rows. Throws when they differ, and on an empty row of A.
Tensor axis_filter(const Tensor& x, std::int64_t axis, const AxisFilter& filter);

// A in compressed rows: y[r] = sum over t in [begin[r], begin[r + 1]) of weight[t] x[column[t]]. x and y are seen as
// [outer, axis, inner]; one item per (outer, row).
struct AxisFilterArgs {
  DType dtype;
  const void* x;
  void* y;
  const std::int64_t *begin, *column;
  const void* weight;  // of dtype; CUDA: f32
  std::int64_t columns, rows, inner;
};

}  // namespace capo
