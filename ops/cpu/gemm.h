// Building blocks of matrix products: C[m, n] (+)= A[m, k] B[k, n]. For ops/cpu files (unnamed namespace, kernel.h).
//
// The scheme (Goto and van de Geijn 2008, sizes measured on AVX-512 machines):
//   - B goes through panels of kPanel columns (four AVX-512 vectors), k rows each, zero-padded to whole vectors.
//   - A is read in place: rows of unit stride along k, any row stride, one broadcast per element. A with another stride
//     along k is first copied to rows (pack_rows: transposition happens here), or read by turned_tile as it lies.
//   - A tile of C (6 x 4 vectors for AVX-512) is summed in registers from zero, then stored or added to C.
//   - k is cut into blocks of at most kMaxK, which keeps a panel in L2 and the f32 error that of a blocked sum.
// The order of the additions to one element depends on the shape only, never on who computes it.
#pragma once

#include <capo/ops/args.h>
#include <capo/ops/cpu/half.h>
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

// min(max(x, low), high), a NaN as it is; of numbers or vectors.
template <class V>
inline V between(V x, V low, V high) {
  const V y = x < low ? low : x;
  return y > high ? high : y;
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

// The same two from 16-bit storage (half.h), widened on the way (S: BFloat16 or Half; at most kTurn of the strided axis
// at a time).
constexpr std::int64_t kTurn = 64;

template <class S>
void widen_rows(const S* src, std::int64_t rs, std::int64_t rows, std::int64_t cols, float* dst, std::int64_t ldd) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const S* s = src + i * rs;
    float* d = dst + i * ldd;
#pragma omp simd
    for (std::int64_t j = 0; j < cols; ++j) d[j] = ::load(s[j]);
  }
}

template <class S>
void pack_rows_half(const S* a, std::int64_t rs, std::int64_t ks, std::int64_t m, std::int64_t k, float* dst,
                    std::int64_t ldd) {
  if (ks == 1) return widen_rows(a, rs, m, k, dst, ldd);
  if (rs == 1) {  // dst's rows are whole vectors: a piece's padding is overwritten by the next piece
    float piece[kTurn * kTurn];
    for (std::int64_t i = 0; i < m; i += kTurn)
      for (std::int64_t p = 0; p < k; p += kTurn) {
        const std::int64_t here = lesser(kTurn, m - i), deep = lesser(kTurn, k - p);
        widen_rows(a + i + p * ks, ks, deep, here, piece, kTurn);
        transpose(piece, kTurn, deep, here, dst + i * ldd + p, ldd);
      }
    return;
  }
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t p = 0; p < k; ++p) dst[i * ldd + p] = ::load(a[i * rs + p * ks]);
}

template <class S>
void pack_panel_half(const S* b, std::int64_t ks, std::int64_t cs, std::int64_t k, std::int64_t n, float* dst) {
  const std::int64_t width = panel_width<float>(0, n);
  if (ks == 1 && cs != 1) {
    float piece[kPanel<float> * kTurn];
    for (std::int64_t p = 0; p < k; p += kTurn) {
      const std::int64_t deep = lesser(kTurn, k - p);
      widen_rows(b + p, cs, n, deep, piece, kTurn);
      transpose(piece, kTurn, n, deep, dst + p * width, width);
    }
    return;
  }
  for (std::int64_t p = 0; p < k; ++p) {
    float* d = dst + p * width;
    if (cs == 1) {
      widen_rows(b + p * ks, 0, 1, n, d, 0);
    } else {
      for (std::int64_t j = 0; j < n; ++j) d[j] = ::load(b[p * ks + j * cs]);
    }
    for (std::int64_t j = n; j < width; ++j) d[j] = 0.0f;
  }
}

// All panels of a block of k rows: panel j starts at dst + j * k. dst holds k * round_up(n, kWidth) elements.
template <class S, class T>
void pack_panels(const S* b, std::int64_t ks, std::int64_t cs, std::int64_t k, std::int64_t n, T* dst) {
  for (std::int64_t j = 0; j < n; j += kPanel<T>) {
    const std::int64_t columns = lesser(std::int64_t{kPanel<T>}, n - j);
    if constexpr (sizeof(S) == 2)
      pack_panel_half(b + j * cs, ks, cs, k, columns, dst + j * k);
    else
      pack_panel(b + j * cs, ks, cs, k, columns, dst + j * k);
  }
}

// ---- The product ----

// The first n columns of a tile's sums.
template <class T>
__attribute__((noinline)) void store_part(const T* sums, int m, int width, T* c, std::int64_t ldc, std::int64_t n,
                                          bool add, const T* bias) {
  for (int i = 0; i < m; ++i) {
    const T* s = sums + i * width;
    T* d = c + i * ldc;
    for (std::int64_t j = 0; j < n; ++j) {
      const T sum = add ? d[j] + s[j] : s[j];
      d[j] = bias ? sum + bias[j] : sum;
    }
  }
}

