// group_norm (Wu and He 2018) and instance_norm (Ulyanov et al. 2016), channels last, with an activation in the same
// pass; and the kernels that batch_norm shares with them.
//
//   group_norm     y = act((x - mean) / sqrt(var + eps) * weight + bias), statistics over all spatial axes x C/groups,
//                  per sample
//   instance_norm  statistics over the spatial axes, per sample and channel (group_norm with groups = C)
//
// x        [B, spatial..., C], rank >= 2, any strides (copied when not contiguous); y has x's shape and dtype
// weight   [C] or undefined (ones); bias [C] or undefined (zeros)
// groups   >= 1, divides C: group g holds channels [g C/groups, (g + 1) C/groups)
// eps      > 0; the variance is the biased one
// act      none, relu or silu; slope: relu's below zero, so that relu with slope 0.01 is the usual leaky_relu
// Of batch_norm also ceiling: relu's greatest value where it is not 0; relu6 is relu with ceiling 6, whose slope is
// clamp's.
// dtypes   f32, f64; bf16 and f16 with weights of the same type or f32, computed in f32. Statistics are f32 (f64
//          for f64): two passes over chunks of rows, joined with Chan's formula, so that a large mean costs no digits.
// bits     on the CPU in f32 and f64 those of the norm followed by the activation, forward and backward. 16-bit values
//          are rounded once, after the activation.
// grad     x, weight, bias. Keeps x, one mean and one rstd per group, and weight if x needs a gradient; nothing for a
//          bias alone. What an activation saw is made again from these and the bias, and so is y where x is kept: who
//          saves y for its own gradient keeps nothing (set_recompute, autograd.h). For a bias alone silu keeps them
//          too; relu keeps y, which the next op mostly keeps anyway. Second order through the composite.
// throws   on a weight or bias that is not [C], groups that do not divide C, mixed dtypes or devices, eps <= 0, another
//          activation, a slope or ceiling without relu or both; instance_norm on one spatial position per channel
//          (nothing is left after subtracting the mean), as PyTorch.
//
//   Tensor h = group_norm(x, 32, weight, bias, 1e-5, Activation::silu);              // a U-Net's block
//   Tensor h = instance_norm(x, weight, bias, 1e-5, Activation::relu, 0.01);
#pragma once

#include <capo/engine/tensor.h>
#include <capo/ops/activation.h>

namespace capo {

Tensor group_norm(const Tensor& x, std::int64_t groups, const Tensor& weight = {}, const Tensor& bias = {},
                  double eps = 1e-5, Activation activation = Activation::none, double slope = 0);
Tensor instance_norm(const Tensor& x, const Tensor& weight = {}, const Tensor& bias = {}, double eps = 1e-5,
                     Activation activation = Activation::none, double slope = 0);

// x seen as [outer, rows, columns], statistics per (outer, group of columns). group_norm: outer = B;
// batch_norm: outer = 1.
namespace detail {
// What is done to the normalised values before they are written: y = act(norm + residual).
struct NormEpilogue {
  Activation activation = Activation::none;  // none, relu, silu
  double slope = 0;                          // relu's below zero
  double ceiling = 0;                        // relu's greatest value; 0: none
  Tensor residual = {};                      // x's shape, dtype and device; or undefined
};
void check_epilogue(const char* op, const Tensor& x, const NormEpilogue& epilogue);

struct ChannelMoments {
  Tensor mean, var, rstd;  // [outer, groups], f32 (f64 for f64); var is biased
};
// Arguments are checked. moments receives the statistics when not null.
Tensor channel_norm(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, std::int64_t outer,
                    std::int64_t groups, double eps, const NormEpilogue& epilogue, ChannelMoments* moments = nullptr);
// act((x - mean) * rstd * weight + bias + residual) with given statistics [columns], which are constants for the
// gradient.
Tensor channel_affine(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                      const Tensor& rstd, const NormEpilogue& epilogue);
}  // namespace detail

// Rows per chunk of the reductions on the CPU (CUDA: by the sizes, so that the device is filled); part_* hold one row
// of [columns] per chunk: [outer, chunks, columns].
inline constexpr std::int64_t kChannelChunk = 64;

struct ChannelNormArgs {
  DType dtype;         // of x and y; statistics are f32 (f64 for f64)
  DType weight_dtype;
  const void *x, *weight, *bias, *residual;  // weight, bias, residual: or null
  void* y;
  void *part_mean, *part_m2;       // per chunk and column: mean (f64 on CUDA: rounded once, when joined) and sum of
                                   // squared deviations from it
  void *mean, *var, *rstd;         // [outer, groups]
  std::int64_t outer, rows, columns, groups;
  double eps;
  std::int64_t chunk;              // rows per chunk
  Activation activation;           // none, relu, silu
  double below_zero, ceiling;      // relu's slope there; its greatest value or 0
};
// group_norm_partial: x -> part_*          item: one chunk (outer * chunks)
// group_norm_moments: part_* -> mean, ...  item: one group (outer * groups)
// group_norm_apply:   x, mean, rstd -> y   item: one chunk

// dz, the gradient of what the activation saw, is dy act'(z): z is made again as (x - mean) rstd weight + bias +
// residual, or relu's slope is read from y. Without an activation dz is dy.
struct ChannelNormBackwardArgs {
  DType dtype;
  DType weight_dtype;
  const void *x, *dy, *weight;        // x: null when no gradient reads it; weight: or null
  const void *mean, *rstd;            // [outer, groups]
  void *part_dy, *part_dyx;           // per chunk and column: sum of dz and of dz (x - mean); part_dyx or null
  void *shift, *slope;                // [outer, groups]: mean(g) and mean(g (x - mean)) rstd^2, g = dz weight; or null
  void *dweight, *dbias;              // [outer, columns], to be summed over outer; each or null
  void* dx;                           // rstd (g - shift - (x - mean) slope), or null
  std::int64_t outer, rows, columns, groups;
  std::int64_t chunk;                 // rows per chunk
  Activation activation;              // none, relu, silu
  double below_zero, ceiling;         // as above
  const void *bias, *residual, *y;    // what z is made of, or in its place y; each or null, residual or y alone
  void* dz;                           // where dz goes as well (the residual's gradient), or null
};
// group_norm_dots:   dy, x -> part_*, dz         item: one chunk
// group_norm_sums:   part_* -> shift, slope, ... item: one group
// group_norm_dx:     dy, x, shift, slope -> dx, dz   item: one chunk

}  // namespace capo
