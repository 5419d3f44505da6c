// Building blocks of matrix products: C[m, n] (+)= A[m, k] B[k, n]. For ops/cpu files (unnamed namespace, see kernel.h).
//
// The scheme (Goto and van de Geijn 2008, sizes measured on AVX-512 machines):
//   - B goes through panels of kPanel columns (four AVX-512 vectors), k rows each, zero-padded to whole vectors.
//   - A is read in place: rows of unit stride along k, any row stride, one broadcast per element. A with another stride
//     along k is first copied to rows (pack_rows), which is where transposition happens.
//   - A tile of C (6 x 4 vectors for AVX-512) is summed in registers from zero, then stored or added to C.
//   - k is cut into blocks of at most kMaxK, which keeps a panel in L2 and the f32 error that of a blocked sum.
// The order of the additions to one element depends on the shape only, never on who computes it.
#pragma once

#include <capo/ops/cpu/kernel.h>

namespace {
namespace gemm {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));  // lanes of a vector
constexpr int kPanelVectors = kVectorBytes == 64 ? 4 : 2;           // 16 or 32 registers
template <class T>
constexpr int kPanel = kPanelVectors * kWidth<T>;                   // columns of a panel
template <class T>
constexpr std::int64_t kMaxK = 1792 / static_cast<std::int64_t>(sizeof(T));  // 448 f32, 224 f64

inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// The blocks of k: equal, whole multiples of 16, at most kMaxK.
template <class T>
inline std::int64_t k_block(std::int64_t k) {
  const std::int64_t blocks = k > kMaxK<T> ? (k + kMaxK<T> - 1) / kMaxK<T> : 1;
  return blocks == 1 ? (k > 0 ? k : 1) : round_up((k + blocks - 1) / blocks, 16);
}

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// ---- Transposition ----

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  using type = Lanes<I...>;
};

// (a0 b0 a1 b1 ..) of the lower or upper halves.
template <int W, int Half, class V, int... I>
inline V interleave(V a, V b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (Half * W / 2 + I / 2 + (I % 2 ? W : 0))...);
}

// A tile of `rows` <= W rows and W columns: row r of src at src + r * ld becomes column r of dst; columns rows .. W are
// zero. log2 W perfect shuffles of the row list.
template <class T>
inline void transpose_tile(const T* src, std::int64_t ld, std::int64_t rows, T* dst, std::int64_t ldd) {
  constexpr int W = kWidth<T>;
  using L = typename MakeLanes<W>::type;
  Vector<T> x[W], y[W];
  if (rows == W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = load(src + i * ld);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = i < rows ? load(src + i * ld) : Vector<T>{};
  }
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = interleave<W, 0>(x[i], x[i + W / 2], L());
      y[2 * i + 1] = interleave<W, 1>(x[i], x[i + W / 2], L());
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(dst + i * ldd, x[i]);
}

// dst[c * ldd + r] = src[r * ld + c] for r < rows, c < cols. Whole vectors are written, zeros after `rows`: ldd must be
// at least round_up(rows, kWidth).
template <class T>
void transpose(const T* src, std::int64_t ld, std::int64_t rows, std::int64_t cols, T* dst, std::int64_t ldd) {
  constexpr int W = kWidth<T>;
  for (std::int64_t r = 0; r < rows; r += W) {
    const std::int64_t n = lesser(std::int64_t{W}, rows - r);
    std::int64_t c = 0;
    for (; c + W <= cols; c += W) transpose_tile(src + r * ld + c, ld, n, dst + c * ldd + r, ldd);
    if (c < cols && cols >= W) {  // the last tile overlaps the one before
      c = cols - W;
      transpose_tile(src + r * ld + c, ld, n, dst + c * ldd + r, ldd);
    } else {
      for (; c < cols; ++c)
        for (int i = 0; i < W; ++i) dst[c * ldd + r + i] = i < n ? src[(r + i) * ld + c] : T(0);
    }
  }
}

// ---- Packing ----

// One block of A as rows: dst[i * ldd + p] = a[i * rs + p * ks]; ldd >= round_up(k, kWidth).
template <class T>
void pack_rows(const T* a, std::int64_t rs, std::int64_t ks, std::int64_t m, std::int64_t k, T* dst, std::int64_t ldd) {
  if (rs == 1) return transpose(a, ks, k, m, dst, ldd);
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t p = 0; p < k; ++p) dst[i * ldd + p] = a[i * rs + p * ks];
}

// The width in memory of the panel that starts at column j of n.
template <class T>
inline std::int64_t panel_width(std::int64_t j, std::int64_t n) {
  return n - j >= kPanel<T> ? kPanel<T> : round_up(n - j, kWidth<T>);
}

// One panel of B, n <= kPanel columns: dst[p * width + j] = b[p * ks + j * cs], columns n .. width are zero.
template <class T>
void pack_panel(const T* b, std::int64_t ks, std::int64_t cs, std::int64_t k, std::int64_t n, T* dst) {
  const std::int64_t width = panel_width<T>(0, n);
  if (cs == 1) {
    constexpr int W = kWidth<T>;
    const std::int64_t whole = n / W * W;
    for (std::int64_t p = 0; p < k; ++p) {
      const T* s = b + p * ks;
      T* d = dst + p * width;
      for (std::int64_t j = 0; j < whole; j += W) store(d + j, load(s + j));
      for (std::int64_t j = whole; j < n; ++j) d[j] = s[j];
      for (std::int64_t j = n; j < width; ++j) d[j] = T(0);
    }
    return;
  }
  if (ks == 1) return transpose(b, cs, n, k, dst, width);
  for (std::int64_t p = 0; p < k; ++p)
    for (std::int64_t j = 0; j < width; ++j) dst[p * width + j] = j < n ? b[p * ks + j * cs] : T(0);
}

