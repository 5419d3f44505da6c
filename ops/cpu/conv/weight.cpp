#include <capo/ops/cpu/conv_walk.h>
#include <capo/ops/cpu/gemm.h>
#include <capo/ops/cpu/storage.h>

namespace {

// ---- The sources as panels ----

// n elements, a constant number of bytes at a time: two copies that overlap.
template <int B, class T>
inline void copy_twice(T* dst, const T* src, int64_t n) {
  constexpr int64_t k = B / static_cast<int64_t>(sizeof(T));
  __builtin_memcpy(dst, src, B);
  __builtin_memcpy(dst + n - k, src + n - k, B);
}

// `count` rows of n elements, `width` apart in dst and `step` apart in src; 16-bit ones are widened.
template <class S, class T = Computed<S>>
  requires kHalf<S>
void copy_rows(T* dst, int64_t width, const S* src, int64_t step, int64_t count, int64_t n) {
  gemm::widen_rows(src, step, count, n, dst, width);
}
template <class T>
void copy_rows(T* dst, int64_t width, const T* src, int64_t step, int64_t count, int64_t n) {
  using namespace gemm;
  constexpr int W = kWidth<T>;
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T)), whole = (n - 1) / W * W;  // all but the last vector
  if (n == W) {
    for (int64_t i = 0; i < count; ++i, dst += width, src += step) store(dst, load(src));
  } else if (n == 4 * W) {
    for (int64_t i = 0; i < count; ++i, dst += width, src += step) {
      store(dst, load(src)), store(dst + W, load(src + W)), store(dst + 2 * W, load(src + 2 * W));
      store(dst + 3 * W, load(src + 3 * W));
    }
  } else if (n > W) {
    for (int64_t i = 0; i < count; ++i, dst += width, src += step) {
      for (int64_t j = 0; j < whole; j += W) store(dst + j, load(src + j));
      store(dst + n - W, load(src + n - W));
    }
  } else if (bytes >= 32) {
    for (int64_t i = 0; i < count; ++i, dst += width, src += step) copy_twice<32>(dst, src, n);
  } else if (bytes >= 16) {
    for (int64_t i = 0; i < count; ++i, dst += width, src += step) copy_twice<16>(dst, src, n);
  } else {
    for (int64_t i = 0; i < count; ++i, dst += width, src += step)
      for (int64_t j = 0; j < n; ++j) dst[j] = src[j];
  }
}

// n columns that lie side by side under the taps of one line, for `depth` positions from number m on; `element`: the
// first column's place in the line, from the pixel of the last axis's first tap. Zeros outside.
template <class S, class T = Computed<S>>
void fill_piece(const Axis* axis, int64_t m, int64_t depth, int64_t jd, int64_t jh, int64_t element, const S* x,
                int64_t pixel, int64_t n, T* dst, int64_t width) {
  const Axis& w = axis[2];
  const int64_t step = w.source_step * pixel, room = w.source * pixel;
  Position at = position_of(axis, m);
  for (int64_t row = 0; row < depth; next_line(axis, at)) {
    const int64_t count = lesser(depth - row, w.count - at.t[2]), line = source_line(axis, at, jd, jh);
    const int64_t first = (at.t[2] * w.source_step + w.offset) * pixel + element;
    int64_t lo = 0, hi = 0;  // of the rows that lie wholly inside
    if (line >= 0) {
      lo = first >= 0 ? 0 : lesser((step - 1 - first) / step, count);
      hi = greater(lesser(room - n - first >= 0 ? (room - n - first) / step + 1 : 0, count), lo);
    }
    const S* src = x + (line < 0 ? 0 : line) * room;
    if (hi > lo) copy_rows(dst + lo * width, width, src + first + lo * step, step, hi - lo, n);
    for (int64_t i = 0; i < count; ++i) {
      if (i == lo && hi > lo) i = hi;
      if (i >= count) break;
      const int64_t e = first + i * step;
      const int64_t begin = line < 0 ? n : lesser(greater(-e, int64_t{0}), n),
                    end = greater(lesser(room - e, n), begin);
      T* d = dst + i * width;
      zero(d, n);
      for (int64_t j = begin; j < end; ++j) d[j] = load(src[e + j]);
    }
    row += count;
    dst += count * width;
  }
}

// Columns c .. c + n, at most a panel, of the matrix of (tap, channel) columns: rows m .. m + depth.
template <class S, class T = Computed<S>>
void fill_panel(const Phase& phase, int64_t m, int64_t depth, const S* x, int64_t pixel, int64_t channels, int64_t c,
                int64_t n, T* dst) {
  const Axis &h = phase.axis[1], &w = phase.axis[2];
  const int64_t width = gemm::panel_width<T>(0, n);
  const bool dense = w.offset_step == 1 && pixel == channels;  // the taps of a line lie side by side
  const int64_t unit = dense ? w.taps * channels : channels;
  for (int64_t j = 0; j < n;) {
    const int64_t at = (c + j) / unit, in = (c + j) % unit, columns = lesser(unit - in, n - j);
    const int64_t line = dense ? at : at / w.taps, element = dense ? in : at % w.taps * w.offset_step * pixel + in;
    fill_piece(phase.axis, m, depth, line / h.taps, line % h.taps, element, x, pixel, columns, dst + j, width);
    j += columns;
  }
  for (int64_t i = 0; i < depth && n < width; ++i) zero(dst + i * width + n, width - n);
}

// ---- The product ----

