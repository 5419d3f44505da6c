// The weight gradient of a convolution whose input channels are whole vectors: dw = dy^T x, tap by tap, both read as
// they lie. Nothing is copied, and what a tap reads of the padding is left out of the sum. 16-bit tensors are widened:
// some rows of dy^T for all taps, and under each tap a panel of x.
#include <capo/ops/cpu/conv_walk.h>
#include <capo/ops/cpu/gemm.h>
#include <capo/ops/cpu/storage.h>

namespace {

constexpr int64_t kMostRuns = 256;

// Positions of `lines` lines, from number `first` on, that have a source under tap (jd, jh, jw), as runs of neighbours.
template <class T>
int64_t runs_under(const Axis* axis, int64_t first, int64_t lines, int64_t jd, int64_t jh, int64_t jw, const T* dy,
                   int64_t dy_row, const T* x, int64_t pixel, gemm::Run<T>* runs) {
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

// The runs of `from`, whose b are `step` apart, with n columns of b from c on widened into x, and a found in the
// widened rows of dy, of m elements, that begin where dy does.
template <class S, class T = Computed<S>>
void widen_runs(const gemm::Run<S>* from, int64_t runs, int64_t step, int64_t c, int64_t n, const S* dy, int64_t dy_row,
                const T* wide_dy, int64_t m, T* x, gemm::Run<T>* to) {
  for (int64_t i = 0; i < runs; ++i) {
    to[i] = {wide_dy + (from[i].a - dy) / dy_row * m, x, from[i].count};
    gemm::widen_rows(from[i].b + c, step, from[i].count, n, x, n);
    x += from[i].count * n;
  }
}

// One chunk of lines; some channels of dy by some of x, under every tap.
template <class S>
void weight_gradient_lines(const capo::ConvWeightArgs& p, int64_t item) {
  using T = Computed<S>;
  constexpr int64_t kPanel = gemm::kPanel<T>;
  constexpr int64_t kWideRows = capo::kConvHalfLine * 64;  // elements of dy
  gemm::Run<S> runs[kMostRuns];
  gemm::Run<T> wide_runs[if_half<S>(kMostRuns)];
  alignas(64) T wide_dy[if_half<S>(kWideRows)];
  alignas(64) T wide_x[if_half<S>(capo::kConvHalfLine * kPanel)];
  const ConvGeometry& g = p.g;
  const Phase phase = phase_of(g, false, 0);
  const Axis &h = phase.axis[1], &w = phase.axis[2];
  const int64_t blocks = (g.cin + p.columns - 1) / p.columns, row_blocks = (g.cout + p.rows - 1) / p.rows;
  const int64_t c0 = item % blocks * p.columns, c1 = lesser(c0 + p.columns, g.cin);
  const int64_t o0 = item / blocks % row_blocks * p.rows, rows = lesser(p.rows, g.cout - o0);
  const int64_t rest = item / blocks / row_blocks, group = rest % g.groups, chunk = rest / g.groups;
  const int64_t begin = chunk * p.chunk, end = lesser(begin + p.chunk, g.batch * g.out[0] * g.out[1]);
  const int64_t k_total = phase.taps * g.cin, dy_row = g.groups * g.cout, pixel = g.groups * g.cin;
  const S* x = static_cast<const S*>(p.x) + group * g.cin;
  const S* dy = static_cast<const S*>(p.dy) + group * g.cout + o0;
  T* dw = static_cast<T*>(p.planes) + ((chunk * g.groups + group) * g.cout + o0) * k_total;

  // Lines at a time: what they hold of dy stays in L2 while taps and panels pass.
  const int64_t positions = gemm::kTurnedK<T> * (rows <= 128 ? 2 : 1);
  const int64_t most = greater(lesser(positions / greater(w.count, int64_t{1}), kMostRuns), int64_t{1});
  int64_t l = begin;
  do {  // once without lines: stores zeros
    const int64_t lines = greater(lesser(most, end - l), int64_t{0});
    // Rows at a time: all, or as many 16-bit ones as fit when they are widened.
    const int64_t row_block = kHalf<S> ? kWideRows / greater(lines * w.count, int64_t{1}) / 6 * 6 : rows;
    for (int64_t r = 0; r < rows; r += row_block) {
      const int64_t m = lesser(row_block, rows - r);
      const S* d = dy + l * w.count * dy_row + r;
      if constexpr (kHalf<S>) gemm::widen_rows(d, dy_row, lines * w.count, m, wide_dy, m);
      for (int64_t tap = 0; tap < phase.taps; ++tap) {
        const int64_t jw = tap % w.taps, jh = tap / w.taps % h.taps, jd = tap / w.taps / h.taps;
        const int64_t n = runs_under(phase.axis, l, lines, jd, jh, jw, dy + r, dy_row, x, pixel, runs);
        if (n == 0 && l > begin) continue;
        // After the last tap come the next lines: of dy, and of x under the first tap.
        const bool ends = tap + 1 == phase.taps && r + row_block >= rows && l + most < end;
        const int64_t next_x = lines * h.source_step * w.source - jh * h.offset_step * w.source - jw * w.offset_step;
        for (int64_t c = c0; c < c1; c += kPanel) {
          const int64_t columns = lesser(kPanel, c1 - c);
          T* to = dw + r * k_total + tap * g.cin + c;
          if constexpr (kHalf<S>) {
            widen_runs(runs, n, w.source_step * pixel, c, columns, d, dy_row, wide_dy, m, wide_x, wide_runs);
            gemm::turned_panel(m, gemm::Runs<T>{wide_runs, n, m, columns}, 0, 0, to, k_total, columns, l > begin);
          } else {
            gemm::Runs<T> all{runs, n, dy_row, w.source_step * pixel};
            if (c + kPanel < c1)
              all.next_b = kPanel;
            else if (ends)
              all.next_a = lines * w.count * dy_row, all.next_b = next_x * pixel + c0 - c;
            gemm::turned_panel(m, all, 0, c, to, k_total, columns, l > begin);
          }
        }
      }
    }
    l += most;
  } while (l < end);
}

}  // namespace

CAPO_CPU_KERNEL(conv_weight_gradient_lines, capo::ConvWeightArgs) {
  with_element(args.dtype, [&](auto element) {
    for (int64_t i = begin; i < end; ++i) weight_gradient_lines<decltype(element)>(args, i);
  });
}
