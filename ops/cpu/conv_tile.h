// The inner product of a convolution: rows of A are found through pointers, one per row and segment of the summed axis,
// so that a window is multiplied where it lies. For ops/cpu files (unnamed namespace, see kernel.h).
#pragma once

#include <capo/ops/cpu/gemm.h>

namespace {
namespace conv_tile {

using gemm::between;
using gemm::kPanel;
using gemm::kPanelVectors;
using gemm::kWidth;
using gemm::load;
using gemm::round_up;
using gemm::store;
using gemm::Vector;
using std::int64_t;

// Row i of A under segment s: k elements from base[s * base_step + i] + s * shift + first.
template <class T>
struct Rows {
  const T* const* base;
  int64_t base_step, shift, first, segments, k;
  const T* zeros;  // where rows of padding point; segments that are padding in all rows of a tile are skipped
};

// C's rows, as distances from c, and what is done with the sums. bias: whole vectors, or null; residual: laid out like
// c, or null.
template <class T>
struct Target {
  T* c;
  const int64_t* row;
  int64_t column, n;
  const T* bias;
  bool add, ends;
  const T* residual;  // may be c where nothing is added
  T low, high;
  bool far;     // c, and residual, are not in a cache yet
  bool stream;  // whole vectors go past the caches; rows begin at lines, nothing is added
};

template <class T>
inline void put(T* d, Vector<T> v, [[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(d), reinterpret_cast<__m512i>(v));
#elif defined(__AVX__)
  if (stream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(d), reinterpret_cast<__m256i>(v));
#elif defined(__SSE2__)
  if (stream) return _mm_stream_si128(reinterpret_cast<__m128i*>(d), reinterpret_cast<__m128i>(v));
#endif
  store(d, v);
}

template <class T>
__attribute__((noinline)) void store_part(const T* sums, int m, int width, const Target<T>& c, int64_t row) {
  for (int i = 0; i < m; ++i) {
    const T* s = sums + i * width;
    const int64_t at = c.row[row + i] + c.column;
    T* d = c.c + at;
    const T* before = c.residual ? c.residual + at : nullptr;
    for (int64_t j = 0; j < c.n; ++j) {
      T sum = c.add ? d[j] + s[j] : s[j];
      if (before) sum += before[j];
      d[j] = c.ends ? between(sum, c.low, c.high) : sum;
    }
  }
}

// The lines that a tile will read and write at its end come while the sums grow.
template <class T, int MR, int NV>
__attribute__((always_inline)) inline void fetch(const Target<T>& c, int64_t row) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  for (int i = 0; i < MR; ++i) {
    const int64_t at = c.row[row + i] + c.column;
#pragma GCC unroll 4
    for (int j = 0; j < NV * kWidth<T>; j += kLine) {
      if (!c.stream) __builtin_prefetch(c.c + at + j, 1);
      if (c.residual) __builtin_prefetch(c.residual + at + j);
    }
  }
}

// A whole tile of sums, ended or for the stream.
template <class T, int MR, int NV>
__attribute__((always_inline)) inline void store_ended(const Vector<T> (&acc)[MR][NV], const Target<T>& c,
                                                       int64_t row) {
  constexpr int W = kWidth<T>;
  const Vector<T> low = c.low - Vector<T>{}, high = c.high - Vector<T>{};  // broadcast
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    const int64_t at = c.row[row + i] + c.column;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      Vector<T> sum = c.add ? load(c.c + at + j * W) + acc[i][j] : acc[i][j];
      if (c.residual) sum += load(c.residual + at + j * W);
      put(c.c + at + j * W, between(sum, low, high), c.stream);
    }
  }
}

// MR rows from `row` on, NV vectors of columns; b: [segments * k, NV vectors].
template <class T, int MR, int NV>
__attribute__((noinline)) void tile(const Rows<T>& r, int64_t row, const T* b, const Target<T>& c) {
  constexpr int W = kWidth<T>;
  using V = Vector<T>;
  if (c.far) fetch<T, MR, NV>(c, row);
  V acc[MR][NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const V start = c.bias ? load(c.bias + j * W) : V{};
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) acc[i][j] = start;
  }
  for (int64_t s = 0; s < r.segments; ++s, b += r.k * NV * W) {
    const T* const* base = r.base + s * r.base_step + row;
    bool padding = true;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) padding &= base[i] == r.zeros;
    if (padding) continue;
    const T* a[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) a[i] = base[i] + s * r.shift + r.first;
    const T* x = b;
    for (int64_t p = 0; p < r.k; ++p, x += NV * W) {
      V y[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) y[j] = load(x + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const V e = a[i][p] - V{};  // broadcast
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] += e * y[j];
      }
    }
  }
  if (c.n == NV * W) {
    if (c.ends || c.stream) return store_ended<T, MR, NV>(acc, c, row);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      T* d = c.c + c.row[row + i] + c.column;
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) store(d + j * W, c.add ? load(d + j * W) + acc[i][j] : acc[i][j]);
    }
    return;
  }
  T rest[MR * NV * W];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(rest + (i * NV + j) * W, acc[i][j]);
  store_part(rest, MR, NV * W, c, row);
}

template <class T, int NV>
void rows(int64_t m, const Rows<T>& r, const T* b, const Target<T>& c) {
  constexpr int R = NV == 4 || (kPanelVectors == 2 && NV == 2) ? 6 : 8;
  int64_t i = 0;
  for (; i + R <= m; i += R) tile<T, R, NV>(r, i, b, c);
  if (m - i >= 4) tile<T, 4, NV>(r, i, b, c), i += 4;
  if (m - i >= 2) tile<T, 2, NV>(r, i, b, c), i += 2;
  if (m - i >= 1) tile<T, 1, NV>(r, i, b, c);
}

// m rows times one panel of up to kPanel columns.
template <class T>
inline void panel(int64_t m, const Rows<T>& r, const T* b, const Target<T>& c) {
  const int64_t vectors = (c.n + kWidth<T> - 1) / kWidth<T>;
  if (vectors == 1) return rows<T, 1>(m, r, b, c);
  if (kPanelVectors == 2 || vectors == 2) return rows<T, 2>(m, r, b, c);
  if constexpr (kPanelVectors == 4) {
    if (vectors == 3) return rows<T, 3>(m, r, b, c);
    return rows<T, 4>(m, r, b, c);
  }
}

}  // namespace conv_tile
}  // namespace
