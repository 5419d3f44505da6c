// What batch_norm has beside group_norm's kernels: the running statistics.
#include <capo/cuda/element.cuh>
#include <capo/ops/batch_norm.h>

namespace {

using capo::RunningStatsArgs;
namespace gpu = capo::gpu;

constexpr int kThreads = 128;

struct Factors {
  float keep, weight, unbias;
};

// Rounded by itself, as the op affine does: an FMA with 0 is not contracted with the sum.
__device__ inline float scaled(float x, float by) { return __fmaf_rn(x, by, 0.0f); }

template <class T>
__global__ void __launch_bounds__(kThreads) update_running(RunningStatsArgs p, Factors f, std::int64_t channels) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= channels) return;
  T &mean = static_cast<T*>(p.running_mean)[c], &var = static_cast<T*>(p.running_var)[c];
  const float batch_mean = static_cast<const float*>(p.mean)[c],
              batch_var = scaled(static_cast<const float*>(p.var)[c], f.unbias);
  mean = gpu::Store<T>::from(scaled(gpu::load(mean), f.keep) + scaled(batch_mean, f.weight));
  var = gpu::Store<T>::from(scaled(gpu::load(var), f.keep) + scaled(batch_var, f.weight));
}

}  // namespace

namespace capo::kernels {

// items: channels.
void batch_norm_running_cuda(const RunningStatsArgs& p, std::int64_t items, void* stream) {
  const Factors f{static_cast<float>(p.keep), static_cast<float>(p.weight), static_cast<float>(p.unbias)};
  gpu::for_floating("batch_norm", p.dtype, [&](auto t) {
    gpu::launch("batch_norm_running", update_running<decltype(t)>, (items + kThreads - 1) / kThreads, kThreads, 0,
                stream, p, f, items);
  });
}

}  // namespace capo::kernels
