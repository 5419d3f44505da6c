#include <capo/ops/cpu/conv_walk.h>
#include <capo/ops/cpu/gemm.h>
#include <capo/ops/cpu/kernel.h>

namespace {

using capo::kConvColumns;

inline void advance(const Axis* axis, Position& p) {
  if (++p.t[2] == axis[2].count) next_line(axis, p);
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

CAPO_CPU_KERNEL(conv_weight_gradient, capo::ConvWeightArgs) {
  for (int64_t i = begin; i < end; ++i)
    args.dtype == capo::DType::f32 ? weight_gradient<float>(args, i) : weight_gradient<double>(args, i);
}
CAPO_CPU_KERNEL(conv_join, capo::ConvJoinArgs) {
  args.dtype == capo::DType::f32 ? join<float>(args, begin, end) : join<double>(args, begin, end);
}
