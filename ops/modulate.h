// What conditions a residual branch: adaptive layer norm's shift, scale and gate (Peebles and Xie 2023, DiT) and
// layer-scale (Touvron et al. 2021), each in one pass over x.
//
//   modulate  y = x * (1 + scale) + shift
//   gate      y = residual + g * x
//
// x         [B, .., C], rank >= 1, any strides; y has x's shape. residual: x's shape
// scale, shift, g   [B, C], one row for each sample, or [C], one for all; scale and shift alike
// dtypes    one for all: f32, f64; bf16 and f16, computed in f32
// grad      every input. Keeps x for the gradient of scale (g), and scale (g) for that of x. The gradients of scale,
//           shift and g are summed over fixed chunks of a sample's rows, then over the chunks. Second order through the
//           composite.
// throws    on other shapes, mixed dtypes or devices.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

Tensor modulate(const Tensor& x, const Tensor& shift, const Tensor& scale);
Tensor gate(const Tensor& x, const Tensor& g, const Tensor& residual);

// y = x * (base + scale) + (shift or residual) over x [samples, rows, columns]. Work item: one row.
struct ModulateArgs {
  DType dtype;  // of all
  double base;  // 1 for modulate, 0 for gate
  const void *x, *scale;
  const void* shift;     // [samples, columns] like scale; or null, then
  const void* residual;  // like x
  void* y;
  std::int64_t samples, rows, columns;
};

// Work item: kModulateChunk rows of one sample, whose dscale and dshift become one row of the partial sums.
inline constexpr std::int64_t kModulateChunk = 64;
struct ModulateBackwardArgs {
  DType dtype;
  double base;
  const void *x, *dy, *scale;       // x: null without dscale_part; scale: null without dx
  void* dx;                         // or null
  void *dscale_part, *dshift_part;  // [samples, chunks, columns], f32 (f64 for f64); each or null
  std::int64_t samples, rows, columns;
};

}  // namespace capo
