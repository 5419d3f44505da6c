// Sums over a warp and over a block in a fixed order: the same bits whatever the schedule.
#pragma once

#include <capo/cuda/gpu.h>

namespace capo::gpu {

// Every lane gets the sum.
template <class T>
__device__ inline T warp_sum(T v) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(kFullMask, v, bits);
  return v;
}

// Every thread gets the sum; every thread of the block calls it. May be called again at once.
template <int kThreads, class T>
__device__ inline T block_sum(T v) {
  CAPO_SHARED(T, part, kThreads / kWarp);
  v = warp_sum(v);
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = v;
  __syncthreads();
  T sum = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) sum += part[i];
  __syncthreads();  // part is free for the next call
  return sum;
}

// Every thread of a team gets the sum; a team, the threads that share a row, is a warp or a whole block.
template <int kTeam>
__device__ inline float team_sum(float v) {
  if constexpr (kTeam == kWarp)
    return warp_sum(v);
  else
    return block_sum<kTeam>(v);
}

}  // namespace capo::gpu
