#include <capo/cuda/block_sum.cuh>
#include <capo/cuda/gpu.h>
#include <capo/cuda/kernels.h>

namespace {

using capo::gpu::kWarp;

constexpr int kRowThreads = 128;
constexpr int kChunk = static_cast<int>(capo::kLayerNormChunk);

struct Forward {
  const float *x, *weight, *bias;
  float *y, *mean, *rstd;
  std::int64_t columns;
  float eps;
  bool rms;
};

// One block per row; the variance in a second pass, around the mean.
__global__ void __launch_bounds__(kRowThreads) layer_norm_forward(Forward a) {
  const std::int64_t row = blockIdx.x;
  const float* const x = a.x + row * a.columns;
  const float n = static_cast<float>(a.columns);
  float mean = 0;
  if (!a.rms) {
    for (std::int64_t c = threadIdx.x; c < a.columns; c += kRowThreads) mean += x[c];
    mean = capo::gpu::block_sum<kRowThreads>(mean) / n;
  }
  float square = 0;
  for (std::int64_t c = threadIdx.x; c < a.columns; c += kRowThreads) square += (x[c] - mean) * (x[c] - mean);
  const float rstd = 1.0f / sqrtf(capo::gpu::block_sum<kRowThreads>(square) / n + a.eps);
  for (std::int64_t c = threadIdx.x; c < a.columns; c += kRowThreads) {
    const float h = (x[c] - mean) * rstd;
    a.y[row * a.columns + c] = h * (a.weight ? a.weight[c] : 1.0f) + (a.bias ? a.bias[c] : 0.0f);
  }
  if (threadIdx.x != 0) return;
  if (a.mean) a.mean[row] = mean;
  if (a.rstd) a.rstd[row] = rstd;
}

struct Backward {
  const float *x, *dy, *weight, *mean, *rstd;
  float *dx, *dweight, *dbias;
  std::int64_t rows, columns;
  bool rms;
};

constexpr int kThreads = 256;

// One block per chunk of rows. dx: a warp per row, dx = rstd (g - mean(g) - h mean(g h)) with g = dy weight,
// h = (x - mean) rstd. Parts: a thread per column runs down the chunk's rows, which are then in cache.
__global__ void __launch_bounds__(kThreads) layer_norm_backward(Backward a) {
  CAPO_SHARED(float, mean, kChunk);
  CAPO_SHARED(float, rstd, kChunk);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kChunk;
  const int rows = static_cast<int>(a.rows - first < kChunk ? a.rows - first : kChunk);
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    mean[r] = a.rms || !a.mean ? 0.0f : a.mean[first + r];
    rstd[r] = a.rstd ? a.rstd[first + r] : 0.0f;
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  if (a.dx)
    for (int r = threadIdx.x / kWarp; r < rows; r += kThreads / kWarp) {
      const std::int64_t at = (first + r) * a.columns;
      float g_sum = 0, gh_sum = 0;
      for (std::int64_t c = lane; c < a.columns; c += kWarp) {
        const float g = a.dy[at + c] * (a.weight ? a.weight[c] : 1.0f);
        g_sum += g;
        gh_sum += g * (a.x[at + c] - mean[r]) * rstd[r];
      }
      const float n = static_cast<float>(a.columns);
      const float g_mean = a.rms ? 0.0f : capo::gpu::warp_sum(g_sum) / n;
      const float gh_mean = capo::gpu::warp_sum(gh_sum) / n;
      for (std::int64_t c = lane; c < a.columns; c += kWarp) {
        const float g = a.dy[at + c] * (a.weight ? a.weight[c] : 1.0f);
        a.dx[at + c] = rstd[r] * (g - g_mean - (a.x[at + c] - mean[r]) * rstd[r] * gh_mean);
      }
    }
  if (!a.dweight && !a.dbias) return;
  for (std::int64_t c = threadIdx.x; c < a.columns; c += kThreads) {
    float dw = 0, db = 0;
    for (int r = 0; r < rows; ++r) {
      const std::int64_t at = (first + r) * a.columns + c;
      const float dy = a.dy[at];
      db += dy;
      if (a.dweight) dw += dy * (a.x[at] - mean[r]) * rstd[r];
    }
    if (a.dweight) a.dweight[blockIdx.x * a.columns + c] = dw;
    if (a.dbias) a.dbias[blockIdx.x * a.columns + c] = db;
  }
}

const float* in(const void* p) { return static_cast<const float*>(p); }
float* out(void* p) { return static_cast<float*>(p); }

void check_f32(const char* op, capo::DType dtype, capo::DType weight_dtype) {
  CAPO_CHECK(dtype == capo::f32 && weight_dtype == capo::f32, op, ": the CUDA kernel is f32 only, got ", dtype,
             " with weights of ", weight_dtype);
}

}  // namespace

namespace capo::kernels {

void layer_norm_cuda(const LayerNormArgs& a, std::int64_t items, void* stream) {
  if (items == 0 || a.columns == 0) return;
  check_f32(a.rms ? "rms_norm" : "layer_norm", a.dtype, a.weight_dtype);
  const Forward f{in(a.x), in(a.weight), in(a.bias), out(a.y), out(a.mean), out(a.rstd),
                  a.columns, static_cast<float>(a.eps), a.rms};
  gpu::launch("layer_norm_forward", layer_norm_forward, items, kRowThreads, 0, stream, f);
}

void layer_norm_backward_cuda(const LayerNormBackwardArgs& a, std::int64_t items, void* stream) {
  if (items == 0 || a.columns == 0) return;
  check_f32(a.rms ? "rms_norm" : "layer_norm", a.dtype, a.weight_dtype);
  const Backward b{in(a.x), in(a.dy), in(a.weight), in(a.mean), in(a.rstd), out(a.dx), out(a.dweight_part),
                   out(a.dbias_part), a.rows, a.columns, a.rms};
  gpu::launch("layer_norm_backward", layer_norm_backward, items, kThreads, 0, stream, b);
}

}  // namespace capo::kernels
