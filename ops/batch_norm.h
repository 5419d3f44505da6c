// batch_norm (Ioffe and Szegedy 2015), channels last: statistics over all axes but the last.
//
//   training  y = (x - mean) / sqrt(var + eps) * weight + bias with the batch's mean and biased variance; then, unless
//             update_running is false or a checkpointed segment is being replayed,
//               running_mean = (1 - momentum) running_mean + momentum mean
//               running_var  = (1 - momentum) running_var  + momentum var n / (n - 1)      unbiased, as PyTorch
//   else      the running statistics, which are constants for the gradient
//
// x        [..., C], rank >= 2, any strides; y has x's shape and dtype
// weight   [C] or undefined (ones); bias [C] or undefined (zeros)
// running_mean, running_var   [C], x's dtype (beside bf16 and f16 also f32), not trainable. Both or none in training;
//          needed otherwise. Written in place (version bumped).
// momentum in [0, 1]; eps > 0
// dtypes   f32, f64; bf16 and f16 with weights of the same type or f32 (CPU: through f32 copies). Statistics are f32 (f64
//          for f64), by chunks of rows as in group_norm.
// grad     x, weight, bias. Training keeps x, mean, rstd, and weight if x needs a gradient; with running statistics x is kept
//          for weight only. Second order through the composite.
// throws   as group_norm; and on training with one value per channel. An empty batch passes and changes no statistics.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

Tensor batch_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& running_mean,
                  const Tensor& running_var, bool training, double momentum = 0.1, double eps = 1e-5,
                  bool update_running = true);

}  // namespace capo
