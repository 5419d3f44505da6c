// Rows of a few to many columns spread over blocks: a power of two of neighbouring threads walks each row, so that
// short rows share a warp, accesses along a row are coalesced and no thread divides by the row's length.
#pragma once

#include <capo/cuda/gpu.h>

namespace capo::gpu {

inline constexpr int kRowThreads = 256;

struct RowLanes {
  int shift;  // lanes = 1 << shift
  std::int64_t rows;

  __device__ std::int64_t row() const {
    return (static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) >> shift;
  }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) & (lanes() - 1); }
  __device__ int lanes() const { return 1 << shift; }

  std::int64_t blocks() const {
    const std::int64_t per_block = kRowThreads >> shift;
    return (rows + per_block - 1) / per_block;
  }
};

inline RowLanes row_lanes(std::int64_t rows, std::int64_t columns) {
  int shift = 0;
  while ((1 << shift) < columns && (1 << shift) < kRowThreads) ++shift;
  return {shift, rows};
}

}  // namespace capo::gpu
