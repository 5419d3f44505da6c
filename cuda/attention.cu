#include <capo/cuda/gpu.h>
#include <capo/cuda/kernels.h>
#include <capo/cuda/ptx.h>

namespace {

using namespace capo::gpu;

constexpr int kHead = 64;       // d = dv
constexpr int kTile = 64;       // queries of a block, keys of a step
constexpr int kThreads = 128;   // four warps of 16 queries
constexpr int kStride = 72;     // of a shared row: 16-byte aligned, and the eight rows of an 8x8 matrix in distinct banks
constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

struct Args {
  const std::uint16_t *q, *k, *v, *bias;
  std::uint16_t* o;
  float* lse;
  std::int64_t heads, nq, nk, tiles;
  std::int64_t qs[3], ks[3], vs[3], bs[4];
  float scale;
  bool causal;
};

// Starts the copy of rows [first, first + kTile) into shared; rows past `rows` become zeros.
__device__ inline void load_tile(std::uint16_t* shared, const std::uint16_t* global, std::int64_t first,
                                 std::int64_t rows, std::int64_t stride) {
  for (int i = threadIdx.x; i < kTile * kHead / 8; i += kThreads) {
    const int r = i / (kHead / 8), c = i % (kHead / 8) * 8;
    const bool valid = first + r < rows;
    cp_async_16(shared + r * kStride + c, valid ? global + (first + r) * stride + c : global, valid);
  }
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
__global__ void __launch_bounds__(kThreads) attention_forward(Args a) {
  CAPO_SHARED_DYNAMIC(carve);
  std::uint16_t* const q = carve.take<std::uint16_t>(kTile * kStride);
  std::uint16_t* const k = carve.take<std::uint16_t>(2 * kTile * kStride);
  std::uint16_t* const v = carve.take<std::uint16_t>(2 * kTile * kStride);
  const std::int64_t tile = blockIdx.x % a.tiles, bh = blockIdx.x / a.tiles, b = bh / a.heads, h = bh % a.heads;
  const std::int64_t first = tile * kTile, shift = a.nk - a.nq;
  const std::uint16_t* const kg = a.k + b * a.ks[0] + h * a.ks[2];
  const std::uint16_t* const vg = a.v + b * a.vs[0] + h * a.vs[2];
  std::int64_t keys = a.nk;  // those that some query of the block sees
  if (a.causal && first + kTile + shift < keys) keys = first + kTile + shift;
  const int steps = keys > 0 ? static_cast<int>((keys + kTile - 1) / kTile) : 0;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const std::int64_t row[2] = {first + warp * 16 + g, first + warp * 16 + g + 8};

  load_tile(q, a.q + b * a.qs[0] + h * a.qs[2], first, a.nq, a.qs[1]);
  if (steps > 0) {
    load_tile(k, kg, 0, a.nk, a.ks[1]);
    load_tile(v, vg, 0, a.nk, a.vs[1]);
  }
  cp_async_commit();

  float o[kHead / 8][4] = {};
  float greatest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // per row, of the scores times log2(e)
  for (int step = 0; step < steps; ++step) {
    const int now = step % 2 * kTile * kStride, next = kTile * kStride - now;
    if (step + 1 < steps) {
      load_tile(k + next, kg, (step + 1) * kTile, a.nk, a.ks[1]);
      load_tile(v + next, vg, (step + 1) * kTile, a.nk, a.vs[1]);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();

    float s[kTile / 8][4] = {};
    for (int d = 0; d < kHead; d += 16) {
      std::uint32_t qa[4];
      ldmatrix(qa, q + (warp * 16 + lane % 16) * kStride + d + lane / 16 * 8);
      for (int n = 0; n < kTile / 16; ++n) {
        std::uint32_t kb[4];
        ldmatrix(kb, k + now + (n * 16 + lane / 16 * 8 + lane % 8) * kStride + d + lane / 8 % 2 * 8);
        const std::uint32_t low[2] = {kb[0], kb[1]}, high[2] = {kb[2], kb[3]};
        mma_bf16(s[2 * n], qa, low);
        mma_bf16(s[2 * n + 1], qa, high);
      }
    }

    for (int n = 0; n < kTile / 8; ++n)
      for (int i = 0; i < 4; ++i) {
        const std::int64_t key = static_cast<std::int64_t>(step) * kTile + n * 8 + 2 * t + i % 2, query = row[i / 2];
        const bool seen = key < a.nk && query < a.nq && (!a.causal || key <= query + shift);
        float score = s[n][i] * a.scale;
        if (a.bias && seen)
          score += from_bf16(a.bias[b * a.bs[0] + h * a.bs[1] + query * a.bs[2] + key * a.bs[3]]);
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
      const std::uint32_t p[4] = {to_bf16x2(s[2 * j][0], s[2 * j][1]), to_bf16x2(s[2 * j][2], s[2 * j][3]),
                                  to_bf16x2(s[2 * j + 1][0], s[2 * j + 1][1]), to_bf16x2(s[2 * j + 1][2], s[2 * j + 1][3])};
      for (int n = 0; n < kHead / 16; ++n) {
        std::uint32_t vb[4];
        ldmatrix_transposed(vb, v + now + (j * 16 + lane % 16) * kStride + n * 16 + lane / 16 * 8);
        const std::uint32_t low[2] = {vb[0], vb[1]}, high[2] = {vb[2], vb[3]};
        mma_bf16(o[2 * n], p, low);
        mma_bf16(o[2 * n + 1], p, high);
      }
    }
    __syncthreads();  // this step's k and v are free for the copy after next
  }
  cp_async_wait<0>();

  for (int half = 0; half < 2; ++half) {
    if (row[half] >= a.nq) continue;
    const float inverse = total[half] > 0 ? 1.0f / total[half] : 0.0f;
    std::uint16_t* const to = a.o + ((b * a.nq + row[half]) * a.heads + h) * kHead;
    for (int n = 0; n < kHead / 8; ++n)
      *reinterpret_cast<std::uint32_t*>(to + n * 8 + 2 * t) =
          to_bf16x2(o[n][2 * half] * inverse, o[n][2 * half + 1] * inverse);
    if (t == 0)
      a.lse[bh * a.nq + row[half]] = total[half] > 0 ? (greatest[half] + log2f(total[half])) * kLn2 : -INFINITY;
  }
}

const std::uint16_t* in(const void* p) { return static_cast<const std::uint16_t*>(p); }

bool aligned(const void* p, const std::int64_t (&strides)[3]) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && strides[0] % 8 == 0 && strides[1] % 8 == 0 && strides[2] % 8 == 0;
}

}  // namespace

namespace capo::kernels {

void attention_64_cuda(const AttentionArgs& a, std::int64_t batches, void* stream) {
  CAPO_CHECK(a.dtype == bf16 && a.d == kHead && a.dv == kHead, "attention: this CUDA kernel is for bf16 and heads of 64, got ",
             a.dtype, ", d = ", a.d, ", dv = ", a.dv);
  CAPO_CHECK(aligned(a.q, a.qs) && aligned(a.k, a.ks) && aligned(a.v, a.vs),
             "attention: rows of q, k and v must be 16-byte aligned");
  if (batches == 0 || a.heads == 0 || a.nq == 0) return;
  Args args{in(a.q), in(a.k), in(a.v), in(a.bias), static_cast<std::uint16_t*>(a.o), static_cast<float*>(a.lse),
            a.heads, a.nq, a.nk, (a.nq + kTile - 1) / kTile, {}, {}, {}, {}, static_cast<float>(a.scale), a.causal};
  for (int i = 0; i < 3; ++i) args.qs[i] = a.qs[i], args.ks[i] = a.ks[i], args.vs[i] = a.vs[i];
  for (int i = 0; i < 4; ++i) args.bs[i] = a.bs[i];
  const std::size_t shared = gpu::shared_bytes<std::uint16_t>(kTile * kStride) +
                             2 * gpu::shared_bytes<std::uint16_t>(2 * kTile * kStride);
  gpu::launch("attention_forward", attention_forward, batches * a.heads * args.tiles, kThreads, shared, stream, args);
}

}  // namespace capo::kernels
