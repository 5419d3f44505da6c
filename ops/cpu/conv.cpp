#include <capo/ops/cpu/conv_tile.h>
#include <capo/ops/cpu/conv_walk.h>
#include <capo/ops/cpu/conv_window.h>

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
constexpr int64_t kLongest = 2304 / static_cast<int64_t>(sizeof(T));  // a panel of 64 columns: 144 KiB
constexpr int64_t kSegments = 32;                                     // of a block
constexpr int64_t kPanelsInL2 = 640 << 10;                            // bytes of weights that stay there
constexpr int64_t kStrip = 24;                                        // rows: whole tiles of any height

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
template <class T>
void pack_merged(const capo::ConvPackArgs& p, int64_t group, int64_t tap, int64_t c, int64_t rows, int64_t j, int64_t n,
                 int64_t width, T* dst) {
  const int64_t cin = p.g.cin / p.merged, cout = p.g.cout / p.merged, taps = taps_of(p.g);
  const T* w = static_cast<const T*>(p.w) + group * p.g.cout * taps * cin;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t x = 0; x < width; ++x) {
      const int64_t i = p.transposed ? j + x : c + r, o = p.transposed ? c + r : j + x;
      dst[r * width + x] = x < n && i / cin == o / cout ? w[(o * taps + tap) * cin + i % cin] : T(0);
    }
}

template <class T>
void pack(const capo::ConvPackArgs& p, int64_t item) {
  using namespace gemm;
  const ConvGeometry& g = p.g;
  const int64_t depth = p.transposed ? g.cout : g.cin, n = p.transposed ? g.cin : g.cout;  // source and result channels
  const int64_t blocks = (n + 63) / 64, phases = phases_of(g, p.transposed), taps = taps_of(g),
                padded = round_up(n, kWidth<T>);
  const int64_t j0 = item % blocks * 64, group = item / blocks / phases;
  const Phase phase = phase_of(g, p.transposed, item / blocks % phases);
  const Sum sum = sum_of<T>(phase, depth, p.tile);
  const T* src = static_cast<const T*>(p.w) + group * g.cout * taps * g.cin;
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
          pack_merged(p, group, tap, c, rows, j, columns, width, panel + (at - k0) * width);
        else
          pack_panel(src + tap * g.cin + c * ks + j * cs, ks, cs, rows, columns, panel + (at - k0) * width);
        at += rows;
      }
    }
  }
  if (item == 0) zero(static_cast<T*>(p.packed) + g.groups * taps * depth * padded, depth);
}

// ---- Forward and data gradient ----

// Where the results of one piece find their sources under one tap: base[0 .. count).
template <class T>
void find_sources(const Axis* axis, const Piece& piece, int64_t tap, const T* source, int64_t pixel, const T* zeros,
                  const T** base) {
  const Axis &h = axis[1], &w = axis[2];
  const int64_t line = source_line(axis, piece.p, tap / w.taps / h.taps, tap / w.taps % h.taps), s = w.source_step;
  const int64_t first = piece.p.t[2] * s + w.offset + tap % w.taps * w.offset_step;
  int64_t lo = 0, hi = 0;
  if (line >= 0) {
    lo = first >= 0 ? 0 : lesser((s - 1 - first) / s, piece.count);
    hi = greater(lesser(first < w.source ? (w.source - first + s - 1) / s : 0, piece.count), lo);
  }
  for (int64_t i = 0; i < lo; ++i) base[i] = zeros;
  const T* at = source + ((line < 0 ? 0 : line) * w.source + first + lo * s) * pixel;
  for (int64_t i = lo; i < hi; ++i, at += s * pixel) base[i] = at;
  for (int64_t i = hi; i < piece.count; ++i) base[i] = zeros;
}

