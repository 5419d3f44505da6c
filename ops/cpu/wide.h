// Rows in vectors of a register's width, for ops/cpu files only: where a row's sums and its results take as long as the
// memory does. GCC's vectoriser keeps such sums in memory between its loops, and puts what is to be streamed on the
// stack first. An expression f(at, i) is written once: at(x + i) is a register of x's elements from i on, or x[i].
#pragma once

#include <capo/ops/cpu/gemm.h>
#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/row.h>

namespace {

constexpr int kRegister = gemm::kVectorBytes;
template <class T>
constexpr int kWide = gemm::kWidth<T>;
template <class T>
using Wide = gemm::Vector<T>;

constexpr auto wide = []<class T>(const T* p) { return gemm::load(p); };
constexpr auto one = [](const auto* p) { return *p; };

// Rows on the stack that do not all begin in one set of the first cache.
constexpr std::int64_t kRowBuffer = capo::kHalfRow + 16 * 7;

// Two sums that are taken together.
template <class V>
struct Two {
  V a, b;
};

// Sum of f(at, i), i in [0, n), in sum_of's order.
template <class T, class F>
inline T sum_row(std::int64_t n, F f) {
  T total = T(0);
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t stop = lesser(i + kSumBlock, n);
    Wide<T> s[kLanes / kWide<T>] = {};
    for (; i + kLanes <= stop; i += kLanes)
      for (int j = 0; j < kLanes / kWide<T>; ++j) s[j] += f(wide, i + j * kWide<T>);
    T lane[kLanes];
    __builtin_memcpy(lane, s, sizeof lane);
    for (int j = 0; i < stop; ++i, ++j) lane[j] += f(one, i);
    total += add_lanes(lane);
  }
  return total;
}

// Sums of both parts of the Two that f(at, i) gives.
template <class T, class F>
inline Two<T> sums_row(std::int64_t n, F f) {
  Two<T> total{T(0), T(0)};
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t stop = lesser(i + kSumBlock, n);
    Wide<T> a[kLanes / kWide<T>] = {}, b[kLanes / kWide<T>] = {};
    for (; i + kLanes <= stop; i += kLanes)
      for (int j = 0; j < kLanes / kWide<T>; ++j) {
        const Two<Wide<T>> v = f(wide, i + j * kWide<T>);
        a[j] += v.a;
        b[j] += v.b;
      }
    T la[kLanes], lb[kLanes];
    __builtin_memcpy(la, a, sizeof la);
    __builtin_memcpy(lb, b, sizeof lb);
    for (int j = 0; i < stop; ++i, ++j) {
      const Two<T> v = f(one, i);
      la[j] += v.a;
      lb[j] += v.b;
    }
    total.a += add_lanes(la);
    total.b += add_lanes(lb);
  }
  return total;
}

// Past the caches, to a multiple of kRegister bytes.
inline void put_past(float* to, [[maybe_unused]] Wide<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(to, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(to, (__m128)v);
#else
  __builtin_memcpy(to, &v, sizeof v);
#endif
}

template <class T, class V>  // V: Wide<T> or T
inline void put(T* to, const V& v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// row[i] = f(at, i), i in [from, n).
template <class T, class F>
inline void fill_row(T* row, std::int64_t from, std::int64_t n, F f) {
  std::int64_t i = from;
  for (; i + kWide<T> <= n; i += kWide<T>) put(row + i, f(wide, i));
  for (; i < n; ++i) row[i] = f(one, i);
}

// Elements [at, at + n) of y = f(at, i), i in [0, n); with streamed past the caches. buffer: for 16-bit y.
template <class T, class F>
inline void put_row(void* y, capo::DType dtype, std::int64_t at, std::int64_t n, T* buffer, bool streamed, F f) {
  T* row = open_row(y, dtype, at, buffer);
  std::int64_t i = 0;
  if constexpr (__is_same(T, float)) {
    if (streamed) {
      const auto past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(row) % kRegister / sizeof(T));
      for (const std::int64_t head = past ? lesser(kWide<T> - past, n) : 0; i < head; ++i) row[i] = f(one, i);
      for (; i + kWide<T> <= n; i += kWide<T>) put_past(row + i, f(wide, i));
    }
  }
  fill_row(row, i, n, f);
  close_row(y, dtype, at, n, row);
}

}  // namespace
