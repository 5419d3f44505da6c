// The weight gradient of a convolution with few input channels: dw^T = windows^T dy. Windows (conv_window.h) and dy are
// multiplied where they lie: a broadcast walks along a copied line, vectors are the channels of dy.
#include <capo/ops/cpu/conv_window.h>
#include <capo/ops/cpu/gemm.h>
#include <capo/ops/cpu/storage.h>

namespace {

using namespace gemm;

// `lines` lines of `count` positions: row i of A, column t of line l is base[l][t * step + i]; b follows the positions.
template <class T>
struct Lines {
  const T* const* base;
  int64_t lines, count, step, ldb;
};

template <class T, int MR, int NV>
__attribute__((noinline)) void tile(const Lines<T>& r, int64_t offset, const T* b, T* c, int64_t ldc, bool add) {
  constexpr int W = kWidth<T>;
  using V = Vector<T>;
  V acc[MR][NV];
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = V{};
  for (int64_t l = 0; l < r.lines; ++l) {
    const T* a = r.base[l] + offset;
    for (int64_t t = 0; t < r.count; ++t, a += r.step, b += r.ldb) {
      V y[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) y[j] = load(b + j * W);
#pragma GCC unroll 12
      for (int i = 0; i < MR; ++i) {
        const V e = a[i] - V{};  // broadcast
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] += e * y[j];
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      T* d = c + i * ldc + j * W;
      store(d, add ? load(d) + acc[i][j] : acc[i][j]);
    }
}

// m rows from `offset` on, NV vectors of columns.
template <class T, int NV>
void rows(int64_t m, const Lines<T>& r, int64_t offset, const T* b, T* c, int64_t ldc, bool add) {
  constexpr int R = NV == 4 || (kPanelVectors == 2 && NV == 2) ? 6 : 12;
  int64_t i = 0;
  for (; i + R <= m; i += R) tile<T, R, NV>(r, offset + i, b, c + i * ldc, ldc, add);
  for (; i + 6 <= m; i += 6) tile<T, 6, NV>(r, offset + i, b, c + i * ldc, ldc, add);
  for (; i + 3 <= m; i += 3) tile<T, 3, NV>(r, offset + i, b, c + i * ldc, ldc, add);
  for (; i < m; ++i) tile<T, 1, NV>(r, offset + i, b, c + i * ldc, ldc, add);
}

// One group for one chunk of lines: dw's plane is [groups, taps * cin, cout]. Of 16-bit tensors lines are widened as
// they are copied, and a panel's columns of dy before it passes.
template <class S>
void weight_gradient_few(const capo::ConvWeightArgs& p, int64_t item) {
  using T = Computed<S>;
  constexpr int W = kWidth<T>;
  constexpr int64_t kLines = 64, kPositions = 256;  // summed at once
  alignas(64) T copies[kWindow<T>];
  alignas(64) T dy_panel[if_half<S>(capo::kConvHalfLine * kPanel<T>)];
  const T* base[kLines];
  const ConvGeometry& g = p.g;
  const Phase phase = phase_of(g, false, 0);
  const Axis &h = phase.axis[1], &w = phase.axis[2];
  const int64_t group = item % g.groups, chunk = item / g.groups, columns = phase.taps * g.cin, k = w.taps * g.cin;
  const int64_t begin = chunk * p.chunk, end = lesser(begin + p.chunk, g.batch * g.out[0] * g.out[1]);
  const int64_t pixel = g.groups * g.cin, segments = phase.axis[0].taps * h.taps, line = window_line(w, w.count, g.cin);
  const int64_t most =
      greater(lesser(lesser(kLines, kWindow<T> / (segments * line)), kPositions / w.count), int64_t{1});
  const S* x = static_cast<const S*>(p.x) + group * g.cin;
  const S* dy = static_cast<const S*>(p.dy) + group * g.cout;
  T* dw = static_cast<T*>(p.planes) + (chunk * g.groups + group) * columns * g.cout;

  if (begin >= end) zero(dw, columns * g.cout);
  for (int64_t l = begin; l < end; l += most) {
    const int64_t lines = lesser(most, end - l);
    Window<T> window{copies, line};
    Position at = position_of(phase.axis, l * w.count);
    for (int64_t i = 0; i < lines; ++i, next_line(phase.axis, at))
      base[i] = window.add(phase.axis, {at, 0, w.count}, x, pixel, g.cin);
    Lines<T> all{base, lines, w.count, w.source_step * g.cin, g.groups * g.cout};
    for (int64_t j = 0; j < g.cout;) {
      const int64_t vectors = lesser((g.cout - j) / W, int64_t{kPanelVectors});
      const S* stored = dy + l * w.count * g.groups * g.cout + j;
      const T* from;
      if constexpr (kHalf<S>) {
        all.ldb = vectors * W;
        widen_rows(stored, g.groups * g.cout, lines * w.count, all.ldb, dy_panel, all.ldb);
        from = dy_panel;
      } else {
        from = stored;
      }
      for (int64_t s = 0; s < segments; ++s) {
        T* c = dw + s * k * g.cout + j;
        if constexpr (kPanelVectors == 4)
          if (vectors == 4) rows<T, 4>(k, all, s * line, from, c, g.cout, l > begin);
        if (vectors == 2 || vectors == 3) rows<T, 2>(k, all, s * line, from, c, g.cout, l > begin);
        if (vectors == 1) rows<T, 1>(k, all, s * line, from, c, g.cout, l > begin);
      }
      j += (vectors == 3 ? 2 : vectors) * W;
    }
  }
}

}  // namespace

CAPO_CPU_KERNEL(conv_weight_gradient_few, capo::ConvWeightArgs) {
  with_element(args.dtype, [&](auto element) {
    for (int64_t i = begin; i < end; ++i) weight_gradient_few<decltype(element)>(args, i);
  });
}
