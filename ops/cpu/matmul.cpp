#include <capo/ops/cpu/gelu.h>
#include <capo/ops/cpu/gemm_bf16.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/matmul.h>
#include <capo/ops/unary_functors.h>

#include <type_traits>

namespace {

using capo::Activation;
using std::int64_t;

constexpr int64_t kPackedBytes = capo::kMatmulPackedBytes;  // of a block of A
constexpr int64_t kSumRows = 256;                           // of an item that keeps its sums apart from c
constexpr int64_t kInL2 = 512 << 10;                        // bytes of A that stay there while panels of B pass
constexpr int64_t kLowDepth = 16;                           // elements or pairs of k that are few beside the stores
constexpr int64_t kPanelsInL2 = 800 << 10;                  // bytes of B that stay there while A passes

struct Identity {
  template <class T>
  static inline T f(T x, T, T) { return x; }
};

// c[i, j] = act(sums[i, j] + bias[j]), the sum also to z. One panel of one block of rows: still in L1. One pass,
// because c and z often lie a multiple of 4 KiB apart, where a load that follows the other's store waits for it. sums
// may be c.
template <class F, bool kBias, bool kKeep, class T, class S>
void finish_rows(const T* sums, int64_t lds, S* c, S* z, const S* bias, int64_t ld, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; ++i) {
    const T* from = sums + i * lds;
    S *row = c + i * ld, *keep = z + (kKeep ? i * ld : 0);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T x = kBias ? from[j] + load(bias[j]) : from[j];
      if (kKeep) store(keep[j], x);
      store(row[j], F::f(x, T(0), T(0)));
    }
  }
}
// The same with GELU from f32 sums, which works on rows.
template <bool kKeep, class S>
void finish_gelu(const float* sums, int64_t lds, S* c, S* z, const S* bias, int64_t ld, int64_t m, int64_t n) {
  constexpr int64_t kWide = 256;
  alignas(64) float x[kWide];
  for (int64_t i = 0; i < m; ++i)
    for (int64_t from = 0; from < n; from += kWide) {
      const int64_t width = lesser(kWide, n - from), at = i * ld + from;
      const float* sum = sums + i * lds + from;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        x[j] = bias ? sum[j] + load(bias[from + j]) : sum[j];
        if (kKeep) store(z[at + j], x[j]);
      }
      m::gelu_row(x, x, width);
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) store(c[at + j], x[j]);
    }
}
template <class F, class T, class S>
void finish_rows(const T* sums, int64_t lds, S* c, S* z, const S* bias, int64_t ld, int64_t m, int64_t n) {
  if constexpr (std::is_same_v<F, Gelu> && std::is_same_v<T, float>)
    return z ? finish_gelu<true>(sums, lds, c, z, bias, ld, m, n) : finish_gelu<false>(sums, lds, c, z, bias, ld, m, n);
  if (z)
    bias ? finish_rows<F, true, true>(sums, lds, c, z, bias, ld, m, n)
         : finish_rows<F, false, true>(sums, lds, c, z, bias, ld, m, n);
  else
    bias ? finish_rows<F, true, false>(sums, lds, c, z, bias, ld, m, n)
         : finish_rows<F, false, false>(sums, lds, c, z, bias, ld, m, n);
}

// c[i, j] = r[i, j] + (sums[i, j] + bias[j]), rounded as add would.
template <class T, class S>
void add_rows(const T* sums, int64_t lds, S* c, const S* r, const S* bias, int64_t ld, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; ++i, sums += lds, c += ld, r += ld) {
    if (bias) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) store(c[j], load(r[j]) + (sums[j] + load(bias[j])));
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) store(c[j], load(r[j]) + sums[j]);
    }
  }
}

