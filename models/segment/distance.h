// Exact Euclidean distances on a grid, on the host.
#pragma once

#include <capo/engine/tensor.h>

#include <vector>

namespace capo::segment {

// mask [H, W] or [D, H, W], bool or integer, on any device; spacing: of each axis, positive (empty: ones). Returns f64
// of the same shape on the CPU: each pixel's distance to the nearest one that is not 0, 0 there; infinity when all are
// 0. Lower envelopes of parabolas, axis by axis: linear in the number of pixels (Felzenszwalb and Huttenlocher 2012).
Tensor distance_to(const Tensor& mask, const std::vector<double>& spacing = {});

}  // namespace capo::segment
