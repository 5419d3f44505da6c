#include <capo/ops/cpu/conv_walk.h>
#include <capo/ops/cpu/gemm.h>
#include <capo/ops/cpu/kernel.h>

namespace {

using capo::ConvArgs;

// [channels, taps] -> [taps, channels], so that neighbouring channels make a vector.
template <class T>
void pack_depthwise(const capo::ConvPackArgs& p) {
  const T* w = static_cast<const T*>(p.w);
  T* packed = static_cast<T*>(p.packed);
  const int64_t taps = taps_of(p.g), channels = p.g.groups;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t) packed[t * channels + c] = w[c * taps + t];
}

// Sums NV vectors of channels over the taps under one position; `source` and `w` point at the first channel.
template <class T, int NV>
inline void depthwise_vectors(const Phase& phase, const ConvGeometry& g, const Position& at, const T* source, const T* w,
                              const T* bias, T* out) {
  using namespace gemm;
  constexpr int W = kWidth<T>;
  const Axis &ad = phase.axis[0], &ah = phase.axis[1], &aw = phase.axis[2];
  const int64_t channels = g.groups;
  Vector<T> sum[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) sum[v] = bias ? load(bias + v * W) : Vector<T>{};
  for (int64_t jd = 0; jd < ad.taps; ++jd) {
    const int64_t sd = at.t[0] * ad.source_step + ad.offset + jd * ad.offset_step;
    if (sd < 0 || sd >= ad.source) continue;
    for (int64_t jh = 0; jh < ah.taps; ++jh) {
      const int64_t sh = at.t[1] * ah.source_step + ah.offset + jh * ah.offset_step;
      if (sh < 0 || sh >= ah.source) continue;
      const int64_t tap = ((ad.first_tap + jd * ad.tap_step) * g.kernel[1] + ah.first_tap + jh * ah.tap_step) * g.kernel[2];
      const T* row = source + ((at.b * ad.source + sd) * ah.source + sh) * aw.source * channels;
      for (int64_t jw = 0; jw < aw.taps; ++jw) {
        const int64_t sw = at.t[2] * aw.source_step + aw.offset + jw * aw.offset_step;
        if (sw < 0 || sw >= aw.source) continue;
        const T* x = row + sw * channels;
        const T* k = w + (tap + aw.first_tap + jw * aw.tap_step) * channels;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[v] += load(x + v * W) * load(k + v * W);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) store(out + v * W, sum[v]);
}

template <class T>
inline T depthwise_one(const Phase& phase, const ConvGeometry& g, const Position& at, const T* source, const T* w, T sum) {
  const Axis &ad = phase.axis[0], &ah = phase.axis[1], &aw = phase.axis[2];
  for (int64_t jd = 0; jd < ad.taps; ++jd) {
    const int64_t sd = at.t[0] * ad.source_step + ad.offset + jd * ad.offset_step;
    if (sd < 0 || sd >= ad.source) continue;
    for (int64_t jh = 0; jh < ah.taps; ++jh) {
      const int64_t sh = at.t[1] * ah.source_step + ah.offset + jh * ah.offset_step;
      if (sh < 0 || sh >= ah.source) continue;
      const int64_t tap = ((ad.first_tap + jd * ad.tap_step) * g.kernel[1] + ah.first_tap + jh * ah.tap_step) * g.kernel[2];
      for (int64_t jw = 0; jw < aw.taps; ++jw) {
        const int64_t sw = at.t[2] * aw.source_step + aw.offset + jw * aw.offset_step;
        if (sw < 0 || sw >= aw.source) continue;
        sum += source[(((at.b * ad.source + sd) * ah.source + sh) * aw.source + sw) * g.groups] *
               w[(tap + aw.first_tap + jw * aw.tap_step) * g.groups];
      }
    }
  }
  return sum;
}

// One line of the last spatial axis of one phase.
template <class T>
void depthwise(const ConvArgs& p, int64_t item) {
  constexpr int W = gemm::kWidth<T>;
  const ConvGeometry& g = p.g;
  const Phase phase = phase_of(g, p.transposed, item / p.tiles);
  const Axis* axis = phase.axis;
  if (axis[0].count * axis[1].count == 0) return;
  const int64_t line = item % p.tiles, width = axis[2].count, channels = g.groups;
  if (line >= g.batch * axis[0].count * axis[1].count) return;
  Position at{line / axis[1].count / axis[0].count, {line / axis[1].count % axis[0].count, line % axis[1].count, 0}};
  int64_t c = at.b;
  for (int x = 0; x < 2; ++x) c = c * axis[x].result + axis[x].start + at.t[x] * axis[x].step;
  const T* source = static_cast<const T*>(p.source);
  const T* w = static_cast<const T*>(p.packed);
  const T* bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.result) + (c * axis[2].result + axis[2].start) * channels;
  const int64_t step = axis[2].step * channels;
  int64_t j = 0;
  for (; j + 4 * W <= channels; j += 4 * W)
    for (at.t[2] = 0; at.t[2] < width; ++at.t[2])
      depthwise_vectors<T, 4>(phase, g, at, source + j, w + j, bias ? bias + j : nullptr, out + at.t[2] * step + j);
  for (; j + W <= channels; j += W)
    for (at.t[2] = 0; at.t[2] < width; ++at.t[2])
      depthwise_vectors<T, 1>(phase, g, at, source + j, w + j, bias ? bias + j : nullptr, out + at.t[2] * step + j);
  for (; j < channels; ++j)
    for (at.t[2] = 0; at.t[2] < width; ++at.t[2])
      out[at.t[2] * step + j] = depthwise_one(phase, g, at, source + j, w + j, bias ? bias[j] : T(0));
}

// 64 channels of one chunk of lines. Each (line, tap) is summed on its own and then added.
template <class T>
void depthwise_weight_gradient(const capo::ConvWeightArgs& p, int64_t item) {
  constexpr int64_t kBlock = 64;
  const ConvGeometry& g = p.g;
  const int64_t channels = g.groups, blocks = (channels + kBlock - 1) / kBlock, taps = taps_of(g);
  const int64_t c0 = item % blocks * kBlock, n = lesser(kBlock, channels - c0), chunk = item / blocks;
  const int64_t lines = g.batch * g.out[0] * g.out[1];
  const int64_t begin = chunk * p.chunk, end = lesser(begin + p.chunk, lines);
  const T* x = static_cast<const T*>(p.x) + c0;
  const T* dy = static_cast<const T*>(p.dy) + c0;
  T* dw = static_cast<T*>(p.planes) + (chunk * channels + c0) * taps;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t kw = tap % g.kernel[2], kh = tap / g.kernel[2] % g.kernel[1], kd = tap / g.kernel[2] / g.kernel[1];
    T total[kBlock];
    zero(total, kBlock);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t oh = line % g.out[1], od = line / g.out[1] % g.out[0], b = line / g.out[1] / g.out[0];
      const int64_t sd = od * g.stride[0] - g.pad[0] + kd * g.dilation[0], sh = oh * g.stride[1] - g.pad[1] + kh * g.dilation[1];
      if (sd < 0 || sd >= g.in[0] || sh < 0 || sh >= g.in[1]) continue;
      const T* xs = x + ((b * g.in[0] + sd) * g.in[1] + sh) * g.in[2] * channels;
      const T* ds = dy + line * g.out[2] * channels;
      T part[kBlock];
      zero(part, kBlock);
      for (int64_t ow = 0; ow < g.out[2]; ++ow) {
        const int64_t sw = ow * g.stride[2] - g.pad[2] + kw * g.dilation[2];
        if (sw < 0 || sw >= g.in[2]) continue;
        const T *u = xs + sw * channels, *v = ds + ow * channels;
        if (n == kBlock) {
#pragma omp simd
          for (int64_t j = 0; j < kBlock; ++j) part[j] += u[j] * v[j];
        } else {
          for (int64_t j = 0; j < n; ++j) part[j] += u[j] * v[j];
        }
      }
#pragma omp simd
      for (int64_t j = 0; j < kBlock; ++j) total[j] += part[j];
    }
    for (int64_t j = 0; j < n; ++j) dw[j * taps + tap] = total[j];
  }
}

}  // namespace

CAPO_CPU_KERNEL(conv_depthwise_pack, capo::ConvPackArgs) {
  if (begin != 0 || end < 1) return;
  args.dtype == capo::DType::f32 ? pack_depthwise<float>(args) : pack_depthwise<double>(args);
}
CAPO_CPU_KERNEL(conv_depthwise, capo::ConvArgs) {
  for (int64_t i = begin; i < end; ++i) args.dtype == capo::DType::f32 ? depthwise<float>(args, i) : depthwise<double>(args, i);
}
CAPO_CPU_KERNEL(conv_depthwise_weight_gradient, capo::ConvWeightArgs) {
  for (int64_t i = begin; i < end; ++i)
    args.dtype == capo::DType::f32 ? depthwise_weight_gradient<float>(args, i) : depthwise_weight_gradient<double>(args, i);
}
