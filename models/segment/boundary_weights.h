// The weight map of the U-Net paper (Ronneberger et al. 2015, equation 2), which makes a network keep touching cells
// apart.
#pragma once

#include <capo/engine/tensor.h>

namespace capo::segment {

struct BoundaryWeights {
  double w0 = 10, sigma = 5;  // pixels
  bool balance = true;        // w_c: foreground and background weigh the same in all; else 1
};

// cells [H, W] or [D, H, W], integer, on any device: 0 background, else the cell's label (components() makes them from
// a mask). Returns f32 of that shape on the CPU,
//
//   w = w_c + [background] w0 exp(-(d1 + d2)^2 / (2 sigma^2))
//
// d1 and d2 the distances to the nearest and second nearest cell. w_c = pixels / (2 pixels of its class), 1 where only
// one class is there; with fewer than two cells the second term is 0, and so it is where d1 + d2 > 8 sigma (below 1e-13
// w0).
Tensor boundary_weights(const Tensor& cells, const BoundaryWeights& options = {});

}  // namespace capo::segment
