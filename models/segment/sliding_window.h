// Predictions for images and volumes of any size from a network that takes patches of one size.
//
//   x        [B, spatial.., channels], any sizes; where smaller than the patch, padded with zeros on both sides and the
//            result cropped
//   network  any callable Tensor -> Tensor: [B, patch.., channels] to [B, patch.., K] of a floating dtype; called
//            without recording, and put to eval() by the caller
//   result   [B, spatial.., K], the weighted mean of the patches' predictions; f64 for f64, else f32
//
// Windows advance by at most patch (1 - overlap) and are spread evenly from border to border (nnU-Net's rule). With
// `gaussian` a prediction counts exp(-d^2 / (2 sigma^2)), d its distance from the patch's centre, sigma an eighth of
// the patch along each axis (nnU-Net's importance map, without its cut at 4 sigma). Mirroring averages the predictions
// of all flips of the chosen axes: 2^n calls per window.
//
// memory   the sums take as much as the result, and one K-th for their weights; they lie on x's device, or on the CPU
//          with `on_host` (a volume's logits may be larger than a GPU's memory). Beside them one window's activations.
// bits     windows are added in order: the same for any number of threads.
// errors   a patch that does not fit x's axes, overlap outside [0, 1), mirror axes outside the spatial ones, a network
//          that changes the patch's size.
//
//   Tensor logits = sliding_window(model, volume, {.patch = {32, 48, 48}, .mirror = {0, 1, 2}});
#pragma once

#include <capo/engine/tensor.h>

#include <cstdint>
#include <type_traits>
#include <vector>

namespace capo::segment {

struct SlidingWindow {
  Dims patch;
  double overlap = 0.5;
  bool gaussian = true;
  Dims mirror = {};      // spatial axes, from 0
  bool on_host = false;  // where sums and result lie
};

namespace detail {
using Network = Tensor (*)(void* network, const Tensor& x);
Tensor sliding_window(Network call, void* network, const Tensor& x, const SlidingWindow& options);
}  // namespace detail

template <class F>
Tensor sliding_window(F&& network, const Tensor& x, const SlidingWindow& options) {
  using Net = std::remove_reference_t<F>;
  const auto call = [](void* n, const Tensor& patch) -> Tensor { return (*static_cast<Net*>(n))(patch); };
  return detail::sliding_window(call, const_cast<void*>(static_cast<const void*>(&network)), x, options);
}

// First positions of windows of `patch` that cover `size` >= patch: the fewest whose step is at most patch (1 -
// overlap), evenly spread and rounded (half to even).
std::vector<std::int64_t> window_steps(std::int64_t size, std::int64_t patch, double overlap);

// exp(-(i - size / 2)^2 / (2 (size / 8)^2)), i = 0 .. size - 1, multiplied over the axes: [patch.., 1], 1 at the
// centre.
Tensor gaussian_importance(const Dims& patch, DType dtype = f32, Device device = kCpu);

}  // namespace capo::segment
