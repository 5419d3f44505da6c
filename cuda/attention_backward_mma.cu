// The backward of attention on tensor cores: bf16 and f16, heads of up to 256. The probabilities are recomputed from
// q, k and lse, in two kernels that each own what they sum: queries for dq (and dbias), keys for dk and dv.
#include <capo/cuda/attention_tiles.cuh>
#include <capo/cuda/kernels.h>

namespace {

namespace gpu = capo::gpu;
using namespace capo::gpu::attention;
using capo::AttentionArgs;
using capo::AttentionGradArgs;
using gpu::kWarp;
using std::int64_t;

// Queries that pass by in a step: beside the sums of both dk and dv there is less room than kStep assumes.
template <int kHead>
constexpr int kQueryStep = kHead > 96 ? 32 : 64;
// dk and dv of the widest heads are too many sums for one kernel.
template <int kHead>
constexpr bool kTogether = kHead <= 160;

template <class T>
__device__ inline Rows<T> output_gradients(const AttentionGradArgs& g, const Block& at, const Wide& w) {
  const AttentionArgs& a = g.forward;
  return {static_cast<const T*>(g.d_o) + (at.b * a.nq * a.heads + at.h) * a.dv, a.heads * a.dv,
          static_cast<int>(a.nq), static_cast<int>(a.dv), w.d_o};
}

// lse times log2(e) of a query; +inf, which makes all its probabilities zero, when it sees no key or does not exist.
__device__ inline float log_sum(const AttentionArgs& a, int64_t bh, int query) {
  const float lse = query < a.nq ? static_cast<const float*>(a.lse)[bh * a.nq + query] : -INFINITY;
  return lse == -INFINITY ? INFINITY : lse * kLog2e;
}
__device__ inline float delta_of(const AttentionGradArgs& g, int64_t bh, int query) {
  return query < g.forward.nq ? static_cast<const float*>(g.delta)[bh * g.forward.nq + query] : 0.0f;
}

template <int kN>
__device__ inline void store_bias_gradient(float* dbias, const float (&ds)[kN][4], int row, int column, int64_t nq,
                                           int64_t nk) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = row + i / 2 * 8, key = column + n * 8 + i % 2;
      if (query < nq && key < nk) dbias[query * nk + key] = ds[n][i];
    }
}

// dq = scale dS k and dbias = dS, dS = P (do v^T - delta): one block per (b, h, 64 queries), the keys pass by.
template <class T, int kHead>
__global__ void __launch_bounds__(kThreads, kBlocks<kHead>) attention_backward_q_mma(AttentionGradArgs g, Wide wide) {
  constexpr int kRow = kStride<kHead>, kKeys = kStep<kHead>;
  const AttentionArgs& a = g.forward;
  CAPO_SHARED_DYNAMIC(carve);
  T* const q = carve.take<T>(kOwn * kRow);
  T* const d_o = carve.take<T>(kOwn * kRow);
  const Block at = block_of(a, a.nq);
  const Scores<T> score = scores<T>(a, at);
  const int end = g.dbias ? score.nk : seen_keys(score, at.first);  // dbias is zero, not absent, at unseen keys
  Passing<kHead, kKeys, T> tiles(carve, keys<T>(a, at, wide), vectors<T>(a, at, wide), end);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, own = static_cast<int>(threadIdx.x) / kWarp * 16;
  const int row = at.first + own + lane / 4, column = lane % 4 * 2;

  load_tile<kHead, kOwn>(q, queries<T>(a, at, wide), at.first);
  load_tile<kHead, kOwn>(d_o, output_gradients<T>(g, at, wide), at.first);
  tiles.begin(0);
  const float lse[2] = {log_sum(a, at.bh, row), log_sum(a, at.bh, row + 8)};
  const float delta[2] = {delta_of(g, at.bh, row), delta_of(g, at.bh, row + 8)};

  float dq[kHead / 8][4] = {};
  for (int key = 0; key < end; key += kKeys) {
    tiles.arrive(key);
    float p[kKeys / 8][4] = {}, ds[kKeys / 8][4] = {};
    multiply_rows<kHead>(p, q + own * kRow, tiles.x());
    const int last = key + kKeys - 1;
    score.template apply<false>(p, row, key + column, last < score.nk && score.sees(at.first, last));
    multiply_rows<kHead>(ds, d_o + own * kRow, tiles.y());
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[n][i] = exp2f(p[n][i] - lse[i / 2]) * (ds[n][i] - delta[i / 2]);
    if (g.dbias)
      store_bias_gradient(static_cast<float*>(g.dbias) + at.bh * a.nq * a.nk, ds, row, key + column, a.nq, a.nk);
    if (g.dq) add_weighted<kHead>(dq, ds, tiles.x());
    tiles.leave();
  }
  gpu::cp_async_wait<0>();
  const float scale = static_cast<float>(a.scale), both[2] = {scale, scale};
  if (g.dq) store_rows<T>(g.dq, dq, at, a, row, a.nq, a.d, both);
}