template <class T, class S>
void finish(Activation activation, const T* sums, int64_t lds, S* c, S* z, const S* r, const S* bias, int64_t ld,
            int64_t m, int64_t n) {
  switch (activation) {
    case Activation::none:
      if (r) return add_rows(sums, lds, c, r, bias, ld, m, n);
      return finish_rows<Identity>(sums, lds, c, z, bias, ld, m, n);
    case Activation::relu: return finish_rows<Relu>(sums, lds, c, z, bias, ld, m, n);
    case Activation::gelu: return finish_rows<Gelu>(sums, lds, c, z, bias, ld, m, n);
    case Activation::gelu_tanh: return finish_rows<GeluTanh>(sums, lds, c, z, bias, ld, m, n);
    case Activation::quick_gelu: return finish_rows<QuickGelu>(sums, lds, c, z, bias, ld, m, n);
    case Activation::silu: return finish_rows<Silu>(sums, lds, c, z, bias, ld, m, n);
  }
}

// ---- How the operands are multiplied: S as stored, Sum their sums' type, Row the elements of A's rows and Packed
// those of B's panels, `depth` of them for k ----

template <class S>
inline constexpr bool kHalf = sizeof(S) == 2;

inline void round_if(bool bf16, float* x, int64_t n) {
  if (bf16) gemm_bf16::round_in_place(x, n);
}
inline void round_if(bool, double*, int64_t) {}  // only f32 is rounded

// In S, or in f32 from 16 bits.
template <class S>
struct Plain {
  using Storage = S;
  using Sum = decltype(load(S()));
  using Row = Sum;
  using Packed = Sum;
  static int64_t step(int64_t k) { return gemm::k_block<Sum>(k); }
  static int64_t depth(int64_t k) { return k; }
  static int64_t row_length(int64_t k) { return gemm::round_up(k, 16) + 16; }
  static const Row* in_place(const S* a) { return reinterpret_cast<const Row*>(a); }
  static void pack_rows(bool bf16, const S* a, int64_t rs, int64_t ks, int64_t m, int64_t k, Row* dst, int64_t ldd) {
    if constexpr (kHalf<S>) {
      gemm::pack_rows_half(a, rs, ks, m, k, dst, ldd);
    } else {
      gemm::pack_rows(a, rs, ks, m, k, dst, ldd);
      for (int64_t i = 0; i < m; ++i) round_if(bf16, dst + i * ldd, k);
    }
  }
  static void pack_panel(bool bf16, const S* b, int64_t ks, int64_t cs, int64_t k, int64_t n, Packed* dst) {
    if constexpr (kHalf<S>) {
      gemm::pack_panel_half(b, ks, cs, k, n, dst);
    } else {
      gemm::pack_panel(b, ks, cs, k, n, dst);
      round_if(bf16, dst, k * gemm::panel_width<Sum>(0, n));
    }
  }
  static void panel(int64_t m, int64_t k, const Row* a, int64_t rs, const Packed* b, int64_t ldb, Sum* c, int64_t ldc,
                    int64_t n, bool add, const S* bias, S*, int64_t, bool far) {
    if constexpr (kHalf<S>)
      gemm::panel(m, k, a, rs, b, ldb, c, ldc, n, add);
    else
      gemm::panel(m, k, a, rs, b, ldb, c, ldc, n, add, bias, far);
  }
  static void low_rows(int64_t m, int64_t k, const Row* a, int64_t rs, const Packed* b, bool panels, int64_t ldb, S* c,
                       int64_t ldc, int64_t n, const S* bias) {
    if constexpr (!kHalf<S>) gemm::low_rows(m, k, a, rs, b, panels, ldb, c, ldc, n, bias);
  }
  using DotTile = gemm::DotTile<Sum>;
  static constexpr bool kFinishes = !kHalf<S>;  // the tiles can add a bias and store what c holds
};

