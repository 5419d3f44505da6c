// The elementwise functions of one variable and their derivatives, read by the C++ and the CUDA compiler alike.
// `m::` is the includer's mathematics (ops/cpu/math.h or cuda/math.cuh). p and q are the op's parameters.
// derivative(dy, x, y): only what it reads must be saved; see reads_output() in ops/unary.h.
#pragma once

#if defined(__CUDACC__)
#define CAPO_HD __host__ __device__
#else
#define CAPO_HD
#endif

namespace {

#define CAPO_UNARY(Name, value, derivative)                                                      \
  struct Name {                                                                                  \
    template <class T>                                                                           \
    CAPO_HD static inline T f(T x, [[maybe_unused]] T p, [[maybe_unused]] T q) {                 \
      return value;                                                                              \
    }                                                                                            \
    template <class T>                                                                           \
    CAPO_HD static inline T df([[maybe_unused]] T x, [[maybe_unused]] T y, [[maybe_unused]] T p, \
                               [[maybe_unused]] T q) {                                           \
      return derivative;                                                                         \
    }                                                                                            \
  };

template <class T>
CAPO_HD inline T sigmoid_of(T x) {
  return T(1) / (T(1) + m::exp(-x));
}
template <class T>
CAPO_HD inline T softplus_of(T x) {
  return (x > T(0) ? x : T(0)) + m::log1p(m::exp(x > T(0) ? -x : x));
}
// exp(-2 u), u = sqrt(2 / pi) (x + 0.044715 x^3); (1 + tanh u) / 2 = 1 / (1 + this).
template <class T>
CAPO_HD inline T tanh_gelu_odds(T x) {
  return m::exp(T(-2 * 0.79788456080286535588) * (x + T(0.044715) * x * x * x));
}
template <class T>
CAPO_HD inline T tanh_gelu_slope(T x) {
  const T c = x > T(20) ? T(20) : (x < T(-20) ? T(-20) : x);  // there the slope is 1 or 0, and x^3 s (1 - s) in range
  const T s = T(1) / (T(1) + tanh_gelu_odds(c));
  return s + c * s * (T(1) - s) * T(2 * 0.79788456080286535588) * (T(1) + T(3 * 0.044715) * c * c);
}
template <class T>
CAPO_HD inline T scaled_sigmoid_slope(T x, T a) {  // of x * sigmoid(a x)
  const T s = sigmoid_of(a * x);
  return s + a * x * s * (T(1) - s);
}

CAPO_UNARY(Abs, (x < T(0) ? -x : x) + T(0), x > T(0) ? T(1) : (x < T(0) ? T(-1) : T(0)))
CAPO_UNARY(Neg, -x, T(-1))
CAPO_UNARY(Sign, x > T(0) ? T(1) : (x < T(0) ? T(-1) : x), T(0))
CAPO_UNARY(Floor, m::floor(x), T(0))
CAPO_UNARY(Exp, m::exp(x), y)
CAPO_UNARY(Log, m::log(x), T(1) / x)
CAPO_UNARY(Sqrt, m::sqrt(x), T(0.5) / y)
CAPO_UNARY(Rsqrt, T(1) / m::sqrt(x), T(-0.5) * y * y * y)
CAPO_UNARY(Reciprocal, T(1) / x, -y * y)
CAPO_UNARY(Square, x * x, T(2) * x)
CAPO_UNARY(Sin, m::sin(x), m::cos(x))
CAPO_UNARY(Cos, m::cos(x), -m::sin(x))
CAPO_UNARY(Tanh, m::tanh(x), T(1) - y * y)
CAPO_UNARY(Sigmoid, sigmoid_of(x), y * (T(1) - y))
CAPO_UNARY(Relu, x <= T(0) ? T(0) : x, y <= T(0) ? T(0) : T(1))  // NaN passes both ways
CAPO_UNARY(LeakyRelu, x > T(0) ? x : p * x, x > T(0) ? T(1) : p)
CAPO_UNARY(Gelu, m::gelu(x), m::gelu_slope(x))
CAPO_UNARY(GeluTanh, x / (T(1) + tanh_gelu_odds(x)), tanh_gelu_slope(x))
CAPO_UNARY(QuickGelu, x / (T(1) + m::exp(T(-1.702) * x)), scaled_sigmoid_slope(x, T(1.702)))
CAPO_UNARY(Silu, x / (T(1) + m::exp(-x)), scaled_sigmoid_slope(x, T(1)))
CAPO_UNARY(Softplus, softplus_of(x), sigmoid_of(x))
CAPO_UNARY(Erf, m::erf(x), T(1.12837916709551257390) * m::exp(-x * x))
CAPO_UNARY(Clamp, x < p ? p : (x > q ? q : x), x >= p && x <= q ? T(1) : T(0))
CAPO_UNARY(Pow, m::pow(x, p), p == T(0) ? T(0) : p * m::pow(x, p - T(1)))
CAPO_UNARY(Affine, p * x + q, p)

#undef CAPO_UNARY

}  // namespace
