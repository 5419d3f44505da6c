#include <capo/ops/conv.h>
#include <capo/ops/conv_axis_internal.h>
#include <capo/ops/cpu/gemm.h>
#include <capo/ops/cpu/kernel.h>

namespace {

using capo::ConvArgs;
using capo::ConvGeometry;
using capo::kConvColumns;
using capo::kConvTile;
using std::int64_t;

using Axis = ConvAxis<int64_t>;

int64_t phases_of(const ConvGeometry& g, bool transposed) {
  return transposed ? g.stride[0] * g.stride[1] * g.stride[2] : 1;
}
int64_t taps_of(const ConvGeometry& g) { return g.kernel[0] * g.kernel[1] * g.kernel[2]; }

struct Phase {
  Axis axis[3];
  int64_t taps, taps_before;
};

Phase phase_of(const ConvGeometry& g, bool transposed, int64_t index) {
  Phase p;
  int64_t number[3] = {0, 0, 0};
  if (transposed) {
    number[2] = index % g.stride[2];
    number[1] = index / g.stride[2] % g.stride[1];
    number[0] = index / g.stride[2] / g.stride[1];
  }
  for (int a = 0; a < 3; ++a) p.axis[a] = conv_axis(g, transposed, a, number[a]);
  const Axis &d = p.axis[0], &h = p.axis[1], &w = p.axis[2];
  p.taps = d.taps * h.taps * w.taps;
  p.taps_before = d.taps_before * g.kernel[1] * g.kernel[2] + d.taps * (h.taps_before * g.kernel[2] + h.taps * w.taps_before);
  return p;
}

template <class T>
inline void copy(T* dst, const T* src, int64_t n) {
  __builtin_memcpy(dst, src, static_cast<unsigned long>(n) * sizeof(T));
}
template <class T>
inline void zero(T* dst, int64_t n) {
  __builtin_memset(dst, 0, static_cast<unsigned long>(n) * sizeof(T));
}

struct Position {
  int64_t b, t[3];  // t: position numbers within the phase
};

inline Position position_of(const Axis* axis, int64_t m) {
  Position p;
  for (int a = 2; a >= 0; --a) {
    p.t[a] = m % axis[a].count;
    m /= axis[a].count;
  }
  p.b = m;
  return p;
}
inline void advance(const Axis* axis, Position& p) {
  for (int a = 2; a >= 0; --a) {
    if (++p.t[a] < axis[a].count) return;
    p.t[a] = 0;
  }
  ++p.b;
}

// Columns [c0, c1) of one row of the im2col matrix: (tap, channel) in row-major order, zeros outside the source.
// source points at the group's first channel; pixels are `pixel` elements apart and give `channels` columns.
template <class T>
void gather(const Axis* axis, const Position& p, const T* source, int64_t pixel, int64_t channels, int64_t c0, int64_t c1, T* dst) {
  const Axis &d = axis[0], &h = axis[1], &w = axis[2];
  const int64_t line = w.taps * channels;  // columns of one (d, h) tap pair
  const bool dense = w.offset_step == 1 && pixel == channels;
  const int64_t w0 = p.t[2] * w.source_step + w.offset;
  for (int64_t l = c0 / line; l * line < c1; ++l) {
    const int64_t begin = greater(c0 - l * line, int64_t{0}), end = lesser(c1 - l * line, line);
    const int64_t jd = l / h.taps, jh = l % h.taps;
    const int64_t sd = p.t[0] * d.source_step + d.offset + jd * d.offset_step;
    const int64_t sh = p.t[1] * h.source_step + h.offset + jh * h.offset_step;
    if (sd < 0 || sd >= d.source || sh < 0 || sh >= h.source) {
      zero(dst, end - begin);
      dst += end - begin;
      continue;
    }
    const T* row = source + ((p.b * d.source + sd) * h.source + sh) * w.source * pixel;
    if (dense) {  // the taps lie side by side
      const int64_t lo = lesser(greater(-w0 * channels, begin), end), hi = greater(lesser((w.source - w0) * channels, end), lo);
      zero(dst, lo - begin);
      if (hi > lo) copy(dst + (lo - begin), row + w0 * channels + lo, hi - lo);
      zero(dst + (hi - begin), end - hi);
      dst += end - begin;
      continue;
    }
    for (int64_t at = begin; at < end;) {
      const int64_t j = at / channels, c = at % channels, n = lesser(channels - c, end - at);
      const int64_t sw = w0 + j * w.offset_step;
      if (sw < 0 || sw >= w.source)
        zero(dst, n);
      else
        copy(dst, row + sw * pixel + c, n);
      dst += n;
      at += n;
    }
  }
}

// ---- Weights ----

template <class T>
void pack(const capo::ConvPackArgs& p, int64_t item) {
  using namespace gemm;
  const ConvGeometry& g = p.g;
  const int64_t depth = p.transposed ? g.cout : g.cin, n = p.transposed ? g.cin : g.cout;  // source and result channels
  const int64_t blocks = (n + 63) / 64, phases = phases_of(g, p.transposed), taps = taps_of(g), padded = round_up(n, kWidth<T>);
  const int64_t j0 = item % blocks * 64, group = item / blocks / phases;
  const Phase phase = phase_of(g, p.transposed, item / blocks % phases);
  const Axis &d = phase.axis[0], &h = phase.axis[1], &w = phase.axis[2];
  const T* src = static_cast<const T*>(p.w) + group * g.cout * taps * g.cin;
  T* dst = static_cast<T*>(p.packed) + (group * taps + phase.taps_before) * depth * padded;
  const int64_t k_total = phase.taps * depth, step = k_block<T>(k_total);
  const int64_t ks = p.transposed ? taps * g.cin : 1, cs = p.transposed ? 1 : taps * g.cin;
  for (int64_t k0 = 0; k0 < k_total; k0 += step) {
    const int64_t k = lesser(step, k_total - k0);
    for (int64_t j = j0; j < lesser(j0 + 64, n); j += kPanel<T>) {
      const int64_t columns = lesser(int64_t{kPanel<T>}, n - j), width = panel_width<T>(0, columns);
      T* panel = dst + k0 * padded + j * k;
      for (int64_t at = k0; at < k0 + k;) {  // pieces of one tap
        const int64_t j_tap = at / depth, c = at % depth, rows = lesser(depth - c, k0 + k - at);
        const int64_t jw = j_tap % w.taps, jh = j_tap / w.taps % h.taps, jd = j_tap / w.taps / h.taps;
        const int64_t tap = ((d.first_tap + jd * d.tap_step) * g.kernel[1] + h.first_tap + jh * h.tap_step) * g.kernel[2] +
                            w.first_tap + jw * w.tap_step;
        pack_panel(src + tap * g.cin + c * ks + j * cs, ks, cs, rows, columns, panel + (at - k0) * width);
        at += rows;
      }
    }
  }
}

// [channels, taps] -> [taps, channels], so that neighbouring channels make a vector.
template <class T>
void pack_depthwise(const capo::ConvPackArgs& p) {
  const T* w = static_cast<const T*>(p.w);
  T* packed = static_cast<T*>(p.packed);
  const int64_t taps = taps_of(p.g), channels = p.g.groups;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t) packed[t * channels + c] = w[c * taps + t];
}

