// batch_norm (Ioffe and Szegedy 2015), channels last: statistics over all axes but the last. The shortcut and the
// activation that follow it in a residual network join the same pass.
//
//   training  y = act((x - mean) / sqrt(var + eps) * weight + bias + residual) with the batch's mean and biased
//             variance; then, unless update_running is false or a checkpointed segment is being replayed,
//               running_mean = (1 - momentum) running_mean + momentum mean
//               running_var  = (1 - momentum) running_var  + momentum var n / (n - 1)      unbiased, as PyTorch
//   else      the running statistics, which are constants for the gradient
//
// x        [..., C], rank >= 2, any strides; y has x's shape and dtype
// weight   [C] or undefined (ones); bias [C] or undefined (zeros)
// running_mean, running_var   [C], x's dtype (beside bf16 and f16 also f32), not trainable. Both or none in training;
//          needed otherwise. Written in place (version bumped).
// momentum in [0, 1]; eps > 0
// act      none, relu or silu; slope: relu's below zero; ceiling: its greatest value where that is not 0 (relu6: 6)
// residual x's shape and dtype, any strides; or undefined (zeros)
// dtypes   f32, f64; bf16 and f16 with weights of the same type or f32, computed in f32. Statistics are f32 (f64
//          for f64), by chunks of rows as in group_norm.
// bits     on the CPU in f32 and f64 those of norm, sum and activation one after the other, forward and backward.
//          16-bit values are rounded once, after the activation.
// grad     x, weight, bias, residual. Training keeps x, mean, rstd, and weight if x needs a gradient; with running
//          statistics x is kept for weight only. What an activation saw is made again from these, the bias and the
//          residual, and so is y for who saves it (group_norm.h). But relu without a ceiling reads its slope from y
//          where x would be kept for relu alone, and where the residual would be made again itself (a downsampling
//          branch, the sum of the block before): y is mostly the next convolution's input, which that one keeps anyway.
//          Then y is not made again. Second order through the composite.
// throws   as group_norm; on a residual unlike x; and on training with one value per channel. An empty batch passes and
//          changes no statistics.
//
//   Tensor y = batch_norm(x, weight, bias, mean, var, training, 0.1, 1e-5, true, Activation::relu, shortcut);
#pragma once

#include <capo/engine/tensor.h>
#include <capo/ops/activation.h>

namespace capo {

Tensor batch_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& running_mean,
                  const Tensor& running_var, bool training, double momentum = 0.1, double eps = 1e-5,
                  bool update_running = true, Activation activation = Activation::none, const Tensor& residual = {},
                  double slope = 0, double ceiling = 0);

// batch_norm_running, one launch: running = keep running + weight batch for both, the batch's variance times unbias,
// every product and sum rounded by itself. An item is one channel.
struct RunningStatsArgs {
  DType dtype;             // of the running statistics: f32 or f64; on CUDA also bf16 and f16
  const void *mean, *var;  // the batch's, f32 (f64 for f64)
  void *running_mean, *running_var;
  double keep, weight, unbias;  // 1 - momentum, momentum, n / (n - 1)
};

}  // namespace capo
