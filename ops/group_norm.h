// group_norm (Wu and He 2018) and instance_norm (Ulyanov et al. 2016), channels last; and the kernels that batch_norm
// shares with them.
//
//   group_norm     y = (x - mean) / sqrt(var + eps) * weight + bias, statistics over all spatial axes x C/groups, per sample
//   instance_norm  statistics over the spatial axes, per sample and channel (group_norm with groups = C)
//
// x        [B, spatial..., C], rank >= 2, any strides (copied when not contiguous); y has x's shape and dtype
// weight   [C] or undefined (ones); bias [C] or undefined (zeros)
// groups   >= 1, divides C: group g holds channels [g C/groups, (g + 1) C/groups)
// eps      > 0; the variance is the biased one
// dtypes   f32, f64; bf16 and f16 with weights of the same type or f32 (CPU: through f32 copies). Statistics are f32 (f64
//          for f64): two passes over chunks of rows, joined with Chan's formula, so that a large mean costs no digits.
// grad     x, weight, bias. Keeps x, one mean and one rstd per group, and weight if x needs a gradient; nothing for a bias alone.
//          Second order through the composite.
// throws   on a weight or bias that is not [C], groups that do not divide C, mixed dtypes or devices, eps <= 0; instance_norm
//          on one spatial position per channel (nothing is left after subtracting the mean), as PyTorch.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

Tensor group_norm(const Tensor& x, std::int64_t groups, const Tensor& weight = {}, const Tensor& bias = {}, double eps = 1e-5);
Tensor instance_norm(const Tensor& x, const Tensor& weight = {}, const Tensor& bias = {}, double eps = 1e-5);

// x seen as [outer, rows, columns], statistics per (outer, group of columns). group_norm: outer = B; batch_norm: outer = 1.
namespace detail {
struct ChannelMoments {
  Tensor mean, var, rstd;  // [outer, groups], f32 (f64 for f64); var is biased
};
// Arguments are checked. moments receives the statistics when not null.
Tensor channel_norm(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, std::int64_t outer,
                    std::int64_t groups, double eps, ChannelMoments* moments = nullptr);
// (x - mean) * rstd * weight + bias with given statistics [columns], which are constants for the gradient.
Tensor channel_affine(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                      const Tensor& rstd);
}  // namespace detail

// Rows per chunk of the reductions on the CPU (CUDA: by the sizes, so that the device is filled); part_* hold one row of
// [columns] per chunk: [outer, chunks, columns].
inline constexpr std::int64_t kChannelChunk = 64;

struct ChannelNormArgs {
  DType dtype;         // of x and y; statistics are f32 (f64 for f64)
  DType weight_dtype;
  const void *x, *weight, *bias;   // weight, bias: or null
  void* y;
  void *part_mean, *part_m2;       // per chunk and column: mean (f64 on CUDA: rounded once, when joined) and sum of squared
                                   // deviations from it
  void *mean, *var, *rstd;         // [outer, groups]
  std::int64_t outer, rows, columns, groups;
  double eps;
  std::int64_t chunk;              // rows per chunk
};
// group_norm_partial: x -> part_*          item: one chunk (outer * chunks)
// group_norm_moments: part_* -> mean, ...  item: one group (outer * groups)
// group_norm_apply:   x, mean, rstd -> y   item: one chunk

struct ChannelNormBackwardArgs {
  DType dtype;
  DType weight_dtype;
  const void *x, *dy, *weight;        // x: null when no gradient reads it; weight: or null
  const void *mean, *rstd;            // [outer, groups]
  void *part_dy, *part_dyx;           // per chunk and column: sum of dy and of dy (x - mean); part_dyx or null
  void *shift, *slope;                // [outer, groups]: mean(g) and mean(g (x - mean)) rstd^2, g = dy weight; or null
  void *dweight, *dbias;              // [outer, columns], to be summed over outer; each or null
  void* dx;                           // rstd (g - shift - (x - mean) slope)
  std::int64_t outer, rows, columns, groups;
  std::int64_t chunk;                 // rows per chunk
};
// group_norm_dots:   dy, x -> part_*             item: one chunk
// group_norm_sums:   part_* -> shift, slope, ... item: one group
// group_norm_dx:     dy, x, shift, slope -> dx   item: one chunk

}  // namespace capo
