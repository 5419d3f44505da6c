// Running sums along one axis of [outer, size, inner]. Floating values are summed in f64, as on the CPU.
#include <capo/cuda/element.cuh>
#include <capo/ops/integer_functors.h>
#include <capo/ops/stats.h>

namespace {

using capo::CumsumArgs;
using capo::DType;
namespace gpu = capo::gpu;
using gpu::kFullMask;
using gpu::kWarp;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr std::int64_t kNarrow = 32;  // fewer columns than this: their lines are scanned by a block each

// Where the sum of line (outer, column) starts, and the stride of its steps.
struct Line {
  std::int64_t start, step;
};
__device__ inline Line line_of(const CumsumArgs& p, std::int64_t line) {
  const std::int64_t outer = line / p.inner, start = outer * p.size * p.inner + (line - outer * p.inner);
  return p.reverse ? Line{start + (p.size - 1) * p.inner, -p.inner} : Line{start, p.inner};
}

// A thread per line: neighbours read neighbouring columns.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) cumsum_columns(CumsumArgs p, std::int64_t lines) {
  const std::int64_t line = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (line >= lines) return;
  const Line l = line_of(p, line);
  const T* const x = static_cast<const T*>(p.x) + l.start;
  T* const y = static_cast<T*>(p.y) + l.start;
  Sum total = 0;
#pragma unroll 4
  for (std::int64_t k = 0; k < p.size; ++k) {
    total = wrap_add(total, static_cast<Sum>(gpu::load(x[k * l.step])));
    y[k * l.step] = gpu::Store<T>::from(total);
  }
}

// A block per line, kThreads steps at a time: a scan within each warp, the warps before it, the steps before those.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) cumsum_line(CumsumArgs p) {
  CAPO_SHARED(Sum, totals, kWarps);
  const Line l = line_of(p, blockIdx.x);
  const T* const x = static_cast<const T*>(p.x) + l.start;
  T* const y = static_cast<T*>(p.y) + l.start;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Sum before = 0;
  for (std::int64_t first = 0; first < p.size; first += kThreads) {
    const std::int64_t k = first + threadIdx.x;
    Sum v = k < p.size ? static_cast<Sum>(gpu::load(x[k * l.step])) : Sum(0);
    for (int by = 1; by < kWarp; by *= 2) {
      const Sum left = __shfl_up_sync(kFullMask, v, by);
      if (lane >= by) v = wrap_add(v, left);
    }
    if (lane == kWarp - 1) totals[warp] = v;
    __syncthreads();
    Sum left = before;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) left = wrap_add(left, totals[w]);
      before = wrap_add(before, totals[w]);
    }
    if (k < p.size) y[k * l.step] = gpu::Store<T>::from(wrap_add(left, v));
    __syncthreads();  // totals are free for the next steps
  }
}

template <class T, class Sum>
void run(const CumsumArgs& p, std::int64_t lines, void* stream) {
  if (p.inner < kNarrow)
    gpu::launch("cumsum", cumsum_line<T, Sum>, lines, kThreads, 0, stream, p);
  else
    gpu::launch("cumsum", cumsum_columns<T, Sum>, (lines + kThreads - 1) / kThreads, kThreads, 0, stream, p, lines);
}

}  // namespace

namespace capo::kernels {

void cumsum_cuda(const CumsumArgs& p, std::int64_t items, void* stream) {
  const std::int64_t outer = items / ((p.inner + 63) / 64), lines = outer * p.inner;
  if (p.dtype == DType::i32) return run<std::int32_t, std::int32_t>(p, lines, stream);
  if (p.dtype == DType::i64) return run<std::int64_t, std::int64_t>(p, lines, stream);
  gpu::for_floating("cumsum", p.dtype, [&](auto t) { run<decltype(t), double>(p, lines, stream); });
}

}  // namespace capo::kernels
