// Kernels written once for the elements S of their tensors, float, double, BFloat16 or Half: what they compute with,
// and the buffers that only 16-bit elements need. For ops/cpu files (unnamed namespace, see kernel.h).
#pragma once

#include <capo/ops/cpu/half.h>

namespace {

// float for 16-bit S, else S.
template <class S>
using Wide = decltype(load(S()));
template <class S>
inline constexpr bool kHalf = sizeof(S) == 2;
// The size of such a buffer: an array must not be empty.
template <class S>
inline constexpr std::int64_t if_half(std::int64_t elements) { return kHalf<S> ? elements : 1; }

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
