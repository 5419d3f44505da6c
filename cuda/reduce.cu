#include <capo/cuda/block_sum.cuh>
#include <capo/cuda/gpu.h>
#include <capo/cuda/kernels.h>

namespace {

constexpr int kThreads = 256;

// Block b sums x[b * chunk, (b + 1) * chunk) into y[b]: thread by thread with stride kThreads, then over the block.
__global__ void __launch_bounds__(kThreads) sum_chunk(const float* x, float* y, std::int64_t n, std::int64_t chunk) {
  const std::int64_t begin = blockIdx.x * chunk, end = begin + chunk < n ? begin + chunk : n;
  float v = 0;
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) v += x[i];
  v = capo::gpu::block_sum<kThreads>(v);
  if (threadIdx.x == 0) y[blockIdx.x] = v;
}

__global__ void __launch_bounds__(kThreads) column_sum(const float* x, float* y, std::int64_t rows, std::int64_t columns) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= columns) return;
  float v = 0;
  for (std::int64_t r = 0; r < rows; ++r) v += x[r * columns + c];
  y[c] = v;
}

}  // namespace

namespace capo::kernels {

void sum_cuda(const SumArgs& a, void* stream) {
  const std::int64_t chunks = sum_chunks(a.n);
  if (chunks > 1) gpu::launch("sum_chunk", sum_chunk, chunks, kThreads, 0, stream, a.x, a.part, a.n, kSumChunk);
  const float* rest = chunks > 1 ? a.part : a.x;
  const std::int64_t left = chunks > 1 ? chunks : a.n;
  gpu::launch("sum_chunk", sum_chunk, 1, kThreads, 0, stream, rest, a.y, left, left);
}

void column_sum_cuda(const ColumnSumArgs& a, void* stream) {
  if (a.columns == 0) return;
  gpu::launch("column_sum", column_sum, (a.columns + kThreads - 1) / kThreads, kThreads, 0, stream, a.x, a.y, a.rows,
              a.columns);
}

}  // namespace capo::kernels
