// y = f(x) and dx = dy f'(saved), 16 bytes of each tensor per thread and step.
#include <capo/cuda/element.cuh>
#include <capo/cuda/math.cuh>
#include <capo/ops/unary.h>
#include <capo/ops/unary_functors.h>

namespace {

namespace gpu = capo::gpu;

constexpr int kThreads = 256;

// The first `packs` packs of kPack<T> elements, then what is left one by one (everything where packs is 0).
template <class F, class T>
__global__ void __launch_bounds__(kThreads) unary_forward(const T* x, T* y, std::int64_t packs, std::int64_t n, float p,
                                                          float q) {
  using Pack = gpu::Pack<T, gpu::kPack<T>>;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t i = first; i < packs; i += step) {
    const Pack in = reinterpret_cast<const Pack*>(x)[i];
    Pack out;
    for (int j = 0; j < gpu::kPack<T>; ++j) out.v[j] = gpu::Store<T>::from(F::f(gpu::load(in.v[j]), p, q));
    reinterpret_cast<Pack*>(y)[i] = out;
  }
  for (std::int64_t i = packs * gpu::kPack<T> + first; i < n; i += step)
    y[i] = gpu::Store<T>::from(F::f(gpu::load(x[i]), p, q));
}

// saved is x, or y for the functions whose derivative reads the output: df looks at the one that it needs.
template <class F, class T>
__device__ inline T slope_times(T saved, T dy, float p, float q) {
  const float s = gpu::load(saved);
  return gpu::Store<T>::from(gpu::load(dy) * F::df(s, s, p, q));
}

template <class F, class T>
__global__ void __launch_bounds__(kThreads) unary_backward(const T* saved, const T* dy, T* dx, std::int64_t packs,
                                                           std::int64_t n, float p, float q) {
  using Pack = gpu::Pack<T, gpu::kPack<T>>;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t i = first; i < packs; i += step) {
    const Pack s = reinterpret_cast<const Pack*>(saved)[i], g = reinterpret_cast<const Pack*>(dy)[i];
    Pack out;
    for (int j = 0; j < gpu::kPack<T>; ++j) out.v[j] = slope_times<F>(s.v[j], g.v[j], p, q);
    reinterpret_cast<Pack*>(dx)[i] = out;
  }
  for (std::int64_t i = packs * gpu::kPack<T> + first; i < n; i += step) dx[i] = slope_times<F>(saved[i], dy[i], p, q);
}

template <class F, class T>
void run_as(const capo::UnaryArgs& a, std::int64_t n, void* stream) {
  const auto* x = static_cast<const T*>(a.x);
  const auto* dy = static_cast<const T*>(a.dy);
  auto* y = static_cast<T*>(a.y);
  const float p = static_cast<float>(a.p), q = static_cast<float>(a.q);
  const std::int64_t packs = gpu::aligned(x) && gpu::aligned(dy) && gpu::aligned(y) ? n / gpu::kPack<T> : 0;
  const std::int64_t blocks = gpu::blocks_for(packs ? packs : n, kThreads);
  if (dy)
    gpu::launch("unary_backward", unary_backward<F, T>, blocks, kThreads, 0, stream, x, dy, y, packs, n, p, q);
  else
    gpu::launch("unary_forward", unary_forward<F, T>, blocks, kThreads, 0, stream, x, y, packs, n, p, q);
}

template <class F>
void run(const capo::UnaryArgs& a, std::int64_t n, void* stream) {
  gpu::for_floating(name_of(a.kind), a.dtype, [&](auto t) { run_as<F, decltype(t)>(a, n, stream); });
}

}  // namespace

namespace capo::kernels {

void unary_cuda(const UnaryArgs& args, std::int64_t items, void* stream) {
  using K = UnaryKind;
  switch (args.kind) {
    case K::abs: return run<Abs>(args, items, stream);
    case K::neg: return run<Neg>(args, items, stream);
    case K::sign: return run<Sign>(args, items, stream);
    case K::floor: return run<Floor>(args, items, stream);
    case K::exp: return run<Exp>(args, items, stream);
    case K::log: return run<Log>(args, items, stream);
    case K::sqrt: return run<Sqrt>(args, items, stream);
    case K::rsqrt: return run<Rsqrt>(args, items, stream);
    case K::reciprocal: return run<Reciprocal>(args, items, stream);
    case K::square: return run<Square>(args, items, stream);
    case K::sin: return run<Sin>(args, items, stream);
    case K::cos: return run<Cos>(args, items, stream);
    case K::tanh: return run<Tanh>(args, items, stream);
    case K::sigmoid: return run<Sigmoid>(args, items, stream);
    case K::relu: return run<Relu>(args, items, stream);
    case K::leaky_relu: return run<LeakyRelu>(args, items, stream);
    case K::gelu: return run<Gelu>(args, items, stream);
    case K::gelu_tanh: return run<GeluTanh>(args, items, stream);
    case K::quick_gelu: return run<QuickGelu>(args, items, stream);
    case K::silu: return run<Silu>(args, items, stream);
    case K::softplus: return run<Softplus>(args, items, stream);
    case K::erf: return run<Erf>(args, items, stream);
    case K::clamp: return run<Clamp>(args, items, stream);
    case K::pow: return run<Pow>(args, items, stream);
    case K::affine: return run<Affine>(args, items, stream);
  }
}

}  // namespace capo::kernels
