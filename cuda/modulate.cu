// modulate and gate over [samples, rows, columns]. A block owns a chunk of one sample's rows and as many columns as a
// warp covers in one access; its warps take the rows in turn. What belongs to a column is read once, its sums stay in
// registers.
#include <capo/cuda/pack.cuh>
#include <capo/ops/modulate.h>

namespace {

using capo::ModulateArgs;
using capo::ModulateBackwardArgs;
namespace gpu = capo::gpu;
using gpu::kWarp;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Place {
  std::int64_t sample, item;  // item: sample * chunks + chunk, the row of the part tables
  std::int64_t row, last;     // this warp's first row in [samples * rows], and the chunk's end
  std::int64_t column;        // this thread's first; may lie beyond the last one
};
template <int N, class Args>
__device__ inline Place place_of(const Args& a) {
  const std::int64_t chunks = (a.rows + capo::kModulateChunk - 1) / capo::kModulateChunk;
  const std::int64_t tiles = (a.columns + kWarp * N - 1) / (kWarp * N);
  const std::int64_t item = blockIdx.x / tiles, sample = item / chunks;
  const std::int64_t first = (item - sample * chunks) * capo::kModulateChunk, end = first + capo::kModulateChunk;
  return {sample, item, sample * a.rows + first + threadIdx.x / kWarp, sample * a.rows + (end < a.rows ? end : a.rows),
          ((blockIdx.x - item * tiles) * kWarp + threadIdx.x % kWarp) * N};
}
template <int N, class Args>
std::int64_t blocks_of(const Args& a) {
  const std::int64_t chunks = (a.rows + capo::kModulateChunk - 1) / capo::kModulateChunk;
  return a.samples * chunks * ((a.columns + kWarp * N - 1) / (kWarp * N));
}

// base + scale of the thread's columns.
template <int N, class T, class Args>
__device__ inline void factors(const Args& a, const Place& p, float* out) {
  gpu::load_many<N>(static_cast<const T*>(a.scale) + p.sample * a.columns + p.column, out);
  for (int j = 0; j < N; ++j) out[j] += static_cast<float>(a.base);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) forward(ModulateArgs a) {
  const Place p = place_of<N>(a);
  if (p.column >= a.columns) return;
  const T* const x = static_cast<const T*>(a.x) + p.column;
  const T* const residual = a.residual ? static_cast<const T*>(a.residual) + p.column : nullptr;
  T* const y = static_cast<T*>(a.y) + p.column;
  float factor[N], plus[N], v[N];
  factors<N, T>(a, p, factor);
  if (a.shift) gpu::load_many<N>(static_cast<const T*>(a.shift) + p.sample * a.columns + p.column, plus);
  for (std::int64_t row = p.row; row < p.last; row += kWarps) {
    gpu::load_many<N>(x + row * a.columns, v);
    if (residual) gpu::load_many<N>(residual + row * a.columns, plus);
    for (int j = 0; j < N; ++j) v[j] = v[j] * factor[j] + plus[j];
    gpu::store_many<N>(y + row * a.columns, v);
  }
}

// own[j] of all warps, added up in their order, becomes the block's columns of a row of part.
template <int N, class Args>
__device__ inline void join_warps(const Args& a, const Place& p, const float* own, float* all, void* part) {
  constexpr int kWide = kWarp * N;
  for (int j = 0; j < N; ++j) all[threadIdx.x * N + j] = own[j];
  __syncthreads();
  const std::int64_t first = p.column - threadIdx.x % kWarp * N;
  for (int c = threadIdx.x; c < kWide && first + c < a.columns; c += kThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += all[w * kWide + c];
    static_cast<float*>(part)[p.item * a.columns + first + c] = sum;
  }
  __syncthreads();
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) backward(ModulateBackwardArgs a) {
  CAPO_SHARED(float, all, kThreads * N);
  const Place p = place_of<N>(a);
  float factor[N], dscale[N] = {}, dshift[N] = {}, x[N] = {}, dy[N];
  if (p.column < a.columns) {
    if (a.dx) factors<N, T>(a, p, factor);
    for (std::int64_t row = p.row; row < p.last; row += kWarps) {
      const std::int64_t at = row * a.columns + p.column;
      gpu::load_many<N>(static_cast<const T*>(a.dy) + at, dy);
      if (a.x) gpu::load_many<N>(static_cast<const T*>(a.x) + at, x);
      for (int j = 0; j < N; ++j) {
        dscale[j] += dy[j] * x[j];
        dshift[j] += dy[j];
      }
      if (!a.dx) continue;
      for (int j = 0; j < N; ++j) dy[j] *= factor[j];
      gpu::store_many<N>(static_cast<T*>(a.dx) + at, dy);
    }
  }
  if (a.dscale_part) join_warps<N>(a, p, dscale, all, a.dscale_part);
  if (a.dshift_part) join_warps<N>(a, p, dshift, all, a.dshift_part);
}

}  // namespace

namespace capo::kernels {

void modulate_cuda(const ModulateArgs& a, std::int64_t, void* stream) {
  gpu::for_floating("modulate", a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = gpu::kPack<T>;
    if (gpu::packs(a.columns, N, a.x, a.scale, a.shift, a.residual, a.y))
      gpu::launch("modulate", forward<T, N>, blocks_of<N>(a), kThreads, 0, stream, a);
    else
      gpu::launch("modulate", forward<T, 1>, blocks_of<1>(a), kThreads, 0, stream, a);
  });
}

void modulate_backward_cuda(const ModulateBackwardArgs& a, std::int64_t, void* stream) {
  gpu::for_floating("modulate", a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = gpu::kPack<T>;
    if (gpu::packs(a.columns, N, a.x, a.dy, a.scale, a.dx))
      gpu::launch("modulate_backward", backward<T, N>, blocks_of<N>(a), kThreads, 0, stream, a);
    else
      gpu::launch("modulate_backward", backward<T, 1>, blocks_of<1>(a), kThreads, 0, stream, a);
  });
}

}  // namespace capo::kernels