// ---- Forward and data gradient ----

template <class T>
void convolve(const ConvArgs& p, int64_t item) {
  using namespace gemm;
  constexpr int64_t kLda = kMaxK<T> + 16;
  alignas(64) T a_rows[kConvTile * kLda];
  const ConvGeometry& g = p.g;
  const int64_t depth = p.transposed ? g.cout : g.cin, n = p.transposed ? g.cin : g.cout;
  const int64_t phases = phases_of(g, p.transposed), padded = round_up(n, kWidth<T>);
  const int64_t tile = item % p.tiles, group = item / p.tiles / phases;
  const Phase phase = phase_of(g, p.transposed, item / p.tiles % phases);
  const Axis *axis = phase.axis, &w = axis[2];
  const int64_t positions = g.batch * axis[0].count * axis[1].count * w.count, m0 = tile * kConvTile;
  const int64_t rows = lesser(kConvTile, positions - m0);
  if (rows <= 0) return;

  const int64_t pixel = g.groups * depth, ldc = g.groups * n;
  const T* source = static_cast<const T*>(p.source) + group * depth;
  const T* packed = static_cast<const T*>(p.packed) + (group * taps_of(g) + phase.taps_before) * depth * padded;
  T* result = static_cast<T*>(p.result) + group * n;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + group * n : nullptr;

  bool in_place = phase.taps == 1, whole = true;  // 1x1: A is the source; results without gaps: one run of rows
  for (int a = 0; a < 3; ++a) {
    in_place = in_place && axis[a].source_step == 1 && axis[a].offset == 0 && axis[a].count == axis[a].source;
    whole = whole && axis[a].step == 1 && axis[a].count == axis[a].result;
  }
  const Position first = position_of(axis, m0);
  const int64_t k_total = phase.taps * depth, step = k_block<T>(k_total);
  int64_t k0 = 0;
  do {  // once when no tap counts: stores zeros
    const int64_t k = lesser(step, k_total - k0);
    const T* a = in_place ? source + m0 * pixel + k0 : a_rows;
    const int64_t lda = in_place ? pixel : kLda;
    if (!in_place && k > 0) {
      Position at = first;
      for (int64_t i = 0; i < rows; ++i, advance(axis, at)) gather(axis, at, source, pixel, depth, k0, k0 + k, a_rows + i * kLda);
    }
    Position at = first;
    for (int64_t i = 0; i < rows;) {
      const int64_t run = whole ? rows : lesser(rows - i, w.count - at.t[2]);
      int64_t c = at.b;
      for (int x = 0; x < 3; ++x) c = c * axis[x].result + axis[x].start + at.t[x] * axis[x].step;
      T* out = result + c * ldc;
      block(run, n, k, a + i * lda, lda, packed + k0 * padded, out, w.step * ldc, k0 > 0);
      if (bias && k0 + step >= k_total)
        for (int64_t r = 0; r < run; ++r) {
          T* row = out + r * w.step * ldc;
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) row[j] += bias[j];
        }
      i += run;
      if (i < rows) {  // to the start of the next line
        at.t[2] = w.count - 1;
        advance(axis, at);
      }
    }
    k0 += step;
  } while (k0 < k_total);
}

