// Matrix products of bf16 operands, or of f32 operands rounded to bf16 as they are packed, whose sums are f32: twice
// the rate of f32 where the processor has vdpbf16ps. For ops/cpu files (unnamed namespace, see kernel.h); the scheme is
// gemm.h's, with two neighbours along k in one 32-bit lane:
//   - A block: [row][pair of k]; bf16 rows of unit stride along an even k are just that, and read in place.
//   - B panel: [pair of k][column], zero-padded to whole vectors; an odd last k is paired with zeros.
// Without the instruction the operands are rounded the same way and multiplied in f32: equal but for the sums' order.
#pragma once

#include <capo/ops/cpu/gemm.h>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {
namespace gemm_bf16 {

using gemm::kPanel;
using gemm::round_up;
using std::int64_t;

constexpr int64_t kMaxK = 896;       // of a block: a panel of 64 columns is 112 KiB, as in f32
constexpr int64_t kMaxPairs = kMaxK / 2;

inline int64_t k_block(int64_t k) {
  const int64_t blocks = k > kMaxK ? (k + kMaxK - 1) / kMaxK : 1;
  return blocks == 1 ? (k > 0 ? k : 1) : round_up((k + blocks - 1) / blocks, 16);
}

// ---- Without the instruction ----

// To the nearest bf16, ties to even; NaN stays NaN.
inline void round_in_place(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    std::uint32_t u;
    __builtin_memcpy(&u, x + i, 4);
    const std::uint32_t nan = (u & 0x7fffffffu) > 0x7f800000u;
    u = nan ? (u | 0x400000u) & 0xffff0000u : (u + 0x7fffu + (u >> 16 & 1u)) & 0xffff0000u;
    __builtin_memcpy(x + i, &u, 4);
  }
}

#if defined(__AVX512BW__)
// ---- With it. Every function that uses it is compiled for it, and only runs where the processor has it. ----
#define CAPO_BF16 __attribute__((target("avx512bf16,avx512bw,avx512vl,avx512f,prefer-vector-width=512")))

using Pairs = std::uint32_t;

// 32 floats, those at `n` and after taken as zero, as 16 pairs of neighbours.
CAPO_BF16 inline __m512i neighbours(const float* p, int64_t n) {
  const __m512 low =
      n >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(static_cast<__mmask16>(n > 0 ? (1u << n) - 1 : 0), p);
  const __m512 high = n >= 32
                          ? _mm512_loadu_ps(p + 16)
                          : _mm512_maskz_loadu_ps(static_cast<__mmask16>(n > 16 ? (1u << (n - 16)) - 1 : 0), p + 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

CAPO_BF16 inline __m512i neighbours(const capo::BFloat16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(n >= 32 ? 0xffffffffu : (1u << n) - 1), p);
}

// Pairs (p[j], q[j]) of the first n <= 16 columns; q null: paired with zeros.
CAPO_BF16 inline __m512i columns(const float* p, const float* q, int64_t n) {
  const auto mask = static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512 low = _mm512_maskz_loadu_ps(mask, p);
  const __m512 high = q ? _mm512_maskz_loadu_ps(mask, q) : _mm512_setzero_ps();
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

// Lane i: element i < n below, or above, 16 zero bits. (Masked forms: GCC 12 warns of the others' undefined operand.)
CAPO_BF16 inline __m512i low_halves(const capo::BFloat16* p, __mmask16 mask) {
  return _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(mask, p));
}
CAPO_BF16 inline __m512i high_halves(const capo::BFloat16* p, __mmask16 mask) {
  return _mm512_maskz_slli_epi32(0xffff, low_halves(p, mask), 16);
}
CAPO_BF16 inline __m512i columns(const capo::BFloat16* p, const capo::BFloat16* q, int64_t n) {
  const auto mask = static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1);
  return q ? _mm512_or_si512(low_halves(p, mask), high_halves(q, mask)) : low_halves(p, mask);
}

// The lanes are moved, never computed with: a float's lane holds a pair as well as anything.
inline void transpose(const Pairs* src, int64_t ld, int64_t rows, int64_t cols, Pairs* dst, int64_t ldd) {
  gemm::transpose(reinterpret_cast<const float*>(src), ld, rows, cols, reinterpret_cast<float*>(dst), ldd);
}

