// Attention for any head size and dtype, forward and backward, in f32 arithmetic. 16-bit elements with heads of up to
// 256 go to tensor cores instead: attention_mma.cu and attention_backward_mma.cu.
#include <capo/cuda/block_sum.cuh>
#include <capo/cuda/cudnn.h>
#include <capo/cuda/element.cuh>
#include <capo/cuda/kernels.h>

namespace {

using capo::AttentionArgs;
using capo::AttentionGradArgs;
using capo::BFloat16;
using capo::DType;
using capo::Half;
using capo::LseMergeArgs;
using std::int64_t;
namespace gpu = capo::gpu;
using gpu::kWarp;

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kTile = 64;    // keys (or queries) that pass by in one step: two to a lane
constexpr int kPart = 64;    // of the head size that lies in shared memory at a time
constexpr int kLd = kPart + 4;  // of a tile's row: packs of four aligned, and eight lanes' rows in distinct banks
using Four = gpu::Pack<float, 4>;

// Vectors of one (b, h): rows of `width` elements, `stride` apart. wide: they may be read four elements at a time.
struct Rows {
  const void* p;
  DType dtype;
  int64_t rows, stride;
  int width;
  bool wide;
};

template <class T>
__device__ inline Four read_four(const T* p, int left, bool wide) {
  Four y{};
  if (wide && left >= 4) {
    const auto x = *reinterpret_cast<const gpu::Pack<T, 4>*>(p);
    for (int j = 0; j < 4; ++j) y.v[j] = gpu::load(x.v[j]);
  } else {
    for (int j = 0; j < 4; ++j)
      if (j < left) y.v[j] = gpu::load(p[j]);
  }
  return y;
}
// Elements column .. +4 of a row as f32, zeros outside. The dtype is the same for all threads: one kernel serves all.
__device__ inline Four read_four(const Rows& x, int64_t row, int column) {
  if (row >= x.rows || column >= x.width) return {};
  const int64_t at = row * x.stride + column;
  const int left = x.width - column;
  if (x.dtype == DType::f32) return read_four(static_cast<const float*>(x.p) + at, left, x.wide);
  if (x.dtype == DType::bf16) return read_four(static_cast<const BFloat16*>(x.p) + at, left, x.wide);
  return read_four(static_cast<const Half*>(x.p) + at, left, x.wide);
}
__device__ inline float read_one(DType dtype, const void* p, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[at];
  if (dtype == DType::bf16) return gpu::load(static_cast<const BFloat16*>(p)[at]);
  return gpu::load(static_cast<const Half*>(p)[at]);
}
__device__ inline void write_one(DType dtype, void* p, int64_t at, float v) {
  if (dtype == DType::f32)
    static_cast<float*>(p)[at] = v;
  else if (dtype == DType::bf16)
    static_cast<BFloat16*>(p)[at] = gpu::Store<BFloat16>::from(v);
  else
    static_cast<Half*>(p)[at] = gpu::Store<Half>::from(v);
}
__device__ inline const void* advance(DType dtype, const void* p, int64_t elements) {
  return static_cast<const char*>(p) + elements * (dtype == DType::f32 ? 4 : 2);
}

// Columns part .. +kPart of rows first .. +kTile, once nobody reads the tile any more, for everybody.
__device__ inline void stage(float* tile, const Rows& x, int64_t first, int part) {
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kPart / 4; i += kThreads) {
    const int r = i / (kPart / 4), c = i % (kPart / 4) * 4;
    *reinterpret_cast<Four*>(tile + r * kLd + c) = read_four(x, first + r, part + c);
  }
  __syncthreads();
}

__host__ __device__ inline int whole_parts(int64_t width) {
  return static_cast<int>((width + kPart - 1) / kPart * kPart);
}

// The block's own vectors stay in shared memory: `rows` of them, whole parts, filled up with zeros.
__device__ inline void keep(float* own, int rows, const Rows& x, int64_t first) {
  const int ld = whole_parts(x.width);
  for (int i = threadIdx.x; i < rows * ld / 4; i += kThreads) {
    const int r = i / (ld / 4), c = i % (ld / 4) * 4;
    *reinterpret_cast<Four*>(own + r * ld + c) = read_four(x, first + r, c);
  }
}

