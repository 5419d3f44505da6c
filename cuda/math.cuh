// Elementary functions for functor headers (m::), as ops/cpu/math.h has them for the CPU. f32 and f64.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define CAPO_M_HD __host__ __device__
#else
#define CAPO_M_HD
#endif

namespace {
namespace m {

#define CAPO_M1(name)                                                     \
  CAPO_M_HD inline float name(float x) { return ::name##f(x); }           \
  CAPO_M_HD inline double name(double x) { return ::name(x); }
CAPO_M1(exp)
CAPO_M1(log)
CAPO_M1(log1p)
CAPO_M1(sqrt)
CAPO_M1(sin)
CAPO_M1(cos)
CAPO_M1(tanh)
CAPO_M1(erf)
CAPO_M1(floor)
#undef CAPO_M1

// x Phi(x) and its derivative Phi(x) + x phi(x), Phi the normal distribution's integral.
template <class T>
CAPO_M_HD inline T gelu(T x) {
  return x * (T(0.5) * (T(1) + erf(x * T(0.70710678118654752440))));
}
template <class T>
CAPO_M_HD inline T gelu_slope(T x) {
  return T(0.5) * (T(1) + erf(x * T(0.70710678118654752440))) + x * (T(0.39894228040143267794) * exp(T(-0.5) * x * x));
}

CAPO_M_HD inline float pow(float x, float y) { return ::powf(x, y); }
CAPO_M_HD inline double pow(double x, double y) { return ::pow(x, y); }

}  // namespace m
}  // namespace

#undef CAPO_M_HD