#if defined(__AVX512BW__)
// By the processor's bf16 dot product. S: BFloat16, or float, which is rounded.
template <class S>
struct Dot {
  using Storage = S;
  using Sum = float;
  using Row = std::uint16_t;
  using Packed = gemm_bf16::Pairs;
  static int64_t step(int64_t k) { return gemm_bf16::k_block(k); }
  static int64_t depth(int64_t k) { return (k + 1) / 2; }
  static int64_t row_length(int64_t k) { return gemm::round_up(k, 32) + 32; }
  static const Row* in_place(const S* a) { return reinterpret_cast<const Row*>(a); }
  static void pack_rows(bool, const S* a, int64_t rs, int64_t ks, int64_t m, int64_t k, Row* dst, int64_t ldd) {
    gemm_bf16::pack_rows(a, rs, ks, m, k, reinterpret_cast<Packed*>(dst), ldd / 2);
  }
  static void pack_panel(bool, const S* b, int64_t ks, int64_t cs, int64_t k, int64_t n, Packed* dst) {
    gemm_bf16::pack_panel(b, ks, cs, k, n, dst);
  }
  static void panel(int64_t m, int64_t k, const Row* a, int64_t rs, const Packed* b, int64_t ldb, Sum* c, int64_t ldc,
                    int64_t n, bool add, const S* bias, S* out, int64_t ldo, bool far) {
    if constexpr (kFinishes) {
      const gemm_bf16::Rounded rounded{out, ldo, bias, far};
      gemm_bf16::panel(m, depth(k), a, rs, b, ldb, c, ldc, n, add, out ? &rounded : nullptr);
    } else {
      gemm_bf16::panel(m, depth(k), a, rs, b, ldb, c, ldc, n, add, nullptr);
    }
  }
  static void low_rows(int64_t m, int64_t k, const Row* a, int64_t rs, const Packed* b, bool, int64_t, S* c,
                       int64_t ldc, int64_t n, const S* bias) {
    if constexpr (kFinishes) gemm_bf16::low_rows(m, depth(k), a, rs, b, n, {c, ldc, bias, false});
  }
  using DotTile = gemm_bf16::DotTile;
  static constexpr bool kFinishes = kHalf<S>;
};
#endif

// What one work item multiplies: rows r0 .. r0 + m, columns c0 .. c1, k0 .. k0 + k_total of one matrix.
template <class S>
struct Item {
  int64_t c0, c1, m, k0, k_total;
  const S *a, *b;          // a at (r0, k0); b at the matrix's start, unless packed
  int64_t packed_matrix;   // index among the packed matrices
  int64_t at;              // of row r0 in c, z or the parts
};

template <class S>
Item<S> locate(const capo::MatmulArgs& p, int64_t item) {
  Item<S> t;
  t.c0 = item % p.col_blocks * p.col_block;
  int64_t rest = item / p.col_blocks;
  const int64_t r0 = rest % p.row_blocks * p.row_block;
  rest /= p.row_blocks;
  const int64_t chunk = rest % p.k_chunks, matrix = rest / p.k_chunks;
  t.m = lesser(p.row_block, p.m - r0), t.c1 = lesser(t.c0 + p.col_block, p.n);
  t.k0 = chunk * p.k_chunk, t.k_total = lesser(p.k_chunk, p.k - t.k0);
  t.a = static_cast<const S*>(p.a) + r0 * p.a_row + t.k0 * p.a_k;
  t.b = static_cast<const S*>(p.b);
  t.packed_matrix = 0;
  rest = matrix;
  for (int i = p.rank - 1; i >= 0; --i) {
    const int64_t index = rest % p.batch[i];
    rest /= p.batch[i];
    t.a += index * p.sa[i];
    if (p.packed)
      t.packed_matrix += index * p.sb[i];
    else
      t.b += index * p.sb[i];
  }
  t.at = ((matrix * p.k_chunks + chunk) * p.m + r0) * p.c_row;
  return t;
}

