// The forward of attention on tensor cores: bf16 and f16, heads of up to 160.
#include <capo/cuda/element.cuh>
#include <capo/cuda/kernels.h>
#include <capo/cuda/ptx.h>

namespace {

using namespace capo::gpu;

constexpr int kTile = 64;       // queries of a block, keys of a step
constexpr int kThreads = 128;   // four warps of 16 queries
// Of a shared row of a head, in elements: 16-byte aligned, and the eight rows of an 8x8 matrix in distinct banks.
template <int kHead>
constexpr int kStride = kHead + 8;
constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

template <class T>
struct Args {
  const T *q, *k, *v, *bias;
  T* o;
  float* lse;
  std::int64_t heads, nq, nk, d, dv, tiles;
  std::int64_t qs[3], ks[3], vs[3], bs[4];
  float scale;
  bool causal;
};

// Starts the copy of rows [first, first + kTile), `width` elements each, into shared; zeros fill up both.
template <int kHead, class T>
__device__ inline void load_tile(T* shared, const T* global, std::int64_t first, std::int64_t rows, std::int64_t width,
                                 std::int64_t stride) {
  for (int i = threadIdx.x; i < kTile * kHead / 8; i += kThreads) {
    const int r = i / (kHead / 8), c = i % (kHead / 8) * 8;
    const std::int64_t left = first + r < rows ? width - c : 0;
    const int count = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
    cp_async_16(shared + r * kStride<kHead> + c, count ? global + (first + r) * stride + c : global, 2 * count);
  }
}

template <class T>
__device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, capo::Half>)
    mma_f16(d, a, b);
  else
    mma_bf16(d, a, b);
}
template <class T>
__device__ inline std::uint32_t pair(float low, float high) {
  if constexpr (std::is_same_v<T, capo::Half>)
    return Store<T>::from(low).bits | static_cast<std::uint32_t>(Store<T>::from(high).bits) << 16;
  else
    return to_bf16x2(low, high);
}

// The greatest, and the sum, over the four lanes that hold one row of a fragment.
__device__ inline float row_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kFullMask, v, 1));
  return fmaxf(v, __shfl_xor_sync(kFullMask, v, 2));
}
__device__ inline float row_sum(float v) {
  v += __shfl_xor_sync(kFullMask, v, 1);
  return v + __shfl_xor_sync(kFullMask, v, 2);
}

