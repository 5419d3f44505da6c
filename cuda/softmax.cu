// softmax and log_softmax along rows of contiguous values, f32 inside. Short rows: a warp holds the row in registers,
// read once. Long rows: a block passes over the row.
#include <capo/cuda/block_sum.cuh>
#include <capo/cuda/element.cuh>
#include <capo/cuda/math.cuh>
#include <capo/ops/softmax.h>

namespace {

namespace gpu = capo::gpu;
using gpu::kFullMask;
using gpu::kWarp;

constexpr int kThreads = 256;       // short rows: eight of them
constexpr int kLongThreads = 512;   // long rows: one
constexpr int kShortRow = 1024;

template <class T>
struct Rows {
  const T *x, *dy;  // backward: x is the saved y
  T* y;
  std::int64_t rows, columns;
  bool log;
};

__device__ inline float warp_max(float v) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) v = fmaxf(v, __shfl_xor_sync(kFullMask, v, bits));
  return v;
}
__device__ inline float block_max(float v) {
  CAPO_SHARED(float, part, kLongThreads / kWarp);
  v = warp_max(v);
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = v;
  __syncthreads();
  for (int i = 0; i < kLongThreads / kWarp; ++i) v = fmaxf(v, part[i]);
  return v;
}

// A lane's elements of one row: kSteps packs of kCount, kWarp packs apart. Those past the row's end are `filler`.
template <int kCount, int kSteps, class T>
__device__ inline void load_row(float* v, const T* row, int columns, float filler) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int c = (s * kWarp + lane) * kCount;
    if (c < columns) {
      const auto pack = *reinterpret_cast<const gpu::Pack<T, kCount>*>(row + c);
      for (int j = 0; j < kCount; ++j) v[s * kCount + j] = gpu::load(pack.v[j]);
    } else {
      for (int j = 0; j < kCount; ++j) v[s * kCount + j] = filler;
    }
  }
}
template <int kCount, int kSteps, class T>
__device__ inline void store_row(const float* v, T* row, int columns) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int c = (s * kWarp + lane) * kCount;
    if (c >= columns) continue;
    gpu::Pack<T, kCount> pack;
    for (int j = 0; j < kCount; ++j) pack.v[j] = gpu::Store<T>::from(v[s * kCount + j]);
    *reinterpret_cast<gpu::Pack<T, kCount>*>(row + c) = pack;
  }
}

template <class T, int kCount, int kSteps>
__global__ void __launch_bounds__(kThreads) softmax_short(Rows<T> a) {
  constexpr int kElements = kCount * kSteps;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int columns = row < a.rows ? static_cast<int>(a.columns) : 0;
  const std::int64_t at = row < a.rows ? row * a.columns : 0;
  float v[kElements], top = -INFINITY, total = 0;
  load_row<kCount, kSteps>(v, a.x + at, columns, -INFINITY);
#pragma unroll
  for (int i = 0; i < kElements; ++i) top = fmaxf(top, v[i]);
  top = warp_max(top);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    v[i] -= top;
    const bool inside = ((i / kCount) * kWarp + static_cast<int>(threadIdx.x % kWarp)) * kCount < columns;
    const float e = inside ? m::exp(v[i]) : 0.0f;  // -inf - -inf of the filler is NaN
    total += e;
    if (!a.log) v[i] = e;
  }
  total = gpu::warp_sum(total);
  const float rest = a.log ? m::log(total) : 1.0f / total;
#pragma unroll
  for (int i = 0; i < kElements; ++i) v[i] = a.log ? v[i] - rest : v[i] * rest;
  store_row<kCount, kSteps>(v, a.y + at, columns);
}

template <class T, int kCount, int kSteps>
__global__ void __launch_bounds__(kThreads) softmax_backward_short(Rows<T> a) {
  constexpr int kElements = kCount * kSteps;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int columns = row < a.rows ? static_cast<int>(a.columns) : 0;
  const std::int64_t at = row < a.rows ? row * a.columns : 0;
  float y[kElements], dy[kElements], total = 0;
  load_row<kCount, kSteps>(y, a.x + at, columns, 0.0f);
  load_row<kCount, kSteps>(dy, a.dy + at, columns, 0.0f);
#pragma unroll
  for (int i = 0; i < kElements; ++i) total += a.log ? dy[i] : dy[i] * y[i];
  total = gpu::warp_sum(total);
#pragma unroll
  for (int i = 0; i < kElements; ++i) dy[i] = a.log ? dy[i] - m::exp(y[i]) * total : y[i] * (dy[i] - total);
  store_row<kCount, kSteps>(dy, a.y + at, columns);
}

// f(c, values) for this thread's packs of the row. The last, partial pack does not exist: kCount divides the columns.
template <int kCount, class T, class F>
__device__ inline void for_packs(const T* row, std::int64_t columns, const F& f) {
  for (std::int64_t c = static_cast<std::int64_t>(threadIdx.x) * kCount; c < columns; c += kLongThreads * kCount)
    f(c, *reinterpret_cast<const gpu::Pack<T, kCount>*>(row + c));
}

