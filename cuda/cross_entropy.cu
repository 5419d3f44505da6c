// Cross entropy and its gradient: one warp or one block per row, which is read for its top, for its sums and for the
// gradient; after the first time it comes from the cache.
#include <capo/cuda/block_sum.cuh>
#include <capo/cuda/pack.cuh>
#include <capo/ops/cross_entropy.h>

#include <math.h>

namespace {

using capo::CrossEntropyArgs;
namespace gpu = capo::gpu;
using gpu::kWarp;

constexpr int kThreads = 256;
constexpr std::int64_t kWarpColumns = 1024;  // longer rows get a block

// NaN is not looked for: it comes up in the sums.
template <int kTeam>
__device__ inline float team_max(float v) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) {
    const float other = __shfl_xor_sync(gpu::kFullMask, v, bits);
    v = other > v ? other : v;
  }
  if constexpr (kTeam > kWarp) {
    CAPO_SHARED(float, part, kTeam / kWarp);
    if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = v;
    __syncthreads();
    for (int i = 0; i < kTeam / kWarp; ++i) v = part[i] > v ? part[i] : v;
    __syncthreads();
  }
  return v;
}

template <class T, int N, int kTeam>
__global__ void __launch_bounds__(kThreads) cross_entropy(CrossEntropyArgs a, float smooth) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  if (row >= a.rows) return;  // the whole team
  const std::int64_t n = a.columns, first = N * static_cast<std::int64_t>(threadIdx.x % kTeam), step = N * kTeam;
  const T* const x = static_cast<const T*>(a.logits) + row * n;
  const T* const target = a.target ? static_cast<const T*>(a.target) + row * n : nullptr;
  T* const d = a.dlogits ? static_cast<T*>(a.dlogits) + row * n : nullptr;
  const std::int64_t label = a.labels ? a.labels[row] : 0;
  const bool counted = !a.labels || label != a.ignore_index, valid = label >= 0 && label < n;
  if (a.counted && first == 0) static_cast<float*>(a.counted)[row] = counted ? 1.0f : 0.0f;
  if (!counted || !valid) {  // a label that the CPU would refuse gives NaN
    const float all = counted ? __uint_as_float(0x7fc00000u) : 0.0f;
    if (first == 0) static_cast<float*>(a.loss)[row] = all;
    if (d)
      for (std::int64_t c = threadIdx.x % kTeam; c < n; c += kTeam) d[c] = gpu::Store<T>::from(all);
    return;
  }
  const float keep = 1.0f - smooth, even = smooth / static_cast<float>(n);
  float v[N], t[N];
  float top = -INFINITY;
  for (std::int64_t c = first; c < n; c += step) {
    gpu::load_many<N>(x + c, v);
    for (int j = 0; j < N; ++j) top = v[j] > top ? v[j] : top;
  }
  top = team_max<kTeam>(top);
  // A label that leads: its own term, exactly 1, stays out of the sum. In 1 + others a small loss, and the gradient
  // that goes with it, would round away.
  const float at_label = a.labels ? gpu::load(x[label]) : 0.0f;
  const bool leads = a.labels && at_label == top;
  const std::int64_t skip = leads ? label : -1;
  float others = 0, below = 0, mass = 0;  // below: sum of top - x, for soft targets with weights q; mass: the sum of q
  for (std::int64_t c = first; c < n; c += step) {
    gpu::load_many<N>(x + c, v);
    if (target) gpu::load_many<N>(target + c, t);
    for (int j = 0; j < N; ++j) {
      others += c + j == skip ? 0.0f : expf(v[j] - top);
      const float q = target ? t[j] * keep + even : 1.0f;
      below += q * (top - v[j]);
      mass += q;
    }
  }
  others = gpu::team_sum<kTeam>(others);
  below = gpu::team_sum<kTeam>(below);
  mass = target ? gpu::team_sum<kTeam>(mass) : 1.0f;
  const float total = leads ? 1.0f + others : others, rest = leads ? log1pf(others) : logf(total), scale = 1.0f / total;
  if (first == 0) {
    float loss = target ? rest * mass + below : keep * (rest + (top - at_label));
    if (!target && smooth > 0) loss += even * (static_cast<float>(n) * rest + below);
    static_cast<float*>(a.loss)[row] = loss;
  }
  if (!d) return;
  const float of_label = leads ? (at_label - top) - others * scale + (smooth - even) : 0.0f;
  for (std::int64_t c = first; c < n; c += step) {
    gpu::load_many<N>(x + c, v);
    if (target) gpu::load_many<N>(target + c, t);
    for (int j = 0; j < N; ++j) {
      const float p = expf(v[j] - top) * scale;
      if (target)
        v[j] = p * mass - (t[j] * keep + even);
      else if (c + j != label)
        v[j] = p - even;
      else
        v[j] = leads ? of_label : p - even - keep;
    }
    gpu::store_many<N>(d + c, v);
  }
}

template <class T>
void run(const CrossEntropyArgs& a, void* stream) {
  constexpr int kMany = gpu::kPack<T>, kWarps = kThreads / kWarp;
  const bool packed = gpu::packs(a.columns, kMany, a.logits, a.target, a.dlogits), by_warp = a.columns <= kWarpColumns;
  const auto kernel = by_warp ? (packed ? cross_entropy<T, kMany, kWarp> : cross_entropy<T, 1, kWarp>)
                              : (packed ? cross_entropy<T, kMany, kThreads> : cross_entropy<T, 1, kThreads>);
  gpu::launch("cross_entropy", kernel, by_warp ? (a.rows + kWarps - 1) / kWarps : a.rows, kThreads, 0, stream, a,
              static_cast<float>(a.smoothing));
}

}  // namespace

namespace capo::kernels {

void cross_entropy_cuda(const CrossEntropyArgs& a, std::int64_t, void* stream) {
  gpu::for_floating("cross_entropy", a.dtype, [&](auto t) { run<decltype(t)>(a, stream); });
}

}  // namespace capo::kernels
