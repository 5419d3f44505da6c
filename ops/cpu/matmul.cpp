#include <capo/ops/cpu/gemm_bf16.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/matmul.h>
#include <capo/ops/unary_functors.h>

namespace {

using capo::Activation;
using std::int64_t;

constexpr int64_t kMaxRows = 96;  // of a block whose A must be packed

struct Identity {
  template <class T>
  static inline T f(T x, T, T) { return x; }
};

// c[i, j] = act(c[i, j] + bias[j]), the sum also to z. One panel of one block of rows: still in L1. One pass, because c
// and z often lie a multiple of 4 KiB apart, where a load that follows the other's store waits for it.
template <class F, bool kBias, bool kKeep, class T>
void finish_rows(T* c, T* z, const T* bias, int64_t ld, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; ++i) {
    T *row = c + i * ld, *keep = z + (kKeep ? i * ld : 0);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T x = kBias ? row[j] + bias[j] : row[j];
      if (kKeep) keep[j] = x;
      row[j] = F::f(x, T(0), T(0));
    }
  }
}
template <class F, class T>
void finish_rows(T* c, T* z, const T* bias, int64_t ld, int64_t m, int64_t n) {
  if (z)
    bias ? finish_rows<F, true, true>(c, z, bias, ld, m, n) : finish_rows<F, false, true>(c, z, bias, ld, m, n);
  else
    bias ? finish_rows<F, true, false>(c, z, bias, ld, m, n) : finish_rows<F, false, false>(c, z, bias, ld, m, n);
}

// c[i, j] = r[i, j] + (c[i, j] + bias[j]), rounded as add would.
template <class T>
void add_rows(T* c, const T* r, const T* bias, int64_t ld, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; ++i, c += ld, r += ld) {
    if (bias) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) c[j] = r[j] + (c[j] + bias[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) c[j] = r[j] + c[j];
    }
  }
}

template <class T>
void finish(Activation activation, T* c, T* z, const T* r, const T* bias, int64_t ld, int64_t m, int64_t n) {
  switch (activation) {
    case Activation::none:
      if (r) return add_rows(c, r, bias, ld, m, n);
      if (bias || z) finish_rows<Identity>(c, z, bias, ld, m, n);
      return;
    case Activation::relu: return finish_rows<Relu>(c, z, bias, ld, m, n);
    case Activation::gelu: return finish_rows<Gelu>(c, z, bias, ld, m, n);
    case Activation::gelu_tanh: return finish_rows<GeluTanh>(c, z, bias, ld, m, n);
    case Activation::quick_gelu: return finish_rows<QuickGelu>(c, z, bias, ld, m, n);
    case Activation::silu: return finish_rows<Silu>(c, z, bias, ld, m, n);
  }
}

// What one work item multiplies: rows r0 .. r0 + m, columns c0 .. c1, k0 .. k0 + k_total of one matrix.
template <class T>
struct Item {
  int64_t c0, c1, m, k0, k_total;
  const T *a, *b;          // a at (r0, k0); b at the matrix's start, unless packed
  int64_t packed_matrix;   // index among the packed matrices
  T *c, *z;                // at row r0
  const T* r;
};

template <class T>
Item<T> locate(const capo::MatmulArgs& p, int64_t item) {
  Item<T> t;
  t.c0 = item % p.col_blocks * p.col_block;
  int64_t rest = item / p.col_blocks;
  const int64_t r0 = rest % p.row_blocks * p.row_block;
  rest /= p.row_blocks;
  const int64_t chunk = rest % p.k_chunks, matrix = rest / p.k_chunks;
  t.m = lesser(p.row_block, p.m - r0), t.c1 = lesser(t.c0 + p.col_block, p.n);
  t.k0 = chunk * p.k_chunk, t.k_total = lesser(p.k_chunk, p.k - t.k0);
  t.a = static_cast<const T*>(p.a) + r0 * p.a_row + t.k0 * p.a_k;
  t.b = static_cast<const T*>(p.b);
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
  const int64_t at = ((matrix * p.k_chunks + chunk) * p.m + r0) * p.c_row;
  t.c = static_cast<T*>(p.c) + at;
  t.z = p.z ? static_cast<T*>(p.z) + at : nullptr;
  t.r = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
  return t;
}

// Columns j .. j + n of the item are summed: bias and activation, while they lie in L1.
template <class T>
void finish_panel(const capo::MatmulArgs& p, const Item<T>& t, int64_t j, int64_t n) {
  const T* bias = static_cast<const T*>(p.bias);
  if (p.k_chunks == 1)
    finish(p.activation, t.c + j, t.z ? t.z + j : nullptr, t.r ? t.r + j : nullptr, bias ? bias + j : nullptr, p.c_row,
           t.m, n);
}

