// dropout (Srivastava et al. 2014) and drop_path (stochastic depth, Huang et al. 2016).
//
//   dropout    y[i] = x[i] / (1 - p), or 0 with probability p
//   drop_path  the same with one draw per sample: all of x[b, ...] or nothing
//
// x        any shape (drop_path: rank >= 1) and strides; dtypes f32, f64; bf16 and f16, computed in f32
// p        in [0, 1)
// rng      advanced by numel(x) words (drop_path: x.size(0)), in training only and not for p = 0. Element i (sample b)
//          is dropped when Philox word i (b) of the range is below p 2^32: the same on every device.
// training false, or p = 0: x itself
// grad     the same mask on dy, any order. dropout keeps only where its numbers came from (seed, stream, offset) and
//          makes the mask again; drop_path keeps one factor per sample (CUDA: makes it again).
#pragma once

#include <capo/engine/rng.h>
#include <capo/engine/tensor.h>

namespace capo {

Tensor dropout(const Tensor& x, double p, Generator& rng, bool training);
Tensor drop_path(const Tensor& x, double p, Generator& rng, bool training);

// Work item: four neighbouring draws, one Philox block; on the CPU, of longer runs, up to kDropPiece elements of one.
struct DropoutArgs {
  DType dtype;
  const void* x;
  void* y;
  std::int64_t elements;
  RngRange range;
  std::uint32_t threshold;  // a word below it drops its element
  double scale;
  std::int64_t run;         // neighbours that share a draw: 1, or a sample's elements (on the CPU 16-bit ones)
};
inline constexpr std::int64_t kDropPiece = 16384;

}  // namespace capo
