#include <capo/ops/cpu/conv_walk.h>
#include <capo/ops/cpu/gemm.h>

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

constexpr int kTaps = 9;  // at once: their weights or sums stay in registers

// Taps that all results of a run read: where the first result's source and the tap's weight lie, in elements.
struct Taps {
  int count;
  int64_t source[kTaps], tap[kTaps];
};

// Calls f(first result, results, taps, more, last) for runs of one line of results that read the same taps, kTaps at a time and
// in order, and with no taps for those that read none. `more`: the run's earlier taps are already summed; `last`: no others follow.
template <class F>
void for_each_run(const ConvGeometry& g, const Axis* axis, const Position& line, const F& f) {
  const Axis &ad = axis[0], &ah = axis[1], &aw = axis[2];
  const int64_t s = aw.source_step;
  for (int64_t t = 0, end; t < aw.count; t = end) {
    end = aw.count;  // the run ends where a tap of the last axis enters or leaves
    int64_t first = aw.taps, last = -1;
    for (int64_t j = 0; j < aw.taps; ++j) {
      const int64_t at = t * s + aw.offset + j * aw.offset_step;
      if (at < 0)
        end = lesser(end, t + (-at + s - 1) / s);
      else if (at < aw.source)
        end = lesser(end, t + (aw.source - at + s - 1) / s), first = lesser(first, j), last = j;
    }
    Taps taps;
    taps.count = 0;
    bool more = false;
    for (int64_t jd = 0; jd < ad.taps; ++jd)
      for (int64_t jh = 0; jh < ah.taps; ++jh) {
        const int64_t from = source_line(axis, line, jd, jh);
        if (from < 0) continue;
        for (int64_t j = first; j <= last; ++j) {
          if (taps.count == kTaps) {
            f(t, end - t, taps, more, false);
            taps.count = 0, more = true;
          }
          taps.source[taps.count] = (from * aw.source + t * s + aw.offset + j * aw.offset_step) * g.groups;
          taps.tap[taps.count++] = tap_at(g, axis, (jd * ah.taps + jh) * aw.taps + j);
        }
      }
    f(t, end - t, taps, more, true);
  }
}

// ---- Forward and data gradient ----

// Where sums go and what happens to them; residual: laid out like out, or null.
template <class T>
struct Target {
  T* out;
  int64_t step;  // from one result to the next
  const T* bias;
  bool more;
  const T* residual;
  T low, high;
};

// One vector of channels: n results from sources that advance by `stride`; N taps.
template <class T, int N, bool kEnds>
void sum_taps(const Taps& taps, int64_t n, const T* source, int64_t stride, const T* w, int64_t channels, const Target<T>& to) {
  using namespace gemm;
  Vector<T> k[N + 1];
  const T* x[N + 1];
#pragma GCC unroll 9
  for (int i = 0; i < N; ++i) k[i] = load(w + taps.tap[i] * channels), x[i] = source + taps.source[i];
  const Vector<T> start = to.bias ? load(to.bias) : Vector<T>{}, low = to.low - Vector<T>{}, high = to.high - Vector<T>{};
  for (int64_t t = 0; t < n; ++t) {
    T* out = to.out + t * to.step;
    Vector<T> sum = to.more ? load(out) : start;
#pragma GCC unroll 9
    for (int i = 0; i < N; ++i) sum += load(x[i] + t * stride) * k[i];
    if (kEnds && to.residual) sum += load(to.residual + t * to.step);
    store(out, kEnds ? between(sum, low, high) : sum);
  }
}

template <class T, bool kEnds>
void sum_run(const Taps& taps, int64_t n, const T* source, int64_t stride, const T* w, int64_t channels, const Target<T>& to) {
  switch (taps.count) {
#define CAPO_TAPS(N) \
  case N:            \
    return sum_taps<T, N, kEnds>(taps, n, source, stride, w, channels, to)
    CAPO_TAPS(0);
    CAPO_TAPS(1);
    CAPO_TAPS(2);
    CAPO_TAPS(3);
    CAPO_TAPS(4);
    CAPO_TAPS(5);
    CAPO_TAPS(6);
    CAPO_TAPS(7);
    CAPO_TAPS(8);
    CAPO_TAPS(9);
#undef CAPO_TAPS
  }
}

