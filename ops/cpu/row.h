// Sums along a row of values, for ops/cpu files only. 32 independent lanes per block of 1,024, joined in a fixed tree:
// fast (two AVX-512 accumulators), the same order on every instruction set, and an f32 error that stays small.
#pragma once

#include <capo/ops/cpu/kernel.h>

namespace {

constexpr int kLanes = 32;
constexpr std::int64_t kSumBlock = 1024;

template <class T, int kCount>
struct Vector {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

// lane[j] joined with lane[j + 16], the results with those 8 further, and so on. Vectors by name: GCC makes 5 loops and
// scalars of a loop over the halves, which took as long as adding up a row of 768.
template <class T, class Join>
inline T join_lanes(const T* lane, Join join) {
  typename Vector<T, 16>::type a, b;
  __builtin_memcpy(&a, lane, sizeof a);
  __builtin_memcpy(&b, lane + 16, sizeof b);
  join(a, b);
  typename Vector<T, 8>::type c = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7);
  join(c, __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15));
  typename Vector<T, 4>::type d = __builtin_shufflevector(c, c, 0, 1, 2, 3);
  join(d, __builtin_shufflevector(c, c, 4, 5, 6, 7));
  T e = d[0], f = d[1];
  join(e, d[2]);
  join(f, d[3]);
  join(e, f);
  return e;
}
template <class T>
inline T add_lanes(const T* lane) {
  return join_lanes(lane, [](auto& a, const auto& b) { a += b; });
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
    total += add_lanes(lane);
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
    total.a += add_lanes(la);
    total.b += add_lanes(lb);
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
  return join_lanes(lane, [](auto& a, const auto& b) { a = a < b ? b : a; });
}

}  // namespace