// dv = P^T do and dk = scale dS^T q: one block per (b, h, 64 keys), the queries pass by. Scores lie transposed, keys in
// rows; kDk and kDv say what this kernel sums.
template <class T, int kHead, bool kDk, bool kDv>
__global__ void __launch_bounds__(kThreads, kBlocks<kHead>) attention_backward_kv_mma(AttentionGradArgs g, Wide wide) {
  constexpr int kRow = kStride<kHead>, kQueries = kQueryStep<kHead>;
  static_assert(2 * kQueries <= kThreads);
  const AttentionArgs& a = g.forward;
  CAPO_SHARED_DYNAMIC(carve);
  T* const k = carve.take<T>(kOwn * kRow);
  T* const v = carve.take<T>(kOwn * kRow);
  const Block at = block_of(a, a.nk);
  const Scores<T> score = scores<T>(a, at);
  const int me = static_cast<int>(threadIdx.x), lane = me % kWarp, own = me / kWarp * 16;
  const int row = at.first + own + lane / 4, column = lane % 4 * 2;
  const int first_seen = score.causal ? at.first - score.shift : 0;  // the first query that sees the block's first key
  const int begin = first_seen > 0 ? first_seen / kQueries * kQueries : 0, end = score.nq;
  Passing<kHead, kQueries, T> tiles(carve, queries<T>(a, at, wide), output_gradients<T>(g, at, wide), end);
  float* const rows = carve.take<float>(2 * 2 * kQueries);  // lse and delta of a step's queries, twice buffered
  // What this thread brings of a step's rows.
  const auto row_value = [&](int query) {
    if (me < kQueries) return log_sum(a, at.bh, query + me);
    return me < 2 * kQueries ? delta_of(g, at.bh, query + me - kQueries) : 0.0f;
  };

  load_tile<kHead, kOwn>(k, keys<T>(a, at, wide), at.first);
  load_tile<kHead, kOwn>(v, vectors<T>(a, at, wide), at.first);
  if (begin < end && me < 2 * kQueries) rows[me] = row_value(begin);
  tiles.begin(begin);

  float dk[kHead / 8][4] = {}, dv[kHead / 8][4] = {};
  int now = 0;
  for (int query = begin; query < end; query += kQueries, now = 1 - now) {
    const float ahead = query + kQueries < end ? row_value(query + kQueries) : 0.0f;
    tiles.arrive(query);

    float p[kQueries / 8][4] = {};
    const float* const lse = rows + now * 2 * kQueries + column;
    multiply_rows<kHead>(p, k + own * kRow, tiles.x());
    // Queries that do not exist have lse = +inf, keys that do not exist rows that nobody reads.
    score.template apply<true>(p, row, query + column, score.sees(query, at.first + kOwn - 1));
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) p[n][i] = exp2f(p[n][i] - lse[n * 8 + i % 2]);
    if constexpr (kDv)
      if (g.dv) add_weighted<kHead>(dv, p, tiles.y());
    if constexpr (kDk)
      if (g.dk) {
        float ds[kQueries / 8][4] = {};
        const float* const delta = lse + kQueries;
        multiply_rows<kHead>(ds, v + own * kRow, tiles.y());
#pragma unroll
        for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) ds[n][i] = p[n][i] * (ds[n][i] - delta[n * 8 + i % 2]);
        add_weighted<kHead>(dk, ds, tiles.x());
      }
    if (me < 2 * kQueries) rows[(1 - now) * 2 * kQueries + me] = ahead;
    tiles.leave();
  }
  gpu::cp_async_wait<0>();
  const float one[2] = {1.0f, 1.0f}, scale = static_cast<float>(a.scale), both[2] = {scale, scale};
  if constexpr (kDk)
    if (g.dk) store_rows<T>(g.dk, dk, at, a, row, a.nk, a.d, both);
  if constexpr (kDv)
    if (g.dv) store_rows<T>(g.dv, dv, at, a, row, a.nk, a.dv, one);
}

template <class T, int kHead>
void start_q(const AttentionGradArgs& g, const Wide& wide, int64_t items, void* stream) {
  const std::size_t shared =
      2 * gpu::shared_bytes<T>(kOwn * kStride<kHead>) + 2 * gpu::shared_bytes<T>(2 * kStep<kHead> * kStride<kHead>);
  gpu::launch("attention_backward_q", attention_backward_q_mma<T, kHead>, blocks_of(items, g.forward.nq), kThreads,
              shared, stream, g, wide);
}

template <class T, int kHead>
void start_kv(const AttentionGradArgs& g, const Wide& wide, int64_t items, void* stream) {
  const std::size_t shared = 2 * gpu::shared_bytes<T>(kOwn * kStride<kHead>) +
                             2 * gpu::shared_bytes<T>(2 * kQueryStep<kHead> * kStride<kHead>) +
                             gpu::shared_bytes<float>(4 * kQueryStep<kHead>);
  const auto start = [&](auto kernel) {
    gpu::launch("attention_backward_kv", kernel, blocks_of(items, g.forward.nk), kThreads, shared, stream, g, wide);
  };
  if constexpr (kTogether<kHead>) {
    start(attention_backward_kv_mma<T, kHead, true, true>);
  } else {
    if (g.dk) start(attention_backward_kv_mma<T, kHead, true, false>);
    if (g.dv) start(attention_backward_kv_mma<T, kHead, false, true>);
  }
}

}  // namespace

namespace capo::kernels {

bool attention_backward_mma(const AttentionGradArgs& g, std::int64_t items, void* stream) {
  const AttentionArgs& a = g.forward;
  if (!takes(a)) return false;
  for_bucket(a, [&](auto bucket) {
    using B = decltype(bucket);
    const Wide wide = wide_of(a, g.d_o);
    if ((g.dq || g.dbias) && a.nq > 0) start_q<typename B::type, B::kHead>(g, wide, items, stream);
    if ((g.dk || g.dv) && a.nk > 0) start_kv<typename B::type, B::kHead>(g, wide, items, stream);
  });
  return true;
}

}  // namespace capo::kernels
