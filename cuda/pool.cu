#include <capo/cuda/pack.cuh>
#include <capo/cuda/row_lanes.cuh>
#include <capo/ops/pool.h>

namespace {

using capo::MaxPoolArgs;
using std::int64_t;
namespace gpu = capo::gpu;
using gpu::kRowThreads;
using gpu::RowLanes;

struct Range {
  int64_t begin, end;
};
// The inputs of window o; never empty, as padding <= kernel / 2.
__device__ inline Range inputs(const MaxPoolArgs& p, int axis, int64_t o) {
  const int64_t from = o * p.stride[axis] - p.padding[axis], to = from + p.kernel[axis];
  return {from > 0 ? from : 0, to < p.in[axis] ? to : p.in[axis]};
}
// The windows over input i; may be empty.
__device__ inline Range windows(const MaxPoolArgs& p, int axis, int64_t i) {
  const int64_t reach = i + p.padding[axis], below = reach - p.kernel[axis], last = reach / p.stride[axis] + 1;
  return {below < 0 ? 0 : below / p.stride[axis] + 1, last < p.out[axis] ? last : p.out[axis]};
}

struct Pixel {
  int64_t image, at[3];
};
__device__ inline Pixel pixel_of(int64_t index, const int64_t* size) {
  Pixel p;
  for (int a = 2; a >= 0; --a) {
    const int64_t rest = index / size[a];
    p.at[a] = index - rest * size[a];
    index = rest;
  }
  p.image = index;
  return p;
}

// One row of lanes per output pixel, N channels a thread.
template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) forward(MaxPoolArgs p, RowLanes lanes) {
  const int64_t row = lanes.row();
  if (row >= lanes.rows) return;
  const Pixel o = pixel_of(row, p.out);
  const Range r0 = inputs(p, 0, o.at[0]), r1 = inputs(p, 1, o.at[1]), r2 = inputs(p, 2, o.at[2]);
  const T* x = static_cast<const T*>(p.x) + o.image * p.in[0] * p.in[1] * p.in[2] * p.channels;
  for (int64_t c = lanes.lane() * N; c < p.channels; c += lanes.lanes() * N) {
    float best[N], v[N];
    std::int32_t at[N];
    bool fresh = true;
    for (int64_t i0 = r0.begin; i0 < r0.end; ++i0)
      for (int64_t i1 = r1.begin; i1 < r1.end; ++i1)
        for (int64_t i2 = r2.begin; i2 < r2.end; ++i2) {
          const int64_t place = (i0 * p.in[1] + i1) * p.in[2] + i2;
          gpu::load_many<N>(x + place * p.channels + c, v);
          for (int j = 0; j < N; ++j)
            if (fresh || best[j] < v[j] || v[j] != v[j]) best[j] = v[j], at[j] = static_cast<std::int32_t>(place);
          fresh = false;
        }
    gpu::store_many<N>(static_cast<T*>(p.y) + row * p.channels + c, best);
    if (p.index) gpu::store_many<N>(p.index + row * p.channels + c, at);
  }
}

// One row of lanes per input pixel, which gathers from the windows over it.
template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) backward(MaxPoolArgs p, RowLanes lanes) {
  const int64_t row = lanes.row();
  if (row >= lanes.rows) return;
  const Pixel i = pixel_of(row, p.in);
  const Range r0 = windows(p, 0, i.at[0]), r1 = windows(p, 1, i.at[1]), r2 = windows(p, 2, i.at[2]);
  const auto here = static_cast<std::int32_t>((i.at[0] * p.in[1] + i.at[1]) * p.in[2] + i.at[2]);
  for (int64_t c = lanes.lane() * N; c < p.channels; c += lanes.lanes() * N) {
    float sum[N] = {}, dy[N];
    std::int32_t winner[N];
    for (int64_t o0 = r0.begin; o0 < r0.end; ++o0)
      for (int64_t o1 = r1.begin; o1 < r1.end; ++o1)
        for (int64_t o2 = r2.begin; o2 < r2.end; ++o2) {
          const int64_t from = (((i.image * p.out[0] + o0) * p.out[1] + o1) * p.out[2] + o2) * p.channels + c;
          gpu::load_many<N>(static_cast<const T*>(p.x) + from, dy);
          gpu::load_many<N>(p.index + from, winner);
          for (int j = 0; j < N; ++j) sum[j] += winner[j] == here ? dy[j] : 0.0f;
        }
    gpu::store_many<N>(static_cast<T*>(p.y) + row * p.channels + c, sum);
  }
}

template <class T, int N>
void run(const MaxPoolArgs& p, bool is_backward, int64_t pixels, void* stream) {
  const RowLanes lanes = gpu::row_lanes(pixels, (p.channels + N - 1) / N);
  if (is_backward)
    gpu::launch("max_pool_backward", backward<T, N>, lanes.blocks(), kRowThreads, 0, stream, p, lanes);
  else
    gpu::launch("max_pool_forward", forward<T, N>, lanes.blocks(), kRowThreads, 0, stream, p, lanes);
}

void run_any(const MaxPoolArgs& p, bool is_backward, int64_t pixels, void* stream) {
  gpu::for_floating("max_pool", p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kMany = gpu::kPack<T>;
    if (gpu::packs(p.channels, kMany, p.x, p.y, p.index))
      run<T, kMany>(p, is_backward, pixels, stream);
    else
      run<T, 1>(p, is_backward, pixels, stream);
  });
}

}  // namespace

namespace capo::kernels {

void max_pool_forward_cuda(const MaxPoolArgs& p, int64_t pixels, void* stream) { run_any(p, false, pixels, stream); }
void max_pool_backward_cuda(const MaxPoolArgs& p, int64_t pixels, void* stream) { run_any(p, true, pixels, stream); }

}  // namespace capo::kernels