inline void round_if(bool bf16, float* x, int64_t n) {
  if (bf16) gemm_bf16::round_in_place(x, n);
}
inline void round_if(bool, double*, int64_t) {}  // only f32 is rounded

template <class T>
void multiply(const capo::MatmulArgs& p, int64_t item) {
  using namespace gemm;
  constexpr int64_t kLda = kMaxK<T> + 16;
  alignas(64) T a_rows[kMaxRows * kLda];
  alignas(64) T b_panel[kMaxK<T> * kPanel<T>];

  const Item<T> t = locate<T>(p, item);
  const int64_t m = t.m, k0 = t.k0, k_total = t.k_total;
  const int64_t padded = round_up(p.n, kWidth<T>), step = k_block<T>(k_total);
  const T* b = p.packed ? t.b + t.packed_matrix * p.k * padded : t.b;
  // B as it lies: whole vectors in each row, and too few rows of A to pay for packing.
  const bool direct = !p.packed && p.b_col == 1 && p.n % kWidth<T> == 0 && m <= 128 && !p.bf16;

  int64_t kb = 0;
  do {  // once when k = 0: stores zeros
    const int64_t k = lesser(step, k_total - kb);
    const bool last = kb + k >= k_total;
    const T* rows_a = t.a + kb * p.a_k;
    int64_t rs = p.a_row;
    if ((p.a_k != 1 || p.bf16) && k > 0) {
      pack_rows(rows_a, p.a_row, p.a_k, m, k, a_rows, kLda);
      for (int64_t i = 0; i < m; ++i) round_if(p.bf16, a_rows + i * kLda, k);
      rows_a = a_rows;
      rs = kLda;
    }
    for (int64_t j = t.c0; j < t.c1; j += kPanel<T>) {
      const int64_t n = lesser(int64_t{kPanel<T>}, t.c1 - j);
      const T* panel_b;
      int64_t ldb;
      if (p.packed) {
        panel_b = b + (k0 + kb) * padded + j * k;
        ldb = panel_width<T>(j, p.n);
      } else if (direct) {
        panel_b = b + (k0 + kb) * p.b_k + j;
        ldb = p.b_k;
      } else {
        pack_panel(b + (k0 + kb) * p.b_k + j * p.b_col, p.b_k, p.b_col, k, n, b_panel);
        panel_b = b_panel;
        ldb = panel_width<T>(0, n);
        round_if(p.bf16, b_panel, k * ldb);
      }
      panel(m, k, rows_a, rs, panel_b, ldb, t.c + j, p.c_row, n, kb > 0);
      if (last) finish_panel(p, t, j, n);
    }
    kb += step;
  } while (kb < k_total);
}

#if defined(__AVX512BW__)
// The same with both operands packed as pairs of bf16.
void multiply_dot(const capo::MatmulArgs& p, int64_t item) {
  using namespace gemm_bf16;
  constexpr int64_t kLda = kMaxPairs + 16;
  alignas(64) Pairs a_rows[kMaxRows * kLda];
  alignas(64) Pairs b_panel[kMaxPairs * kPanel<float>];

  const Item<float> t = locate<float>(p, item);
  const int64_t padded = round_up(p.n, 16), step = k_block(t.k_total);
  const Pairs* packed = static_cast<const Pairs*>(p.b) + t.packed_matrix * ((p.k + 1) / 2) * padded;
  int64_t kb = 0;
  do {
    const int64_t k = lesser(step, t.k_total - kb), pairs = (k + 1) / 2;
    if (k > 0) pack_rows(t.a + kb * p.a_k, p.a_row, p.a_k, t.m, k, a_rows, kLda);
    for (int64_t j = t.c0; j < t.c1; j += kPanel<float>) {
      const int64_t n = lesser(int64_t{kPanel<float>}, t.c1 - j);
      const Pairs* panel_b = packed + (t.k0 + kb) / 2 * padded + j * pairs;
      if (!p.packed) {
        pack_panel(t.b + (t.k0 + kb) * p.b_k + j * p.b_col, p.b_k, p.b_col, k, n, b_panel);
        panel_b = b_panel;
      }
      panel(t.m, pairs, a_rows, kLda, panel_b, gemm::panel_width<float>(0, n), t.c + j, p.c_row, n, kb > 0);
      if (kb + k >= t.k_total) finish_panel(p, t, j, n);
    }
    kb += step;
  } while (kb < t.k_total);
}
#endif

