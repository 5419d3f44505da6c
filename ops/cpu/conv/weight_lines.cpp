// The weight gradient of a convolution whose input channels are whole vectors: dw = dy^T x, tap by tap, both read as they lie.
// Nothing is copied, and what a tap reads of the padding is left out of the sum.
#include <capo/ops/cpu/conv_walk.h>
#include <capo/ops/cpu/gemm.h>

namespace {

constexpr int64_t kMostRuns = 256;

// The positions of `lines` lines, from number `first` on, that have a source under tap (jd, jh, jw), as runs of neighbours.
template <class T>
int64_t runs_under(const Axis* axis, int64_t first, int64_t lines, int64_t jd, int64_t jh, int64_t jw, const T* dy, int64_t dy_row,
                   const T* x, int64_t pixel, gemm::Run<T>* runs) {
  const Axis& w = axis[2];
  const int64_t from = w.offset + jw * w.offset_step;
  const int64_t lo = from < 0 ? (-from + w.source_step - 1) / w.source_step : 0;
  const int64_t hi = from < w.source ? lesser((w.source - 1 - from) / w.source_step + 1, w.count) : 0;
  if (hi <= lo || lines <= 0) return 0;
  Position at = position_of(axis, first * w.count);
  int64_t n = 0;
  for (int64_t l = 0; l < lines; ++l, next_line(axis, at)) {
    const int64_t line = source_line(axis, at, jd, jh);
    if (line < 0) continue;
    const T* a = dy + ((first + l) * w.count + lo) * dy_row;
    const T* b = x + (line * w.source + lo * w.source_step + from) * pixel;
    gemm::Run<T>* last = runs + n - 1;
    if (n > 0 && last->a + last->count * dy_row == a && last->b + last->count * w.source_step * pixel == b)
      last->count += hi - lo;
    else
      runs[n++] = {a, b, hi - lo};
  }
  return n;
}

// One chunk of lines; some channels of dy by some of x, under every tap.
template <class T>
void weight_gradient_lines(const capo::ConvWeightArgs& p, int64_t item) {
  constexpr int64_t kPanel = gemm::kPanel<T>;
  gemm::Run<T> runs[kMostRuns];
  const ConvGeometry& g = p.g;
  const Phase phase = phase_of(g, false, 0);
  const Axis &h = phase.axis[1], &w = phase.axis[2];
  const int64_t blocks = (g.cin + p.columns - 1) / p.columns, row_blocks = (g.cout + p.rows - 1) / p.rows;
  const int64_t c0 = item % blocks * p.columns, c1 = lesser(c0 + p.columns, g.cin);
  const int64_t o0 = item / blocks % row_blocks * p.rows, rows = lesser(p.rows, g.cout - o0);
  const int64_t rest = item / blocks / row_blocks, group = rest % g.groups, chunk = rest / g.groups;
  const int64_t begin = chunk * p.chunk, end = lesser(begin + p.chunk, g.batch * g.out[0] * g.out[1]);
  const int64_t k_total = phase.taps * g.cin, dy_row = g.groups * g.cout, pixel = g.groups * g.cin;
  const T* x = static_cast<const T*>(p.x) + group * g.cin;
  const T* dy = static_cast<const T*>(p.dy) + group * g.cout + o0;
  T* dw = static_cast<T*>(p.planes) + ((chunk * g.groups + group) * g.cout + o0) * k_total;

  // Lines at a time: what they hold of dy stays in L2 while taps and panels pass.
  const int64_t positions = gemm::kTurnedK<T> * (rows <= 128 ? 2 : 1);
  const int64_t most = greater(lesser(positions / greater(w.count, int64_t{1}), kMostRuns), int64_t{1});
  int64_t l = begin;
  do {  // once without lines: stores zeros
    const int64_t lines = greater(lesser(most, end - l), int64_t{0});
    for (int64_t tap = 0; tap < phase.taps; ++tap) {
      const int64_t jw = tap % w.taps, jh = tap / w.taps % h.taps, jd = tap / w.taps / h.taps;
      const int64_t n = runs_under(phase.axis, l, lines, jd, jh, jw, dy, dy_row, x, pixel, runs);
      if (n == 0 && l > begin) continue;
      const gemm::Runs<T> all{runs, n, dy_row, w.source_step * pixel};
      for (int64_t c = c0; c < c1; c += kPanel)
        gemm::turned_panel(rows, all, 0, c, dw + tap * g.cin + c, k_total, lesser(kPanel, c1 - c), l > begin);
    }
    l += most;
  } while (l < end);
}

}  // namespace

CAPO_CPU_KERNEL(conv_weight_gradient_lines, capo::ConvWeightArgs) {
  for (int64_t i = begin; i < end; ++i)
    args.dtype == capo::DType::f32 ? weight_gradient_lines<float>(args, i) : weight_gradient_lines<double>(args, i);
}