// The end of a tile: the first n columns of its sums, stored or added to C.
template <class T, int MR, int NV>
__attribute__((always_inline)) inline void store_tile(const Vector<T> (&acc)[MR][NV], T* c, std::int64_t ldc,
                                                      std::int64_t n, bool add, const T* bias) {
  constexpr int W = kWidth<T>;
  if (n == NV * W) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        T* d = c + i * ldc + j * W;
        const Vector<T> sum = add ? load(d) + acc[i][j] : acc[i][j];
        store(d, bias ? sum + load(bias + j * W) : sum);
      }
    return;
  }
  T rest[MR * NV * W];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(rest + (i * NV + j) * W, acc[i][j]);
  store_part(rest, MR, NV * W, c, ldc, n, add, bias);
}

// The sums of one register tile: MR rows, NV vectors of columns.
template <class T, int MR, int NV>
__attribute__((always_inline)) inline void sum_tile(Vector<T> (&acc)[MR][NV], std::int64_t k, const T* a,
                                                    std::int64_t rs, const T* b, std::int64_t ldb) {
  using V = Vector<T>;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = V{};
  for (std::int64_t p = 0; p < k; ++p) {
    V x[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) x[j] = load(b + p * ldb + j * kWidth<T>);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const V y = a[i * rs + p] - V{};  // broadcast
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] += y * x[j];
    }
  }
}

// A tile of which n columns are stored. add: C += instead of C =. bias, one element per column or null, is added last.
// far: C is not in a cache yet.
template <class T, int MR, int NV>
__attribute__((noinline)) void tile(std::int64_t k, const T* a, std::int64_t rs, const T* b, std::int64_t ldb, T* c,
                                    std::int64_t ldc, std::int64_t n, bool add, const T* bias, bool far) {
  if (far) {  // the lines to be stored come while the sums grow
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) __builtin_prefetch(c + i * ldc + j * kWidth<T>, 1);
  }
  Vector<T> acc[MR][NV];
  sum_tile<T, MR, NV>(acc, k, a, rs, b, ldb);
  store_tile<T, MR, NV>(acc, c, ldc, n, add, bias);
}

template <int NV>
constexpr int kTileRows = NV == 4 ? 6 : NV == 3 ? 8 : kPanelVectors == 2 && NV == 2 ? 6 : 12;

template <class T, int NV>
void rows(std::int64_t m, std::int64_t k, const T* a, std::int64_t rs, const T* b, std::int64_t ldb, T* c,
          std::int64_t ldc, std::int64_t n, bool add, const T* bias, bool far) {
  constexpr int R = kTileRows<NV>;
  std::int64_t i = 0;
  if constexpr (R == 6) {  // tiles of nearly equal height: none is too low to hide the instructions' latency
    for (std::int64_t left = (m + 5) / 6; left > 0; --left) {
      const std::int64_t height = (m - i + left - 1) / left;
      const T* x = a + i * rs;
      T* y = c + i * ldc;
      i += height;
      switch (height) {
        case 6: tile<T, 6, NV>(k, x, rs, b, ldb, y, ldc, n, add, bias, far); break;
        case 5: tile<T, 5, NV>(k, x, rs, b, ldb, y, ldc, n, add, bias, far); break;
        case 4: tile<T, 4, NV>(k, x, rs, b, ldb, y, ldc, n, add, bias, far); break;
        case 3: tile<T, 3, NV>(k, x, rs, b, ldb, y, ldc, n, add, bias, far); break;
        case 2: tile<T, 2, NV>(k, x, rs, b, ldb, y, ldc, n, add, bias, far); break;
        default: tile<T, 1, NV>(k, x, rs, b, ldb, y, ldc, n, add, bias, far);
      }
    }
    return;
  }
  for (; i + R <= m; i += R) tile<T, R, NV>(k, a + i * rs, rs, b, ldb, c + i * ldc, ldc, n, add, bias, far);
  if (R > 8 && m - i >= 8) tile<T, 8, NV>(k, a + i * rs, rs, b, ldb, c + i * ldc, ldc, n, add, bias, far), i += 8;
  if (m - i >= 4) tile<T, 4, NV>(k, a + i * rs, rs, b, ldb, c + i * ldc, ldc, n, add, bias, far), i += 4;
  if (m - i >= 2) tile<T, 2, NV>(k, a + i * rs, rs, b, ldb, c + i * ldc, ldc, n, add, bias, far), i += 2;
  if (m - i >= 1) tile<T, 1, NV>(k, a + i * rs, rs, b, ldb, c + i * ldc, ldc, n, add, bias, far);
}