// Columns j .. j + n of the item are summed: bias, activation, residual and rounding, while they lie in L1.
template <class P>
void finish_panel(const capo::MatmulArgs& p, const Item<typename P::Storage>& t, const typename P::Sum* sums,
                  int64_t lds, int64_t j, int64_t n) {
  using S = typename P::Storage;
  S *c = static_cast<S*>(p.c) + t.at + j, *z = p.z ? static_cast<S*>(p.z) + t.at + j : nullptr;
  const S* r = p.residual ? static_cast<const S*>(p.residual) + t.at + j : nullptr;
  const S* bias = p.bias ? static_cast<const S*>(p.bias) + j : nullptr;
  finish(p.activation, sums, lds, c, z, r, bias, p.c_row, t.m, n);
}

// Few rows or few columns: rows of A by rows of B^T, nothing packed.
template <class P>
void multiply_dots(const capo::MatmulArgs& p, const Item<typename P::Storage>& t) {
  using S = typename P::Storage;
  using Sum = typename P::Sum;
  using Tile = typename P::DotTile;
  constexpr int64_t kStripe = 256;
  const bool apart = kHalf<S> && !p.parts, more = p.bias || p.activation != Activation::none || p.z || p.residual;
  const bool finish = !p.parts && (kHalf<S> || more);
  Sum sums[kHalf<S> ? Tile::kRows * kStripe : 1];
  const S* b = t.b + t.k0 * p.b_k;
  for (int64_t j0 = t.c0; j0 < t.c1; j0 += kStripe)
    for (int64_t i = 0; i < t.m; i += Tile::kRows) {
      Item<S> part = t;
      part.m = lesser(int64_t{Tile::kRows}, t.m - i), part.at = t.at + i * p.c_row;
      const int64_t j1 = lesser(t.c1, j0 + kStripe), ldc = apart ? kStripe : p.c_row;
      Sum* c = apart ? sums : static_cast<Sum*>(p.c) + part.at + j0;
      for (int64_t j = j0; j < j1; j += Tile::kCols)
        Tile::run(t.k_total, t.a + i * p.a_row, p.a_row, b + j * p.b_col, p.b_col, c + (j - j0), ldc, part.m, j1 - j);
      if (finish) finish_panel<P>(p, part, c, ldc, j0, j1 - j0);
    }
}

// A as it lies transposed: a part of k at a time over all panels, B's rows as they lie where they are whole vectors.
template <class T>
void multiply_turned(const capo::MatmulArgs& p, const Item<T>& t) {
  constexpr int64_t kColumns = gemm::kPanel<T>, kMost = gemm::kTurnedK<T>;
  alignas(64) T b_panel[kMost * kColumns];
  const bool direct = p.b_col == 1 && p.n % gemm::kWidth<T> == 0;
  const bool finishes = !p.parts && (p.activation != Activation::none || p.z || p.residual);
  // One tile of eight rows by three vectors, where a panel has four.
  const int64_t columns = gemm::kPanelVectors == 4 && direct && (t.m == 7 || t.m == 8) ? kColumns / 4 * 3 : kColumns;
  T* c = static_cast<T*>(p.c) + t.at;
  for (int64_t kb = 0; kb < t.k_total; kb += kMost) {
    const int64_t k = lesser(kMost, t.k_total - kb);
    const bool last = kb + k >= t.k_total;
    const T* b = t.b + (t.k0 + kb) * p.b_k;
    for (int64_t j = t.c0; j < t.c1; j += columns) {
      const int64_t n = lesser(columns, t.c1 - j);
      gemm::Run<T> run{t.a + kb * p.a_k, b + j, k};
      int64_t ldb = p.b_k;
      if (!direct) {
        gemm::pack_panel(b + j * p.b_col, p.b_k, p.b_col, k, n, b_panel);
        run.b = b_panel, ldb = gemm::panel_width<T>(0, n);
      }
      const T* bias = last && !p.parts && !finishes && p.bias ? static_cast<const T*>(p.bias) + j : nullptr;
      gemm::Runs<T> runs{&run, 1, p.a_k, ldb};
      const bool ends = j + columns >= t.c1;  // then comes the next part of k
      if (direct && !(ends && last)) runs.next_b = ends ? k * p.b_k + t.c0 - j : columns;
      if (ends && !last) runs.next_a = k * p.a_k;
      gemm::turned_panel(t.m, runs, 0, 0, c + j, p.c_row, n, kb > 0, bias);
      if (last && finishes) finish_panel<Plain<T>>(p, t, c + j, p.c_row, j, n);
    }
  }
}

