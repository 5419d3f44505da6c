#include <capo/ops/attention.h>
#include <capo/ops/cpu/gemm.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/cpu/storage.h>

namespace {

using capo::AttentionArgs;
using capo::AttentionGradArgs;
using capo::LseMergeArgs;
using std::int64_t;

// Forward: scores of up to 72 queries x 512 keys stay in L2. Backward holds three such blocks, so they are smaller.
constexpr int64_t kQueries = 72, kKeys = 512, kMaxChunk = 512;
constexpr int64_t kGradQueries = 96, kGradKeys = capo::kAttentionGradKeys;
template <class T>
constexpr int64_t kPacked = 262144 / static_cast<int64_t>(sizeof(T));  // elements of a packed block of k or v
constexpr int64_t kWideQueries = 16384;                                // elements of a block of 16-bit q, widened

inline float infinity(float) { return __builtin_inff(); }
inline double infinity(double) { return __builtin_inf(); }

// n rows cut into equal blocks of at most `most`.
inline int64_t even_block(int64_t n, int64_t most) {
  const int64_t blocks = (n + most - 1) / most;
  return blocks <= 1 ? n : lesser(most, gemm::round_up((n + blocks - 1) / blocks, 6));
}
// Rows of width d that fit in a packed block, whole vectors.
template <class T>
inline int64_t fitting(int64_t d, int64_t most) {
  const int64_t rows = kPacked<T> / gemm::round_up(d > 0 ? d : 1, 16) / 16 * 16;
  return lesser(most, rows);
}

// Rows to compute with: where they lie, or 16-bit ones widened into a buffer, with zeros up to whole vectors.
template <class T>
struct Rows {
  const T* data;
  int64_t ld;
};
template <class S>
inline Rows<Computed<S>> rows_of(const S* x, int64_t ld, int64_t rows, int64_t n,
                                 [[maybe_unused]] Computed<S>* buffer) {
  if constexpr (kHalf<S>) {
    const int64_t wide = gemm::round_up(n, 16);
    gemm::widen_rows(x, ld, rows, n, buffer, wide);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = n; j < wide; ++j) buffer[i * wide + j] = 0;
    return {buffer, wide};
  } else {
    return {x, ld};
  }
}
// Where rows of n elements are summed: in the result, or, when that is 16-bit, in a buffer, from which put_rows rounds
// them.
template <class T>
struct Sums {
  T* data;
  int64_t ld;
};
template <class S>
inline Sums<Computed<S>> sums_for(S* y, int64_t ld, [[maybe_unused]] int64_t n, [[maybe_unused]] Computed<S>* buffer) {
  if constexpr (kHalf<S>)
    return {buffer, n};
  else
    return {y, ld};
}
template <class S>
inline void put_rows([[maybe_unused]] Sums<Computed<S>> sums, [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t n,
                     [[maybe_unused]] S* y, [[maybe_unused]] int64_t ld) {
  if constexpr (kHalf<S>)
    for (int64_t i = 0; i < rows; ++i) narrow(sums.data + i * sums.ld, y + i * ld, n);
}

// How the kernels multiply by a [rows, n] matrix of row stride ld: in place, or through a packed copy.
template <class T>
struct Right {
  const T* data;
  int64_t ld;  // 0: packed
};
template <class S>
inline Right<Computed<S>> right(Rows<Computed<S>> b, int64_t rows, int64_t n, Computed<S>* buffer) {
  if (kHalf<S> || (n % gemm::kWidth<Computed<S>> == 0 && b.ld != 0)) return {b.data, b.ld};
  gemm::pack_panels(b.data, b.ld, 1, rows, n, buffer);
  return {buffer, 0};
}
template <class S>
inline Right<Computed<S>> right(const S* b, int64_t ld, int64_t rows, int64_t n, Computed<S>* buffer) {
  return right<S>(rows_of(b, ld, rows, n, buffer), rows, n, buffer);
}
// C[m, n] (+)= A[m, k] right[k, n]; a packed right was made of `packed_rows` rows.
template <class T>
inline void times(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, Right<T> b, int64_t packed_rows, T* c,
                  int64_t ldc, bool add) {
  for (int64_t j = 0; j < n; j += gemm::kPanel<T>) {
    const T* panel = b.ld ? b.data + j : b.data + j * packed_rows;
    gemm::panel(m, k, a, lda, panel, b.ld ? b.ld : gemm::panel_width<T>(j, n), c + j, ldc,
                lesser(int64_t{gemm::kPanel<T>}, n - j), add);
  }
}

template <int Shift, class V, int... I>
inline V rotate(V v, gemm::Lanes<I...>) {
  return __builtin_shufflevector(v, v, ((I + Shift) % static_cast<int>(sizeof...(I)))...);
}
// All lanes joined in a fixed tree.
template <class T, class Join>
inline T across(gemm::Vector<T> v, Join join) {
  constexpr int W = gemm::kWidth<T>;
  using L = typename gemm::MakeLanes<W>::type;
  if constexpr (W >= 16) v = join(v, rotate<8>(v, L()));
  if constexpr (W >= 8) v = join(v, rotate<4>(v, L()));
  if constexpr (W >= 4) v = join(v, rotate<2>(v, L()));
  v = join(v, rotate<1>(v, L()));
  return v[0];
}

// Lane i is true when i < n.
template <class T, int... I>
inline auto before(int64_t n, gemm::Lanes<I...>) {
  using Mask = decltype(gemm::Vector<T>{} < gemm::Vector<T>{});
  using Lane = __typeof__(Mask{}[0]);
  return Mask{static_cast<Lane>(I)...} < Mask{} + static_cast<Lane>(n < 0 ? 0 : n);
}

// Rows are padded to whole vectors. s[j] = s[j] * scale + bias[j * stride], -inf from `own` on; returns the maximum.
template <class T>
inline T scale_row(T* s, int64_t own, int64_t width, T scale, const T* bias, int64_t stride) {
  constexpr int W = gemm::kWidth<T>;
  using V = gemm::Vector<T>;
  V best = V{} - infinity(T(0));
  for (int64_t j = 0; j < width; j += W) {
    V x = gemm::load(s + j) * scale;
    if (bias && j + W <= own && stride == 1) {
      x += gemm::load(bias + j);
    } else if (bias) {
      T y[W] = {};
      for (int i = 0; i < W && j + i < own; ++i) y[i] = bias[(j + i) * stride];
      x += gemm::load(y);
    }
    if (j + W > own) x = before<T>(own - j, typename gemm::MakeLanes<W>::type()) ? x : V{} - infinity(T(0));
    best = x > best || x != x ? x : best;
    gemm::store(s + j, x);
  }
  return across<T>(best, [](V a, V b) { return a > b ? a : b; });
}
// The maximum of s[j] before `own`; -inf from there on. NaN is passed over: the sum of exp_row meets it.
template <class T>
inline T top_row(T* s, int64_t own, int64_t width) {
  constexpr int W = gemm::kWidth<T>;
  using V = gemm::Vector<T>;
  V best = V{} - infinity(T(0));
  for (int64_t j = 0; j < width; j += W) {
    V x = gemm::load(s + j);
    if (j + W > own) {
      x = before<T>(own - j, typename gemm::MakeLanes<W>::type()) ? x : V{} - infinity(T(0));
      gemm::store(s + j, x);
    }
    best = x > best ? x : best;
  }
  return across<T>(best, [](V a, V b) { return a > b ? a : b; });
}
// s[j] = exp(s[j] * scale - shift), which must not be far above 0; returns the sum.
template <class T>
inline T exp_row(T* s, int64_t width, T scale, T shift) {
  constexpr int W = gemm::kWidth<T>;
  using V = gemm::Vector<T>;
  V sum{};
  for (int64_t j = 0; j < width; j += W) {
    T* x = s + j;
#pragma omp simd
    for (int i = 0; i < W; ++i) x[i] = m::exp_small(x[i] * scale - shift);
    sum += gemm::load(x);
  }
  return across<T>(sum, [](V a, V b) { return a + b; });
}
template <class T>
inline void multiply_row(T* x, int64_t n, T by) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] *= by;
}
template <class S>
inline void fill_rows(S* x, int64_t rows, int64_t ld, int64_t n) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; ++j) x[i * ld + j] = S{};
}
template <class S, class T = Computed<S>>
inline T dot(const S* a, const S* b, int64_t n) {
  T lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) lane[j] += load(a[i + j]) * load(b[i + j]);
  for (int j = 0; i < n; ++i, ++j) lane[j] += load(a[i]) * load(b[i]);
  for (int half = 8; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}