// s[r][e] = <own row r, row lane + 32 e of x from `first` on>
template <int kRows>
__device__ inline void dots(const float* own, float* tile, const Rows& x, int64_t first, float (&s)[kRows][2]) {
  const int lane = threadIdx.x % kWarp, ld = whole_parts(x.width);
  for (int r = 0; r < kRows; ++r) s[r][0] = s[r][1] = 0;
  for (int part = 0; part < ld; part += kPart) {
    stage(tile, x, first, part);
#pragma unroll 4
    for (int c = 0; c < kPart; c += 4) {
      const Four a = *reinterpret_cast<const Four*>(tile + lane * kLd + c);
      const Four b = *reinterpret_cast<const Four*>(tile + (lane + kWarp) * kLd + c);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Four q = *reinterpret_cast<const Four*>(own + r * ld + part + c);
        for (int j = 0; j < 4; ++j) s[r][0] += q.v[j] * a.v[j], s[r][1] += q.v[j] * b.v[j];
      }
    }
  }
}

// sum[r][p] += over the tile's rows: weights[r][row] * element 32 p + lane of the row. kPieces: at least width / 32.
template <int kRows, int kPieces>
__device__ inline void add_weighted(const float* weights, float* tile, const Rows& x, int64_t first,
                                    float (&sum)[kRows][kPieces]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int p = 0; p < kPieces; p += 2) {
    if (p * kWarp >= x.width) continue;
    stage(tile, x, first, p * kWarp);
#pragma unroll 4
    for (int j = 0; j < kTile; j += 4) {
      Four w[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) w[r] = *reinterpret_cast<const Four*>(weights + r * kTile + j);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float a = tile[(j + e) * kLd + lane], b = tile[(j + e) * kLd + kWarp + lane];
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r][p] += w[r].v[e] * a, sum[r][p + 1] += w[r].v[e] * b;
      }
    }
  }
}

template <int kPieces>
__device__ inline void write_row(DType dtype, void* to, int64_t at, int64_t width, const float (&v)[kPieces],
                                 float scale) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int p = 0; p < kPieces; ++p)
    if (p * kWarp + lane < width) write_one(dtype, to, at + p * kWarp + lane, v[p] * scale);
}

__device__ inline float warp_max(float v) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) v = fmaxf(v, __shfl_xor_sync(gpu::kFullMask, v, bits));
  return v;
}

struct Wide {
  bool q, k, v, o;
};
__device__ inline Rows queries(const AttentionArgs& a, const Wide& w, int64_t b, int64_t h) {
  return {advance(a.dtype, a.q, b * a.qs[0] + h * a.qs[2]), a.dtype, a.nq, a.qs[1], static_cast<int>(a.d), w.q};
}
__device__ inline Rows keys(const AttentionArgs& a, const Wide& w, int64_t b, int64_t h) {
  return {advance(a.dtype, a.k, b * a.ks[0] + h * a.ks[2]), a.dtype, a.nk, a.ks[1], static_cast<int>(a.d), w.k};
}
__device__ inline Rows vectors(const AttentionArgs& a, const Wide& w, int64_t b, int64_t h) {
  return {advance(a.dtype, a.v, b * a.vs[0] + h * a.vs[2]), a.dtype, a.nk, a.vs[1], static_cast<int>(a.dv), w.v};
}
__device__ inline Rows output_gradients(const AttentionGradArgs& g, const Wide& w, int64_t b, int64_t h) {
  const AttentionArgs& a = g.forward;
  return {advance(a.dtype, g.d_o, (b * a.nq * a.heads + h) * a.dv),
          a.dtype,
          a.nq,
          a.heads * a.dv,
          static_cast<int>(a.dv),
          w.o};
}

// The score of a query and a key from their product, -inf where the query does not see the key.
__device__ inline float score_of(const AttentionArgs& a, int64_t b, int64_t h, int64_t query, int64_t key,
                                 float product) {
  if (query >= a.nq || key >= a.nk || (a.causal && key > query + a.nk - a.nq)) return -INFINITY;
  const float s = product * static_cast<float>(a.scale);
  return a.bias ? s + read_one(a.dtype, a.bias, b * a.bs[0] + h * a.bs[1] + query * a.bs[2] + key * a.bs[3]) : s;
}
// The end of the keys that queries before `end` see.
__device__ inline int64_t seen_keys(const AttentionArgs& a, int64_t end) {
  const int64_t seen = a.causal ? end + a.nk - a.nq : a.nk;
  return seen < a.nk ? seen : a.nk;
}