// ---- Depthwise ----

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

// ---- Weight gradient ----

// Columns [c0, c1) of (tap, channel) for one chunk of positions: dw += dy^T im2col, dy transposed and im2col as panels.
template <class T>
void weight_gradient(const capo::ConvWeightArgs& p, int64_t item) {
  using namespace gemm;
  constexpr int64_t kRows = 96, kDepth = 128;  // channels of dy at once; positions at once
  constexpr int64_t kLda = kDepth + 16;        // not a power of two: cache sets
  alignas(64) T columns[kDepth * kConvColumns];
  alignas(64) T a_rows[kRows * kLda];
  const ConvGeometry& g = p.g;
  const Phase phase = phase_of(g, false, 0);
  const int64_t k_total = phase.taps * g.cin, blocks = (k_total + kConvColumns - 1) / kConvColumns;
  const int64_t c0 = item % blocks * kConvColumns, c1 = lesser(c0 + kConvColumns, k_total);
  const int64_t group = item / blocks % g.groups, chunk = item / blocks / g.groups;
  const int64_t positions = g.batch * g.out[0] * g.out[1] * g.out[2];
  const int64_t begin = chunk * p.chunk, end = lesser(begin + p.chunk, positions);
  const T* x = static_cast<const T*>(p.x) + group * g.cin;
  const T* dy = static_cast<const T*>(p.dy) + group * g.cout;
  const int64_t dy_row = g.groups * g.cout;
  T* dw = static_cast<T*>(p.planes) + (chunk * g.groups + group) * g.cout * k_total + c0;

  if (begin >= end)  // no position at all: the gradient is zero
    for (int64_t o = 0; o < g.cout; ++o) zero(dw + o * k_total, c1 - c0);
  for (int64_t m = begin; m < end; m += kDepth) {
    const int64_t depth = lesser(kDepth, end - m);
    for (int64_t j = 0; j < c1 - c0; j += kPanel<T>) {
      const int64_t n = lesser(int64_t{kPanel<T>}, c1 - c0 - j), width = panel_width<T>(0, n);
      Position at = position_of(phase.axis, m);
      for (int64_t i = 0; i < depth; ++i, advance(phase.axis, at)) {
        T* row = columns + j * depth + i * width;
        gather(phase.axis, at, x, g.groups * g.cin, g.cin, c0 + j, c0 + j + n, row);
        zero(row + n, width - n);
      }
    }
    for (int64_t o = 0; o < g.cout; o += kRows) {
      const int64_t rows = lesser(kRows, g.cout - o);
      pack_rows(dy + m * dy_row + o, int64_t{1}, dy_row, rows, depth, a_rows, kLda);
      block(rows, c1 - c0, depth, a_rows, kLda, columns, dw + o * k_total, k_total, m > begin);
    }
  }
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

template <class T>
void join(const capo::ConvJoinArgs& p, int64_t begin, int64_t end) {
  const T* planes = static_cast<const T*>(p.planes);
  T* dw = static_cast<T*>(p.dw);
  for (int64_t i = begin; i < end; ++i) dw[i] = planes[i];
  for (int64_t c = 1; c < p.chunks; ++c) {
    const T* plane = planes + c * p.plane;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) dw[i] += plane[i];
  }
}

}  // namespace