// C[m, n] (+)= A[m, k] panel[k, n] (+ bias[n]): a has unit stride along k and row stride rs; b has row stride ldb and
// whole vectors to read at each row (packed, or B itself when n is a multiple of the vector width); n <= kPanel.
template <class T>
inline void panel(std::int64_t m, std::int64_t k, const T* a, std::int64_t rs, const T* b, std::int64_t ldb, T* c,
                  std::int64_t ldc, std::int64_t n, bool add, const T* bias = nullptr, bool far = false) {
  const std::int64_t vectors = (n + kWidth<T> - 1) / kWidth<T>;
  if (vectors == 1) return rows<T, 1>(m, k, a, rs, b, ldb, c, ldc, n, add, bias, far);
  if (kPanelVectors == 2 || vectors == 2) return rows<T, 2>(m, k, a, rs, b, ldb, c, ldc, n, add, bias, far);
  if constexpr (kPanelVectors == 4) {
    if (vectors == 3) return rows<T, 3>(m, k, a, rs, b, ldb, c, ldc, n, add, bias, far);
    return rows<T, 4>(m, k, a, rs, b, ldb, c, ldc, n, add, bias, far);
  }
}

// C[m, n] = A[m, k] B[k, n] (+ bias[n]) for a short k, where stores take as long as sums: low tiles, C from end to end.
// B: packed panels, or, with whole vectors in its rows, as it lies, ldb from one to the next.
constexpr int kLowRows = 4;

template <class T>
__attribute__((noinline)) void low_rows(std::int64_t m, std::int64_t k, const T* a, std::int64_t rs, const T* b,
                                        bool panels, std::int64_t ldb, T* c, std::int64_t ldc, std::int64_t n,
                                        const T* bias) {
  constexpr std::int64_t N = 2 * kWidth<T>;
  for (; m > 0; m -= kLowRows, a += kLowRows * rs, c += kLowRows * ldc)
    for (std::int64_t j = 0; j < n; j += N) {
      const std::int64_t in = j % kPanel<T>;
      const T* here = panels ? b + (j - in) * k + in : b + j;
      const std::int64_t step = panels ? panel_width<T>(j - in, n) : ldb;
      if (m >= kLowRows && n - j >= N) {
        Vector<T> acc[kLowRows][2];
        sum_tile<T, kLowRows, 2>(acc, k, a, rs, here, step);
        store_tile<T, kLowRows, 2>(acc, c + j, ldc, N, false, bias ? bias + j : nullptr);
      } else {
        panel(lesser(std::int64_t{kLowRows}, m), k, a, rs, here, step, c + j, ldc, lesser(N, n - j), false,
              bias ? bias + j : nullptr);
      }
    }
}

// ---- A transposed, read as it lies: C = A^T B of two row-major operands with a long k (weight gradients) ----

// `count` neighbours along k: row i of A and column j of B at a[i] and b[j], the next ones lda and ldb further.
template <class T>
struct Run {
  const T *a, *b;
  std::int64_t count;
};
// What is multiplied next comes into L2 meanwhile: elements from a to its rows, from b to its panel; 0: it is there.
template <class T>
struct Runs {
  const Run<T>* run;
  std::int64_t runs, lda, ldb;
  std::int64_t next_a = 0, next_b = 0;
};

// The part of k that is summed over all of C at a time: its rows of A stay in L2.
template <class T>
constexpr std::int64_t kTurnedK = 512 / static_cast<std::int64_t>(sizeof(T));
constexpr std::int64_t kAhead = 8;  // rows fetched ahead: both operands come from afar, and each row from another page

// A tile as above whose rows of A start at column i of its storage, and whose columns at column j of B's. next_b: to
// one line of each row of the next panel.
template <class T, int MR, int NV>
__attribute__((noinline)) void turned_tile(const Runs<T>& r, std::int64_t i0, std::int64_t j0, T* c, std::int64_t ldc,
                                           std::int64_t n, bool add, const T* bias, std::int64_t next_b) {
  constexpr int W = kWidth<T>;
  using V = Vector<T>;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = V{};
  for (std::int64_t l = 0; l < r.runs; ++l) {
    const T *a = r.run[l].a + i0, *b = r.run[l].b + j0;
    for (std::int64_t p = r.run[l].count; p > 0; --p, a += r.lda, b += r.ldb) {
      __builtin_prefetch(b + next_b, 0, 2);
      __builtin_prefetch(a + r.next_a, 0, 2);
      __builtin_prefetch(a + kAhead * r.lda);
      V x[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        __builtin_prefetch(b + kAhead * r.ldb + j * W);
        x[j] = load(b + j * W);
      }
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const V y = a[i] - V{};  // broadcast
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] += y * x[j];
      }
    }
  }
  store_tile<T, MR, NV>(acc, c, ldc, n, add, bias);
}

