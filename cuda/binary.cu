// y = f(a, b) over broadcast operands, and the in-place a += scale b.
#include <capo/cuda/element.cuh>
#include <capo/ops/binary.h>
#include <capo/ops/integer_functors.h>

namespace {

using capo::AxpyArgs;
using capo::BFloat16;
using capo::BinaryArgs;
using capo::DType;
using capo::Half;
using capo::WhereArgs;
namespace gpu = capo::gpu;

constexpr int kThreads = 256;

struct Add { template <class T> __device__ static T f(T a, T b) { return wrap_add(a, b); } };
struct Sub { template <class T> __device__ static T f(T a, T b) { return wrap_sub(a, b); } };
struct Mul { template <class T> __device__ static T f(T a, T b) { return wrap_mul(a, b); } };
struct Div { template <class T> __device__ static T f(T a, T b) { return static_cast<T>(a / b); } };
// NaN in either wins, as in PyTorch.
struct Maximum {
  template <class T> __device__ static T f(T a, T b) { return a != a ? a : (b != b ? b : (a < b ? b : a)); }
};
struct Minimum {
  template <class T> __device__ static T f(T a, T b) { return a != a ? a : (b != b ? b : (b < a ? b : a)); }
};
struct Eq { template <class T> __device__ static bool f(T a, T b) { return a == b; } };
struct Ne { template <class T> __device__ static bool f(T a, T b) { return a != b; } };
struct Lt { template <class T> __device__ static bool f(T a, T b) { return a < b; } };
struct Le { template <class T> __device__ static bool f(T a, T b) { return a <= b; } };
struct Gt { template <class T> __device__ static bool f(T a, T b) { return a > b; } };
struct Ge { template <class T> __device__ static bool f(T a, T b) { return a >= b; } };
struct And { template <class T> __device__ static bool f(T a, T b) { return a && b; } };
struct Or { template <class T> __device__ static bool f(T a, T b) { return a || b; } };

// Comparisons write bool, the others what they read.
template <class R, class T>
struct ResultOf {
  using type = T;
};
template <class T>
struct ResultOf<bool, T> {
  using type = bool;
};
template <class F, class T>
using Result = typename ResultOf<decltype(F::f(gpu::Compute<T>(), gpu::Compute<T>())), T>::type;

template <class F, class T>
__device__ inline Result<F, T> value(T a, T b) {
  return gpu::Store<Result<F, T>>::from(F::f(gpu::load(a), gpu::load(b)));
}

// kCount neighbours of the last axis, or one element for all of them where the operand's stride is 0.
template <int kCount, class T>
__device__ inline gpu::Pack<T, kCount> operand(const T* x, std::int64_t stride) {
  if constexpr (kCount > 1) {
    if (stride == 0) {
      gpu::Pack<T, kCount> all;
      for (int j = 0; j < kCount; ++j) all.v[j] = *x;
      return all;
    }
  }
  return *reinterpret_cast<const gpu::Pack<T, kCount>*>(x);
}

// Thread and step: kCount neighbours of the last axis. One division per axis but the first, for all of them together.
// With rank 1 the last n % kCount elements come one by one; more axes have a last one that kCount divides.
template <class F, class T, int kCount>
__global__ void __launch_bounds__(kThreads) binary_nest(BinaryArgs p, std::int64_t n) {
  using Out = gpu::Pack<Result<F, T>, kCount>;
  const T* const a = static_cast<const T*>(p.a);
  const T* const b = static_cast<const T*>(p.b);
  auto* const y = static_cast<Result<F, T>*>(p.y);
  const std::int64_t ia = p.sa[p.rank - 1], ib = p.sb[p.rank - 1];
  const std::int64_t packs = n / kCount, step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t i = first; i < packs; i += step) {
    std::int64_t index = i * kCount, oa = 0, ob = 0;
    for (int d = p.rank - 1; d > 0; --d) {
      const std::int64_t rest = index / p.shape[d], k = index - rest * p.shape[d];
      oa += k * p.sa[d], ob += k * p.sb[d];
      index = rest;
    }
    oa += index * p.sa[0], ob += index * p.sb[0];
    const auto u = operand<kCount>(a + oa, ia);
    const auto v = operand<kCount>(b + ob, ib);
    Out out;
    for (int j = 0; j < kCount; ++j) out.v[j] = value<F, T>(u.v[j], v.v[j]);
    reinterpret_cast<Out*>(y)[i] = out;
  }
  if constexpr (kCount > 1) {
    const std::int64_t i = packs * kCount + first;
    if (i < n) y[i] = value<F, T>(a[i * ia], b[i * ib]);
  }
}

// Whether an operand can be read in packs of `count`: stride 1 and aligned wherever a row starts, or one value a row.
bool readable(const void* x, const std::int64_t* strides, int rank, std::int64_t count) {
  if (strides[rank - 1] == 0) return true;
  if (strides[rank - 1] != 1 || !gpu::aligned(x)) return false;
  for (int d = 0; d + 1 < rank; ++d)
    if (strides[d] % count != 0) return false;
  return true;
}

