// Reductions over any axes. ops/reduce.cpp plans: rows or columns, in parts or at once.
#include <capo/cuda/element.cuh>
#include <capo/ops/integer_functors.h>
#include <capo/ops/reduce.h>

namespace {

namespace gpu = capo::gpu;
using capo::DType;
using capo::ReduceArgs;
using capo::ReduceKind;
using gpu::kFullMask;
using gpu::kWarp;

constexpr int kThreads = 256;

struct SumOf {
  template <class T> __device__ static T start() { return T(0); }
  template <class T> __device__ static T join(T a, T b) { return wrap_add(a, b); }
};
// NaN in the set wins.
struct MaxOf {
  template <class T> __device__ static T start() { return lowest(T(0)); }
  template <class T> __device__ static T join(T a, T b) { return a != a ? a : (b != b ? b : (a < b ? b : a)); }
  __device__ static float lowest(float) { return -INFINITY; }
  __device__ static std::int32_t lowest(std::int32_t) { return INT32_MIN; }
  __device__ static std::int64_t lowest(std::int64_t) { return INT64_MIN; }
};
struct MinOf {
  template <class T> __device__ static T start() { return highest(T(0)); }
  template <class T> __device__ static T join(T a, T b) { return a != a ? a : (b != b ? b : (b < a ? b : a)); }
  __device__ static float highest(float) { return INFINITY; }
  __device__ static std::int32_t highest(std::int32_t) { return INT32_MAX; }
  __device__ static std::int64_t highest(std::int64_t) { return INT64_MAX; }
};

// Where element k (row-major over shape) lies. One axis, the common case, needs no division.
__device__ inline std::int64_t offset_of(int rank, const std::int64_t* shape, const std::int64_t* strides,
                                         std::int64_t k) {
  std::int64_t at = 0;
  for (int d = rank - 1; d > 0; --d) {
    const std::int64_t rest = k / shape[d];
    at += (k - rest * shape[d]) * strides[d];
    k = rest;
  }
  return at + k * strides[0];
}

// The result of one output's part: to the work space, or scaled to y when it is all there is.
template <class D, class A>
__device__ inline void finish(const ReduceArgs& p, std::int64_t output, std::int64_t part, A v) {
  if (p.parts > 1) {
    static_cast<A*>(p.work)[output * p.parts + part] = v;
    return;
  }
  if constexpr (A(0.5) != A(0)) v *= static_cast<A>(p.scale);  // floating
  static_cast<D*>(p.y)[output] = gpu::Store<D>::from(v);
}

// kTeam threads (a warp or the block) per output and part; kCount accumulators each, joined in a fixed tree.
template <class R, class S, class D, int kCount, int kTeam>
__global__ void __launch_bounds__(kThreads) reduce_rows(ReduceArgs p, std::int64_t outputs) {
  using A = gpu::Compute<S>;
  constexpr int kTeams = kThreads / kTeam;
  const std::int64_t team = static_cast<std::int64_t>(blockIdx.x) * kTeams + threadIdx.x / kTeam;
  const std::int64_t output = kTeam == kWarp ? team : team / p.parts;  // a warp's row has one part
  const std::int64_t part = kTeam == kWarp ? 0 : team - output * p.parts;
  const bool inside = output < outputs;
  const S* x = static_cast<const S*>(p.x);
  if (inside) x += offset_of(p.kept, p.kept_shape, p.kept_strides, output);
  const std::int64_t begin = part * p.length, stop = kTeam == kWarp ? p.count : begin + p.length;
  const std::int64_t end = !inside ? begin : stop < p.count ? stop : p.count;
  A v[kCount];
  for (int j = 0; j < kCount; ++j) v[j] = R::template start<A>();
#pragma unroll 4
  for (std::int64_t r = begin + threadIdx.x % kTeam * kCount; r < end; r += kTeam * kCount) {
    const std::int64_t at = offset_of(p.reduced, p.reduced_shape, p.reduced_strides, r);
    const auto pack = *reinterpret_cast<const gpu::Pack<S, kCount>*>(x + at);
    for (int j = 0; j < kCount; ++j) v[j] = R::join(v[j], gpu::load(pack.v[j]));
  }
  A all = v[0];
  for (int j = 1; j < kCount; ++j) all = R::join(all, v[j]);
  for (int bits = kWarp / 2; bits > 0; bits /= 2) all = R::join(all, __shfl_xor_sync(kFullMask, all, bits));
  if constexpr (kTeam != kWarp) {
    CAPO_SHARED(A, warps, kTeam / kWarp);
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = all;
    __syncthreads();
    all = warps[0];
    for (int i = 1; i < kTeam / kWarp; ++i) all = R::join(all, warps[i]);
  }
  if (inside && threadIdx.x % kTeam == 0) finish<D>(p, output, part, all);
}

// p.across threads side by side take kCount neighbouring outputs each, the block's groups of them every n-th element of
// the part; the groups are joined in a fixed tree.
template <class R, class T, int kCount>
__global__ void __launch_bounds__(kThreads) reduce_columns(ReduceArgs p, std::int64_t outputs) {
  using A = gpu::Compute<T>;
  CAPO_SHARED(A, shared, kThreads * kCount);  // [kCount, group, across]
  const std::int64_t tile = blockIdx.x / p.parts, part = blockIdx.x - tile * p.parts;
  const int across = p.across, groups = kThreads / across, group = threadIdx.x / across;
  const std::int64_t output = (tile * across + threadIdx.x % across) * kCount;
  const bool inside = output < outputs;
  const T* x = static_cast<const T*>(p.x);
  if (inside) x += offset_of(p.kept, p.kept_shape, p.kept_strides, output);
  const std::int64_t begin = part * p.length, stop = begin + p.length;
  const std::int64_t end = !inside ? begin : stop < p.count ? stop : p.count;
  A v[kCount];
  for (int j = 0; j < kCount; ++j) v[j] = R::template start<A>();
#pragma unroll 4
  for (std::int64_t r = begin + group; r < end; r += groups) {
    const std::int64_t at = offset_of(p.reduced, p.reduced_shape, p.reduced_strides, r);
    const auto pack = *reinterpret_cast<const gpu::Pack<T, kCount>*>(x + at);
    for (int j = 0; j < kCount; ++j) v[j] = R::join(v[j], gpu::load(pack.v[j]));
  }
  for (int j = 0; j < kCount; ++j) shared[j * kThreads + threadIdx.x] = v[j];
  for (int half = groups / 2; half > 0; half /= 2) {
    __syncthreads();
    if (group < half)
      for (int j = 0; j < kCount; ++j) {
        A& to = shared[j * kThreads + threadIdx.x];
        to = R::join(to, shared[j * kThreads + threadIdx.x + half * across]);
      }
  }
  if (group == 0 && inside)  // written by this thread itself
    for (int j = 0; j < kCount; ++j) finish<T>(p, output + j, part, shared[j * kThreads + threadIdx.x]);
}

template <class R, class S, class D, int kCount>
void run_rows(const char* name, const ReduceArgs& p, std::int64_t outputs, void* stream) {
  constexpr std::int64_t kShortRow = 1024, kWarps = kThreads / kWarp;  // as in ops/reduce.cpp
  if (p.count <= kShortRow && p.parts == 1)
    gpu::launch(name, reduce_rows<R, S, D, kCount, kWarp>, (outputs + kWarps - 1) / kWarps, kThreads, 0, stream, p,
                outputs);
  else
    gpu::launch(name, reduce_rows<R, S, D, kCount, kThreads>, outputs * p.parts, kThreads, 0, stream, p, outputs);
}

template <class R, class T, int kCount>
void run_columns(const char* name, const ReduceArgs& p, std::int64_t outputs, void* stream) {
  const std::int64_t width = (outputs + kCount - 1) / kCount, tiles = (width + p.across - 1) / p.across;
  gpu::launch(name, reduce_columns<R, T, kCount>, tiles * p.parts, kThreads, 0, stream, p, outputs);
}

// The second stage: rows of `parts` values each.
ReduceArgs over_parts(const ReduceArgs& p, std::int64_t outputs) {
  ReduceArgs q{};
  q.kind = p.kind;
  q.x = p.work;
  q.y = p.y;
  q.kept = q.reduced = 1;
  q.kept_shape[0] = outputs;
  q.kept_strides[0] = p.parts;
  q.reduced_shape[0] = q.count = q.length = p.parts;
  q.reduced_strides[0] = q.parts = 1;
  q.scale = p.scale;
  return q;
}

template <class R, class T>
void run(const char* name, const ReduceArgs& p, std::int64_t outputs, void* stream) {
  constexpr int kCount = gpu::kPack<T>;
  if (p.columns)
    p.packed ? run_columns<R, T, kCount>(name, p, outputs, stream) : run_columns<R, T, 1>(name, p, outputs, stream);
  else
    p.packed ? run_rows<R, T, T, kCount>(name, p, outputs, stream) : run_rows<R, T, T, 1>(name, p, outputs, stream);
  if (p.parts > 1) run_rows<R, gpu::Compute<T>, T, 1>(name, over_parts(p, outputs), outputs, stream);
}

template <class R>
void by_dtype(const char* name, const ReduceArgs& p, std::int64_t outputs, void* stream) {
  if (p.dtype == DType::i32) return run<R, std::int32_t>(name, p, outputs, stream);
  if (p.dtype == DType::i64) return run<R, std::int64_t>(name, p, outputs, stream);
  gpu::for_floating(name, p.dtype, [&](auto t) { run<R, decltype(t)>(name, p, outputs, stream); });
}

}  // namespace

namespace capo::kernels {

void reduce_cuda(const ReduceArgs& p, std::int64_t outputs, void* stream) {
  switch (p.kind) {
    case ReduceKind::sum: return by_dtype<SumOf>("sum", p, outputs, stream);
    case ReduceKind::max: return by_dtype<MaxOf>("max", p, outputs, stream);
    case ReduceKind::min: return by_dtype<MinOf>("min", p, outputs, stream);
  }
}

}  // namespace capo::kernels
