// The forward of attention on tensor cores: bf16 and f16, heads of up to 256.
#include <capo/cuda/attention_tiles.cuh>
#include <capo/cuda/kernels.h>

namespace {

namespace gpu = capo::gpu;
using namespace capo::gpu::attention;
using gpu::kWarp;

// The greatest, and the sum, over the four lanes that hold one row of a fragment.
__device__ inline float row_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(gpu::kFullMask, v, 1));
  return fmaxf(v, __shfl_xor_sync(gpu::kFullMask, v, 2));
}
__device__ inline float row_sum(float v) {
  v += __shfl_xor_sync(gpu::kFullMask, v, 1);
  return v + __shfl_xor_sync(gpu::kFullMask, v, 2);
}

// A row's softmax so far: the greatest score times log2(e), and the sum of 2^(score - greatest).
struct Online {
  float greatest = -INFINITY, total = 0;
};
// Turns row `half` of a tile's scores into probabilities before division; returns what earlier sums shrink by.
template <int kN>
__device__ inline float advance(Online& row, float (&s)[kN][4], int half) {
  float m = row.greatest;
#pragma unroll
  for (int n = 0; n < kN; ++n) m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
  m = row_max(m);
  const float base = m == -INFINITY ? 0.0f : m;  // a row that has seen no key yet
  const float shrink = exp2f(row.greatest - base);
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int j = 2 * half; j < 2 * half + 2; ++j) {
      s[n][j] = exp2f(s[n][j] - base);
      sum += s[n][j];
    }
  row.greatest = m;
  row.total = row.total * shrink + row_sum(sum);
  return shrink;
}

// One block per (b, h, 64 queries) runs over the keys with an online softmax.
template <class T, int kHead>
__global__ void __launch_bounds__(kThreads, kBlocks<kHead>) attention_forward_mma(capo::AttentionArgs a, Wide wide) {
  constexpr int kRow = kStride<kHead>, kKeys = kStep<kHead>;
  CAPO_SHARED_DYNAMIC(carve);
  T* const q = carve.take<T>(kOwn * kRow);
  const Block at = block_of(a, a.nq);
  const Scores<T> score = scores<T>(a, at);
  const int end = seen_keys(score, at.first);
  Passing<kHead, kKeys, T> tiles(carve, keys<T>(a, at, wide), vectors<T>(a, at, wide), end);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, own = static_cast<int>(threadIdx.x) / kWarp * 16;
  const int row = at.first + own + lane / 4;

  load_tile<kHead, kOwn>(q, queries<T>(a, at, wide), at.first);
  tiles.begin(0);

  float o[kHead / 8][4] = {};
  Online online[2];
  for (int key = 0; key < end; key += kKeys) {
    tiles.arrive(key);
    float s[kKeys / 8][4] = {};
    multiply_rows<kHead>(s, q + own * kRow, tiles.x());
    const int last = key + kKeys - 1;
    score.template apply<false>(s, row, key + lane % 4 * 2, last < score.nk && score.sees(at.first, last));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shrink = advance(online[half], s, half);
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n) {
        o[n][2 * half] *= shrink;
        o[n][2 * half + 1] *= shrink;
      }
    }
    add_weighted<kHead>(o, s, tiles.y());
    tiles.leave();
  }
  gpu::cp_async_wait<0>();

  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto [greatest, total] = online[half];
    inverse[half] = total == 0 ? 0.0f : 1.0f / total;
    if (lane % 4 == 0 && row + half * 8 < a.nq)
      static_cast<float*>(a.lse)[at.bh * a.nq + row + half * 8] =
          total == 0 ? -INFINITY : (greatest + log2f(total)) * kLn2;
  }
  store_rows<T>(a.o, o, at, a, row, a.nq, a.dv, inverse);
}

}  // namespace

namespace capo::kernels {

bool attention_mma(const AttentionArgs& a, std::int64_t items, void* stream) {
  if (!takes(a)) return false;
  for_bucket(a, [&](auto bucket) {
    using B = decltype(bucket);
    using T = typename B::type;
    constexpr int kHead = B::kHead;
    const std::size_t shared =
        gpu::shared_bytes<T>(kOwn * kStride<kHead>) + 2 * gpu::shared_bytes<T>(2 * kStep<kHead> * kStride<kHead>);
    gpu::launch("attention", attention_forward_mma<T, kHead>, blocks_of(items, a.nq), kThreads, shared, stream, a,
                wide_of(a));
  });
  return true;
}

}  // namespace capo::kernels
