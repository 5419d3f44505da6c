// Sums along a row of values, for ops/cpu files only. 32 independent lanes per block of 1,024, joined in a fixed tree:
// fast (two AVX-512 accumulators), the same order on every instruction set, and an f32 error that stays small.
#pragma once

#include <capo/ops/cpu/kernel.h>

namespace {

constexpr int kLanes = 32;
constexpr std::int64_t kSumBlock = 1024;

template <class T>
inline T join_lanes(T* lane) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

// Sum of f(i), i in [0, n).
template <class T, class F>
inline T sum_of(std::int64_t n, F f) {
  T total = T(0);
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t stop = lesser(i + kSumBlock, n);
    T lane[kLanes];
    for (int j = 0; j < kLanes; ++j) lane[j] = T(0);
    for (; i + kLanes <= stop; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lane[j] += f(i + j);
    for (int j = 0; i < stop; ++i, ++j) lane[j] += f(i);
    total += join_lanes(lane);
  }
  return total;
}

// Sums of f(i) and g(i) in one pass.
template <class T>
struct TwoSums {
  T a, b;
};
template <class T, class F, class G>
inline TwoSums<T> sums_of(std::int64_t n, F f, G g) {
  TwoSums<T> total{T(0), T(0)};
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t stop = lesser(i + kSumBlock, n);
    T la[kLanes], lb[kLanes];
    for (int j = 0; j < kLanes; ++j) la[j] = lb[j] = T(0);
    for (; i + kLanes <= stop; i += kLanes)
      for (int j = 0; j < kLanes; ++j) la[j] += f(i + j), lb[j] += g(i + j);
    for (int j = 0; i < stop; ++i, ++j) la[j] += f(i), lb[j] += g(i);
    total.a += join_lanes(la);
    total.b += join_lanes(lb);
  }
  return total;
}

// The largest x[i], -infinity for none. NaN is not looked for.
template <class T>
inline T largest(const T* x, std::int64_t n) {
  T lane[kLanes];
  for (int j = 0; j < kLanes; ++j) lane[j] = static_cast<T>(-__builtin_inf());
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] = greater(lane[j], x[i + j]);
  for (int j = 0; i < n; ++i, ++j) lane[j] = greater(lane[j], x[i]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] = greater(lane[j], lane[j + half]);
  return lane[0];
}

}  // namespace
