// GELU and its gradient along rows. Every kernel calls these, so that a fused activation has the op's bits.
//
// With AVX-512 the tail of the normal distribution is read from 16 polynomials held in six registers where |x| < 3.875,
// at a third of the time; sixteen values of which one lies beyond are computed by math.h's functions as well, and each
// takes its own of the two. What a value gives thus depends on nothing beside or before it.
#pragma once

#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {
namespace m {

#if defined(__AVX512F__)

constexpr float kTableEnd = 3.875f;
constexpr __mmask16 kAll = 0xffff;  // the forms without a mask start from an undefined vector, which GCC 12 warns of

// Coefficient i of piece n, in a - n / 4 for a within 1 / 8 of n / 4: fits of least maximum (least squares, reweighted
// until the errors were level) of Q(a) = Phi(-a), 1.9e-7 of it, and of Q(a) - a phi(a), 4e-8 of Q(a) + a phi(a).
alignas(64) constexpr float kTail[6][16] = {
    {0.5f, 0.401293665f, 0.308537543f, 0.22662735f, 0.158655256f, 0.105649777f, 0.066807203f, 0.0400591567f,
     0.0227501318f, 0.0122244721f, 0.00620966544f, 0.00297976332f, 0.00134989806f, 0.000577025057f, 0.0002326291f,
     8.84172987e-05f},
    {-0.398942292f, -0.386668116f, -0.352065325f, -0.301137418f, -0.241970733f, -0.182649091f, -0.1295176f,
     -0.086277321f, -0.0539909676f, -0.0317396522f, -0.0175283011f, -0.00909356307f, -0.00443184841f,
     -0.00202904758f, -0.000872682373f, -0.000352595409f},
    {8.54292523e-07f, 0.048337914f, 0.0880138949f, 0.112927444f, 0.120984063f, 0.114154033f, 0.097137399f,
     0.0754928291f, 0.0539911464f, 0.0357074887f, 0.0219103862f, 0.0125036202f, 0.00664775027f, 0.00329717994f,
     0.00152717112f, 0.000661099853f},
    {0.0664704069f, 0.0604137927f, 0.0440091565f, 0.0219542366f, 2.79112669e-06f, -0.0171205141f, -0.0269808937f,
     -0.0296572708f, -0.0269951485f, -0.0214907657f, -0.0153370565f, -0.00994591881f, -0.00590910902f,
     -0.00323391589f, -0.00163636799f, -0.000767699792f},
    {0.000181999188f, -0.0120825525f, -0.0199667346f, -0.0229490064f, -0.0200496074f, -0.0135606062f, -0.0060303132f,
     0.000362841529f, 0.00446804799f, 0.00609725062f, 0.00592541602f, 0.00475394865f, 0.00332700647f, 0.00208222517f,
     0.00118135824f, 0.000612499483f},
    {-0.0105250888f, -0.00822632015f, -0.00466940459f, 0.000332606724f, 0.00386326597f, 0.00579385692f,
     0.00574003579f, 0.00427980674f, 0.00223278999f, 0.000496986962f, -0.000674522191f, -0.00112926378f,
     -0.00110867876f, -0.000859227323f, -0.00057428726f, -0.000338822283f},
};
alignas(64) constexpr float kTailSlope[6][16] = {
    {0.5f, 0.304626644f, 0.13250488f, 0.000774280576f, -0.0833154693f, -0.122661583f, -0.127469197f, -0.110926151f,
     -0.0852318034f, -0.0591897443f, -0.0376110859f, -0.0220275335f, -0.0119456472f, -0.00601738086f,
     -0.00282176025f, -0.0012338165f},
    {-0.797884583f, -0.749169469f, -0.616114318f, -0.432885051f, -0.241970718f, -0.0799089819f, 0.0323794037f,
     0.0916696414f, 0.107981935f, 0.097202681f, 0.0744952783f, 0.0505829453f, 0.0310229417f, 0.0173737239f,
     0.00894499756f, 0.00425318535f},
    {1.63509719e-06f, 0.190312102f, 0.330056518f, 0.388182342f, 0.362954706f, 0.278254777f, 0.169995338f,
     0.0707756057f, 1.93723827e-06f, -0.0379384346f, -0.0492984392f, -0.044544559f, -0.0332391262f, -0.0216381866f,
     -0.0125994524f, -0.00665251538f},
    {0.265925854f, 0.229833499f, 0.135691121f, 0.0190162696f, -0.0806583092f, -0.136865586f, -0.144360647f,
     -0.115876518f, -0.0719899088f, -0.0307268463f, -0.0020090586f, 0.0125084659f, 0.0162492488f, 0.0140782222f,
     0.00993578415f, 0.00607155496f},
    {0.000284822774f, -0.0694447383f, -0.111659229f, -0.113686793f, -0.0804372504f, -0.0310201626f, 0.0132737365f,
     0.0394372456f, 0.044746872f, 0.0358170532f, 0.0213606991f, 0.00839067809f, 5.49227007e-05f, -0.00363213802f,
     -0.00422268454f, -0.00336055737f},
    {-0.060436625f, -0.0476941913f, -0.0182443317f, 0.0145193692f, 0.0362701789f, 0.040030621f, 0.0294173155f,
     0.012002985f, -0.00252386951f, -0.0105813006f, -0.0116417585f, -0.0086407382f, -0.00461134966f, -0.00149409543f,
     0.0003192437f, 0.000920151651f},
};

struct Pieces {
  __m512 coefficient[6];
};
inline Pieces pieces_of(const float (&table)[6][16]) {
  Pieces p;
  for (int i = 0; i < 6; ++i) p.coefficient[i] = _mm512_load_ps(table[i]);
  return p;
}
// At 0 <= a < kTableEnd; elsewhere anything.
inline __m512 at(const Pieces& p, __m512 a) {
  const __m512 quarter = _mm512_set1_ps(3145728.0f);  // 1.5 * 2^21: rounds to a fourth in the low mantissa bits
  const __m512 t = _mm512_add_ps(a, quarter), r = _mm512_sub_ps(a, _mm512_sub_ps(t, quarter));
  const __m512i n = _mm512_castps_si512(t);
  __m512 y = _mm512_maskz_permutexvar_ps(kAll, n, p.coefficient[5]);
  for (int i = 4; i >= 0; --i) y = _mm512_fmadd_ps(y, r, _mm512_maskz_permutexvar_ps(kAll, n, p.coefficient[i]));
  return y;
}
inline __mmask16 beyond(__m512 a) { return _mm512_cmp_ps_mask(a, _mm512_set1_ps(kTableEnd), _CMP_NLT_UQ); }  // NaN too

template <float (*kF)(float)>
[[gnu::noinline]] __m512 each(__m512 x) {
  float v[16];
  _mm512_storeu_ps(v, x);
#pragma omp simd
  for (int i = 0; i < 16; ++i) v[i] = kF(v[i]);
  return _mm512_loadu_ps(v);
}

inline __m512 gelu(const Pieces& tail, __m512 x) {
  const __m512 a = _mm512_abs_ps(x), zero = _mm512_setzero_ps();
  const __m512 y = _mm512_fnmadd_ps(a, at(tail, a), _mm512_maskz_max_ps(kAll, zero, x));
  const __mmask16 far = beyond(a);
  return far ? _mm512_mask_mov_ps(y, far, each<gelu>(x)) : y;
}
inline __m512 gelu_slope(const Pieces& tail_slope, __m512 x) {
  const __m512 a = _mm512_abs_ps(x), left = at(tail_slope, a);
  const __mmask16 right = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLT_UQ), far = beyond(a);
  const __m512 y = _mm512_mask_sub_ps(left, right, _mm512_set1_ps(1.0f), left);
  return far ? _mm512_mask_mov_ps(y, far, each<gelu_slope>(x)) : y;
}

