// Losses made of ops: any order of derivative, for every tensor that needs one. PyTorch's definitions.
//
// inputs   floating, all of one shape, dtype and device; targets may need gradients too
// result   none: the inputs' shape; sum, mean: a scalar of their dtype; mean of an empty tensor is NaN
// throws   on shapes or dtypes that differ (nothing is broadcast but weight and pos_weight)
#pragma once

#include <capo/engine/tensor.h>
#include <capo/ops/cross_entropy.h>  // Reduction

namespace capo {

// -weight * (pos_weight * t * log sigmoid(x) + (1 - t) * log(1 - sigmoid(x))), without overflow or cancellation.
// weight and pos_weight are optional and broadcast to x.
struct BceOptions {
  Tensor weight, pos_weight;
  Reduction reduction = Reduction::mean;
};
Tensor bce_with_logits(const Tensor& x, const Tensor& target, const BceOptions& options = {});

// (x - t)^2
Tensor mse(const Tensor& x, const Tensor& target, Reduction reduction = Reduction::mean);

// d = |x - t|: d^2 / (2 beta) below beta, else d - beta / 2. beta = 0 is |x - t|.
Tensor smooth_l1(const Tensor& x, const Tensor& target, double beta = 1, Reduction reduction = Reduction::mean);

// d = |x - t|: d^2 / 2 below delta, else delta (d - delta / 2). delta > 0.
Tensor huber(const Tensor& x, const Tensor& target, double delta = 1, Reduction reduction = Reduction::mean);

// t (log t - x) with x = log probabilities; 0 where t = 0 (there the gradient of t is taken as -x, as 0 if x = -inf).
// log_target: t holds log probabilities too. batchmean (the divergence per sample) divides the sum by the first axis.
Tensor kl_div(const Tensor& log_input, const Tensor& target, Reduction reduction = Reduction::batchmean,
              bool log_target = false);

}  // namespace capo
