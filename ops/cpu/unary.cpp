#include <capo/ops/cpu/gelu.h>
#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/unary.h>
#include <capo/ops/unary_functors.h>

namespace {

template <class F, class T>
void forward(const T* x, T* y, std::int64_t n, T p, T q) {
  if constexpr (__is_same(F, Gelu) && __is_same(T, float)) return m::gelu_row(x, y, n);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = F::f(x[i], p, q);
}

template <class F, class T>
void backward(const T* s, const T* dy, T* dx, std::int64_t n, T p, T q) {
  if constexpr (__is_same(F, Gelu) && __is_same(T, float)) return m::gelu_gradient_row(s, dy, dx, n);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) dx[i] = dy[i] * F::df(s[i], s[i], p, q);
}

template <class F, class T>
void pieces(const capo::UnaryArgs& a, std::int64_t begin, std::int64_t end) {
  const T p = static_cast<T>(a.p), q = static_cast<T>(a.q);
  const bool streamed = streams(a.dtype, a.elements);
  const std::int64_t step = piece(a.dtype, streamed, end - begin);
  alignas(64) T read[kPiece], slope[kPiece], result[kPiece];
  for (std::int64_t at = begin; at < end; at += step) {
    const std::int64_t n = lesser(step, end - at);
    const T* x = read_row(a.x, a.dtype, at, n, read);
    T* y = open_row(a.y, a.dtype, at, result, streamed);
    if (a.dy)
      backward<F>(x, read_row(a.dy, a.dtype, at, n, slope), y, n, p, q);
    else
      forward<F>(x, y, n, p, q);
    close_row(a.y, a.dtype, at, n, y, streamed);
  }
  end_stream(streamed);
}

template <class F>
void run(const capo::UnaryArgs& a, std::int64_t begin, std::int64_t end) {
  a.dtype == capo::DType::f64 ? pieces<F, double>(a, begin, end) : pieces<F, float>(a, begin, end);
}

}  // namespace

CAPO_CPU_KERNEL(unary, capo::UnaryArgs) {
  using K = capo::UnaryKind;
  switch (args.kind) {
    case K::abs: return run<Abs>(args, begin, end);
    case K::neg: return run<Neg>(args, begin, end);
    case K::sign: return run<Sign>(args, begin, end);
    case K::floor: return run<Floor>(args, begin, end);
    case K::exp: return run<Exp>(args, begin, end);
    case K::log: return run<Log>(args, begin, end);
    case K::sqrt: return run<Sqrt>(args, begin, end);
    case K::rsqrt: return run<Rsqrt>(args, begin, end);
    case K::reciprocal: return run<Reciprocal>(args, begin, end);
    case K::square: return run<Square>(args, begin, end);
    case K::sin: return run<Sin>(args, begin, end);
    case K::cos: return run<Cos>(args, begin, end);
    case K::tanh: return run<Tanh>(args, begin, end);
    case K::sigmoid: return run<Sigmoid>(args, begin, end);
    case K::relu: return run<Relu>(args, begin, end);
    case K::leaky_relu: return run<LeakyRelu>(args, begin, end);
    case K::gelu: return run<Gelu>(args, begin, end);
    case K::gelu_tanh: return run<GeluTanh>(args, begin, end);
    case K::quick_gelu: return run<QuickGelu>(args, begin, end);
    case K::silu: return run<Silu>(args, begin, end);
    case K::softplus: return run<Softplus>(args, begin, end);
    case K::erf: return run<Erf>(args, begin, end);
    case K::clamp: return run<Clamp>(args, begin, end);
    case K::pow: return run<Pow>(args, begin, end);
    case K::affine: return run<Affine>(args, begin, end);
  }
}