CAPO_CPU_KERNEL(conv_pack, capo::ConvPackArgs) {
  for (int64_t i = begin; i < end; ++i) args.dtype == capo::DType::f32 ? pack<float>(args, i) : pack<double>(args, i);
}
CAPO_CPU_KERNEL(conv, capo::ConvArgs) {
  for (int64_t i = begin; i < end; ++i) args.dtype == capo::DType::f32 ? convolve<float>(args, i) : convolve<double>(args, i);
}
CAPO_CPU_KERNEL(conv_depthwise_pack, capo::ConvPackArgs) {
  if (begin != 0 || end < 1) return;
  args.dtype == capo::DType::f32 ? pack_depthwise<float>(args) : pack_depthwise<double>(args);
}
CAPO_CPU_KERNEL(conv_depthwise, capo::ConvArgs) {
  for (int64_t i = begin; i < end; ++i) args.dtype == capo::DType::f32 ? depthwise<float>(args, i) : depthwise<double>(args, i);
}
CAPO_CPU_KERNEL(conv_weight_gradient, capo::ConvWeightArgs) {
  for (int64_t i = begin; i < end; ++i)
    args.dtype == capo::DType::f32 ? weight_gradient<float>(args, i) : weight_gradient<double>(args, i);
}
CAPO_CPU_KERNEL(conv_depthwise_weight_gradient, capo::ConvWeightArgs) {
  for (int64_t i = begin; i < end; ++i)
    args.dtype == capo::DType::f32 ? depthwise_weight_gradient<float>(args, i) : depthwise_weight_gradient<double>(args, i);
}
CAPO_CPU_KERNEL(conv_join, capo::ConvJoinArgs) {
  args.dtype == capo::DType::f32 ? join<float>(args, begin, end) : join<double>(args, begin, end);
}
