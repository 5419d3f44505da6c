#include <capo/ops/cpu/conv_walk.h>
#include <capo/ops/cpu/gemm.h>
#include <capo/ops/cpu/storage.h>

namespace {

using capo::ConvArgs;

// [channels, taps] -> [taps, channels], so that neighbouring channels make a vector.
template <class S, class T = Computed<S>>
void pack_depthwise(const capo::ConvPackArgs& p) {
  const S* w = static_cast<const S*>(p.w);
  T* packed = static_cast<T*>(p.packed);
  const int64_t taps = taps_of(p.g), channels = p.g.groups;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t) packed[t * channels + c] = load(w[c * taps + t]);
}

constexpr int kTaps = 9;  // at once: their weights or sums stay in registers

// Taps that all results of a run read: where the first result's source and the tap's weight lie, in elements.
template <int kMost>
struct Taps {
  int count;
  int64_t source[kMost], tap[kMost];
};
// At once for elements S: sums of 16-bit results cannot wait in the result.
template <class S>
inline constexpr int kTapsOf = kHalf<S> ? capo::kConvHalfTaps : kTaps;

// Calls f(first result, results, taps, more, last) for runs of one line of results that read the same taps, kMost at a
// time and in order, and with no taps for those that read none. `more`: the run's earlier taps are already summed;
// `last`: no others follow.
template <int kMost, class F>
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
    Taps<kMost> taps;
    taps.count = 0;
    bool more = false;
    for (int64_t jd = 0; jd < ad.taps; ++jd)
      for (int64_t jh = 0; jh < ah.taps; ++jh) {
        const int64_t from = source_line(axis, line, jd, jh);
        if (from < 0) continue;
        for (int64_t j = first; j <= last; ++j) {
          if (taps.count == kMost) {
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
template <class S>
struct Target {
  S* out;
  int64_t step;  // from one result to the next
  const S* bias;
  bool more;
  const S* residual;
  Computed<S> low, high;
};

// One vector of channels: n results from sources that advance by `stride`; N taps.
template <class S, int N, bool kEnds>
void sum_taps(const Taps<kTapsOf<S>>& taps, int64_t n, const S* source, int64_t stride, const Computed<S>* w,
              int64_t channels, const Target<S>& to) {
  using namespace gemm;
  using T = Computed<S>;
  Vector<T> k[N + 1];
  const S* x[N + 1];
#pragma GCC unroll 9
  for (int i = 0; i < N; ++i) k[i] = load(w + taps.tap[i] * channels), x[i] = source + taps.source[i];
  const Vector<T> start = to.bias ? load_wide(to.bias) : Vector<T>{};
  const Vector<T> low = to.low - Vector<T>{}, high = to.high - Vector<T>{};
  for (int64_t t = 0; t < n; ++t) {
    S* out = to.out + t * to.step;
    Vector<T> sum = to.more ? load_wide(out) : start;
#pragma GCC unroll 9
    for (int i = 0; i < N; ++i) sum += load_wide(x[i] + t * stride) * k[i];
    if (kEnds && to.residual) sum += load_wide(to.residual + t * to.step);
    store_rounded(out, kEnds ? between(sum, low, high) : sum);
  }
}

// The same of results t .. n, kRow at a time, with any number of taps; returns the first result that is left.
template <class S, int kRow, bool kEnds>
int64_t sum_many(const Taps<kTapsOf<S>>& taps, int64_t t, int64_t n, const S* source, int64_t stride,
                 const Computed<S>* w, int64_t channels, const Target<S>& to) {
  using namespace gemm;
  using V = Vector<Computed<S>>;
  const V start = to.bias ? load_wide(to.bias) : V{}, low = to.low - V{}, high = to.high - V{};
  for (; t + kRow <= n; t += kRow) {
    V sum[kRow];
    for (int r = 0; r < kRow; ++r) sum[r] = to.more ? load_wide(to.out + (t + r) * to.step) : start;
    for (int i = 0; i < taps.count; ++i) {
      const V k = load(w + taps.tap[i] * channels);
      const S* x = source + taps.source[i] + t * stride;
#pragma GCC unroll 4
      for (int r = 0; r < kRow; ++r) sum[r] += load_wide(x + r * stride) * k;
    }
    for (int r = 0; r < kRow; ++r) {
      if (kEnds && to.residual) sum[r] += load_wide(to.residual + (t + r) * to.step);
      store_rounded(to.out + (t + r) * to.step, kEnds ? between(sum[r], low, high) : sum[r]);
    }
  }
  return t;
}

template <class S, bool kEnds>
void sum_run(const Taps<kTapsOf<S>>& taps, int64_t n, const S* source, int64_t stride, const Computed<S>* w,
             int64_t channels, const Target<S>& to) {
  switch (taps.count) {
#define CAPO_TAPS(N) \
  case N:            \
    return sum_taps<S, N, kEnds>(taps, n, source, stride, w, channels, to)
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
  if constexpr (kHalf<S>) {
    const int64_t t = sum_many<S, 4, kEnds>(taps, 0, n, source, stride, w, channels, to);
    sum_many<S, 1, kEnds>(taps, t, n, source, stride, w, channels, to);
  }
}

// One line of the last spatial axis of one phase.
template <class S>
void depthwise(const ConvArgs& p, int64_t item) {
  using T = Computed<S>;
  constexpr int W = gemm::kWidth<T>;
  const ConvGeometry& g = p.g;
  const Phase phase = phase_of(g, p.transposed, item / p.tiles);
  const Axis* axis = phase.axis;
  if (axis[0].count * axis[1].count * axis[2].count == 0) return;
  const int64_t line = item % p.tiles, channels = g.groups, step = axis[2].step * channels,
                stride = axis[2].source_step * channels;
  if (line >= g.batch * axis[0].count * axis[1].count) return;
  const Position at = position_of(axis, line * axis[2].count);
  const S* source = static_cast<const S*>(p.source);
  const T* w = static_cast<const T*>(p.packed);
  const S* bias = static_cast<const S*>(p.bias);
  const S* residual = static_cast<const S*>(p.residual);
  const int64_t first = result_pixel(axis, at) * channels;
  const T low = static_cast<T>(p.low), high = static_cast<T>(p.high);
  for_each_run<kTapsOf<S>>(g, axis, at, [&](int64_t t, int64_t n, const auto& taps, bool more, bool last) {
    const int64_t from = first + t * step;
    S* out = static_cast<S*>(p.result) + from;
    const S* add = residual ? residual + from : nullptr;
    const bool ends = p.ends && last;
    int64_t c = 0;
    for (; c + W <= channels; c += W) {
      const Target<S> to{out + c, step, bias ? bias + c : nullptr, more, add ? add + c : nullptr, low, high};
      ends ? sum_run<S, true>(taps, n, source + c, stride, w + c, channels, to)
           : sum_run<S, false>(taps, n, source + c, stride, w + c, channels, to);
    }
    for (; c < channels; ++c)
      for (int64_t i = 0; i < n; ++i) {
        T sum = more ? load(out[i * step + c]) : bias ? load(bias[c]) : T(0);
        for (int x = 0; x < taps.count; ++x)
          sum += load(source[taps.source[x] + i * stride + c]) * w[taps.tap[x] * channels + c];
        if (ends) sum = gemm::between(add ? sum + load(add[i * step + c]) : sum, low, high);
        store(out[i * step + c], sum);
      }
  });
}

// ---- Weight gradient ----

// dw[tap] += sum over a run of dy x the tap's sources, one vector of channels; summed from zero, then added.
template <class S, int N, class T = Computed<S>>
void add_taps(const Taps<kTaps>& taps, int64_t n, const S* x0, int64_t stride, const S* dy, int64_t channels, T* dw,
              int64_t width) {
  using namespace gemm;
  Vector<T> sum[N];
  const S* x[N];
#pragma GCC unroll 9
  for (int i = 0; i < N; ++i) sum[i] = Vector<T>{}, x[i] = x0 + taps.source[i];
  for (int64_t t = 0; t < n; ++t) {
    const Vector<T> v = load_wide(dy + t * channels);
#pragma GCC unroll 9
    for (int i = 0; i < N; ++i) sum[i] += load_wide(x[i] + t * stride) * v;
  }
#pragma GCC unroll 9
  for (int i = 0; i < N; ++i) store(dw + taps.tap[i] * width, load(dw + taps.tap[i] * width) + sum[i]);
}

template <class S, class T = Computed<S>>
void add_run(const Taps<kTaps>& taps, int64_t n, const S* x, int64_t stride, const S* dy, int64_t channels, T* dw,
             int64_t width) {
  switch (taps.count) {
#define CAPO_TAPS(N) \
  case N:            \
    return add_taps<S, N>(taps, n, x, stride, dy, channels, dw, width)
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
template <class S>
void depthwise_weight_gradient(const capo::ConvWeightArgs& p, int64_t item) {
  using T = Computed<S>;
  constexpr int W = gemm::kWidth<T>;
  const ConvGeometry& g = p.g;
  const Phase phase = phase_of(g, false, 0);
  const int64_t channels = g.groups, begin = item * p.chunk,
                end = lesser(begin + p.chunk, g.batch * g.out[0] * g.out[1]);
  const int64_t stride = g.stride[2] * channels;
  const S* x = static_cast<const S*>(p.x);
  T* dw = static_cast<T*>(p.planes) + item * taps_of(g) * channels;
  zero(dw, taps_of(g) * channels);
  for (int64_t line = begin; line < end && g.out[2] > 0; ++line) {
    const Position at = position_of(phase.axis, line * g.out[2]);
    const S* dy = static_cast<const S*>(p.dy) + line * g.out[2] * channels;
    for_each_run<kTaps>(g, phase.axis, at, [&](int64_t t, int64_t n, const Taps<kTaps>& taps, bool, bool) {
      const S* d = dy + t * channels;
      int64_t c = 0;
      for (; c + W <= channels; c += W) add_run(taps, n, x + c, stride, d + c, channels, dw + c, channels);
      for (; c < channels; ++c)
        for (int i = 0; i < taps.count; ++i) {
          T sum = 0;
          for (int64_t j = 0; j < n; ++j) sum += load(x[taps.source[i] + j * stride + c]) * load(d[j * channels + c]);
          dw[taps.tap[i] * channels + c] += sum;
        }
    });
  }
}

}  // namespace

CAPO_CPU_KERNEL(conv_depthwise_pack, capo::ConvPackArgs) {
  if (begin != 0 || end < 1) return;
  with_element(args.dtype, [&](auto element) { pack_depthwise<decltype(element)>(args); });
}
CAPO_CPU_KERNEL(conv_depthwise, capo::ConvArgs) {
  with_element(args.dtype, [&](auto element) {
    for (int64_t i = begin; i < end; ++i) depthwise<decltype(element)>(args, i);
  });
}
CAPO_CPU_KERNEL(conv_depthwise_weight_gradient, capo::ConvWeightArgs) {
  with_element(args.dtype, [&](auto element) {
    for (int64_t i = begin; i < end; ++i) depthwise_weight_gradient<decltype(element)>(args, i);
  });
}