// A panel of B at a time, over all of k; when A is packed and too long for that, a part of k at a time over all panels.
// Sums of 16-bit products lie apart from c until they are whole. With `across`, a few rows of A at a time over all
// panels.
template <class P>
void multiply(const capo::MatmulArgs& p, int64_t item) {
  using S = typename P::Storage;
  using Sum = typename P::Sum;
  using Row = typename P::Row;
  using Packed = typename P::Packed;
  constexpr int64_t kColumns = gemm::kPanel<Sum>, kRows = kPackedBytes / static_cast<int64_t>(sizeof(Row));
  const bool apart = kHalf<S> && !p.parts;
  alignas(64) Row a_rows[kRows];
  alignas(64) Packed b_panel[gemm::kMaxK<float> * 4 / sizeof(Packed) * kColumns];
  alignas(64) Sum sums[kHalf<S> ? kSumRows * kColumns : 1];

  const Item<S> t = locate<S>(p, item);
  if constexpr (std::is_same_v<S, Sum> ? std::is_same_v<S, Packed> : P::kFinishes)
    if (p.dots) return multiply_dots<P>(p, t);
  if constexpr (std::is_same_v<S, Packed>)
    if (p.turned) return multiply_turned(p, t);
  const int64_t m = t.m, padded = gemm::round_up(p.n, gemm::kWidth<Sum>), step = P::step(t.k_total);
  const Packed* packed = static_cast<const Packed*>(p.b) + (t.packed_matrix * P::depth(p.k) + P::depth(t.k0)) * padded;
  // B as it lies: whole vectors in each row, and too few rows of A to pay for packing.
  const bool direct =
      std::is_same_v<S, Packed> && !p.packed && p.b_col == 1 && p.n % gemm::kWidth<Sum> == 0 && m <= 128 && !p.bf16;
  // The tiles finish.
  const bool plain = P::kFinishes && !p.parts && p.activation == Activation::none && !p.z && !p.residual;

  int64_t part = t.k_total;
  if (!p.a_in_place)
    part = t.k_total <= p.a_part ? t.k_total : p.a_part / step * step;
  else if (!apart && m * t.k_total * static_cast<int64_t>(sizeof(S)) > kInL2)
    part = step;
  const int64_t lda = P::row_length(lesser(part, t.k_total));

  // Panels that stay in L2 pass by a strip of C, which is then written from end to end. Down the panels its lines come
  // and go in columns, and the fetchers of two cores pull at each other's: 6 times slower at k = 8.
  const int64_t panels = P::depth(t.k_total) * (t.c1 - t.c0) * static_cast<int64_t>(sizeof(Packed));
  const bool across = (p.packed || direct) && part == t.k_total && t.k_total <= step && t.k_total > 0 && m > 16 &&
                      panels <= kPanelsInL2;
  const int64_t strip = across ? 12 : m;
  // One tile of eight rows by three vectors, where a panel has four.
  const bool eight = gemm::kPanelVectors == 4 && direct && !across && (m == 7 || m == 8);
  const int64_t columns = eight ? kColumns / 4 * 3 : kColumns;
  Item<S> here = t;
  int64_t kp = 0;
  do {  // once when k = 0: stores zeros
    const int64_t end = lesser(kp + part, t.k_total);
    const Row* rows = a_rows;
    int64_t rs = lda;
    if (p.a_in_place)
      rows = P::in_place(t.a + kp), rs = p.a_row;
    else if (end > kp)
      P::pack_rows(p.bf16, t.a + kp * p.a_k, p.a_row, p.a_k, m, end - kp, a_rows, lda);
    if (across && plain && P::depth(end) <= kLowDepth && t.c0 == 0 && t.c1 == p.n) {
      const Packed* b = p.packed ? packed : reinterpret_cast<const Packed*>(t.b + t.k0 * p.b_k);
      return P::low_rows(m, end, rows, rs, b, p.packed, p.b_k, static_cast<S*>(p.c) + t.at, p.c_row, p.n,
                         static_cast<const S*>(p.bias));
    }
    int64_t i = 0;
    for (int64_t left = (m + strip - 1) / strip; left > 0; --left, i += here.m) {  // strips of nearly equal height
      here.m = (m - i + left - 1) / left, here.at = t.at + i * p.c_row;
      for (int64_t j = t.c0; j < t.c1; j += columns) {
        const int64_t n = lesser(columns, t.c1 - j);
        S* final = static_cast<S*>(p.c) + here.at + j;
        Sum* c = apart ? sums : static_cast<Sum*>(p.c) + here.at + j;
        const int64_t ldc = apart ? kColumns : p.c_row;
        int64_t kb = kp;
        do {
          const int64_t k = lesser(step, end - kb);
          const Packed* b;
          int64_t ldb = gemm::panel_width<Sum>(0, n);
          if (p.packed) {
            b = packed + P::depth(kb) * padded + j * P::depth(k);
          } else if (direct) {
            b = reinterpret_cast<const Packed*>(t.b + (t.k0 + kb) * p.b_k + j), ldb = p.b_k;
          } else {
            P::pack_panel(p.bf16, t.b + (t.k0 + kb) * p.b_k + j * p.b_col, p.b_k, p.b_col, k, n, b_panel);
            b = b_panel;
          }
          const bool finishes = plain && kb + k >= t.k_total;
          const S* bias = finishes && p.bias ? static_cast<const S*>(p.bias) + j : nullptr;
          P::panel(here.m, k, rows + i * rs + (kb - kp), rs, b, ldb, c, ldc, n, kb > 0, bias,
                   finishes ? final : nullptr, p.c_row, p.far || across);
          kb += step;
        } while (kb < end);
        if (end >= t.k_total && !p.parts && !plain) finish_panel<P>(p, here, c, ldc, j, n);
      }
    }
    kp += part;
  } while (kp < t.k_total);
}