// One block per (b, h, kRows queries of each warp); online softmax over tiles of keys.
template <int kRows, int kPieces>
__global__ void __launch_bounds__(kThreads) attention_forward(AttentionArgs a, Wide wide) {
  constexpr int kOwn = kRows * kWarps;
  CAPO_SHARED_DYNAMIC(carve);
  float* const tile = carve.take<float>(kTile * kLd);
  float* const weights = carve.take<float>(kOwn * kTile);
  float* const own = carve.take<float>(kOwn * whole_parts(a.d));
  const int64_t tiles = (a.nq + kOwn - 1) / kOwn, bh = blockIdx.x / tiles, first = blockIdx.x % tiles * kOwn;
  const int64_t b = bh / a.heads, h = bh % a.heads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Rows k = keys(a, wide, b, h), v = vectors(a, wide, b, h);
  const float* const q = own + warp * kRows * whole_parts(a.d);
  float* const mine = weights + warp * kRows * kTile;
  const int64_t row = first + warp * kRows, end = seen_keys(a, first + kOwn);
  keep(own, kOwn, queries(a, wide, b, h), first);

  float o[kRows][kPieces] = {}, greatest[kRows], total[kRows], s[kRows][2];
  for (int r = 0; r < kRows; ++r) greatest[r] = -INFINITY, total[r] = 0;
  for (int64_t j = 0; j < end; j += kTile) {
    dots<kRows>(q, tile, k, j, s);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      for (int e = 0; e < 2; ++e) s[r][e] = score_of(a, b, h, row + r, j + lane + e * kWarp, s[r][e]);
      const float top = fmaxf(greatest[r], warp_max(fmaxf(s[r][0], s[r][1])));
      const float base = top == -INFINITY ? 0.0f : top;  // a row that has seen no key yet
      const float shrink = expf(greatest[r] - base);
      float sum = 0;
      for (int e = 0; e < 2; ++e) {
        const float p = expf(s[r][e] - base);
        mine[r * kTile + lane + e * kWarp] = p;
        sum += p;
      }
      greatest[r] = top;
      total[r] = total[r] * shrink + gpu::warp_sum(sum);
#pragma unroll
      for (int p = 0; p < kPieces; ++p) o[r][p] *= shrink;
    }
    add_weighted<kRows, kPieces>(mine, tile, v, j, o);  // its barriers also show the weights to the warp
    __syncwarp();
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (row + r >= a.nq) continue;
    write_row(a.dtype, a.o, ((b * a.nq + row + r) * a.heads + h) * a.dv, a.dv, o[r],
              total[r] == 0 ? 0.0f : 1.0f / total[r]);
    if (lane == 0)
      static_cast<float*>(a.lse)[bh * a.nq + row + r] = total[r] == 0 ? -INFINITY : greatest[r] + logf(total[r]);
  }
}

// delta = <do, o> - dlse per query: 16 lanes each, four elements at a time.
constexpr int kDeltaLanes = 16, kDeltaRows = kThreads / kDeltaLanes;

__global__ void __launch_bounds__(kThreads) attention_delta(AttentionGradArgs g, int64_t rows, bool wide) {
  const AttentionArgs& a = g.forward;
  const int lane = threadIdx.x % kDeltaLanes, width = static_cast<int>(a.dv);
  const Rows d_o{g.d_o, a.dtype, rows, a.dv, width, wide}, o{a.o, a.dtype, rows, a.dv, width, wide};
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kDeltaRows; first < rows;
       first += static_cast<int64_t>(gridDim.x) * kDeltaRows) {
    const int64_t item = first + threadIdx.x / kDeltaLanes;
    float sum = 0;
    for (int c = lane * 4; c < width; c += kDeltaLanes * 4) {
      const Four x = read_four(d_o, item, c), y = read_four(o, item, c);
      for (int j = 0; j < 4; ++j) sum += x.v[j] * y.v[j];
    }
    for (int bits = kDeltaLanes / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(gpu::kFullMask, sum, bits);
    if (lane != 0 || item >= rows) continue;
    const int64_t h = item % a.heads, token = item / a.heads, at = (token / a.nq * a.heads + h) * a.nq + token % a.nq;
    static_cast<float*>(g.delta)[at] = sum - (g.dlse ? static_cast<const float*>(g.dlse)[at] : 0.0f);
  }
}

// The probability of a score; rows without keys have none.
__device__ inline float probability(float score, float lse) { return lse == -INFINITY ? 0.0f : expf(score - lse); }

