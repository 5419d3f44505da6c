// Connected parts of masks, 2D and 3D, on the host. Two pixels touch when they share a side (a face in 3D).
#pragma once

#include <capo/engine/tensor.h>

namespace capo::segment {

// mask [H, W] or [D, H, W], bool or integer, on any device: what is not 0 is inside. Returns i64 of the same shape on
// the CPU: 0 outside, else the part's number from 1, in row-major order of first pixels.
Tensor components(const Tensor& mask);

// components(), the parts then grown over what is outside, all at the same speed, until they meet: lines of at most one
// pixel, which stay 0, are left between them. It is the watershed of Vincent and Soille 1991 on an image of two levels;
// where that depends on the order of neighbours, this does not: a pixel takes the label that its labelled neighbours of
// the steps before agree on, or stays a line. An empty mask gives zeros.
Tensor grown_components(const Tensor& mask);

}  // namespace capo::segment