template <class F, class T>
void run(const BinaryArgs& p, std::int64_t n, void* stream) {
  constexpr int kCount = gpu::kPack<T>;
  const bool packed = (p.rank == 1 || p.shape[p.rank - 1] % kCount == 0) && gpu::aligned(p.y) &&
                      readable(p.a, p.sa, p.rank, kCount) && readable(p.b, p.sb, p.rank, kCount);
  const std::int64_t blocks = gpu::blocks_for(packed ? n / kCount + 1 : n, kThreads);
  if (packed)
    gpu::launch(name_of(p.kind), binary_nest<F, T, kCount>, blocks, kThreads, 0, stream, p, n);
  else
    gpu::launch(name_of(p.kind), binary_nest<F, T, 1>, blocks, kThreads, 0, stream, p, n);
}

template <class F>
void floating(const BinaryArgs& p, std::int64_t n, void* stream) {
  gpu::for_floating(name_of(p.kind), p.dtype, [&](auto t) { run<F, decltype(t)>(p, n, stream); });
}

template <class F>
void number(const BinaryArgs& p, std::int64_t n, void* stream) {
  if (p.dtype == DType::i32) return run<F, std::int32_t>(p, n, stream);
  if (p.dtype == DType::i64) return run<F, std::int64_t>(p, n, stream);
  floating<F>(p, n, stream);
}

// One element a thread and step, moved as a word of its size.
template <class W>
__global__ void __launch_bounds__(kThreads) where_nest(WhereArgs p, std::int64_t n) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    std::int64_t index = i, oc = 0, oa = 0, ob = 0;
    for (int d = p.rank - 1; d > 0; --d) {
      const std::int64_t rest = index / p.shape[d], k = index - rest * p.shape[d];
      oc += k * p.sc[d], oa += k * p.sa[d], ob += k * p.sb[d];
      index = rest;
    }
    oc += index * p.sc[0], oa += index * p.sa[0], ob += index * p.sb[0];
    static_cast<W*>(p.y)[i] = p.condition[oc] ? static_cast<const W*>(p.a)[oa] : static_cast<const W*>(p.b)[ob];
  }
}

template <class W>
void run_where(const WhereArgs& p, std::int64_t n, void* stream) {
  gpu::launch("where", where_nest<W>, gpu::blocks_for(n, kThreads), kThreads, 0, stream, p, n);
}

// a += scale b, or a *= scale where b is null.
__global__ void __launch_bounds__(kThreads) axpy_packed(float* a, const float* b, float scale, std::int64_t packs,
                                                        std::int64_t n) {
  using Pack = gpu::Pack<float, 4>;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t i = first; i < packs; i += step) {
    Pack u = reinterpret_cast<const Pack*>(a)[i];
    if (b) {
      const Pack v = reinterpret_cast<const Pack*>(b)[i];
      for (int j = 0; j < 4; ++j) u.v[j] += scale * v.v[j];
    } else {
      for (int j = 0; j < 4; ++j) u.v[j] *= scale;
    }
    reinterpret_cast<Pack*>(a)[i] = u;
  }
  for (std::int64_t i = packs * 4 + first; i < n; i += step) a[i] = b ? a[i] + scale * b[i] : a[i] * scale;
}

}  // namespace

namespace capo::kernels {

void binary_cuda(const BinaryArgs& p, std::int64_t n, void* stream) {
  using K = BinaryKind;
  switch (p.kind) {
    case K::add: return number<Add>(p, n, stream);
    case K::sub: return number<Sub>(p, n, stream);
    case K::mul: return number<Mul>(p, n, stream);
    case K::div: return floating<Div>(p, n, stream);
    case K::maximum: return number<Maximum>(p, n, stream);
    case K::minimum: return number<Minimum>(p, n, stream);
    case K::eq: return number<Eq>(p, n, stream);
    case K::ne: return number<Ne>(p, n, stream);
    case K::lt: return number<Lt>(p, n, stream);
    case K::le: return number<Le>(p, n, stream);
    case K::gt: return number<Gt>(p, n, stream);
    case K::ge: return number<Ge>(p, n, stream);
    case K::logical_and: return run<And, bool>(p, n, stream);
    case K::logical_or: return run<Or, bool>(p, n, stream);
  }
}

void where_cuda(const WhereArgs& p, std::int64_t n, void* stream) {
  switch (p.element_bytes) {
    case 8: return run_where<std::uint64_t>(p, n, stream);
    case 4: return run_where<std::uint32_t>(p, n, stream);
    case 2: return run_where<std::uint16_t>(p, n, stream);
    default: return run_where<std::uint8_t>(p, n, stream);
  }
}

void axpy_cuda(const AxpyArgs& p, std::int64_t n, void* stream) {
  CAPO_CHECK(p.dtype == DType::f32, p.b ? "add_" : "mul_", ": the CUDA kernel is f32 only, got ", p.dtype);
  auto* a = static_cast<float*>(p.a);
  const auto* b = static_cast<const float*>(p.b);
  const std::int64_t packs = gpu::aligned(a) && gpu::aligned(b) ? n / 4 : 0;
  gpu::launch("axpy", axpy_packed, gpu::blocks_for(packs ? packs : n, kThreads), kThreads, 0, stream, a, b,
              static_cast<float>(p.scale), packs, n);
}

}  // namespace capo::kernels