// dq = scale dS k and dbias = dS, dS = P (do v^T - delta). One block per (b, h, kRows queries of each warp).
template <int kRows, int kPieces>
__global__ void __launch_bounds__(kThreads) attention_backward_q(AttentionGradArgs g, Wide wide) {
  constexpr int kOwn = kRows * kWarps;
  const AttentionArgs& a = g.forward;
  CAPO_SHARED_DYNAMIC(carve);
  float* const tile = carve.take<float>(kTile * kLd);
  float* const weights = carve.take<float>(kOwn * kTile);
  float* const own_q = carve.take<float>(kOwn * whole_parts(a.d));
  float* const own_do = carve.take<float>(kOwn * whole_parts(a.dv));
  const int64_t tiles = (a.nq + kOwn - 1) / kOwn, bh = blockIdx.x / tiles, first = blockIdx.x % tiles * kOwn;
  const int64_t b = bh / a.heads, h = bh % a.heads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Rows k = keys(a, wide, b, h), v = vectors(a, wide, b, h);
  const float* const q = own_q + warp * kRows * whole_parts(a.d);
  const float* const d_o = own_do + warp * kRows * whole_parts(a.dv);
  float* const mine = weights + warp * kRows * kTile;
  const int64_t row = first + warp * kRows, end = g.dbias ? a.nk : seen_keys(a, first + kOwn);
  keep(own_q, kOwn, queries(a, wide, b, h), first);
  keep(own_do, kOwn, output_gradients(g, wide, b, h), first);

  float dq[kRows][kPieces] = {}, s[kRows][2], dp[kRows][2], lse[kRows], delta[kRows];
  for (int r = 0; r < kRows; ++r) {
    const bool inside = row + r < a.nq;
    lse[r] = inside ? static_cast<const float*>(a.lse)[bh * a.nq + row + r] : -INFINITY;
    delta[r] = inside ? static_cast<const float*>(g.delta)[bh * a.nq + row + r] : 0.0f;
  }
  for (int64_t j = 0; j < end; j += kTile) {
    dots<kRows>(q, tile, k, j, s);
    dots<kRows>(d_o, tile, v, j, dp);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      for (int e = 0; e < 2; ++e) {
        const int64_t key = j + lane + e * kWarp;
        const float ds = probability(score_of(a, b, h, row + r, key, s[r][e]), lse[r]) * (dp[r][e] - delta[r]);
        if (g.dbias && row + r < a.nq && key < a.nk)
          static_cast<float*>(g.dbias)[(bh * a.nq + row + r) * a.nk + key] = ds;
        mine[r * kTile + lane + e * kWarp] = ds * static_cast<float>(a.scale);
      }
    if (g.dq) add_weighted<kRows, kPieces>(mine, tile, k, j, dq);
    __syncwarp();
  }
  if (!g.dq) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (row + r < a.nq) write_row(a.dtype, g.dq, ((b * a.nq + row + r) * a.heads + h) * a.d, a.d, dq[r], 1.0f);
}

