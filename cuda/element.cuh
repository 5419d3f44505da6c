// Elements in memory and in registers: 16-bit storage is computed in f32, everything else as it is. The conversions are
// those of engine/dtype.h: nearest, ties to even, NaN stays NaN.
#pragma once

#include <capo/cuda/gpu.h>
#include <capo/engine/dtype.h>

#if !defined(CAPO_HOST_SHIM)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace capo::gpu {

template <class T>
struct ComputeOf {
  using type = T;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <>
struct ComputeOf<Half> {
  using type = float;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class T>
__device__ inline T load(T v) {
  return v;
}
template <class T>
struct Store {
  template <class S>
  __device__ static T from(S v) {
    return static_cast<T>(v);
  }
};
template <>
struct Store<bool> {
  template <class S>
  __device__ static bool from(S v) {
    return v != S(0);
  }
};

#if defined(CAPO_HOST_SHIM)
inline float load(BFloat16 v) { return to_f32(v); }
inline float load(Half v) { return to_f32(v); }
#else
__device__ inline float load(BFloat16 v) { return __uint_as_float(static_cast<std::uint32_t>(v.bits) << 16); }
__device__ inline float load(Half v) { return __half2float(__ushort_as_half(v.bits)); }
#endif
template <>
struct Store<BFloat16> {
  template <class S>
  __device__ static BFloat16 from(S s) {
    const float v = static_cast<float>(s);
#if defined(CAPO_HOST_SHIM)
    return to_bf16(v);
#else
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#endif
  }
};
template <>
struct Store<Half> {
  template <class S>
  __device__ static Half from(S s) {
    const float v = static_cast<float>(s);
#if defined(CAPO_HOST_SHIM)
    return to_f16(v);
#else
    return {__half_as_ushort(__float2half_rn(v))};
#endif
  }
};

// kCount neighbours in one access of 16 bytes (fewer for f64): the pointer must be aligned to the whole.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T v[kCount];
};
template <class T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));

inline bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// Calls f(T{}) with the C++ type of a floating dtype that CUDA kernels compute in; `op` starts the error for others.
template <class F>
void for_floating(const char* op, DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Half{});
    default: detail::fail(op, ": CUDA kernels compute in f32, bf16 and f16, got ", to_string(dtype));
  }
}

}  // namespace capo::gpu
