// Elementary functions that GCC can vectorise: branch-free f32 versions, f64 from libm. The bounds in ulp are of
// results in f32's normal range, with FMA; math_test walks all floats against them on every instruction set. A NaN
// gives NaN. Include from ops/cpu files only (unnamed namespace on purpose, see kernel.h).
#pragma once

#include <cstdint>
#include <cstring>

namespace {
namespace m {

inline float from_bits(std::int32_t b) {
  float f;
  __builtin_memcpy(&f, &b, 4);
  return f;
}
inline std::int32_t to_bits(float f) {
  std::int32_t b;
  __builtin_memcpy(&b, &f, 4);
  return b;
}

// e^r for |r| <= ln(2) / 2: a least-maximum polynomial, 4e-9 before rounding.
inline float exp_near_zero(float r) {
  float p = 1.3814176199957728e-3f;
  p = p * r + 8.368921466171741e-3f;
  p = p * r + 4.166840761899948e-2f;
  p = p * r + 0.1666651964187622f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}
// 2^n for -126 <= n <= 127, and y 2^n for y in [1/2, 2), not NaN, and a normal result; from n + 1.5 * 2^23, whose low
// mantissa bits are n.
inline float power_of_two(float n_shifted) {
  return from_bits(static_cast<std::int32_t>((static_cast<std::uint32_t>(to_bits(n_shifted)) + 127u) << 23));
}
inline float scaled(float y, float n_shifted) {
  return from_bits(static_cast<std::int32_t>(static_cast<std::uint32_t>(to_bits(y)) +
                                             (static_cast<std::uint32_t>(to_bits(n_shifted)) << 23)));
}

// Cody-Waite reduction by ln 2 and a polynomial: 1 ulp. 0 below -87.33 (2^-126), inf above 88.72.
inline float exp(float x) {
  float c = x < -87.3365447f ? -87.3365447f : x;
  c = c > 88.7228394f ? 88.7228394f : c;
  const float t = c * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low mantissa bits
  const float n = t - 12582912.0f;
  float r = c - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float y = scaled(exp_near_zero(r), t);
  y = x < -87.3365447f ? 0.0f : y;
  y = x > 88.7228394f ? __builtin_inff() : y;
  return x != x ? x : y;
}
inline double exp(double x) { return __builtin_exp(x); }

// exp for x up to 88, where softmax's arguments lie: no upper bound to watch and one factor of 2^n. 0 below -87.33.
inline float exp_small(float x) {
  const float c = x < -87.3365447f ? -87.3365447f : x;
  const float t = c * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
  float r = c - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  const float y = exp_near_zero(r) * power_of_two(t);
  return x < -87.3365447f ? 0.0f : y;
}
inline double exp_small(double x) { return __builtin_exp(x); }

// Mantissa in [sqrt(1/2), sqrt(2)), degree-8 polynomial (coefficients: Cephes logf): 1 ulp.
inline float log(float x) {
  const std::uint32_t b = static_cast<std::uint32_t>(to_bits(x));  // unsigned: bits of negative numbers wrap
  const std::int32_t e0 = static_cast<std::int32_t>(b - 0x3f3504f3u) >> 23;
  const float mant = from_bits(static_cast<std::int32_t>(b - (static_cast<std::uint32_t>(e0) << 23)));
  const float e = static_cast<float>(e0);
  const float f = mant - 1.0f, z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  float y = f * z * p;
  y = y - e * 2.12194440e-4f - 0.5f * z;
  y = f + y + e * 0.693359375f;
  y = x == 0.0f ? -__builtin_inff() : y;
  y = x < 0.0f ? __builtin_nanf("") : y;
  y = x == __builtin_inff() ? x : y;
  return x != x ? x : y;
}
inline double log(double x) { return __builtin_log(x); }

// Rational approximation (coefficients: Eigen's fast tanh), 6 ulp; x itself when tiny.
inline float tanh(float x) {
  float c = x < -7.90531110763549805f ? -7.90531110763549805f : x;
  c = c > 7.90531110763549805f ? 7.90531110763549805f : c;
  const float z = c * c;
  float p = -2.76076847742355e-16f;
  p = p * z + 2.00018790482477e-13f;
  p = p * z - 8.60467152213735e-11f;
  p = p * z + 5.12229709037114e-08f;
  p = p * z + 1.48572235717979e-05f;
  p = p * z + 6.37261928875436e-04f;
  p = p * z + 4.89352455891786e-03f;
  float q = 1.19825839466702e-06f;
  q = q * z + 1.18534705686654e-04f;
  q = q * z + 2.26843463243900e-03f;
  q = q * z + 4.89352518554385e-03f;
  const float y = c * p / q;
  return z < 1.6e-7f ? x : y;
}
inline double tanh(double x) { return __builtin_tanh(x); }

// Rational approximation on [-4, 4] (coefficients: Eigen's fast erf), 6 ulp, never outside [-1, 1].
inline float erf(float x) {
  float c = x < -4.0f ? -4.0f : x;
  c = c > 4.0f ? 4.0f : c;
  const float z = c * c;
  float p = -2.72614225801306e-10f;
  p = p * z + 2.77068142495902e-08f;
  p = p * z - 2.10102402082508e-06f;
  p = p * z - 5.69250639462346e-05f;
  p = p * z - 7.34990630326855e-04f;
  p = p * z - 2.95459980854025e-03f;
  p = p * z - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * z - 2.13374055278905e-04f;
  q = q * z - 1.68282697438203e-03f;
  q = q * z - 7.37332916720468e-03f;
  q = q * z - 1.42647390514189e-02f;
  float y = z < 1e-8f ? 1.12837917f * x : c * p / q;  // c p would underflow before erf does
  y = y > 1.0f ? 1.0f : y;  // rounding must not leave [-1, 1]: gelu's tail would change its sign
  return y < -1.0f ? -1.0f : y;
}
inline double erf(double x) { return __builtin_erf(x); }

// ---- The normal distribution, by the tail Phi(-a) = exp(-a^2 / 2) R(a), a = |x|: digits stay where
// (1 + erf) / 2 cancels.

inline float tail_end(float x) {  // |x|, at most 13.2: there exp(-a^2 / 2) is 2^-126, the least normal number
  const float a = __builtin_fabsf(x);
  return a > 13.2f ? 13.2f : a;
}
// exp(-a^2 / 2). With FMA the square is exact when the reduction by ln 2 takes its leading part away; without, its
// rounding costs a^2 / 4 ulp.
inline float gauss(float a) {
  const float h = -0.5f * a, t = (h * a) * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
#if defined(__FMA__)
  float r = __builtin_fmaf(h, a, n * -0.693359375f);  // n times 9 bits: exact
#else
  float r = h * a - n * 0.693359375f;
#endif
  r = r + n * 2.12194440e-4f;
  return exp_near_zero(r) * power_of_two(t);
}
// Mills' ratio R(a) as a polynomial in t = 1 / (1 + 0.33 a), 5e-8.
inline float mills(float a) {
  const float t = 1.0f / (1.0f + 0.33f * a);
  float p = -0.021336494013667107f;
  p = p * t + 0.1256006509065628f;
  p = p * t - 0.2722771465778351f;
  p = p * t + 0.23030400276184082f;
  p = p * t - 0.06033006310462952f;
  p = p * t + 0.12338459491729736f;
  p = p * t + 0.11068078875541687f;
  p = p * t + 0.13235440850257874f;
  p = p * t + 0.13161927461624146f;
  return p * t;
}
// x Phi(x): 7 ulp down to x = -13, where it vanishes. NaN at -inf, as -inf times 0 is.
inline float gelu(float x) {
  const float a = tail_end(x), tail = mills(a) * gauss(a);
  return (x < 0.0f ? x * 0.0f : x) - a * tail;
}
inline double gelu(double x) { return x * (0.5 * __builtin_erfc(x * -0.70710678118654752440)); }
// Phi(x) + x phi(x): 7 ulp of the greater term.
inline float gelu_slope(float x) {
  const float a = tail_end(x), left = (mills(a) - 0.39894228f * a) * gauss(a);  // the slope at -a
  const float y = x < 0.0f ? left : (x != x ? x : 1.0f - left);
  return x < -13.2f ? 0.0f : y;
}
inline double gelu_slope(double x) {
  return 0.5 * __builtin_erfc(x * -0.70710678118654752440) + x * 0.39894228040143267794 * __builtin_exp(-0.5 * x * x);
}

inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline double sqrt(double x) { return __builtin_sqrt(x); }
inline float sin(float x) { return __builtin_sinf(x); }
inline double sin(double x) { return __builtin_sin(x); }
inline float cos(float x) { return __builtin_cosf(x); }
inline double cos(double x) { return __builtin_cos(x); }
inline float floor(float x) { return __builtin_floorf(x); }
inline double floor(double x) { return __builtin_floor(x); }
inline float pow(float x, float y) { return __builtin_powf(x, y); }
inline double pow(double x, double y) { return __builtin_pow(x, y); }

// log(1 + x) for x >= 0 without losing small x: the correction term of Kahan.
inline float log1p(float x) {
  const float u = 1.0f + x;
  const float y = log(u) * (x / (u - 1.0f));
  return u == 1.0f ? x : (u == __builtin_inff() ? u : y);
}
inline double log1p(double x) { return __builtin_log1p(x); }

}  // namespace m
}  // namespace
