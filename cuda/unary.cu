#include <capo/cuda/gpu.h>
#include <capo/cuda/math.cuh>
#include <capo/ops/unary.h>
#include <capo/ops/unary_functors.h>

namespace {

constexpr int kThreads = 256;

template <class F>
__global__ void __launch_bounds__(kThreads) unary_forward(const float* x, float* y, std::int64_t n, float p, float q) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step)
    y[i] = F::f(x[i], p, q);
}

// saved is x, or y for the functions whose derivative reads the output: df looks at the one that it needs.
template <class F>
__global__ void __launch_bounds__(kThreads) unary_backward(const float* saved, const float* dy, float* dx,
                                                           std::int64_t n, float p, float q) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step)
    dx[i] = dy[i] * F::df(saved[i], saved[i], p, q);
}

template <class F>
void run(const capo::UnaryArgs& a, std::int64_t n, void* stream) {
  const auto* x = static_cast<const float*>(a.x);
  const auto* dy = static_cast<const float*>(a.dy);
  auto* y = static_cast<float*>(a.y);
  const float p = static_cast<float>(a.p), q = static_cast<float>(a.q);
  const std::int64_t blocks = capo::gpu::blocks_for(n, kThreads);
  if (dy)
    capo::gpu::launch("unary_backward", unary_backward<F>, blocks, kThreads, 0, stream, x, dy, y, n, p, q);
  else
    capo::gpu::launch("unary_forward", unary_forward<F>, blocks, kThreads, 0, stream, x, y, n, p, q);
}

}  // namespace

namespace capo::kernels {

void unary_cuda(const UnaryArgs& args, std::int64_t items, void* stream) {
  CAPO_CHECK(args.dtype == DType::f32, name_of(args.kind), ": the CUDA kernel is f32 only, got ", args.dtype);
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