// dv = P^T do and dk = scale dS^T q. One block per (b, h, kRows keys of each warp), the queries pass by.
template <int kRows, int kPieces>
__global__ void __launch_bounds__(kThreads) attention_backward_kv(AttentionGradArgs g, Wide wide) {
  constexpr int kOwn = kRows * kWarps;
  const AttentionArgs& a = g.forward;
  CAPO_SHARED_DYNAMIC(carve);
  float* const tile = carve.take<float>(kTile * kLd);
  float* const weights = carve.take<float>(2 * kOwn * kTile);
  float* const own_k = carve.take<float>(kOwn * whole_parts(a.d));
  float* const own_v = carve.take<float>(kOwn * whole_parts(a.dv));
  const int64_t tiles = (a.nk + kOwn - 1) / kOwn, bh = blockIdx.x / tiles, first = blockIdx.x % tiles * kOwn;
  const int64_t b = bh / a.heads, h = bh % a.heads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Rows q = queries(a, wide, b, h), d_o = output_gradients(g, wide, b, h);
  const float* const k = own_k + warp * kRows * whole_parts(a.d);
  const float* const v = own_v + warp * kRows * whole_parts(a.dv);
  float* const p_mine = weights + warp * kRows * kTile;
  float* const ds_mine = p_mine + kOwn * kTile;
  const int64_t row = first + warp * kRows;
  keep(own_k, kOwn, keys(a, wide, b, h), first);
  keep(own_v, kOwn, vectors(a, wide, b, h), first);

  int64_t begin = a.causal ? first - (a.nk - a.nq) : 0;  // the first query that sees the block's first key
  begin = begin < 0 ? 0 : begin / kTile * kTile;
  float dk[kRows][kPieces] = {}, dv[kRows][kPieces] = {}, s[kRows][2], dp[kRows][2];
  for (int64_t i = begin; i < a.nq; i += kTile) {
    dots<kRows>(k, tile, q, i, s);
    dots<kRows>(v, tile, d_o, i, dp);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t query = i + lane + e * kWarp;
      const bool inside = query < a.nq;
      const float lse = inside ? static_cast<const float*>(a.lse)[bh * a.nq + query] : -INFINITY;
      const float delta = inside ? static_cast<const float*>(g.delta)[bh * a.nq + query] : 0.0f;
      for (int r = 0; r < kRows; ++r) {
        const float p = probability(score_of(a, b, h, query, row + r, s[r][e]), lse);
        p_mine[r * kTile + lane + e * kWarp] = p;
        ds_mine[r * kTile + lane + e * kWarp] = p * (dp[r][e] - delta) * static_cast<float>(a.scale);
      }
    }
    if (g.dv) add_weighted<kRows, kPieces>(p_mine, tile, d_o, i, dv);
    if (g.dk) add_weighted<kRows, kPieces>(ds_mine, tile, q, i, dk);
    __syncwarp();
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (row + r >= a.nk) continue;
    const int64_t at = (b * a.nk + row + r) * a.heads + h;
    if (g.dk) write_row(a.dtype, g.dk, at * a.d, a.d, dk[r], 1.0f);
    if (g.dv) write_row(a.dtype, g.dv, at * a.dv, a.dv, dv[r], 1.0f);
  }
}

// A warp per (b, n, h) row, by the formulas of ops/cpu/attention.cpp.
template <class T>
__global__ void __launch_bounds__(kThreads) merge(LseMergeArgs p, int64_t rows) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; item < rows;
       item += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t h = item % p.heads, n = item / p.heads % p.n, b = item / p.heads / p.n,
                  at = (b * p.heads + h) * p.n + n;
    const float l1 = static_cast<const float*>(p.lse1)[at], l2 = static_cast<const float*>(p.lse2)[at];
    const float top = l1 > l2 ? l1 : l2;
    const bool none = l1 == -INFINITY && l2 == -INFINITY;
    const float e1 = none ? 0.0f : expf(l1 - top), e2 = none ? 0.0f : expf(l2 - top);
    const float w1 = none ? 0.0f : e1 / (e1 + e2), w2 = none ? 0.0f : e2 / (e1 + e2);
    const T *o1 = static_cast<const T*>(p.o1) + item * p.d, *o2 = static_cast<const T*>(p.o2) + item * p.d;
    if (!p.d_o) {
      T* const o = static_cast<T*>(p.o) + item * p.d;
      // A side without weight may hold anything: it is not read.
      const T *x1 = w1 == 0 ? o2 : o1, *x2 = w2 == 0 ? o1 : o2;
      for (int64_t i = lane; i < p.d; i += kWarp) {
        const float x = none ? 0.0f : gpu::load(x1[i]);
        o[i] = gpu::Store<T>::from(none ? 0.0f : x + w2 * (gpu::load(x2[i]) - x));
      }
      if (lane == 0) static_cast<float*>(p.lse)[at] = none ? -INFINITY : top + logf(e1 + e2);
      continue;
    }
    const T* const d_o = static_cast<const T*>(p.d_o) + item * p.d;
    T *const do1 = static_cast<T*>(p.do1) + item * p.d, *const do2 = static_cast<T*>(p.do2) + item * p.d;
    const float slope = w1 * w2;
    float gain = 0;
    for (int64_t i = lane; i < p.d; i += kWarp) {
      const float g = gpu::load(d_o[i]);
      if (slope != 0) gain += g * (gpu::load(o2[i]) - gpu::load(o1[i]));
      do1[i] = gpu::Store<T>::from(w1 * g);
      do2[i] = gpu::Store<T>::from(w2 * g);
    }
    gain = gpu::warp_sum(gain);
    if (lane != 0) continue;
    const float g = p.dlse ? static_cast<const float*>(p.dlse)[at] : 0.0f;
    static_cast<float*>(p.dlse1)[at] = w1 * g - slope * gain;
    static_cast<float*>(p.dlse2)[at] = w2 * g + slope * gain;
  }
}