template <class P>
void pack(const capo::MatmulPackArgs& p, int64_t item) {
  using S = typename P::Storage;
  const int64_t groups = (p.n + 63) / 64, step = P::step(lesser(p.k_chunk, p.k));
  const int64_t steps = (p.k_chunk + step - 1) / step;  // of a whole chunk; the last one's may be fewer
  const int64_t j0 = item % groups * 64;
  int64_t rest = item / groups;
  // Blocks of k restart at each chunk, and each chunk has its own step (the last one is shorter).
  const int64_t chunks = (p.k + p.k_chunk - 1) / p.k_chunk;
  const int64_t index = rest % (chunks * steps), matrix = rest / (chunks * steps);
  const int64_t k0 = index / steps * p.k_chunk, k_total = lesser(p.k_chunk, p.k - k0);
  const int64_t own = P::step(k_total), kb = index % steps * own;
  if (kb >= k_total) return;
  const int64_t k = lesser(own, k_total - kb);

  const S* b = static_cast<const S*>(p.b);
  rest = matrix;
  for (int i = p.rank - 1; i >= 0; --i) {
    b += rest % p.batch[i] * p.sb[i];
    rest /= p.batch[i];
  }
  b += (k0 + kb) * p.b_k;
  const int64_t padded = gemm::round_up(p.n, gemm::kWidth<typename P::Sum>);
  auto* dst = static_cast<typename P::Packed*>(p.packed) + (matrix * P::depth(p.k) + P::depth(k0 + kb)) * padded;
  constexpr int64_t kColumns = gemm::kPanel<typename P::Sum>;
  for (int64_t j = j0; j < lesser(j0 + 64, p.n); j += kColumns)
    P::pack_panel(p.bf16, b + j * p.b_col, p.b_k, p.b_col, k, lesser(kColumns, p.n - j), dst + j * P::depth(k));
}