// All panels of a block of k rows: panel j starts at dst + j * k. dst holds k * round_up(n, kWidth) elements.
template <class T>
void pack_panels(const T* b, std::int64_t ks, std::int64_t cs, std::int64_t k, std::int64_t n, T* dst) {
  for (std::int64_t j = 0; j < n; j += kPanel<T>)
    pack_panel(b + j * cs, ks, cs, k, n - j < kPanel<T> ? n - j : std::int64_t{kPanel<T>}, dst + j * k);
}

// ---- The product ----

// The first n columns of a tile's sums.
template <class T>
__attribute__((noinline)) void store_part(const T* sums, int m, int width, T* c, std::int64_t ldc, std::int64_t n, bool add) {
  for (int i = 0; i < m; ++i) {
    const T* s = sums + i * width;
    T* d = c + i * ldc;
    if (add) {
      for (std::int64_t j = 0; j < n; ++j) d[j] += s[j];
    } else {
      for (std::int64_t j = 0; j < n; ++j) d[j] = s[j];
    }
  }
}

// One register tile: MR rows, NV vectors of columns of which n are stored. add: C += instead of C =.
template <class T, int MR, int NV>
__attribute__((noinline)) void tile(std::int64_t k, const T* a, std::int64_t rs, const T* b, std::int64_t ldb, T* c,
                                    std::int64_t ldc, std::int64_t n, bool add) {
  constexpr int W = kWidth<T>;
  using V = Vector<T>;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = V{};
  for (std::int64_t p = 0; p < k; ++p) {
    V x[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) x[j] = load(b + p * ldb + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const V y = a[i * rs + p] - V{};  // broadcast
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] += y * x[j];
    }
  }
  if (n == NV * W) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        T* d = c + i * ldc + j * W;
        store(d, add ? load(d) + acc[i][j] : acc[i][j]);
      }
    return;
  }
  T rest[MR * NV * W];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(rest + (i * NV + j) * W, acc[i][j]);
  store_part(rest, MR, NV * W, c, ldc, n, add);
}

template <class T, int NV>
void rows(std::int64_t m, std::int64_t k, const T* a, std::int64_t rs, const T* b, std::int64_t ldb, T* c,
          std::int64_t ldc, std::int64_t n, bool add) {
  constexpr int R = NV == 4 ? 6 : NV == 3 ? 8 : kPanelVectors == 2 && NV == 2 ? 6 : 12;
  std::int64_t i = 0;
  for (; i + R <= m; i += R) tile<T, R, NV>(k, a + i * rs, rs, b, ldb, c + i * ldc, ldc, n, add);
  if (R > 8 && m - i >= 8) tile<T, 8, NV>(k, a + i * rs, rs, b, ldb, c + i * ldc, ldc, n, add), i += 8;
  if (m - i >= 4) tile<T, 4, NV>(k, a + i * rs, rs, b, ldb, c + i * ldc, ldc, n, add), i += 4;
  if (m - i >= 2) tile<T, 2, NV>(k, a + i * rs, rs, b, ldb, c + i * ldc, ldc, n, add), i += 2;
  if (m - i >= 1) tile<T, 1, NV>(k, a + i * rs, rs, b, ldb, c + i * ldc, ldc, n, add);
}

// C[m, n] (+)= A[m, k] panel[k, n]: a has unit stride along k and row stride rs; b has row stride ldb and whole vectors
// to read at each row (packed, or B itself when n is a multiple of the vector width); n <= kPanel.
template <class T>
inline void panel(std::int64_t m, std::int64_t k, const T* a, std::int64_t rs, const T* b, std::int64_t ldb, T* c,
                  std::int64_t ldc, std::int64_t n, bool add) {
  const std::int64_t vectors = (n + kWidth<T> - 1) / kWidth<T>;
  if (vectors == 1) return rows<T, 1>(m, k, a, rs, b, ldb, c, ldc, n, add);
  if (kPanelVectors == 2 || vectors == 2) return rows<T, 2>(m, k, a, rs, b, ldb, c, ldc, n, add);
  if constexpr (kPanelVectors == 4) {
    if (vectors == 3) return rows<T, 3>(m, k, a, rs, b, ldb, c, ldc, n, add);
    return rows<T, 4>(m, k, a, rs, b, ldb, c, ldc, n, add);
  }
}

// All panels of one block of k: B packed by pack_panels.
template <class T>
void block(std::int64_t m, std::int64_t n, std::int64_t k, const T* a, std::int64_t rs, const T* packed, T* c,
           std::int64_t ldc, bool add) {
  for (std::int64_t j = 0; j < n; j += kPanel<T>)
    panel(m, k, a, rs, packed + j * k, panel_width<T>(j, n), c + j, ldc,
          n - j < kPanel<T> ? n - j : std::int64_t{kPanel<T>}, add);
}

}  // namespace gemm
}  // namespace