// Some channels of dy and some (tap, channel) columns for one chunk of positions: dw = dy^T columns.
template <class S>
void weight_gradient(const capo::ConvWeightArgs& p, int64_t item) {
  using namespace gemm;
  using T = Computed<S>;
  constexpr int64_t kRows = 96, kDepth = 128;  // channels of dy at once; positions at once
  constexpr int64_t kLda = kDepth + 16;        // not a power of two: cache sets
  alignas(64) T columns[kDepth * capo::kConvColumns];
  alignas(64) T a_rows[kRows * kLda];
  const ConvGeometry& g = p.g;
  const Phase phase = phase_of(g, false, 0);
  const int64_t k_total = phase.taps * g.cin, column_blocks = (k_total + p.columns - 1) / p.columns,
                row_blocks = (g.cout + p.rows - 1) / p.rows;
  const int64_t c0 = item % column_blocks * p.columns, c1 = lesser(c0 + p.columns, k_total);
  const int64_t o0 = item / column_blocks % row_blocks * p.rows, o1 = lesser(o0 + p.rows, g.cout);
  const int64_t rest = item / column_blocks / row_blocks, group = rest % g.groups, chunk = rest / g.groups;
  const int64_t positions = g.batch * g.out[0] * g.out[1] * g.out[2];
  const int64_t begin = chunk * p.chunk, end = lesser(begin + p.chunk, positions);
  const S* x = static_cast<const S*>(p.x) + group * g.cin;
  const S* dy = static_cast<const S*>(p.dy) + group * g.cout;
  const int64_t dy_row = g.groups * g.cout;
  T* dw = static_cast<T*>(p.planes) + (chunk * g.groups + group) * g.cout * k_total + c0;

  if (begin >= end)  // no position at all: the gradient is zero
    for (int64_t o = o0; o < o1; ++o) zero(dw + o * k_total, c1 - c0);
  for (int64_t m = begin; m < end; m += kDepth) {
    const int64_t depth = lesser(kDepth, end - m);
    for (int64_t j = 0; j < c1 - c0; j += kPanel<T>)
      fill_panel(phase, m, depth, x, g.groups * g.cin, g.cin, c0 + j, lesser(int64_t{kPanel<T>}, c1 - c0 - j),
                 columns + j * depth);
    for (int64_t o = o0; o < o1; o += kRows) {
      const int64_t rows = lesser(kRows, o1 - o);
      if constexpr (kHalf<S>)
        pack_rows_half(dy + m * dy_row + o, int64_t{1}, dy_row, rows, depth, a_rows, kLda);
      else
        pack_rows(dy + m * dy_row + o, int64_t{1}, dy_row, rows, depth, a_rows, kLda);
      block(rows, c1 - c0, depth, a_rows, kLda, columns, dw + o * k_total, k_total, m > begin);
    }
  }
}

// ---- The sum of the chunks ----

// Elements i .. i + n of a plane, summed, to dw [groups * rows, taps, cin], of merged groups those of a row's own
// group. The plane is [groups, taps * merged * cin, rows] ..
template <class S, class T>
void scatter_turned(const capo::ConvJoinArgs& p, int64_t i, int64_t n, const T* sum, S* dw) {
  const int64_t width = p.merged * p.cin, columns = p.taps * width, rows = p.merged * p.cout;
  for (int64_t x = 0; x < n;) {
    const int64_t at = (i + x) / rows, row = (i + x) % rows, here = lesser(rows - row, n - x);
    const int64_t group = at / columns, tap = at % columns / width, c = at % width, first = c / p.cin * p.cout;
    S* to = dw + (group * rows * p.taps + tap) * p.cin + c % p.cin;
    for (int64_t r = greater(first, row); r < lesser(first + p.cout, row + here); ++r)
      store(to[r * p.taps * p.cin], sum[x + r - row]);
    x += here;
  }
}
// .. or [groups * rows, taps, merged * cin].
template <class S, class T>
void scatter_merged(const capo::ConvJoinArgs& p, int64_t i, int64_t n, const T* sum, S* dw) {
  const int64_t width = p.merged * p.cin;
  for (int64_t x = 0; x < n;) {
    const int64_t line = (i + x) / width, c = (i + x) % width, here = lesser(width - c, n - x);
    const int64_t first = line / p.taps / p.cout % p.merged * p.cin;
    for (int64_t y = greater(first, c); y < lesser(first + p.cin, c + here); ++y)
      store(dw[line * p.cin + y - first], sum[x + y - c]);
    x += here;
  }
}

template <class S>
void join(const capo::ConvJoinArgs& p, int64_t begin, int64_t end) {
  using T = Computed<S>;
  constexpr int64_t kPart = 256;
  const T* planes = static_cast<const T*>(p.planes);
  S* dw = static_cast<S*>(p.dw);
  for (int64_t i = begin; i < end; i += kPart) {
    const int64_t n = lesser(kPart, end - i);
    T sum[kPart];
    copy(sum, planes + i, n);
    for (int64_t c = 1; c < p.chunks; ++c) {
      const T* plane = planes + c * p.plane + i;
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) sum[x] += plane[x];
    }
    if (p.turned)
      scatter_turned(p, i, n, sum, dw);
    else if (p.merged > 1)
      scatter_merged(p, i, n, sum, dw);
    else
      for (int64_t x = 0; x < n; ++x) store(dw[i + x], sum[x]);
  }
}

}  // namespace

CAPO_CPU_KERNEL(conv_weight_gradient, capo::ConvWeightArgs) {
  with_element(args.dtype, [&](auto element) {
    for (int64_t i = begin; i < end; ++i) weight_gradient<decltype(element)>(args, i);
  });
}
CAPO_CPU_KERNEL(conv_join, capo::ConvJoinArgs) {
  with_element(args.dtype, [&](auto element) { join<decltype(element)>(args, begin, end); });
}
