#include <capo/ops/conv_sum_internal.h>
#include <capo/ops/cpu/conv_order.h>
#include <capo/ops/cpu/conv_tile.h>
#include <capo/ops/cpu/conv_walk.h>
#include <capo/ops/cpu/conv_window.h>
#include <capo/ops/cpu/storage.h>

namespace {

using capo::ConvArgs;
using capo::kConvTile;

// ---- The summed axis ----

// A phase sums `segments` runs of k source elements: the channels under one tap, read where they lie; or, when those
// are few, the channels under all taps of a line, read from copies of the lines (a window). A segment longer than
// kLongest is cut into pieces of `step`; shorter ones are summed `per` at a time.
struct Sum {
  bool window;
  int64_t segments, k, per, step, blocks;
  int64_t line;  // window: elements of one copied line
};
template <class T>
constexpr int64_t kLongest = capo::kConvLongest / static_cast<int64_t>(sizeof(T));
constexpr int64_t kSegments = capo::kConvSegments;
constexpr int64_t kPanelsInL2 = 640 << 10;  // bytes of weights that stay there
constexpr int64_t kStrip = 24;              // rows: whole tiles of any height

template <class T>
Sum sum_of(const Phase& phase, int64_t depth, int64_t tile) {
  using gemm::round_up;
  const Axis& w = phase.axis[2];
  Sum s{false, phase.taps, depth, 0, 0, 0, 0};
  if (w.taps > 1 && w.offset_step == 1 && depth < capo::kConvFew && w.count > 0) {
    s.line = window_line(w, lesser(tile, w.count), depth);
    s.window = ((tile - 1) / w.count + 2) * (phase.taps / w.taps) * s.line <= kWindow<T>;
  }
  if (s.window) s.segments = phase.taps / w.taps, s.k = w.taps * depth;
  if (s.k > kLongest<T>) {
    const int64_t pieces = (s.k + kLongest<T> - 1) / kLongest<T>;
    s.per = 1, s.step = round_up((s.k + pieces - 1) / pieces, 16);
    s.blocks = s.segments * ((s.k + s.step - 1) / s.step);
  } else {
    const int64_t most = lesser(kLongest<T> / s.k, kSegments), blocks = (s.segments + most - 1) / most;
    s.step = s.k, s.per = blocks > 0 ? (s.segments + blocks - 1) / blocks : 1;
    s.blocks = (s.segments + s.per - 1) / s.per;
  }
  return s;
}

// Block number b: segments first .. first + segments, elements at .. at + k of each.
struct Block {
  int64_t first, segments, at, k;
};
inline Block block_of(const Sum& s, int64_t b) {
  const int64_t pieces = (s.k + s.step - 1) / s.step;
  if (pieces > 1) return {b / pieces, 1, b % pieces * s.step, lesser(s.step, s.k - b % pieces * s.step)};
  return {b * s.per, lesser(s.per, s.segments - b * s.per), 0, s.k};
}

// ---- Weights ----

// Rows c .. c + rows of one tap, columns j .. j + n, of `merged` groups side by side: zero where the groups differ.
template <class S, class T = Computed<S>>
void pack_merged(const capo::ConvPackArgs& p, int64_t group, int64_t tap, int64_t c, int64_t rows, int64_t j, int64_t n,
                 int64_t width, T* dst) {
  const int64_t cin = p.g.cin / p.merged, cout = p.g.cout / p.merged, taps = taps_of(p.g);
  const S* w = static_cast<const S*>(p.w) + group * p.g.cout * taps * cin;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t x = 0; x < width; ++x) {
      const int64_t i = p.transposed ? j + x : c + r, o = p.transposed ? c + r : j + x;
      dst[r * width + x] = x < n && i / cin == o / cout ? load(w[(o * taps + tap) * cin + i % cin]) : T(0);
    }
}