// FlashAttention-2 forward (Dao 2023): one block per (b, h, 64 queries) runs over the keys with an online softmax; the
// scores stay in registers, from the accumulators of q k^T straight to the A operand of p v.
template <class T, int kHead>
__global__ void __launch_bounds__(kThreads) attention_forward_mma(Args<T> a) {
  constexpr int kRow = kStride<kHead>;
  CAPO_SHARED_DYNAMIC(carve);
  T* const q = carve.take<T>(kTile * kRow);
  T* const k = carve.take<T>(2 * kTile * kRow);
  T* const v = carve.take<T>(2 * kTile * kRow);
  const std::int64_t tile = blockIdx.x % a.tiles, bh = blockIdx.x / a.tiles, b = bh / a.heads, h = bh % a.heads;
  const std::int64_t first = tile * kTile, shift = a.nk - a.nq;
  const T* const kg = a.k + b * a.ks[0] + h * a.ks[2];
  const T* const vg = a.v + b * a.vs[0] + h * a.vs[2];
  std::int64_t keys = a.nk;  // those that some query of the block sees
  if (a.causal && first + kTile + shift < keys) keys = first + kTile + shift;
  const int steps = keys > 0 ? static_cast<int>((keys + kTile - 1) / kTile) : 0;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const std::int64_t row[2] = {first + warp * 16 + g, first + warp * 16 + g + 8};

  load_tile<kHead>(q, a.q + b * a.qs[0] + h * a.qs[2], first, a.nq, a.d, a.qs[1]);
  if (steps > 0) {
    load_tile<kHead>(k, kg, 0, a.nk, a.d, a.ks[1]);
    load_tile<kHead>(v, vg, 0, a.nk, a.dv, a.vs[1]);
  }
  cp_async_commit();

  float o[kHead / 8][4] = {};
  float greatest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // per row, of the scores times log2(e)
  for (int step = 0; step < steps; ++step) {
    const int now = step % 2 * kTile * kRow, next = kTile * kRow - now;
    if (step + 1 < steps) {
      load_tile<kHead>(k + next, kg, (step + 1) * kTile, a.nk, a.d, a.ks[1]);
      load_tile<kHead>(v + next, vg, (step + 1) * kTile, a.nk, a.dv, a.vs[1]);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();

    float s[kTile / 8][4] = {};
    for (int d = 0; d < kHead; d += 16) {
      std::uint32_t qa[4];
      ldmatrix(qa, q + (warp * 16 + lane % 16) * kRow + d + lane / 16 * 8);
      for (int n = 0; n < kTile / 16; ++n) {
        std::uint32_t kb[4];
        ldmatrix(kb, k + now + (n * 16 + lane / 16 * 8 + lane % 8) * kRow + d + lane / 8 % 2 * 8);
        const std::uint32_t low[2] = {kb[0], kb[1]}, high[2] = {kb[2], kb[3]};
        mma<T>(s[2 * n], qa, low);
        mma<T>(s[2 * n + 1], qa, high);
      }
    }

    for (int n = 0; n < kTile / 8; ++n)
      for (int i = 0; i < 4; ++i) {
        const std::int64_t key = static_cast<std::int64_t>(step) * kTile + n * 8 + 2 * t + i % 2, query = row[i / 2];
        const bool seen = key < a.nk && query < a.nq && (!a.causal || key <= query + shift);
        float score = s[n][i] * a.scale;
        if (a.bias && seen)
          score += load(a.bias[b * a.bs[0] + h * a.bs[1] + query * a.bs[2] + key * a.bs[3]]);
        s[n][i] = seen ? score * kLog2e : -INFINITY;
      }
    for (int half = 0; half < 2; ++half) {
      float m = greatest[half];
      for (int n = 0; n < kTile / 8; ++n) m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      m = row_max(m);
      const float base = m == -INFINITY ? 0.0f : m;  // a row that has seen no key yet
      const float keep = exp2f(greatest[half] - base);
      greatest[half] = m;
      float sum = 0;
      for (int n = 0; n < kTile / 8; ++n)
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
          s[n][j] = exp2f(s[n][j] - base);
          sum += s[n][j];
        }
      total[half] = total[half] * keep + row_sum(sum);
      for (int n = 0; n < kHead / 8; ++n) {
        o[n][2 * half] *= keep;
        o[n][2 * half + 1] *= keep;
      }
    }

    for (int j = 0; j < kTile / 16; ++j) {
      const std::uint32_t p[4] = {pair<T>(s[2 * j][0], s[2 * j][1]), pair<T>(s[2 * j][2], s[2 * j][3]),
                                  pair<T>(s[2 * j + 1][0], s[2 * j + 1][1]), pair<T>(s[2 * j + 1][2], s[2 * j + 1][3])};
      for (int n = 0; n < kHead / 16; ++n) {
        std::uint32_t vb[4];
        ldmatrix_transposed(vb, v + now + (j * 16 + lane % 16) * kRow + n * 16 + lane / 16 * 8);
        const std::uint32_t low[2] = {vb[0], vb[1]}, high[2] = {vb[2], vb[3]};
        mma<T>(o[2 * n], p, low);
        mma<T>(o[2 * n + 1], p, high);
      }
    }
    __syncthreads();  // this step's k and v are free for the copy after next
  }
  cp_async_wait<0>();

  for (int half = 0; half < 2; ++half) {
    if (row[half] >= a.nq) continue;
    const float inverse = total[half] == 0 ? 0.0f : 1.0f / total[half];
    T* const to = a.o + ((b * a.nq + row[half]) * a.heads + h) * a.dv;  // dv is even
    for (int n = 0; n < kHead / 8; ++n)
      if (n * 8 + 2 * t < a.dv)
        *reinterpret_cast<std::uint32_t*>(to + n * 8 + 2 * t) = pair<T>(o[n][2 * half] * inverse, o[n][2 * half + 1] * inverse);
    if (t == 0)
      a.lse[bh * a.nq + row[half]] = total[half] == 0 ? -INFINITY : (greatest[half] + log2f(total[half])) * kLn2;
  }
}

bool aligned(const void* p, const std::int64_t (&strides)[3]) {
  return capo::gpu::aligned(p) && strides[0] % 8 == 0 && strides[1] % 8 == 0 && strides[2] % 8 == 0;
}

template <class T, int kHead>
void start(const capo::AttentionArgs& a, std::int64_t items, void* stream) {
  const auto in = [](const void* p) { return static_cast<const T*>(p); };
  Args<T> args{in(a.q), in(a.k), in(a.v), in(a.bias), static_cast<T*>(a.o), static_cast<float*>(a.lse),
               a.heads, a.nq, a.nk, a.d, a.dv, (a.nq + kTile - 1) / kTile, {}, {}, {}, {}, static_cast<float>(a.scale), a.causal};
  for (int i = 0; i < 3; ++i) args.qs[i] = a.qs[i], args.ks[i] = a.ks[i], args.vs[i] = a.vs[i];
  for (int i = 0; i < 4; ++i) args.bs[i] = a.bs[i];
  const std::size_t shared = shared_bytes<T>(kTile * kStride<kHead>) + 2 * shared_bytes<T>(2 * kTile * kStride<kHead>);
  launch("attention", attention_forward_mma<T, kHead>, items * args.tiles, kThreads, shared, stream, args);
}

template <class T>
void start(const capo::AttentionArgs& a, std::int64_t items, void* stream) {
  const std::int64_t widest = a.d > a.dv ? a.d : a.dv;
  if (widest <= 32) return start<T, 32>(a, items, stream);
  if (widest <= 64) return start<T, 64>(a, items, stream);
  if (widest <= 80) return start<T, 80>(a, items, stream);
  if (widest <= 128) return start<T, 128>(a, items, stream);
  start<T, 160>(a, items, stream);
}

}  // namespace

namespace capo::kernels {

bool attention_mma(const AttentionArgs& a, std::int64_t items, void* stream) {
  if (!is_half(a.dtype) || a.d > 160 || a.dv > 160 || a.dv % 2 != 0) return false;
  if (!aligned(a.q, a.qs) || !aligned(a.k, a.ks) || !aligned(a.v, a.vs)) return false;
  a.dtype == bf16 ? start<BFloat16>(a, items, stream) : start<Half>(a, items, stream);
  return true;
}

}  // namespace capo::kernels
