// exp along a row, for softmax: y[i] = exp(x[i] - top), and the sum of these, added up as sum_of does. Of differences
// up to 88; 0 below -87.33; a NaN gives NaN.
#pragma once

#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/cpu/row.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {
namespace m {

#if defined(__AVX512F__)

// 2^(k / 16), k = 0 .. 15
alignas(64) constexpr float kSixteenths[16] = {
    1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
    1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f};

// 1.5 ulp. exp(d) = 2^n T e^r with n in sixteenths, of which T holds the fraction and scalef takes the floor, and
// |r| <= ln(2) / 32, where three terms leave 1e-8: two thirds of exp_small's instructions.
inline __m512 exp_small(__m512 d) {
  constexpr __mmask16 all = 0xffff;  // the forms without a mask start from an undefined vector, which GCC 12 warns of
  const __m512 shift = _mm512_set1_ps(786432.0f);  // 1.5 * 2^19: rounds to a sixteenth in the low mantissa bits
  const __m512 c = _mm512_maskz_max_ps(all, _mm512_set1_ps(-120.0f), d);
  const __m512 t = _mm512_fmadd_ps(c, _mm512_set1_ps(1.44269504f), shift), n = _mm512_sub_ps(t, shift);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), c);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(0.16666667f), _mm512_set1_ps(0.5f));
  p = _mm512_mul_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), r);
  const __m512 power = _mm512_maskz_permutexvar_ps(all, _mm512_castps_si512(t), _mm512_load_ps(kSixteenths));
  return _mm512_maskz_scalef_ps(all, _mm512_fmadd_ps(p, power, power), n);
}

inline float exp_row(const float* x, float top, float* y, std::int64_t n) {
  const __m512 t = _mm512_set1_ps(top);
  float total = 0;
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t stop = lesser(i + kSumBlock, n);
    alignas(64) float lane[kLanes];
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (; i + kLanes <= stop; i += kLanes)
      for (int j = 0; j < 2; ++j) {
        const __m512 e = exp_small(_mm512_sub_ps(_mm512_loadu_ps(x + i + 16 * j), t));
        _mm512_storeu_ps(y + i + 16 * j, e);
        sum[j] = _mm512_add_ps(sum[j], e);
      }
    for (int j = 0; i < stop; i = lesser(i + 16, stop), ++j) {
      const __mmask16 some = static_cast<__mmask16>((1u << lesser<std::int64_t>(16, stop - i)) - 1);
      const __m512 e = exp_small(_mm512_sub_ps(_mm512_maskz_loadu_ps(some, x + i), t));
      _mm512_mask_storeu_ps(y + i, some, e);
      sum[j] = _mm512_mask_add_ps(sum[j], some, sum[j], e);
    }
    _mm512_store_ps(lane, sum[0]);
    _mm512_store_ps(lane + 16, sum[1]);
    total += add_lanes(lane);
  }
  return total;
}

#else

inline float exp_row(const float* x, float top, float* y, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = exp_small(x[i] - top);
  return sum_of<float>(n, [y](std::int64_t i) { return y[i]; });
}

#endif

inline double exp_row(const double* x, double top, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = exp(x[i] - top);
  return sum_of<double>(n, [y](std::int64_t i) { return y[i]; });
}

}  // namespace m
}  // namespace
