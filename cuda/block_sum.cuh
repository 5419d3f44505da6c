// Sums over a warp and over a block in a fixed order: the same bits whatever the schedule.
#pragma once

#include <capo/cuda/gpu.h>

namespace capo::gpu {

// Every lane gets the sum.
__device__ inline float warp_sum(float v) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(kFullMask, v, bits);
  return v;
}

// Every thread gets the sum; every thread of the block calls it. May be called again at once.
template <int kThreads>
__device__ inline float block_sum(float v) {
  CAPO_SHARED(float, part, kThreads / kWarp);
  v = warp_sum(v);
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = v;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) sum += part[i];
  __syncthreads();  // part is free for the next call
  return sum;
}

}  // namespace capo::gpu