// One block of A: dst[i * ldd + p] = pair p of row i; ldd >= round_up(pairs, 16), round_up(m, 16) rows. S: float or
// BFloat16.
template <class S>
CAPO_BF16 __attribute__((noinline)) void pack_rows(const S* a, int64_t rs, int64_t ks, int64_t m, int64_t k, Pairs* dst,
                                                   int64_t ldd) {
  if (ks == 1) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t p = 0; p < k; p += 32) _mm512_storeu_si512(dst + i * ldd + p / 2, neighbours(a + i * rs + p, k - p));
    return;
  }
  alignas(64) Pairs part[16 * 96];  // 16 pairs of k, up to 96 rows
  for (int64_t p = 0; p < k; p += 32) {
    const int64_t pairs = lesser(int64_t{16}, (k - p + 1) / 2);
    for (int64_t x = 0; x < pairs; ++x) {
      const S *low = a + (p + 2 * x) * ks, *high = p + 2 * x + 1 < k ? low + ks : nullptr;
      S gathered[2][96];
      if (rs != 1) {
        for (int64_t i = 0; i < m; ++i) gathered[0][i] = low[i * rs], gathered[1][i] = high ? high[i * rs] : S{};
        low = gathered[0], high = gathered[1];
      }
      for (int64_t i = 0; i < m; i += 16)
        _mm512_store_si512(part + x * 96 + i, columns(low + i, high ? high + i : nullptr, m - i));
    }
    transpose(part, 96, pairs, round_up(m, 16), dst + p / 2, ldd);  // rows m and after: zeros, in dst as well
  }
}

// One panel of B, n <= 64 columns: dst[p * width + j] = pair p of column j; columns n .. width are zero.
template <class S>
CAPO_BF16 __attribute__((noinline)) void pack_panel(const S* b, int64_t ks, int64_t cs, int64_t k, int64_t n,
                                                    Pairs* dst) {
  const int64_t width = gemm::panel_width<float>(0, n), pairs = (k + 1) / 2;
  if (cs == 1) {
    for (int64_t p = 0; p < pairs; ++p) {
      const S *low = b + 2 * p * ks, *high = 2 * p + 1 < k ? low + ks : nullptr;
      for (int64_t j = 0; j < width; j += 16)
        _mm512_storeu_si512(dst + p * width + j, columns(low + j, high ? high + j : nullptr, n - j));
    }
    return;
  }
  alignas(64) Pairs part[16 * 16];  // 16 columns, 16 pairs of k
  for (int64_t j = 0; j < n; j += 16) {
    const int64_t cols = lesser(int64_t{16}, n - j);
    for (int64_t p = 0; p < pairs; p += 16) {
      const int64_t here = lesser(int64_t{16}, pairs - p);
      if (sizeof(S) == 2 && ks == 1 && cs % 2 == 0 && 2 * p + 32 <= k) {  // pairs as they lie
        const auto* lying = reinterpret_cast<const float*>(b + j * cs + 2 * p);
        gemm::transpose_tile(lying, cs / 2, cols, reinterpret_cast<float*>(dst + p * width + j), width);
        continue;
      }
      for (int64_t x = 0; x < cols; ++x) {
        const S* s = b + (j + x) * cs + 2 * p * ks;
        if (ks == 1) {
          _mm512_store_si512(part + x * 16, neighbours(s, k - 2 * p));
        } else {
          S row[32] = {};
          for (int64_t y = 0; y < lesser(int64_t{32}, k - 2 * p); ++y) row[y] = s[y * ks];
          _mm512_store_si512(part + x * 16, neighbours(row, 32));
        }
      }
      if (here == 16) {
        auto* whole = reinterpret_cast<float*>(dst + p * width + j);
        gemm::transpose_tile(reinterpret_cast<const float*>(part), 16, cols, whole, width);
        continue;
      }
      alignas(64) Pairs turned[16 * 16];
      gemm::transpose_tile(reinterpret_cast<const float*>(part), 16, cols, reinterpret_cast<float*>(turned), 16);
      for (int64_t y = 0; y < here; ++y)
        _mm512_storeu_si512(dst + (p + y) * width + j, _mm512_load_si512(turned + y * 16));
    }
  }
}

// Where sums that are whole go: out = bf16(sums + bias), to the nearest, ties to even; bias of bf16 or null.
struct Rounded {
  capo::BFloat16* out;
  int64_t ld;
  const capo::BFloat16* bias;
  bool far;  // from the caches
};

