// One spatial axis of a convolution as its kernels walk it, on the CPU (Int = int64_t) and on CUDA (Int = int).
//
// A result is cut into phases: one forward, `stride` transposed, by the position modulo the stride. Inside a phase
// result positions are start, start + step, ..; position number t reads the sources
// t * source_step + offset + j * offset_step for j < taps, under the kernel taps first_tap + j * tap_step.
#pragma once

#if defined(__CUDACC__)
#define CAPO_AXIS_HD __host__ __device__
#else
#define CAPO_AXIS_HD
#endif

namespace {

template <class Int>
struct ConvAxis {
  Int start, step, count;
  Int source_step, offset, offset_step;
  Int taps, first_tap, tap_step;
  Int taps_before;  // in the axis's earlier phases
  Int source, result;
};

// Axis a of a geometry whose arrays (in, out, kernel, stride, pad, dilation) hold Ints, ops/conv.h's ConvGeometry.
template <class Int, class Geometry>
CAPO_AXIS_HD inline ConvAxis<Int> conv_axis(const Geometry& g, bool transposed, int a, Int phase) {
  if (!transposed)
    return {0, 1, g.out[a], g.stride[a], -g.pad[a], g.dilation[a], g.kernel[a], 0, 1, 0, g.in[a], g.out[a]};
  // Result i gets tap k from source (i + pad - k dilation) / stride where that is whole. phase = (i + pad) mod stride.
  const Int s = g.stride[a], d = g.dilation[a];
  ConvAxis<Int> x{};
  x.source = g.out[a];
  x.result = g.in[a];
  x.step = s;
  x.start = ((phase - g.pad[a]) % s + s) % s;
  x.count = x.start < x.result ? (x.result - x.start + s - 1) / s : 0;
  x.source_step = 1;
  x.tap_step = 1;
  while (x.tap_step * d % s != 0) ++x.tap_step;
  for (Int k = 0; k < g.kernel[a]; ++k) {
    const Int r = k * d % s;
    if (r < phase) ++x.taps_before;
    if (r == phase && x.taps++ == 0) x.first_tap = k;
  }
  x.offset = (x.start + g.pad[a] - x.first_tap * d) / s;
  x.offset_step = -(x.tap_step * d / s);
  return x;
}

}  // namespace

#undef CAPO_AXIS_HD