template <class S>
void pack(const capo::ConvPackArgs& p, int64_t item) {
  using namespace gemm;
  using T = Computed<S>;
  const ConvGeometry& g = p.g;
  const int64_t depth = p.transposed ? g.cout : g.cin, n = p.transposed ? g.cin : g.cout;  // source and result channels
  const int64_t blocks = (n + 63) / 64, phases = phases_of(g, p.transposed), taps = taps_of(g),
                padded = round_up(n, kWidth<T>);
  const int64_t j0 = item % blocks * 64, group = item / blocks / phases;
  const Phase phase = phase_of(g, p.transposed, item / blocks % phases);
  const Sum sum = sum_of<T>(phase, depth, p.tile);
  const S* src = static_cast<const S*>(p.w) + group * g.cout * taps * g.cin;
  T* dst = static_cast<T*>(p.packed) + (group * taps + phase.taps_before) * depth * padded;
  const int64_t ks = p.transposed ? taps * g.cin : 1, cs = p.transposed ? 1 : taps * g.cin;
  for (int64_t b = 0; b < sum.blocks; ++b) {
    const Block block = block_of(sum, b);
    const int64_t k0 = block.first * sum.k + block.at, k = block.segments * block.k;
    for (int64_t j = j0; j < lesser(j0 + 64, n); j += kPanel<T>) {
      const int64_t columns = lesser(int64_t{kPanel<T>}, n - j), width = panel_width<T>(0, columns);
      T* panel = dst + k0 * padded + j * k;
      for (int64_t at = k0; at < k0 + k;) {  // pieces of one tap
        const int64_t c = at % depth, rows = lesser(depth - c, k0 + k - at), tap = tap_at(g, phase.axis, at / depth);
        if (p.merged > 1)
          pack_merged<S>(p, group, tap, c, rows, j, columns, width, panel + (at - k0) * width);
        else
          pack_panels(src + tap * g.cin + c * ks + j * cs, ks, cs, rows, columns, panel + (at - k0) * width);
        at += rows;
      }
    }
  }
  if (item == 0) zero(static_cast<T*>(p.packed) + g.groups * taps * depth * padded, depth);
}

// ---- Forward and data gradient ----

// Where the results of one piece find their sources under one tap: base[place[0 .. count)].
template <class T>
void find_sources(const Axis* axis, const Piece& piece, int64_t tap, const T* source, int64_t pixel, const T* zeros,
                  const int* place, const T** base) {
  const Axis &h = axis[1], &w = axis[2];
  const int64_t line = source_line(axis, piece.p, tap / w.taps / h.taps, tap / w.taps % h.taps), s = w.source_step;
  const int64_t first = piece.p.t[2] * s + w.offset + tap % w.taps * w.offset_step;
  int64_t lo = 0, hi = 0;
  if (line >= 0) {
    lo = first >= 0 ? 0 : lesser((s - 1 - first) / s, piece.count);
    hi = greater(lesser(first < w.source ? (w.source - first + s - 1) / s : 0, piece.count), lo);
  }
  for (int64_t i = 0; i < lo; ++i) base[place[i]] = zeros;
  const T* at = source + ((line < 0 ? 0 : line) * w.source + first + lo * s) * pixel;
  for (int64_t i = lo; i < hi; ++i, at += s * pixel) base[place[i]] = at;
  for (int64_t i = hi; i < piece.count; ++i) base[place[i]] = zeros;
}

// 16-bit sources of one block, rows of k elements at stored[segment * kConvTile + row] + at, widened side by side; null
// is padding.
template <class S, class T = Computed<S>>
void widen_sources(const S* const* stored, const Block& block, int64_t m, const T* zeros, T* wide, const T** base) {
  for (int64_t s = 0; s < block.segments; ++s)
    for (int64_t i = 0; i < m; ++i) {
      const S* from = stored[s * kConvTile + i];
      base[s * kConvTile + i] = from ? wide : zeros;
      if (!from) continue;
      widen(from + block.at, wide, block.k);
      wide += block.k;
    }
}