// Parts of S's sums, joined and finished.
template <class S>
void join(const capo::MatmulSumArgs& p, int64_t begin, int64_t end) {
  using Sum = decltype(load(S()));
  const Sum* parts = static_cast<const Sum*>(p.parts);
  S *c = static_cast<S*>(p.c), *z = static_cast<S*>(p.z);
  const S* r = static_cast<const S*>(p.residual);
  const S* bias = static_cast<const S*>(p.bias);
  for (int64_t i = begin; i < end;) {  // pieces of rows
    const int64_t in = i % p.plane, j = in % p.n, n = lesser(lesser(p.n - j, end - i), int64_t{256});
    const Sum* src = parts + i / p.plane * p.chunks * p.plane + in;
    Sum sum[256];
    for (int64_t x = 0; x < n; ++x) sum[x] = src[x];
    for (int64_t chunk = 1; chunk < p.chunks; ++chunk) {
      const Sum* s = src + chunk * p.plane;
      for (int64_t x = 0; x < n; ++x) sum[x] += s[x];
    }
    const int64_t at = i / p.n * p.c_row + j;
    finish(p.activation, sum, 256, c + at, z ? z + at : nullptr, r ? r + at : nullptr, bias ? bias + j : nullptr,
           p.c_row, 1, n);
    i += n;
  }
}

}  // namespace

CAPO_CPU_KERNEL(matmul, capo::MatmulArgs) {
  const auto run = [&](void (*f)(const capo::MatmulArgs&, std::int64_t)) {
    for (std::int64_t item = begin; item < end; ++item) f(args, item);
  };
#if defined(__AVX512BW__)
  if (args.bf16_dot)
    return args.dtype == capo::DType::bf16 ? run(multiply<Dot<capo::BFloat16>>) : run(multiply<Dot<float>>);
#endif
  switch (args.dtype) {
    case capo::DType::f64: return run(multiply<Plain<double>>);
    case capo::DType::bf16: return run(multiply<Plain<capo::BFloat16>>);
    case capo::DType::f16: return run(multiply<Plain<capo::Half>>);
    default: return run(multiply<Plain<float>>);
  }
}

CAPO_CPU_KERNEL(matmul_pack, capo::MatmulPackArgs) {
  const auto run = [&](void (*f)(const capo::MatmulPackArgs&, std::int64_t)) {
    for (std::int64_t item = begin; item < end; ++item) f(args, item);
  };
#if defined(__AVX512BW__)
  if (args.bf16_dot) return args.dtype == capo::DType::bf16 ? run(pack<Dot<capo::BFloat16>>) : run(pack<Dot<float>>);
#endif
  switch (args.dtype) {
    case capo::DType::f64: return run(pack<Plain<double>>);
    case capo::DType::bf16: return run(pack<Plain<capo::BFloat16>>);
    case capo::DType::f16: return run(pack<Plain<capo::Half>>);
    default: return run(pack<Plain<float>>);
  }
}

CAPO_CPU_KERNEL(matmul_sum, capo::MatmulSumArgs) {
  switch (args.dtype) {
    case capo::DType::f64: return join<double>(args, begin, end);
    case capo::DType::bf16: return join<capo::BFloat16>(args, begin, end);
    case capo::DType::f16: return join<capo::Half>(args, begin, end);
    default: return join<float>(args, begin, end);
  }
}