// sum of a (b - c)
template <class S, class T = Computed<S>>
inline T dot_difference(const S* a, const S* b, const S* c, int64_t n) {
  T lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) lane[j] += load(a[i + j]) * (load(b[i + j]) - load(c[i + j]));
  for (int j = 0; i < n; ++i, ++j) lane[j] += load(a[i]) * (load(b[i]) - load(c[i]));
  for (int half = 8; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

// Keys before j0 + result are visible to query i (0 .. n).
inline int64_t visible(const AttentionArgs& p, int64_t i, int64_t j0, int64_t n) {
  if (!p.causal) return n;
  const int64_t last = i + p.nk - p.nq - j0 + 1;
  return last < 0 ? 0 : lesser(last, n);
}

template <class S>
struct Head {  // one (b, h)
  const S *q, *k, *v, *bias;
  S* o;
  Computed<S>* lse;
  int64_t ldo;
};
template <class S>
Head<S> head_of(const AttentionArgs& p, int64_t bh) {
  const int64_t b = bh / p.heads, h = bh % p.heads;
  const S* bias = static_cast<const S*>(p.bias);
  return {static_cast<const S*>(p.q) + b * p.qs[0] + h * p.qs[2],
          static_cast<const S*>(p.k) + b * p.ks[0] + h * p.ks[2],
          static_cast<const S*>(p.v) + b * p.vs[0] + h * p.vs[2],
          bias ? bias + b * p.bs[0] + h * p.bs[1] : nullptr,
          static_cast<S*>(p.o) + (b * p.nq * p.heads + h) * p.dv,
          static_cast<Computed<S>*>(p.lse) + bh * p.nq,
          p.heads * p.dv};
}

// What is added to the scores of one query and n keys from j0 on: null for nothing.
template <class T>
struct Bias {
  const T* data;
  int64_t stride;
};
template <class S>
inline Bias<Computed<S>> bias_of(const AttentionArgs& p, const Head<S>& head, int64_t row, int64_t j0,
                             [[maybe_unused]] int64_t n, [[maybe_unused]] Computed<S>* buffer) {
  if (!head.bias) return {nullptr, 0};
  const S* bias = head.bias + row * p.bs[2] + j0 * p.bs[3];
  if constexpr (kHalf<S>) {
    if (p.bs[3] == 1) return widen(bias, buffer, n), Bias<Computed<S>>{buffer, 1};
    for (int64_t j = 0; j < n; ++j) buffer[j] = load(bias[j * p.bs[3]]);
    return {buffer, 1};
  } else {
    return {bias, p.bs[3]};
  }
}

// Queries first .. first + rows, at most kMaxChunk, of one head; 16-bit ones have their sums in a block.
template <class S>
__attribute__((noinline)) void attend(const AttentionArgs& p, const Head<S>& head, int64_t first, int64_t rows) {
  using T = Computed<S>;
  constexpr int W = gemm::kWidth<T>;
  alignas(64) T kt[kPacked<T>];
  alignas(64) T vp[kPacked<T>];
  alignas(64) T scores[kQueries * kKeys];
  alignas(64) T o_block[if_half<S>(kPacked<T>)];
  alignas(64) T q_block[if_half<S>(kWideQueries)];
  alignas(64) T bias_row[if_half<S>(kKeys)];
  T top[kMaxChunk], total[kMaxChunk];  // the running maximum and sum of exp(score - maximum)

  const S* q0 = head.q + first * p.qs[1];
  const T scale = static_cast<T>(p.scale);
  const bool plain = !head.bias && scale > T(0);  // the scaling can wait for the exponential: one pass less
  S* o0 = head.o + first * head.ldo;
  const Sums<T> o = sums_for(o0, head.ldo, p.dv, o_block);
  for (int64_t i = 0; i < rows; ++i) top[i] = -infinity(T(0)), total[i] = T(0);

  const int64_t block = fitting<T>(greater(p.d, p.dv), kKeys);
  const int64_t most = kHalf<S> ? lesser(kQueries, kWideQueries / gemm::round_up(p.d, 16)) : kQueries;
  const int64_t query_block = even_block(rows, most);
  for (int64_t j0 = 0; j0 < p.nk; j0 += block) {
    const int64_t n = lesser(block, p.nk - j0), ld = gemm::round_up(n, W);
    if (j0 > 0 && visible(p, first + rows - 1, j0, n) == 0) break;
    gemm::pack_panels(head.k + j0 * p.ks[1], int64_t{1}, p.ks[1], p.d, n, kt);
    const Right<T> v = right(head.v + j0 * p.vs[1], p.vs[1], n, p.dv, vp);
    for (int64_t i0 = 0; i0 < rows; i0 += query_block) {
      const int64_t m = lesser(query_block, rows - i0), seen = visible(p, first + i0 + m - 1, j0, n);
      T* ob = o.data + i0 * o.ld;
      if (seen == 0) {
        if (j0 == 0) fill_rows(ob, m, o.ld, p.dv);
        continue;
      }
      const int64_t width = gemm::round_up(seen, W);
      const Rows<T> q = rows_of(q0 + i0 * p.qs[1], p.qs[1], m, p.d, q_block);
      for (int64_t j = 0; j < seen; j += gemm::kPanel<T>)  // whole vectors: kt is padded with zeros
        gemm::panel(m, p.d, q.data, q.ld, kt + j * p.d, gemm::panel_width<T>(j, n), scores + j, ld,
                    lesser(int64_t{gemm::kPanel<T>}, ld - j), false);
      for (int64_t i = 0; i < m; ++i) {
        T* s = scores + i * ld;
        const int64_t row = first + i0 + i, own = visible(p, row, j0, n);
        T& t = top[i0 + i];
        const Bias<T> bias = bias_of(p, head, row, j0, n, bias_row);
        const T most_of_row = plain ? top_row(s, own, width) * scale
                                    : scale_row(s, own, width, scale, bias.data, bias.stride);
        const T now = greater(t, most_of_row), shift = now == -infinity(T(0)) ? T(0) : now;
        const T sum = exp_row(s, width, plain ? scale : T(1), shift);
        if (j0 == 0) {
          total[i0 + i] = sum;
        } else {
          const T shrink = m::exp(t - shift);
          if (shrink != T(1)) multiply_row(ob + i * o.ld, p.dv, shrink);
          total[i0 + i] = total[i0 + i] * shrink + sum;
        }
        t = now;
      }
      times(m, p.dv, seen, scores, ld, v, n, ob, o.ld, j0 > 0);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (total[i] == T(0))
      fill_rows(o.data + i * o.ld, 1, o.ld, p.dv);
    else
      multiply_row(o.data + i * o.ld, p.dv, T(1) / total[i]);
  }
  put_rows(o, rows, p.dv, o0, head.ldo);
#pragma omp simd
  for (int64_t i = 0; i < rows; ++i) head.lse[first + i] = top[i] + m::log(total[i]);  // -inf + log 0 = -inf
}

template <class S>
void attend_chunk(const AttentionArgs& p, int64_t item) {
  const Head<S> head = head_of<S>(p, item / p.chunks);
  const int64_t begin = item % p.chunks * p.chunk, end = lesser(begin + p.chunk, p.nq);
  const int64_t most = kHalf<S> ? kPacked<Computed<S>> / greater(p.dv, int64_t{1}) : p.chunk;
  for (int64_t i = begin; i < end; i += most) attend(p, head, i, lesser(most, end - i));
}

template <class S>
__attribute__((noinline)) void attend_backward(const AttentionGradArgs& g, int64_t bh) {
  using T = Computed<S>;
  constexpr int W = gemm::kWidth<T>;
  alignas(64) T kt[kPacked<T>];
  alignas(64) T vt[kPacked<T>];
  alignas(64) T kp[kPacked<T>];
  alignas(64) T qp[kPacked<T>];
  alignas(64) T dop[kPacked<T>];
  alignas(64) T prob[kGradQueries * kGradKeys];
  alignas(64) T ds[kGradQueries * kGradKeys];
  alignas(64) T flipped[kGradQueries * kGradKeys];  // keys x queries
  alignas(64) T dq_block[if_half<S>(kPacked<T>)];
  alignas(64) T dk_block[if_half<S>(kPacked<T>)];
  alignas(64) T dv_block[if_half<S>(kPacked<T>)];
  alignas(64) T bias_row[if_half<S>(kGradKeys)];

  const AttentionArgs& p = g.forward;
  const Head<S> head = head_of<S>(p, bh);
  const int64_t b = bh / p.heads, h = bh % p.heads;
  const T scale = static_cast<T>(p.scale);
  const S* d_o = static_cast<const S*>(g.d_o) + (b * p.nq * p.heads + h) * p.dv;
  const T* dlse = g.dlse ? static_cast<const T*>(g.dlse) + bh * p.nq : nullptr;
  T* delta = static_cast<T*>(g.delta) + bh * p.nq;
  const int64_t ldq = p.heads * p.d, ldo = head.ldo;
  S* dq = g.dq ? static_cast<S*>(g.dq) + (b * p.nq * p.heads + h) * p.d : nullptr;
  S* dk = g.dk ? static_cast<S*>(g.dk) + (b * p.nk * p.heads + h) * p.d : nullptr;
  S* dv = g.dv ? static_cast<S*>(g.dv) + (b * p.nk * p.heads + h) * p.dv : nullptr;
  T* dbias = g.dbias ? static_cast<T*>(g.dbias) + bh * p.nq * p.nk : nullptr;
  // 16-bit dq of several blocks of keys is summed here.
  T* dq_sums = g.dq_sums ? static_cast<T*>(g.dq_sums) + (bh - g.first) * p.nq * p.d : nullptr;

  for (int64_t i = 0; i < p.nq; ++i) delta[i] = dot(d_o + i * ldo, head.o + i * ldo, p.dv) - (dlse ? dlse[i] : T(0));
  // Blocks that a causal mask hides are skipped, so their gradients must be zero beforehand.
  const bool fresh = !p.causal && p.nq > 0 && p.nk > 0;
  if (!fresh) {
    if (dq) fill_rows(dq, p.nq, ldq, p.d);
    if (dq_sums) fill_rows(dq_sums, p.nq, p.d, p.d);
    if (dk) fill_rows(dk, p.nk, ldq, p.d);
    if (dv) fill_rows(dv, p.nk, ldo, p.dv);
    if (dbias) fill_rows(dbias, p.nq, p.nk, p.nk);
  }
  const int64_t widest = greater(p.d, p.dv), block = fitting<T>(widest, kGradKeys);
  const int64_t query_block = even_block(p.nq, fitting<T>(widest, kGradQueries));
  for (int64_t j0 = 0; j0 < p.nk; j0 += block) {
    const int64_t n = lesser(block, p.nk - j0), ld = gemm::round_up(n, W);
    const S *k = head.k + j0 * p.ks[1], *v = head.v + j0 * p.vs[1];
    gemm::pack_panels(k, int64_t{1}, p.ks[1], p.d, n, kt);
    gemm::pack_panels(v, int64_t{1}, p.vs[1], p.dv, n, vt);
    const Right<T> k_right = dq ? right(k, p.ks[1], n, p.d, kp) : Right<T>{};
    const Sums<T> dk_part = sums_for(dk ? dk + j0 * ldq : dk, ldq, p.d, dk_block);
    const Sums<T> dv_part = sums_for(dv ? dv + j0 * ldo : dv, ldo, p.dv, dv_block);
    if (kHalf<S> && !fresh) {
      fill_rows(dk_part.data, n, p.d, p.d);
      fill_rows(dv_part.data, n, p.dv, p.dv);
    }
    for (int64_t i0 = 0; i0 < p.nq; i0 += query_block) {
      const int64_t m = lesser(query_block, p.nq - i0);
      if (visible(p, i0 + m - 1, j0, n) == 0) continue;
      const Rows<T> q = rows_of(head.q + i0 * p.qs[1], p.qs[1], m, p.d, qp);
      const Rows<T> d_ob = rows_of(d_o + i0 * ldo, ldo, m, p.dv, dop);
      times(m, ld, p.d, q.data, q.ld, {kt, 0}, p.d, prob, ld,
            false);  // whole vectors: kt and vt are padded with zeros
      times(m, ld, p.dv, d_ob.data, d_ob.ld, {vt, 0}, p.dv, ds, ld, false);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = i0 + i;
        const T lse = head.lse[row], less = delta[row];
        const bool empty = lse == -infinity(T(0));
        T *s = prob + i * ld, *d = ds + i * ld;
        // Without bias every lane may be scaled on the way; what lies in the lanes after n is not read.
        const int64_t own = empty ? 0 : visible(p, row, j0, n);
        const bool plain = !head.bias && own == n;
        if (!plain) {
          const Bias<T> bias = bias_of(p, head, row, j0, n, bias_row);
          scale_row(s, own, ld, scale, bias.data, bias.stride);
        }
        const T shift = empty ? T(0) : lse, factor = dbias ? T(1) : scale, by = plain ? scale : T(1);
        for (int64_t j = 0; j < ld; j += W) {
#pragma omp simd
          for (int x = 0; x < W; ++x) s[j + x] = m::exp_small(s[j + x] * by - shift);
          gemm::store(d + j, gemm::load(s + j) * (gemm::load(d + j) - less) * factor);
        }
        if (dbias) {
          __builtin_memcpy(dbias + row * p.nk + j0, d, static_cast<unsigned long>(n) * sizeof(T));
          multiply_row(d, n, scale);
        }
      }
      if (dv) {
        gemm::transpose(prob, ld, m, n, flipped, kGradQueries);
        times(n, p.dv, m, flipped, kGradQueries, right<S>(d_ob, m, p.dv, dop), m, dv_part.data, dv_part.ld,
              !fresh || i0 > 0);
      }
      if (dk) {
        gemm::transpose(ds, ld, m, n, flipped, kGradQueries);
        times(n, p.d, m, flipped, kGradQueries, right<S>(q, m, p.d, qp), m, dk_part.data, dk_part.ld, !fresh || i0 > 0);
      }
      if (dq) {
        S* y = dq + i0 * ldq;
        const Sums<T> dq_part = sums_for(y, ldq, p.d, dq_sums ? dq_sums + i0 * p.d : dq_block);
        const bool add = !fresh || j0 > 0;
        if (kHalf<S> && !dq_sums && add) fill_rows(dq_part.data, m, p.d, p.d);
        times(m, p.d, n, ds, ld, k_right, n, dq_part.data, dq_part.ld, add);
        if (!dq_sums) put_rows(dq_part, m, p.d, y, ldq);
      }
    }
    if (dk) put_rows(dk_part, n, p.d, dk + j0 * ldq, ldq);
    if (dv) put_rows(dv_part, n, p.dv, dv + j0 * ldo, ldo);
  }
  if (dq_sums) put_rows(Sums<T>{dq_sums, p.d}, p.nq, p.d, dq, ldq);
}

// The weights of both sides; 0 and 0 when neither has keys.
template <class T>
struct Weights {
  T a, b;
};
template <class T>
inline Weights<T> merge_weights(T lse1, T lse2) {
  const T inf = infinity(T(0));
  if (lse1 == -inf && lse2 == -inf) return {T(0), T(0)};
  const T top = greater(lse1, lse2), e1 = m::exp(lse1 - top), e2 = m::exp(lse2 - top);
  return {e1 / (e1 + e2), e2 / (e1 + e2)};
}

template <class S>
void merge(const LseMergeArgs& p, int64_t begin, int64_t end) {
  using T = Computed<S>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = item % p.heads, n = item / p.heads % p.n, b = item / p.heads / p.n,
                  at = (b * p.heads + h) * p.n + n;
    const T l1 = static_cast<const T*>(p.lse1)[at], l2 = static_cast<const T*>(p.lse2)[at];
    const Weights<T> w = merge_weights(l1, l2);
    const S *o1 = static_cast<const S*>(p.o1) + item * p.d, *o2 = static_cast<const S*>(p.o2) + item * p.d;
    if (!p.d_o) {
      S* o = static_cast<S*>(p.o) + item * p.d;
      // A side without weight may hold anything: it is not read.
      const S *x1 = w.a == T(0) ? o2 : o1, *x2 = w.b == T(0) ? o1 : o2;
      if (w.a == T(0) && w.b == T(0)) {
        for (int64_t i = 0; i < p.d; ++i) o[i] = S{};
      } else {
        for (int64_t i = 0; i < p.d; ++i) {
          const T from = load(x1[i]), to = load(x2[i]);
          store(o[i], from + w.b * (to - from));
        }
      }
      const T top = greater(l1, l2);
      static_cast<T*>(p.lse)[at] = top == -infinity(T(0)) ? top : top + m::log(m::exp(l1 - top) + m::exp(l2 - top));
      continue;
    }
    const S* d_o = static_cast<const S*>(p.d_o) + item * p.d;
    S *do1 = static_cast<S*>(p.do1) + item * p.d, *do2 = static_cast<S*>(p.do2) + item * p.d;
    T slope = w.a * w.b, gain = T(0);
    if (slope != T(0)) gain = dot_difference(d_o, o2, o1, p.d);
    for (int64_t i = 0; i < p.d; ++i) {
      const T d = load(d_o[i]);
      store(do1[i], w.a * d), store(do2[i], w.b * d);
    }
    const T g = p.dlse ? static_cast<const T*>(p.dlse)[at] : T(0);
    static_cast<T*>(p.dlse1)[at] = w.a * g - slope * gain;
    static_cast<T*>(p.dlse2)[at] = w.b * g + slope * gain;
  }
}

}  // namespace

CAPO_CPU_KERNEL(attention, capo::AttentionArgs) {
  with_element(args.dtype, [&](auto element) {
    for (std::int64_t item = begin; item < end; ++item) attend_chunk<decltype(element)>(args, item);
  });
}

CAPO_CPU_KERNEL(attention_backward, capo::AttentionGradArgs) {
  with_element(args.forward.dtype, [&](auto element) {
    for (std::int64_t item = begin; item < end; ++item) attend_backward<decltype(element)>(args, args.first + item);
  });
}

CAPO_CPU_KERNEL(lse_merge, capo::LseMergeArgs) {
  with_element(args.dtype, [&](auto element) { merge<decltype(element)>(args, begin, end); });
}