// m rows of n sums, ended and rounded to 16 bits: row i to result + out[i].
template <class S, class T = Computed<S>>
void put_rounded(const ConvArgs& p, const T* sums, int64_t m, int64_t n, S* result, const S* residual,
                 const int64_t* out) {
  const T low = static_cast<T>(p.low), high = static_cast<T>(p.high);
  for (int64_t i = 0; i < m; ++i, sums += n) {
    S* y = result + out[i];
    const S* r = residual ? residual + out[i] : nullptr;
    if (!p.ends) {
      narrow(sums, y, n);
    } else if (r) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) store(y[j], gemm::between(sums[j] + load(r[j]), low, high));
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) store(y[j], gemm::between(sums[j], low, high));
    }
  }
}

// 16-bit sources are widened as they are copied to windows, or a block of the summed axis at a time; their results are
// summed beside the result.
template <class S>
void convolve(const ConvArgs& p, int64_t item) {
  using namespace gemm;
  using T = Computed<S>;
  const ConvGeometry& g = p.g;
  const int64_t depth = p.transposed ? g.cout : g.cin, n = p.transposed ? g.cin : g.cout;
  const int64_t phases = phases_of(g, p.transposed), padded = round_up(n, kWidth<T>),
                column_blocks = (n + p.columns - 1) / p.columns;
  const int64_t at_tile = item / phases, rest = at_tile / p.tiles, group = rest / column_blocks;
  const int64_t m0 = at_tile % p.tiles * p.tile, c0 = rest % column_blocks * p.columns, c1 = lesser(c0 + p.columns, n);
  const Phase phase =
      phase_of(g, p.transposed, item % phases);  // phase after phase: they share sources and lines of the result
  const Axis *axis = phase.axis, &w = axis[2];
  const int64_t m = lesser(p.tile, g.batch * axis[0].count * axis[1].count * w.count - m0);
  if (m <= 0) return;

  const int64_t pixel = g.groups * depth, ldc = g.groups * n, taps = taps_of(g);
  const S* source = static_cast<const S*>(p.source) + group * depth;
  const T* packed = static_cast<const T*>(p.packed) + (group * taps + phase.taps_before) * depth * padded;
  const T* zeros = static_cast<const T*>(p.packed) + g.groups * taps * depth * padded;
  S* result = static_cast<S*>(p.result) + group * n;
  const S* residual = p.residual ? static_cast<const S*>(p.residual) + group * n : nullptr;
  const Sum sum = sum_of<T>(phase, depth, p.tile);

  alignas(64) T copies_of_lines[kWindow<T>];
  Window<T> window{copies_of_lines, sum.line};
  alignas(64) T bias[kPanel<T>];
  const T* base[kSegments * kConvTile];
  const S* stored[if_half<S>(kSegments * kConvTile)];
  alignas(64) T sums[if_half<S>(kConvTile * capo::kConvHalfColumns)];
  int64_t out[kConvTile], sums_row[if_half<S>(kConvTile)];
  Piece pieces[kConvTile];
  int64_t count = 0;
  Position at = position_of(axis, m0);
  for (int64_t row = 0; row < m; next_line(axis, at)) {
    pieces[count++] = {at, row, lesser(m - row, w.count - at.t[2])};
    row += pieces[count - 1].count;
  }
  int place[kConvTile];
  order_positions(axis, pieces, sum.window ? 0 : count, m, place);  // a copy holds its padding: nothing to skip
  for (int64_t k = 0; k < count; ++k) {
    const Piece& piece = pieces[k];
    const int* to = place + piece.row;
    const int64_t first = result_pixel(axis, piece.p) * ldc;
    for (int64_t i = 0; i < piece.count; ++i) out[to[i]] = first + i * w.step * ldc;
    if (sum.window) {
      const T* copies = window.add(axis, piece, source, pixel, depth);
      for (int64_t i = 0; i < piece.count; ++i) base[to[i]] = copies + i * w.source_step * depth;
    }
  }

  // Panels that stay in L2 pass by a strip of the result, which is then written from end to end.
  const bool across =
      sum.blocks == 1 && phase.taps * depth * (c1 - c0) * static_cast<int64_t>(sizeof(T)) <= kPanelsInL2;
  const int64_t strip = across ? kStrip : m;
  if constexpr (kHalf<S>)
    for (int64_t i = 0; i < m; ++i) sums_row[i] = i * (c1 - c0);
  const bool by_lines = reinterpret_cast<std::uintptr_t>(result) % 64 == 0 && ldc % 16 == 0;
  const bool streamed = !kHalf<S> && p.streamed && sum.blocks == 1 && by_lines;
  int64_t b = 0;
  do {  // once when no tap counts: stores the bias or zeros
    const Block block = sum.blocks > 0 ? block_of(sum, b) : Block{0, 0, 0, 0};
    conv_tile::Rows<T> rows{
        base, sum.window ? 0 : kConvTile, sum.window ? sum.line : 0, block.at, block.segments, block.k, zeros};
    if (sum.window) {
      rows.first += block.first * sum.line;
    } else if (block.at == 0) {
      for (int64_t s = 0; s < block.segments; ++s)
        for (int64_t i = 0; i < count; ++i) {
          const int* to = place + pieces[i].row;
          if constexpr (kHalf<S>)
            find_sources<S>(axis, pieces[i], block.first + s, source, pixel, nullptr, to, stored + s * kConvTile);
          else
            find_sources(axis, pieces[i], block.first + s, source, pixel, zeros, to, base + s * kConvTile);
        }
    }
    if constexpr (kHalf<S>)
      if (!sum.window) {
        widen_sources(stored, block, m, zeros, copies_of_lines, base);
        rows.first = 0;
      }
    const int64_t k0 = block.first * sum.k + block.at, k = block.segments * block.k;
    const T* const* first = rows.base;
    for (int64_t i = 0; i < m; i += strip)
      for (int64_t j = c0; j < c1; j += kPanel<T>) {
        const int64_t columns = lesser(int64_t{kPanel<T>}, c1 - j);
        const bool start = b == 0 && p.bias;
        if (start) {
          const S* of_group = static_cast<const S*>(p.bias) + group * n + j;
          for (int64_t x = 0; x < columns; ++x) bias[x] = load(of_group[x]);
          zero(bias + columns, kPanel<T> - columns);
        }
        const bool last = b + 1 >= sum.blocks;
        conv_tile::Target<T> target{nullptr, nullptr, j, columns, start ? bias : nullptr, b > 0, p.ends && last,
                                    nullptr, static_cast<T>(p.low), static_cast<T>(p.high), p.far && b == 0, streamed};
        if constexpr (kHalf<S>) {
          target.c = sums, target.row = sums_row + i, target.column = j - c0;
          target.ends = target.far = false;
        } else {
          target.c = result, target.row = out + i;
          if (last) target.residual = residual;
        }
        rows.base = first + i;
        conv_tile::panel(lesser(strip, m - i), rows, packed + k0 * padded + j * k, target);
      }
  } while (++b < sum.blocks);
  if constexpr (kHalf<S>) put_rounded(p, sums, m, c1 - c0, result + c0, residual ? residual + c0 : nullptr, out);
}

}  // namespace

CAPO_CPU_KERNEL(conv_pack, capo::ConvPackArgs) {
  with_element(args.dtype, [&](auto element) {
    for (int64_t i = begin; i < end; ++i) pack<decltype(element)>(args, i);
  });
}
CAPO_CPU_KERNEL(conv, capo::ConvArgs) {
  with_element(args.dtype, [&](auto element) {
    for (int64_t i = begin; i < end; ++i) convolve<decltype(element)>(args, i);
  });
  end_stream(args.streamed);
}
