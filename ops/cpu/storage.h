// Kernels written once for the elements S of their tensors, float, double, BFloat16 or Half: what they compute with,
// and the buffers that only 16-bit elements need. For ops/cpu files (unnamed namespace, see kernel.h).
#pragma once

#include <capo/ops/cpu/gemm.h>
#include <capo/ops/cpu/half.h>

namespace {

// float for 16-bit S, else S.
template <class S>
using Computed = decltype(load(S()));
template <class S>
inline constexpr bool kHalf = sizeof(S) == 2;
// The size of such a buffer: an array must not be empty.
template <class S>
inline constexpr std::int64_t if_half(std::int64_t elements) { return kHalf<S> ? elements : 1; }

// A vector of Computed<S> from as many elements at p, and back.
using HalfBits __attribute__((vector_size(gemm::kVectorBytes / 2))) = std::uint16_t;
using WideBits __attribute__((vector_size(gemm::kVectorBytes))) = std::uint32_t;
inline gemm::Vector<float> load_wide(const float* p) { return gemm::load(p); }
inline gemm::Vector<double> load_wide(const double* p) { return gemm::load(p); }
inline WideBits bits_of(const void* p) {
  HalfBits bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, WideBits);
}
inline gemm::Vector<float> load_wide(const capo::BFloat16* p) {
  return reinterpret_cast<gemm::Vector<float>>(bits_of(p) << 16);
}
inline gemm::Vector<float> load_wide(const capo::Half* p) {  // as load(Half)
  const WideBits v = bits_of(p), sign = (v & 0x8000u) << 16, a = v & 0x7fffu;
  const WideBits normal = a >= 0x7c00u ? 0x7f800000u | ((a & 0x3ffu) << 13) : (a << 13) + 0x38000000u;
  const auto small = reinterpret_cast<WideBits>(__builtin_convertvector(a, gemm::Vector<float>) * 0x1p-24f);
  return reinterpret_cast<gemm::Vector<float>>(sign | (a >= 0x400u ? normal : small));
}
template <class S>
inline void store_rounded(S* p, gemm::Vector<Computed<S>> v) {
  if constexpr (kHalf<S>) {
    float wide[gemm::kWidth<float>];
    gemm::store(wide, v);
#pragma omp simd
    for (int i = 0; i < gemm::kWidth<float>; ++i) store(p[i], wide[i]);
  } else {
    gemm::store(p, v);
  }
}

// f(an element of the dtype)
template <class F>
inline void with_element(capo::DType dtype, const F& f) {
  switch (dtype) {
    case capo::DType::bf16: return f(capo::BFloat16{});
    case capo::DType::f16: return f(capo::Half{});
    case capo::DType::f64: return f(double{});
    default: return f(float{});
  }
}

}  // namespace