template <class T>
void convolve(const ConvArgs& p, int64_t item) {
  using namespace gemm;
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
  const T* source = static_cast<const T*>(p.source) + group * depth;
  const T* packed = static_cast<const T*>(p.packed) + (group * taps + phase.taps_before) * depth * padded;
  const T* zeros = static_cast<const T*>(p.packed) + g.groups * taps * depth * padded;
  T* result = static_cast<T*>(p.result) + group * n;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + group * n : nullptr;
  const Sum sum = sum_of<T>(phase, depth, p.tile);

  alignas(64) T copies_of_lines[kWindow<T>];
  Window<T> window{copies_of_lines, sum.line};
  alignas(64) T bias[kPanel<T>];
  const T* base[kSegments * kConvTile];
  int64_t out[kConvTile];
  Piece pieces[kConvTile];
  int64_t count = 0;
  Position at = position_of(axis, m0);
  for (int64_t row = 0; row < m; next_line(axis, at)) {
    const Piece piece{at, row, lesser(m - row, w.count - at.t[2])};
    const int64_t to = result_pixel(axis, at) * ldc;
    for (int64_t i = 0; i < piece.count; ++i) out[row + i] = to + i * w.step * ldc;
    if (sum.window) {
      const T* copies = window.add(axis, piece, source, pixel, depth);
      for (int64_t i = 0; i < piece.count; ++i) base[row + i] = copies + i * w.source_step * depth;
    }
    pieces[count++] = piece;
    row += piece.count;
  }

  // Panels that stay in L2 pass by a strip of the result, which is then written from end to end.
  const bool across = sum.blocks == 1 && phase.taps * depth * (c1 - c0) * static_cast<int64_t>(sizeof(T)) <= kPanelsInL2;
  const int64_t strip = across ? kStrip : m;
  const bool streamed = p.streamed && sum.blocks == 1 && reinterpret_cast<std::uintptr_t>(result) % 64 == 0 && ldc % 16 == 0;
  int64_t b = 0;
  do {  // once when no tap counts: stores the bias or zeros
    const Block block = sum.blocks > 0 ? block_of(sum, b) : Block{0, 0, 0, 0};
    conv_tile::Rows<T> rows{
        base, sum.window ? 0 : kConvTile, sum.window ? sum.line : 0, block.at, block.segments, block.k, zeros};
    if (sum.window) {
      rows.first += block.first * sum.line;
    } else if (block.at == 0) {
      for (int64_t s = 0; s < block.segments; ++s)
        for (int64_t i = 0; i < count; ++i)
          find_sources(axis, pieces[i], block.first + s, source, pixel, zeros, base + s * kConvTile + pieces[i].row);
    }
    const int64_t k0 = block.first * sum.k + block.at, k = block.segments * block.k;
    const T* const* first = rows.base;
    for (int64_t i = 0; i < m; i += strip)
      for (int64_t j = c0; j < c1; j += kPanel<T>) {
        const int64_t columns = lesser(int64_t{kPanel<T>}, c1 - j);
        const bool start = b == 0 && p.bias;
        if (start) {
          copy(bias, static_cast<const T*>(p.bias) + group * n + j, columns);
          zero(bias + columns, kPanel<T> - columns);
        }
        const bool last = b + 1 >= sum.blocks;
        const conv_tile::Target<T> target{result, out + i, j, columns, start ? bias : nullptr, b > 0, p.ends && last,
                                          last ? residual : nullptr, static_cast<T>(p.low), static_cast<T>(p.high),
                                          p.far && b == 0, streamed};
        rows.base = first + i;
        conv_tile::panel(lesser(strip, m - i), rows, packed + k0 * padded + j * k, target);
      }
  } while (++b < sum.blocks);
}

}  // namespace

CAPO_CPU_KERNEL(conv_pack, capo::ConvPackArgs) {
  for (int64_t i = begin; i < end; ++i) args.dtype == capo::DType::f32 ? pack<float>(args, i) : pack<double>(args, i);
}
CAPO_CPU_KERNEL(conv, capo::ConvArgs) {
  for (int64_t i = begin; i < end; ++i)
    args.dtype == capo::DType::f32 ? convolve<float>(args, i) : convolve<double>(args, i);
  end_stream(args.streamed);
}