template <class T, int kCount>
__global__ void __launch_bounds__(kLongThreads) softmax_long(Rows<T> a) {
  using Pack = gpu::Pack<T, kCount>;
  const T* const x = a.x + blockIdx.x * a.columns;
  T* const y = a.y + blockIdx.x * a.columns;
  float top = -INFINITY, total = 0;
  for_packs<kCount>(x, a.columns, [&](std::int64_t, const Pack& p) {
    for (int j = 0; j < kCount; ++j) top = fmaxf(top, gpu::load(p.v[j]));
  });
  top = block_max(top);
  for_packs<kCount>(x, a.columns, [&](std::int64_t, const Pack& p) {
    for (int j = 0; j < kCount; ++j) total += m::exp(gpu::load(p.v[j]) - top);
  });
  total = gpu::block_sum<kLongThreads>(total);
  const float rest = a.log ? m::log(total) : 1.0f / total;
  for_packs<kCount>(x, a.columns, [&](std::int64_t c, const Pack& p) {
    Pack out;
    for (int j = 0; j < kCount; ++j) {
      const float v = gpu::load(p.v[j]) - top;
      out.v[j] = gpu::Store<T>::from(a.log ? v - rest : m::exp(v) * rest);
    }
    *reinterpret_cast<Pack*>(y + c) = out;
  });
}

template <class T, int kCount>
__global__ void __launch_bounds__(kLongThreads) softmax_backward_long(Rows<T> a) {
  using Pack = gpu::Pack<T, kCount>;
  const std::int64_t at = blockIdx.x * a.columns;
  const T* const y = a.x + at;
  float total = 0;
  for_packs<kCount>(a.dy + at, a.columns, [&](std::int64_t c, const Pack& p) {
    const Pack q = *reinterpret_cast<const Pack*>(y + c);
    for (int j = 0; j < kCount; ++j) total += a.log ? gpu::load(p.v[j]) : gpu::load(p.v[j]) * gpu::load(q.v[j]);
  });
  total = gpu::block_sum<kLongThreads>(total);
  for_packs<kCount>(a.dy + at, a.columns, [&](std::int64_t c, const Pack& p) {
    const Pack q = *reinterpret_cast<const Pack*>(y + c);
    Pack out;
    for (int j = 0; j < kCount; ++j) {
      const float g = gpu::load(p.v[j]), v = gpu::load(q.v[j]);
      out.v[j] = gpu::Store<T>::from(a.log ? g - m::exp(v) * total : v * (g - total));
    }
    *reinterpret_cast<Pack*>(a.y + at + c) = out;
  });
}

template <class T, int kCount, int kSteps>
void run_short(const Rows<T>& a, void* stream) {
  const std::int64_t blocks = (a.rows + kThreads / kWarp - 1) / (kThreads / kWarp);
  if (a.dy)
    gpu::launch("softmax_backward", softmax_backward_short<T, kCount, kSteps>, blocks, kThreads, 0, stream, a);
  else
    gpu::launch("softmax", softmax_short<T, kCount, kSteps>, blocks, kThreads, 0, stream, a);
}

template <class T, int kCount>
void run_rows(const Rows<T>& a, void* stream) {
  constexpr int kFull = kShortRow / (kWarp * kCount), kQuarter = kFull / 4;
  if (a.columns <= kShortRow / 4) return run_short<T, kCount, kQuarter>(a, stream);
  if (a.columns <= kShortRow) return run_short<T, kCount, kFull>(a, stream);
  if (a.dy)
    gpu::launch("softmax_backward", softmax_backward_long<T, kCount>, a.rows, kLongThreads, 0, stream, a);
  else
    gpu::launch("softmax", softmax_long<T, kCount>, a.rows, kLongThreads, 0, stream, a);
}

template <class T>
void run(const capo::SoftmaxArgs& p, void* stream) {
  const Rows<T> a{static_cast<const T*>(p.x), static_cast<const T*>(p.dy), static_cast<T*>(p.y), p.rows, p.columns,
                  p.log};
  const bool packed = a.columns % gpu::kPack<T> == 0 && gpu::aligned(a.x) && gpu::aligned(a.dy) && gpu::aligned(a.y);
  packed ? run_rows<T, gpu::kPack<T>>(a, stream) : run_rows<T, 1>(a, stream);
}

}  // namespace

namespace capo::kernels {

void softmax_cuda(const SoftmaxArgs& p, std::int64_t, void* stream) {
  gpu::for_floating(p.log ? "log_softmax" : "softmax", p.dtype, [&](auto t) { run<decltype(t)>(p, stream); });
}

}  // namespace capo::kernels
