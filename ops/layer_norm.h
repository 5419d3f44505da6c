// Normalisation over the last axis: layer_norm (Ba et al. 2016) and rms_norm (Zhang and Sennrich 2019).
//
//   layer_norm  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias    biased variance, as PyTorch
//   rms_norm    y = x / sqrt(mean(x^2) + eps) * weight
//
// x        [..., C], rank >= 1, any strides (copied when not contiguous); y has x's shape and dtype, but for f32
//          streams
// weight   [C] or undefined (ones); bias [C] or undefined (zeros). Either also [B, C], a row for each sample: with
//          1 + scale and shift that is adaptive layer norm (Peebles and Xie 2023). Both alike
// eps      > 0
// dtypes   f32, f64; bf16 and f16 with weights of the same type or f32, computed in f32. Statistics are
//          f32 (f64 for f64), with a two-pass variance: a mean of 10,000 costs no digits.
// streams  x may be f32 beside a bf16 or f16 weight or bias: a residual stream that keeps its digits (CPU: through f32
//          copies). y, the input of 16-bit products, is then of theirs
// grad     x, weight, bias. Keeps x, one mean and one rstd per row, and weight if x needs a gradient; nothing for a
//          bias alone. dweight and dbias are summed over fixed chunks of rows. Second order through the composite.
// throws   on a weight or bias of another shape, mixed dtypes or devices, eps <= 0.
//
// add_layer_norm and add_rms_norm are a transformer's residual step in one kernel: sum = x + r and y = norm(sum), both
// in x's dtype, with the values of add followed by the norm. x and r must have one shape, dtype and device. The
// gradient reads dsum and dy (either may be missing) and writes one tensor that is both dx and dr. Keeps sum in place
// of x. Or x is an f32 stream and r bf16 or f16: sum is then f32 and unrounded, y of r's dtype, weight and bias of r's
// or f32; dx is f32, dr of r's dtype, both written at once.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

Tensor layer_norm(const Tensor& x, const Tensor& weight = {}, const Tensor& bias = {}, double eps = 1e-6);
Tensor rms_norm(const Tensor& x, const Tensor& weight = {}, double eps = 1e-6);

struct AddNorm {
  Tensor sum, y;
};
AddNorm add_layer_norm(const Tensor& x, const Tensor& r, const Tensor& weight = {}, const Tensor& bias = {},
                       double eps = 1e-6);
AddNorm add_rms_norm(const Tensor& x, const Tensor& r, const Tensor& weight = {}, double eps = 1e-6);

// Work item: one row.
struct LayerNormArgs {
  DType dtype;         // of x and sum
  DType weight_dtype;  // of weight and bias
  bool rms;
  const void *x, *weight, *bias;  // weight, bias: or null
  void* y;
  void *mean, *rstd;  // [rows], f32 (f64 for f64); null when not kept; mean unused by rms
  std::int64_t rows, columns;
  double eps;
  const void* residual = nullptr;  // or null; else x + residual is written to sum and normalised
  void* sum = nullptr;
  std::int64_t samples = 1;  // rows of weight and bias; each serves rows / samples rows of x
  DType y_dtype = dtype;     // of y and residual: dtype, or on CUDA bf16 or f16 beside f32
};

// Work item: kLayerNormChunk rows of one sample, whose dweight and dbias become one row of the partial sums.
inline constexpr std::int64_t kLayerNormChunk = 64;
struct LayerNormBackwardArgs {
  DType dtype;         // of x, dsum and dx
  DType weight_dtype;
  bool rms;
  const void *x, *dy, *weight;        // weight: or null
  const void *mean, *rstd;            // as kept
  void* dx;                           // or null
  void *dweight_part, *dbias_part;    // [chunks, columns], f32 (f64 for f64); each or null
  std::int64_t rows, columns;
  void *dweight = nullptr, *dbias = nullptr;  // [samples, columns], the parts' sums in weight_dtype: on CUDA; or null
  const void* dsum = nullptr;  // what else reaches x: added to dx; or null
  std::int64_t samples = 1;
  DType y_dtype = dtype;  // of dy and dr: dtype, or on CUDA bf16 or f16 beside f32
  void* dr = nullptr;     // dx once more in y_dtype; or null
};

}  // namespace capo
