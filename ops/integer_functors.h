// What C++ leaves undefined in arithmetic on elements, defined for every kernel and both compilers: integer sums and
// products wrap around as PyTorch's, and a floating value outside an integer's range becomes the nearest end, NaN 0.
#pragma once

#include <cstdint>

#if !defined(CAPO_HD)
#if defined(__CUDACC__)
#define CAPO_HD __host__ __device__
#else
#define CAPO_HD
#endif
#endif

namespace {

template <class T> struct WrapOf { using type = T; };  // floats stay as they are
template <> struct WrapOf<std::int32_t> { using type = std::uint32_t; };
template <> struct WrapOf<std::int64_t> { using type = std::uint64_t; };

template <class T>
CAPO_HD inline T wrap_add(T a, T b) {
  using U = typename WrapOf<T>::type;
  return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
}
template <class T>
CAPO_HD inline T wrap_sub(T a, T b) {
  using U = typename WrapOf<T>::type;
  return static_cast<T>(static_cast<U>(a) - static_cast<U>(b));
}
template <class T>
CAPO_HD inline T wrap_mul(T a, T b) {
  using U = typename WrapOf<T>::type;
  return static_cast<T>(static_cast<U>(a) * static_cast<U>(b));
}

// limit: 2^bits of the value, exact in every floating type.
template <class I, class F>
CAPO_HD inline I saturate(F v, I low, I high, F limit) {
  return v >= limit ? high : (v < static_cast<F>(low) ? low : (v != v ? I(0) : static_cast<I>(v)));
}
template <class I> struct Truncated;  // Truncated<I>::from(float or double), toward zero
template <> struct Truncated<std::int32_t> {
  template <class F> CAPO_HD static std::int32_t from(F v) { return saturate(v, INT32_MIN, INT32_MAX, F(0x1p31)); }
};
template <> struct Truncated<std::int64_t> {
  template <class F> CAPO_HD static std::int64_t from(F v) {
    return saturate(v, std::int64_t{INT64_MIN}, std::int64_t{INT64_MAX}, F(0x1p63));
  }
};
template <> struct Truncated<std::uint8_t> {
  template <class F> CAPO_HD static std::uint8_t from(F v) {
    return static_cast<std::uint8_t>(saturate(v, std::int32_t{0}, std::int32_t{255}, F(256)));
  }
};
template <> struct Truncated<std::int8_t> {
  template <class F> CAPO_HD static std::int8_t from(F v) {
    return static_cast<std::int8_t>(saturate(v, std::int32_t{-128}, std::int32_t{127}, F(128)));
  }
};

// As static_cast<D>(v), with floating values to integers truncated as above; between integers it wraps around.
template <class T> inline constexpr bool kIsFloating = false;
template <> inline constexpr bool kIsFloating<float> = true;
template <> inline constexpr bool kIsFloating<double> = true;
template <class D, class S>
CAPO_HD inline D convert_to(S v) {
  if constexpr (kIsFloating<S> && !kIsFloating<D>)
    return Truncated<D>::from(v);
  else
    return static_cast<D>(v);
}

}  // namespace
