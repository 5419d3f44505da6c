// Tensor-core fragments by element type, for products, convolutions and attention alike (layouts: ptx.h).
#pragma once

#include <capo/cuda/element.cuh>
#include <capo/cuda/ptx.h>

#include <type_traits>

namespace capo::gpu {

// d += a b, all 32 lanes; f16 for Half, else bf16 (f32 is rounded on its way to shared memory).
template <class T>
__device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>)
    mma_f16(d, a, b);
  else
    mma_bf16(d, a, b);
}
// Two products with one A: b holds the fragments of 16 columns, as one ldmatrix gives them.
template <class T>
__device__ inline void mma(float (&left)[4], float (&right)[4], const std::uint32_t (&a)[4],
                           const std::uint32_t (&b)[4]) {
  const std::uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
  mma<T>(left, a, low);
  mma<T>(right, a, high);
}

// Two neighbours of a fragment, rounded.
template <class T>
__device__ inline std::uint32_t pair(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bf16x2(low, high);
  } else {
#if defined(CAPO_HOST_SHIM)
    return Store<T>::from(low).bits | static_cast<std::uint32_t>(Store<T>::from(high).bits) << 16;
#else
    const __half2 h = __floats2half2_rn(low, high);
    return __half_as_ushort(__low2half(h)) | static_cast<std::uint32_t>(__half_as_ushort(__high2half(h))) << 16;
#endif
  }
}

}  // namespace capo::gpu
