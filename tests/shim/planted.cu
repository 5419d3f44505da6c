#include <capo/cuda/gpu.h>
#include <capo/cuda/ptx.h>
#include <capo/tests/shim/planted.h>

namespace {

using capo::gpu::kFullMask;
using capo::planted::Bug;
using capo::planted::kThreads;
using capo::planted::StepState;

template <Bug bug>
__global__ void __launch_bounds__(kThreads) mirror(const float* x, float* y) {
  CAPO_SHARED_DYNAMIC(carve);
  CAPO_SHARED(float, tile, kThreads);
  float* const one = carve.take<float>(kThreads);
  float* const two = carve.take<float>(kThreads);
  const int t = threadIdx.x;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + t;
  if (t % 4 == 0) capo::gpu::cp_async_16(two + t, x + i, true);
  capo::gpu::cp_async_commit();
  tile[bug == Bug::shared_index ? t + 1 : t] = x[i];
  one[bug == Bug::carved_index ? t + 4 : t] = 1.0f;
  if constexpr (bug == Bug::shared_word) tile[0] = x[i - t];  // every thread, the same value
  if constexpr (bug == Bug::early_exit) {
    if (t == 41) return;
  }
  if constexpr (bug != Bug::no_wait) capo::gpu::cp_async_wait<0>();
  if constexpr (bug == Bug::divergent_barrier) {
    if (t < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if constexpr (bug != Bug::no_barrier) {
    __syncthreads();
  }
  const float mirrored = (tile[kThreads - 1 - t] + two[kThreads - 1 - t]) * 0.5f * one[(t + 1) % kThreads];
  if constexpr (bug == Bug::no_wait) capo::gpu::cp_async_wait<0>();

  float sum = 0;  // of zeros, over the warp
  if constexpr (bug == Bug::wrong_mask) {
    sum = __shfl_xor_sync(0xffffu, 0.0f, 1);
  } else if constexpr (bug == Bug::divergent_shuffle) {
    if (t % 32 < 16) sum = __shfl_xor_sync(kFullMask, 0.0f, 1);
  } else {
    sum = __shfl_xor_sync(kFullMask, 0.0f, 1);
  }
  __syncthreads();
  tile[t] = mirrored;
  if constexpr (bug != Bug::no_syncwarp) __syncwarp();
  const float neighbour = tile[t ^ 1];
  if constexpr (bug == Bug::unwritten) {
    if (t == 77) return;
  }
  std::int64_t to = i;
  if (bug == Bug::global_index) to = i + 1;
  if (bug == Bug::other_block && t == 0) to = 0;
  y[to] = mirrored + sum + 0.0f * neighbour;
}

template <Bug bug>
void start(const float* x, float* y, std::int64_t blocks) {
  const std::size_t shared = 2 * capo::gpu::shared_bytes<float>(kThreads);
  capo::gpu::launch("mirror", mirror<bug>, blocks, kThreads, shared, nullptr, x, y);
}

__device__ inline float masked(std::uint32_t seed, std::int64_t i) {
  std::uint32_t h = seed ^ static_cast<std::uint32_t>(i) * 0x9e3779b9u;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  return (h >> 31) != 0 ? 2.0f : 0.0f;
}

__global__ void step_by_value(float* w, const float* g, std::int64_t n, float rate, std::uint32_t seed) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) w[i] -= rate * masked(seed, i) * g[i];
}

__global__ void step_by_pointer(float* w, const float* g, std::int64_t n, const StepState* state) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) w[i] -= state->rate * masked(state->seed, i) * g[i];
}

__device__ inline std::uint32_t pair(const std::uint16_t* p, int second) {
  return static_cast<std::uint32_t>(p[0]) | static_cast<std::uint32_t>(p[second]) << 16;
}

__global__ void tile(bool is_bf16, const std::uint16_t* a, const std::uint16_t* b, float* d, int* wrong) {
  CAPO_SHARED(uint4, rows, 32);  // 16 rows of 16
  auto* const s = reinterpret_cast<std::uint16_t*>(rows);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) s[i] = a[i];
  __syncthreads();
  std::uint32_t fa[4], fat[4];
  capo::gpu::ldmatrix(fa, s + lane % 16 * 16 + lane / 16 * 8);
  capo::gpu::ldmatrix_transposed(fat, s + lane % 16 * 16 + lane / 16 * 8);
  int bad = 0;
  for (int i = 0; i < 4; ++i) {
    const int row = i % 2 * 8, column = i / 2 * 8;
    bad += fa[i] != pair(s + (row + g) * 16 + column + 2 * t, 1);
    bad += fat[i] != pair(s + (row + 2 * t) * 16 + column + g, 16);
  }
  wrong[lane] = bad;
  const std::uint32_t fb[2] = {pair(b + g * 16 + 2 * t, 1), pair(b + g * 16 + 2 * t + 8, 1)};
  float fd[4] = {};
  if (is_bf16)
    capo::gpu::mma_bf16(fd, fa, fb);
  else
    capo::gpu::mma_f16(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fd[i];
}

}  // namespace

namespace capo::planted {

void tile_product(bool is_bf16, const std::uint16_t* a, const std::uint16_t* b, float* d, int* wrong) {
  gpu::launch("tile", tile, 1, 32, 0, nullptr, is_bf16, a, b, d, wrong);
}

void mirror(Bug bug, const float* x, float* y, std::int64_t blocks) {
  switch (bug) {
    case Bug::none: return start<Bug::none>(x, y, blocks);
    case Bug::global_index: return start<Bug::global_index>(x, y, blocks);
    case Bug::shared_index: return start<Bug::shared_index>(x, y, blocks);
    case Bug::carved_index: return start<Bug::carved_index>(x, y, blocks);
    case Bug::no_barrier: return start<Bug::no_barrier>(x, y, blocks);
    case Bug::unwritten: return start<Bug::unwritten>(x, y, blocks);
    case Bug::wrong_mask: return start<Bug::wrong_mask>(x, y, blocks);
    case Bug::divergent_shuffle: return start<Bug::divergent_shuffle>(x, y, blocks);
    case Bug::divergent_barrier: return start<Bug::divergent_barrier>(x, y, blocks);
    case Bug::early_exit: return start<Bug::early_exit>(x, y, blocks);
    case Bug::no_wait: return start<Bug::no_wait>(x, y, blocks);
    case Bug::shared_word: return start<Bug::shared_word>(x, y, blocks);
    case Bug::other_block: return start<Bug::other_block>(x, y, blocks);
    case Bug::no_syncwarp: return start<Bug::no_syncwarp>(x, y, blocks);
  }
}

void step(bool frozen, float* w, const float* g, std::int64_t n, float rate, std::uint32_t seed,
          const StepState* state) {
  const std::int64_t blocks = gpu::blocks_for(n, 64);
  if (frozen)
    gpu::launch("step_by_value", step_by_value, blocks, 64, 0, nullptr, w, g, n, rate, seed);
  else
    gpu::launch("step_by_pointer", step_by_pointer, blocks, 64, 0, nullptr, w, g, n, state);
}

}  // namespace capo::planted