template <class T, int NV>
void turned_rows(std::int64_t m, const Runs<T>& r, std::int64_t i0, std::int64_t j0, T* c, std::int64_t ldc,
                 std::int64_t n, bool add, const T* bias) {
  constexpr int R = kTileRows<NV>;
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  std::int64_t i = 0, line = 0;  // of the next panel: one for each of the first tiles
  const auto put = [&](auto tile, std::int64_t height) {
    const bool fetches = r.next_b != 0 && line < NV * kWidth<T>;
    tile(r, i0 + i, j0, c + i * ldc, ldc, n, add, bias, fetches ? r.next_b + line : 0);
    i += height;
    line += kLine;
  };
  if constexpr (R == 6) {  // as rows
    for (std::int64_t left = (m + 5) / 6; left > 0; --left) {
      const std::int64_t height = (m - i + left - 1) / left;
      put(height == 6   ? turned_tile<T, 6, NV>
          : height == 5 ? turned_tile<T, 5, NV>
          : height == 4 ? turned_tile<T, 4, NV>
          : height == 3 ? turned_tile<T, 3, NV>
          : height == 2 ? turned_tile<T, 2, NV>
                        : turned_tile<T, 1, NV>,
          height);
    }
    return;
  }
  while (i + R <= m) put(turned_tile<T, R, NV>, R);
  if (m - i >= 4) put(turned_tile<T, 4, NV>, 4);
  if (m - i >= 4) put(turned_tile<T, 4, NV>, 4);
  if (m - i >= 2) put(turned_tile<T, 2, NV>, 2);
  if (m - i >= 1) put(turned_tile<T, 1, NV>, 1);
}

// C[m, n] (+)= A^T B (+ bias[n]) of rows i0 .. of A^T and columns j0 .. j0 + n <= kPanel of B, whose rows have whole
// vectors to read.
template <class T>
void turned_panel(std::int64_t m, const Runs<T>& r, std::int64_t i0, std::int64_t j0, T* c, std::int64_t ldc,
                  std::int64_t n, bool add, const T* bias = nullptr) {
  const std::int64_t vectors = (n + kWidth<T> - 1) / kWidth<T>;
  if (vectors == 1) return turned_rows<T, 1>(m, r, i0, j0, c, ldc, n, add, bias);
  if (kPanelVectors == 2 || vectors == 2) return turned_rows<T, 2>(m, r, i0, j0, c, ldc, n, add, bias);
  if constexpr (kPanelVectors == 4) {
    if (vectors == 3) return turned_rows<T, 3>(m, r, i0, j0, c, ldc, n, add, bias);
    return turned_rows<T, 4>(m, r, i0, j0, c, ldc, n, add, bias);
  }
}

// ---- Few rows or few columns: nothing is packed, the vectors lie along k ----

// The sums of the lanes of W vectors, as the lanes of one.
template <class T>
inline Vector<T> lane_sums(Vector<T>* x) {
  constexpr int W = kWidth<T>;
  using L = typename MakeLanes<W>::type;
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      x[i] = interleave<W, 0>(x[i], x[i + half], L()) + interleave<W, 1>(x[i], x[i + half], L());
  return x[0];
}

// C[r, c] = the sum over k of a[r * lda + p] b[c * ldb + p], for a tile of kWidth sums of which m x n are stored.
template <class T>
struct DotTile {
  static constexpr int kCols = kWidth<T> >= 8 ? 4 : 2, kRows = kWidth<T> / kCols;
  static __attribute__((noinline)) void run(std::int64_t k, const T* a, std::int64_t lda, const T* b, std::int64_t ldb,
                                            T* c, std::int64_t ldc, std::int64_t m, std::int64_t n) {
    constexpr int W = kWidth<T>;
    const T *x[kRows], *y[kCols];  // beyond the last row or column: that one again
    for (int i = 0; i < kRows; ++i) x[i] = a + lesser(std::int64_t{i}, m - 1) * lda;
    for (int j = 0; j < kCols; ++j) y[j] = b + lesser(std::int64_t{j}, n - 1) * ldb;
    Vector<T> acc[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) acc[i] = Vector<T>{};
    std::int64_t p = 0;
    for (; p + W <= k; p += W) {
      Vector<T> v[kCols];
#pragma GCC unroll 4
      for (int j = 0; j < kCols; ++j) v[j] = load(y[j] + p);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vector<T> u = load(x[i] + p);
#pragma GCC unroll 4
        for (int j = 0; j < kCols; ++j) acc[i * kCols + j] += u * v[j];
      }
    }
    T sum[W];
    store(sum, lane_sums<T>(acc));
    for (int i = 0; i < kRows && i < m; ++i)
      for (int j = 0; j < kCols && j < n; ++j) {
        T total = sum[i * kCols + j];
        for (std::int64_t q = p; q < k; ++q) total += x[i][q] * y[j][q];
        c[i * ldc + j] = total;
      }
  }
};

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
