// How the convolution kernels walk their geometry: phases, positions, the blocks of the summed axis. For ops/cpu files
// (unnamed namespace, see kernel.h).
#pragma once

#include <capo/ops/conv.h>
#include <capo/ops/conv_axis_internal.h>
#include <capo/ops/cpu/kernel.h>

namespace {

using capo::ConvGeometry;
using std::int64_t;

using Axis = ConvAxis<int64_t>;

inline int64_t phases_of(const ConvGeometry& g, bool transposed) {
  return transposed ? g.stride[0] * g.stride[1] * g.stride[2] : 1;
}
inline int64_t taps_of(const ConvGeometry& g) { return g.kernel[0] * g.kernel[1] * g.kernel[2]; }

struct Phase {
  Axis axis[3];
  int64_t taps, taps_before;
};

// The taps of an axis are put in the order of their sources: without dilation, neighbours of the last axis lie side by
// side.
inline Phase phase_of(const ConvGeometry& g, bool transposed, int64_t index) {
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
  p.taps_before =
      d.taps_before * g.kernel[1] * g.kernel[2] + d.taps * (h.taps_before * g.kernel[2] + h.taps * w.taps_before);
  for (Axis& x : p.axis) {
    if (x.offset_step >= 0 || x.taps == 0) continue;
    x.offset += (x.taps - 1) * x.offset_step;
    x.first_tap += (x.taps - 1) * x.tap_step;
    x.offset_step = -x.offset_step;
    x.tap_step = -x.tap_step;
  }
  return p;
}

// The kernel's tap under which tap number j of a phase lies; j counts in row-major order.
inline int64_t tap_at(const ConvGeometry& g, const Axis* axis, int64_t j) {
  const Axis &d = axis[0], &h = axis[1], &w = axis[2];
  const int64_t jw = j % w.taps, jh = j / w.taps % h.taps, jd = j / w.taps / h.taps;
  return ((d.first_tap + jd * d.tap_step) * g.kernel[1] + h.first_tap + jh * h.tap_step) * g.kernel[2] + w.first_tap +
         jw * w.tap_step;
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
// To the start of the next line.
inline void next_line(const Axis* axis, Position& p) {
  p.t[2] = 0;
  for (int a = 1; a >= 0; --a) {
    if (++p.t[a] < axis[a].count) return;
    p.t[a] = 0;
  }
  ++p.b;
}

// The source line (of the last axis) that position p reads under the taps (jd, jh): its number, or -1 outside.
inline int64_t source_line(const Axis* axis, const Position& p, int64_t jd, int64_t jh) {
  const Axis &d = axis[0], &h = axis[1];
  const int64_t sd = p.t[0] * d.source_step + d.offset + jd * d.offset_step;
  const int64_t sh = p.t[1] * h.source_step + h.offset + jh * h.offset_step;
  return sd < 0 || sd >= d.source || sh < 0 || sh >= h.source ? -1 : (p.b * d.source + sd) * h.source + sh;
}
// The pixel of the result where position p stands.
inline int64_t result_pixel(const Axis* axis, const Position& p) {
  int64_t c = p.b;
  for (int a = 0; a < 3; ++a) c = c * axis[a].result + axis[a].start + p.t[a] * axis[a].step;
  return c;
}

}  // namespace