// One line of the last spatial axis of one phase.
template <class T>
void depthwise(const ConvArgs& p, int64_t item) {
  constexpr int W = gemm::kWidth<T>;
  const ConvGeometry& g = p.g;
  const Phase phase = phase_of(g, p.transposed, item / p.tiles);
  const Axis* axis = phase.axis;
  if (axis[0].count * axis[1].count * axis[2].count == 0) return;
  const int64_t line = item % p.tiles, channels = g.groups, step = axis[2].step * channels,
                stride = axis[2].source_step * channels;
  if (line >= g.batch * axis[0].count * axis[1].count) return;
  const Position at = position_of(axis, line * axis[2].count);
  const T* source = static_cast<const T*>(p.source);
  const T* w = static_cast<const T*>(p.packed);
  const T* bias = static_cast<const T*>(p.bias);
  const T* residual = static_cast<const T*>(p.residual);
  const int64_t first = result_pixel(axis, at) * channels;
  const T low = static_cast<T>(p.low), high = static_cast<T>(p.high);
  for_each_run(g, axis, at, [&](int64_t t, int64_t n, const Taps& taps, bool more, bool last) {
    const int64_t from = first + t * step;
    T* out = static_cast<T*>(p.result) + from;
    const T* add = residual ? residual + from : nullptr;
    const bool ends = p.ends && last;
    int64_t c = 0;
    for (; c + W <= channels; c += W) {
      const Target<T> to{out + c, step, bias ? bias + c : nullptr, more, add ? add + c : nullptr, low, high};
      ends ? sum_run<T, true>(taps, n, source + c, stride, w + c, channels, to)
           : sum_run<T, false>(taps, n, source + c, stride, w + c, channels, to);
    }
    for (; c < channels; ++c)
      for (int64_t i = 0; i < n; ++i) {
        T sum = more ? out[i * step + c] : bias ? bias[c] : T(0);
        for (int x = 0; x < taps.count; ++x)
          sum += source[taps.source[x] + i * stride + c] * w[taps.tap[x] * channels + c];
        if (ends) sum = gemm::between(add ? sum + add[i * step + c] : sum, low, high);
        out[i * step + c] = sum;
      }
  });
}

// ---- Weight gradient ----

// dw[tap] += sum over a run of dy x the tap's sources, one vector of channels; summed from zero, then added.
template <class T, int N>
void add_taps(const Taps& taps, int64_t n, const T* x0, int64_t stride, const T* dy, int64_t channels, T* dw,
              int64_t width) {
  using namespace gemm;
  Vector<T> sum[N];
  const T* x[N];
#pragma GCC unroll 9
  for (int i = 0; i < N; ++i) sum[i] = Vector<T>{}, x[i] = x0 + taps.source[i];
  for (int64_t t = 0; t < n; ++t) {
    const Vector<T> v = load(dy + t * channels);
#pragma GCC unroll 9
    for (int i = 0; i < N; ++i) sum[i] += load(x[i] + t * stride) * v;
  }
#pragma GCC unroll 9
  for (int i = 0; i < N; ++i) store(dw + taps.tap[i] * width, load(dw + taps.tap[i] * width) + sum[i]);
}

template <class T>
void add_run(const Taps& taps, int64_t n, const T* x, int64_t stride, const T* dy, int64_t channels, T* dw,
             int64_t width) {
  switch (taps.count) {
#define CAPO_TAPS(N) \
  case N:            \
    return add_taps<T, N>(taps, n, x, stride, dy, channels, dw, width)
    CAPO_TAPS(1);
    CAPO_TAPS(2);
    CAPO_TAPS(3);
    CAPO_TAPS(4);
    CAPO_TAPS(5);
    CAPO_TAPS(6);
    CAPO_TAPS(7);
    CAPO_TAPS(8);
    CAPO_TAPS(9);
#undef CAPO_TAPS
  }
}

// All channels of one chunk of lines: dw's plane is [taps, channels].
template <class T>
void depthwise_weight_gradient(const capo::ConvWeightArgs& p, int64_t item) {
  constexpr int W = gemm::kWidth<T>;
  const ConvGeometry& g = p.g;
  const Phase phase = phase_of(g, false, 0);
  const int64_t channels = g.groups, begin = item * p.chunk,
                end = lesser(begin + p.chunk, g.batch * g.out[0] * g.out[1]);
  const int64_t stride = g.stride[2] * channels;
  const T* x = static_cast<const T*>(p.x);
  T* dw = static_cast<T*>(p.planes) + item * taps_of(g) * channels;
  zero(dw, taps_of(g) * channels);
  for (int64_t line = begin; line < end && g.out[2] > 0; ++line) {
    const Position at = position_of(phase.axis, line * g.out[2]);
    const T* dy = static_cast<const T*>(p.dy) + line * g.out[2] * channels;
    for_each_run(g, phase.axis, at, [&](int64_t t, int64_t n, const Taps& taps, bool, bool) {
      const T* d = dy + t * channels;
      int64_t c = 0;
      for (; c + W <= channels; c += W) add_run(taps, n, x + c, stride, d + c, channels, dw + c, channels);
      for (; c < channels; ++c)
        for (int i = 0; i < taps.count; ++i) {
          T sum = 0;
          for (int64_t j = 0; j < n; ++j) sum += x[taps.source[i] + j * stride + c] * d[j * channels + c];
          dw[taps.tap[i] * channels + c] += sum;
        }
    });
  }
}

}  // namespace

CAPO_CPU_KERNEL(conv_depthwise_pack, capo::ConvPackArgs) {
  if (begin != 0 || end < 1) return;
  args.dtype == capo::DType::f32 ? pack_depthwise<float>(args) : pack_depthwise<double>(args);
}
CAPO_CPU_KERNEL(conv_depthwise, capo::ConvArgs) {
  for (int64_t i = begin; i < end; ++i)
    args.dtype == capo::DType::f32 ? depthwise<float>(args, i) : depthwise<double>(args, i);
}
CAPO_CPU_KERNEL(conv_depthwise_weight_gradient, capo::ConvWeightArgs) {
  for (int64_t i = begin; i < end; ++i)
    args.dtype == capo::DType::f32 ? depthwise_weight_gradient<float>(args, i)
                                   : depthwise_weight_gradient<double>(args, i);
}
