#include <capo/cuda/pack.cuh>
#include <capo/cuda/row_lanes.cuh>
#include <capo/ops/axis_filter.h>

namespace {

using capo::AxisFilterArgs;
using std::int64_t;
namespace gpu = capo::gpu;
using gpu::kRowThreads;
using gpu::RowLanes;

// One row of lanes per (outer, row of A), N inner elements a thread; taps in their order.
template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) filter(AxisFilterArgs p, RowLanes lanes) {
  const int64_t item = lanes.row();
  if (item >= lanes.rows) return;
  const int64_t outer = item / p.rows, row = item - outer * p.rows, first = p.begin[row], last = p.begin[row + 1];
  const T* x = static_cast<const T*>(p.x) + outer * p.columns * p.inner;
  T* y = static_cast<T*>(p.y) + item * p.inner;
  const float* weight = static_cast<const float*>(p.weight);
  for (int64_t c = lanes.lane() * N; c < p.inner; c += lanes.lanes() * N) {
    float sum[N] = {}, v[N];
    for (int64_t t = first; t < last; ++t) {
      const float w = weight[t];
      gpu::load_many<N>(x + p.column[t] * p.inner + c, v);
      for (int j = 0; j < N; ++j) sum[j] += w * v[j];
    }
    gpu::store_many<N>(y + c, sum);
  }
}

template <class T, int N>
void run(const AxisFilterArgs& p, int64_t items, void* stream) {
  const RowLanes lanes = gpu::row_lanes(items, (p.inner + N - 1) / N);
  gpu::launch("axis_filter", filter<T, N>, lanes.blocks(), kRowThreads, 0, stream, p, lanes);
}

}  // namespace

namespace capo::kernels {

void axis_filter_cuda(const AxisFilterArgs& p, int64_t items, void* stream) {
  gpu::for_floating("axis_filter", p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kMany = gpu::kPack<T>;
    if (gpu::packs(p.inner, kMany, p.x, p.y))
      run<T, kMany>(p, items, stream);
    else
      run<T, 1>(p, items, stream);
  });
}

}  // namespace capo::kernels