CAPO_BF16 inline __m512 wide(const capo::BFloat16* p, __mmask16 mask) {
  return _mm512_castsi512_ps(high_halves(p, mask));
}
CAPO_BF16 inline __m256i rounded(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

// Of a tile's sums, n < 16 NV columns.
template <int MR, int NV>
CAPO_BF16 __attribute__((always_inline)) inline void store_part(const __m512 (&acc)[MR][NV], float* c, int64_t ldc,
                                                                int64_t n, bool add, const Rounded* out) {
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const int64_t left = n - j * 16;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffffu : left > 0 ? (1u << left) - 1 : 0);
    const __m512 bias = out && out->bias ? wide(out->bias + j * 16, mask) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      float* d = c + i * ldc + j * 16;
      const __m512 sum = add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, d), acc[i][j]) : acc[i][j];
      if (out)
        _mm256_mask_storeu_epi16(out->out + i * out->ld + j * 16, mask, rounded(_mm512_add_ps(sum, bias)));
      else
        _mm512_mask_storeu_ps(d, mask, sum);
    }
  }
}

// The sums of one register tile over `pairs` pairs of k: MR rows, NV vectors of columns. A's rows are bf16, rs elements
// apart.
template <int MR, int NV>
CAPO_BF16 __attribute__((always_inline)) inline void sum_tile(__m512 (&acc)[MR][NV], int64_t pairs,
                                                              const std::uint16_t* a, int64_t rs, const Pairs* b,
                                                              int64_t ldb) {
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512i x[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) x[j] = _mm512_loadu_si512(b + p * ldb + j * 16);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      int pair;
      __builtin_memcpy(&pair, a + i * rs + 2 * p, 4);
      const __m512i y = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j)
        acc[i][j] = _mm512_dpbf16_ps(acc[i][j], reinterpret_cast<__m512bh>(y), reinterpret_cast<__m512bh>(x[j]));
    }
  }
}

// The end of a tile of which n columns are stored.
template <int MR, int NV>
CAPO_BF16 __attribute__((always_inline)) inline void store_tile(const __m512 (&acc)[MR][NV], float* c, int64_t ldc,
                                                                int64_t n, bool add, const Rounded* out) {
  if (n < NV * 16) return store_part<MR, NV>(acc, c, ldc, n, add, out);
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {  // without masks, which cost as much as the store
    const bool biased = out && out->bias;
    const __m512 bias = biased ? wide(out->bias + j * 16, 0xffff) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      float* d = c + i * ldc + j * 16;
      __m512 sum = add ? _mm512_add_ps(_mm512_loadu_ps(d), acc[i][j]) : acc[i][j];
      if (biased) sum = _mm512_add_ps(sum, bias);
      if (out)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out->out + i * out->ld + j * 16), rounded(sum));
      else
        _mm512_storeu_ps(d, sum);
    }
  }
}

// A tile. With `out` the sums go there, and c is only read to be added.
template <int MR, int NV>
CAPO_BF16 __attribute__((noinline)) void tile(int64_t pairs, const std::uint16_t* a, int64_t rs, const Pairs* b,
                                              int64_t ldb, float* c, int64_t ldc, int64_t n, bool add,
                                              const Rounded* out) {
  if (out && out->far) {  // the lines to be stored come while the sums grow
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; j += 2) __builtin_prefetch(out->out + i * out->ld + j * 16, 1);
  }
  __m512 acc[MR][NV];
  sum_tile<MR, NV>(acc, pairs, a, rs, b, ldb);
  store_tile<MR, NV>(acc, c, ldc, n, add, out);
}

template <int NV>
void rows(int64_t m, int64_t pairs, const std::uint16_t* a, int64_t rs, const Pairs* b, int64_t ldb, float* c,
          int64_t ldc, int64_t n, bool add, const Rounded* out) {
  constexpr int R = NV == 4 ? 6 : NV == 3 ? 8 : 12;
  Rounded here{};
  if (out) here = *out;
  int64_t i = 0;
  const auto put = [&](auto f, int64_t height) {
    f(pairs, a + i * rs, rs, b, ldb, c + i * ldc, ldc, n, add, out ? &here : nullptr);
    i += height;
    if (out) here.out += height * here.ld;
  };
  if constexpr (R == 6) {  // tiles of nearly equal height, as gemm.h's
    for (int64_t left = (m + 5) / 6; left > 0; --left) {
      const int64_t height = (m - i + left - 1) / left;
      put(height == 6 ? tile<6, NV> : height == 5 ? tile<5, NV> : height == 4 ? tile<4, NV> : height == 3 ? tile<3, NV>
          : height == 2 ? tile<2, NV> : tile<1, NV>, height);
    }
    return;
  }
  while (i + R <= m) put(tile<R, NV>, R);
  if (R > 8 && m - i >= 8) put(tile<8, NV>, 8);
  if (m - i >= 4) put(tile<4, NV>, 4);
  if (m - i >= 2) put(tile<2, NV>, 2);
  if (m - i >= 1) put(tile<1, NV>, 1);
}