// y[i] = gelu(x[i]); y may be x.
inline void gelu_row(const float* x, float* y, std::int64_t n) {
  const Pieces tail = pieces_of(kTail);
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(y + i, gelu(tail, _mm512_loadu_ps(x + i)));
  const __mmask16 rest = static_cast<__mmask16>((1u << (n - i)) - 1);
  if (rest) _mm512_mask_storeu_ps(y + i, rest, gelu(tail, _mm512_maskz_loadu_ps(rest, x + i)));
}
// dx[i] = dy[i] gelu'(x[i])
inline void gelu_gradient_row(const float* x, const float* dy, float* dx, std::int64_t n) {
  const Pieces slope = pieces_of(kTailSlope);
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(dx + i, _mm512_mul_ps(_mm512_loadu_ps(dy + i), gelu_slope(slope, _mm512_loadu_ps(x + i))));
  const __mmask16 rest = static_cast<__mmask16>((1u << (n - i)) - 1);
  if (!rest) return;
  const __m512 y = gelu_slope(slope, _mm512_maskz_loadu_ps(rest, x + i));
  _mm512_mask_storeu_ps(dx + i, rest, _mm512_mul_ps(_mm512_maskz_loadu_ps(rest, dy + i), y));
}

#else

inline void gelu_row(const float* x, float* y, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = gelu(x[i]);
}
inline void gelu_gradient_row(const float* x, const float* dy, float* dx, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) dx[i] = dy[i] * gelu_slope(x[i]);
}

#endif

}  // namespace m
}  // namespace
