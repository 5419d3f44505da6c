// Losses of segmentation. Made of ops, so capturable and of any order of derivative unless said otherwise.
//
//   logits   [B, spatial.., C], any number of spatial axes; f32, f64; bf16 and f16 are taken to f32 first
//   labels   i64 [B, spatial..], each in [0, C) or `ignore`; others throw on the CPU (ops/index.h)
//   result   a scalar of the logits' dtype (f32 for 16-bit ones), unless said otherwise
#pragma once

#include <capo/engine/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace capo::segment {

// Soft Dice as nnU-Net defines it (Isensee et al. 2021), p = softmax(logits), t the labels one-hot, sums over space:
//
//   dice = (2 sum p t + smooth) / max(sum p + sum t + smooth, 1e-8)
struct DiceOptions {
  bool batch = false;                       // the sums run over the batch as well
  bool background = false;                  // class 0 counts, too
  double smooth = 1e-5;                     // in both places of the formula, once
  std::optional<std::int64_t> ignore = {};  // pixels of this label enter no sum
};
// Per sample and class [B, C'], or with `batch` per class [C']; C' is C, or C - 1 without the background.
Tensor soft_dice(const Tensor& logits, const Tensor& labels, const DiceOptions& options = {});
// 1 - mean(soft_dice). (nnU-Net leaves the 1 out: the same gradients.)
Tensor dice_loss(const Tensor& logits, const Tensor& labels, const DiceOptions& options = {});

// dice_weight * dice_loss + ce_weight * mean cross entropy (over the pixels not ignored; NaN when all are). The cross
// entropy has no second derivative.
struct DiceCeOptions {
  DiceOptions dice = {};
  double dice_weight = 1, ce_weight = 1;
};
Tensor dice_ce_loss(const Tensor& logits, const Tensor& labels, const DiceCeOptions& options = {});

// Lin et al. 2017 for C classes: mean over pixels of -alpha_y (1 - p_y)^gamma log p_y, y the pixel's label.
struct FocalOptions {
  double gamma = 2;                // 0 (cross entropy), or >= 1: below, the slope at p_y = 1 is infinite
  std::vector<double> alpha = {};  // one per class; empty: ones
};
Tensor focal_loss(const Tensor& logits, const Tensor& labels, const FocalOptions& options = {});

// Cross entropy with a weight per pixel, weights [B, spatial..] of the logits' dtype (f32 for 16-bit ones): sum(w
// ce) / sum(w), NaN when that is 0. With boundary_weights it is the energy of the U-Net paper over its weights'
// sum.
Tensor weighted_cross_entropy(const Tensor& logits, const Tensor& labels, const Tensor& weights);

// ---- Deep supervision: logits of several resolutions, finest first.

// nnU-Net's weights: 1, 1/2, 1/4, .. and 0 for the coarsest, over their sum; {1} for n = 1.
std::vector<double> deep_supervision_weights(int n);
// Labels [B, spatial..] of any dtype at another resolution: index floor((i + 1/2) in / out) on each axis (PyTorch's
// nearest-exact, which nnU-Net uses). A view where `size` divides.
Tensor resize_labels(const Tensor& labels, const Dims& size);
// sum_i weight_i loss(logits[i], labels at its size); terms of weight 0 are left out.
//   Tensor l = deep_supervision_loss(model.outputs(x), labels, [](auto& z, auto& y) { return dice_ce_loss(z, y); });
template <class Loss>
Tensor deep_supervision_loss(const std::vector<Tensor>& logits, const Tensor& labels, Loss&& loss);

namespace detail {
Dims spatial_sizes(const Tensor& logits);
Tensor add_scaled(const Tensor& sum, const Tensor& term, double weight);  // sum: or undefined
}  // namespace detail

template <class Loss>
Tensor deep_supervision_loss(const std::vector<Tensor>& logits, const Tensor& labels, Loss&& loss) {
  const std::vector<double> weights = deep_supervision_weights(static_cast<int>(logits.size()));
  Tensor total;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (weights[i] == 0) continue;
    total =
        detail::add_scaled(total, loss(logits[i], resize_labels(labels, detail::spatial_sizes(logits[i]))), weights[i]);
  }
  return total;
}

}  // namespace capo::segment