// ---- host

bool wide_rows(const void* p, const int64_t (&strides)[3], int64_t width) {
  return gpu::aligned(p) && width % 4 == 0 && strides[0] % 4 == 0 && strides[1] % 4 == 0 && strides[2] % 4 == 0;
}
Wide wide_of(const AttentionArgs& a, const void* d_o = nullptr) {
  return {wide_rows(a.q, a.qs, a.d), wide_rows(a.k, a.ks, a.d), wide_rows(a.v, a.vs, a.dv),
          gpu::aligned(d_o) && a.dv % 4 == 0};
}

// f(rows of a warp, pieces of 32 that hold the head size) as constants: few kernels, the widest for 1024.
template <int kR, int kP>
struct Sizes {
  static constexpr int kRows = kR, kPieces = kP;
};
template <class F>
void for_width(int64_t width, const F& f) {
  if (width <= 64) return f(Sizes<4, 2>{});
  if (width <= 256) return f(Sizes<4, 8>{});
  f(Sizes<1, 32>{});
}
int64_t tiles_of(int64_t rows, int own) { return (rows + own - 1) / own; }

// A tile, `planes` of weights and the block's own rows of the widths d and dv (0: none).
std::size_t shared_of(int own, int planes, int64_t d, int64_t dv) {
  const auto floats = [](int n) { return gpu::shared_bytes<float>(static_cast<std::size_t>(n)); };
  return floats(kTile * kLd) + floats(planes * own * kTile) + floats(own * whole_parts(d)) +
         floats(own * whole_parts(dv));
}

}  // namespace

namespace capo::kernels {

// items: (b, h) pairs.
void attention_cuda(const AttentionArgs& a, std::int64_t items, void* stream) {
  gpu::for_floating("attention", a.dtype, [](auto) {});
#if !defined(CAPO_HOST_SHIM)
  if (cudnn_attention(a, items, stream)) return;  // where it is switched on
#endif
  if (a.nq == 0 || attention_mma(a, items, stream)) return;
  for_width(a.dv, [&](auto size) {
    using S = decltype(size);
    constexpr int kOwn = S::kRows * kWarps;
    gpu::launch("attention", attention_forward<S::kRows, S::kPieces>, items * tiles_of(a.nq, kOwn), kThreads,
                shared_of(kOwn, 1, a.d, 0), stream, a, wide_of(a));
  });
}

void attention_backward_cuda(const AttentionGradArgs& g, std::int64_t items, void* stream) {
  const AttentionArgs& a = g.forward;
  gpu::for_floating("attention", a.dtype, [](auto) {});
#if !defined(CAPO_HOST_SHIM)
  if (cudnn_attention_backward(g, items, stream)) return;  // where it is switched on
#endif
  const Wide wide = wide_of(a, g.d_o);
  const std::int64_t rows = items * a.nq;
  if (rows > 0)
    gpu::launch("attention_delta", attention_delta, gpu::blocks_for(rows, kDeltaRows), kThreads, 0, stream, g, rows,
                gpu::aligned(a.o) && wide.o);
  if (attention_backward_mma(g, items, stream)) return;
  for_width(a.d > a.dv ? a.d : a.dv, [&](auto size) {
    using S = decltype(size);
    constexpr int kOwn = S::kRows * kWarps;
    if ((g.dq || g.dbias) && a.nq > 0)
      gpu::launch("attention_backward_q", attention_backward_q<S::kRows, S::kPieces>, items * tiles_of(a.nq, kOwn),
                  kThreads, shared_of(kOwn, 1, a.d, a.dv), stream, g, wide);
    if ((g.dk || g.dv) && a.nk > 0)
      gpu::launch("attention_backward_kv", attention_backward_kv<S::kRows, S::kPieces>, items * tiles_of(a.nk, kOwn),
                  kThreads, shared_of(kOwn, 2, a.d, a.dv), stream, g, wide);
  });
}

void lse_merge_cuda(const LseMergeArgs& p, std::int64_t items, void* stream) {
  gpu::for_floating("lse_merge", p.dtype, [&](auto t) {
    gpu::launch("lse_merge", merge<decltype(t)>, gpu::blocks_for(items, kWarps), kThreads, 0, stream, p, items);
  });
}

}  // namespace capo::kernels
