// Resizing channels-last images and volumes: x [B, spatial.., C] with one to three spatial axes.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

enum class ResizeMode : int { nearest, bilinear, bicubic };  // on three axes bilinear is trilinear

// PyTorch's torch.nn.functional.interpolate(x, size=..): half-pixel centres, or corner to corner with align_corners;
// bicubic a = -0.75, edges repeated; antialias (not with nearest): the filter widens with the reduction and bicubic
// takes a = -0.5; nearest takes floor(i in / out).
// dtypes  f32, f64; bf16 and f16 through f32 (CPU). Axis by axis, the greatest reduction first (ops/axis_filter.h): an
//         axis that keeps its size is skipped, and x itself comes back when all do.
// grad    the transposed filters: any order, nothing kept.
//
//   Tensor small = resize(images, 224, 224, ResizeMode::bicubic, true);
Tensor resize(const Tensor& x, const Dims& size, ResizeMode mode, bool antialias = false, bool align_corners = false);
inline Tensor resize(const Tensor& x, std::int64_t out_h, std::int64_t out_w, ResizeMode mode, bool antialias = false,
                     bool align_corners = false) {
  return resize(x, Dims{out_h, out_w}, mode, antialias, align_corners);
}

}  // namespace capo