// C[m, n] (+)= A[m, 2 pairs] panel[2 pairs, n], rounded into `out` unless null; n <= 64.
inline void panel(int64_t m, int64_t pairs, const std::uint16_t* a, int64_t rs, const Pairs* b, int64_t ldb, float* c,
                  int64_t ldc, int64_t n, bool add, const Rounded* out) {
  switch ((n + 15) / 16) {
    case 1: return rows<1>(m, pairs, a, rs, b, ldb, c, ldc, n, add, out);
    case 2: return rows<2>(m, pairs, a, rs, b, ldb, c, ldc, n, add, out);
    case 3: return rows<3>(m, pairs, a, rs, b, ldb, c, ldc, n, add, out);
    default: return rows<4>(m, pairs, a, rs, b, ldb, c, ldc, n, add, out);
  }
}

// gemm.h's low_rows, rounded into `out`; b is packed panels.
CAPO_BF16 __attribute__((noinline)) inline void low_rows(int64_t m, int64_t pairs, const std::uint16_t* a, int64_t rs,
                                                         const Pairs* b, int64_t n, Rounded out) {
  constexpr int kRows = gemm::kLowRows;
  constexpr int64_t N = 32;
  for (; m > 0; m -= kRows, a += kRows * rs, out.out += kRows * out.ld)
    for (int64_t j = 0; j < n; j += N) {
      const int64_t in = j % kPanel<float>, width = gemm::panel_width<float>(j - in, n);
      const Pairs* here = b + (j - in) * pairs + in;
      const Rounded to{out.out + j, out.ld, out.bias ? out.bias + j : nullptr, false};
      if (m >= kRows && n - j >= N) {
        __m512 acc[kRows][2];
        sum_tile<kRows, 2>(acc, pairs, a, rs, here, width);
        store_tile<kRows, 2>(acc, nullptr, 0, N, false, &to);
      } else {
        panel(lesser(int64_t{kRows}, m), pairs, a, rs, here, width, nullptr, 0, lesser(N, n - j), false, &to);
      }
    }
}

// gemm.h's DotTile for bf16 operands and f32 sums.
struct DotTile {
  static constexpr int kCols = 4, kRows = 4;
  CAPO_BF16 static __attribute__((noinline)) void run(int64_t k, const capo::BFloat16* a, int64_t lda,
                                                      const capo::BFloat16* b, int64_t ldb, float* c, int64_t ldc,
                                                      int64_t m, int64_t n) {
    const capo::BFloat16 *x[kRows], *y[kCols];
    for (int i = 0; i < 4; ++i) x[i] = a + lesser(int64_t{i}, m - 1) * lda, y[i] = b + lesser(int64_t{i}, n - 1) * ldb;
    __m512 acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
    for (int64_t p = 0; p < k; p += 32) {
      const auto mask = static_cast<__mmask32>(k - p >= 32 ? 0xffffffffu : (1u << (k - p)) - 1);
      __m512i v[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) v[j] = _mm512_maskz_loadu_epi16(mask, y[j] + p);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i u = _mm512_maskz_loadu_epi16(mask, x[i] + p);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          acc[i * 4 + j] =
              _mm512_dpbf16_ps(acc[i * 4 + j], reinterpret_cast<__m512bh>(u), reinterpret_cast<__m512bh>(v[j]));
      }
    }
    gemm::Vector<float> lanes[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) lanes[i] = reinterpret_cast<gemm::Vector<float>>(acc[i]);
    float sum[16];
    gemm::store(sum, gemm::lane_sums<float>(lanes));
    for (int i = 0; i < 4 && i < m; ++i)
      for (int j = 0; j < 4 && j < n; ++j) c[i * ldc + j] = sum[i * 4 + j];
  }
};
#undef CAPO_BF16
#endif  // __AVX512BW__

}  // namespace gemm_bf16
}  // namespace