template <class T>
void pack(const capo::MatmulPackArgs& p, int64_t item) {
  using namespace gemm;
  const auto block_of = [&](int64_t k) { return p.bf16_dot ? gemm_bf16::k_block(k) : k_block<T>(k); };
  const int64_t groups = (p.n + 63) / 64, step = block_of(lesser(p.k_chunk, p.k));
  const int64_t steps = (p.k_chunk + step - 1) / step;  // of a whole chunk; the last one's may be fewer
  const int64_t j0 = item % groups * 64;
  int64_t rest = item / groups;
  // Blocks of k restart at each chunk, and each chunk has its own step (the last one is shorter).
  const int64_t chunks = (p.k + p.k_chunk - 1) / p.k_chunk;
  const int64_t index = rest % (chunks * steps), matrix = rest / (chunks * steps);
  const int64_t k0 = index / steps * p.k_chunk, k_total = lesser(p.k_chunk, p.k - k0);
  const int64_t own = block_of(k_total), kb = index % steps * own;
  if (kb >= k_total) return;
  const int64_t k = lesser(own, k_total - kb);

  const T* b = static_cast<const T*>(p.b);
  rest = matrix;
  for (int i = p.rank - 1; i >= 0; --i) {
    b += rest % p.batch[i] * p.sb[i];
    rest /= p.batch[i];
  }
  b += (k0 + kb) * p.b_k;
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 4) {
    if (p.bf16_dot) {
      const int64_t padded = round_up(p.n, 16);
      auto* dst = static_cast<gemm_bf16::Pairs*>(p.packed) + (matrix * ((p.k + 1) / 2) + (k0 + kb) / 2) * padded;
      gemm_bf16::pack_panel(b + j0 * p.b_col, p.b_k, p.b_col, k, lesser(int64_t{64}, p.n - j0), dst + j0 * ((k + 1) / 2));
      return;
    }
  }
#endif
  const int64_t padded = round_up(p.n, kWidth<T>);
  T* dst = static_cast<T*>(p.packed) + (matrix * p.k + k0 + kb) * padded;
  for (int64_t j = j0; j < lesser(j0 + 64, p.n); j += kPanel<T>) {
    const int64_t n = lesser(int64_t{kPanel<T>}, p.n - j);
    pack_panel(b + j * p.b_col, p.b_k, p.b_col, k, n, dst + j * k);
    round_if(p.bf16, dst + j * k, k * panel_width<T>(0, n));
  }
}

template <class T>
void join(const capo::MatmulSumArgs& p, int64_t begin, int64_t end) {
  const T* parts = static_cast<const T*>(p.parts);
  T* c = static_cast<T*>(p.c);
  T* z = static_cast<T*>(p.z);
  const T* r = static_cast<const T*>(p.residual);
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t i = begin; i < end;) {  // pieces of rows
    const int64_t in = i % p.plane, j = in % p.n, n = lesser(lesser(p.n - j, end - i), int64_t{256});
    const T* src = parts + i / p.plane * p.chunks * p.plane + in;
    T sum[256];
    for (int64_t x = 0; x < n; ++x) sum[x] = src[x];
    for (int64_t chunk = 1; chunk < p.chunks; ++chunk) {
      const T* s = src + chunk * p.plane;
      for (int64_t x = 0; x < n; ++x) sum[x] += s[x];
    }
    const int64_t at = i / p.n * p.c_row + j;
    for (int64_t x = 0; x < n; ++x) c[at + x] = sum[x];
    finish(p.activation, c + at, z ? z + at : nullptr, r ? r + at : nullptr, bias ? bias + j : nullptr, p.c_row, 1, n);
    i += n;
  }
}

}  // namespace

CAPO_CPU_KERNEL(matmul, capo::MatmulArgs) {
#if defined(__AVX512BW__)
  if (args.bf16_dot) {
    for (std::int64_t item = begin; item < end; ++item) multiply_dot(args, item);
    return;
  }
#endif
  for (std::int64_t item = begin; item < end; ++item)
    args.dtype == capo::DType::f32 ? multiply<float>(args, item) : multiply<double>(args, item);
}

CAPO_CPU_KERNEL(matmul_pack, capo::MatmulPackArgs) {
  for (std::int64_t item = begin; item < end; ++item)
    args.dtype == capo::DType::f32 ? pack<float>(args, item) : pack<double>(args, item);
}

CAPO_CPU_KERNEL(matmul_sum, capo::MatmulSumArgs) {
  args.dtype == capo::DType::f32 ? join<float>(args, begin, end) : join<double>(args, begin, end);
}
