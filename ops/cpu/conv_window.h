// Copies of the source lines that some results read, padded with zeros: in a copy the channels under all taps of a line
// lie side by side, whatever the groups and the padding. For few channels, where a tap alone is too short a run. For
// ops/cpu files (unnamed namespace, see kernel.h).
#pragma once

#include <capo/ops/cpu/conv_walk.h>
#include <capo/ops/cpu/gemm.h>
#include <capo/ops/cpu/storage.h>

namespace {

template <class T>
constexpr int64_t kWindow = capo::kConvWindow / static_cast<int64_t>(sizeof(T));  // elements of all copies

// `count` neighbours of one line of the result, from position p on: rows row .. of the tile.
struct Piece {
  Position p;
  int64_t row, count;
};

// Elements of one copy for up to `count` results of a line, and what whole vectors write beyond.
inline int64_t window_line(const Axis& w, int64_t count, int64_t depth) {
  return gemm::round_up(((count - 1) * w.source_step + w.taps) * depth, 16);
}

template <class T>
inline void clear(T* dst, int64_t n) {  // mostly a pixel or two
  for (int64_t i = 0; i < n; ++i) dst[i] = T(0);
}

// The pixels that `count` results from number t on read of one line, zeros outside; line: the line's start, or null.
// 16-bit ones are widened.
template <class S, class T = Computed<S>>
void copy_line(const Axis& w, int64_t t, int64_t count, const S* line, int64_t pixel, int64_t depth, T* dst) {
  constexpr int W = gemm::kWidth<T>;
  const int64_t first = t * w.source_step + w.offset, n = (count - 1) * w.source_step + w.taps;
  const int64_t lo = line ? lesser(greater(-first, int64_t{0}), n) : n, hi = greater(lesser(w.source - first, n), lo);
  clear(dst, lo * depth);
  clear(dst + hi * depth, (n - hi) * depth);
  if (hi <= lo) return;
  const S* src = line + (first + lo) * pixel;
  T* d = dst + lo * depth;
  if constexpr (kHalf<S>) {
    if (pixel == depth) return widen(src, d, (hi - lo) * depth);
    gemm::widen_rows(src, pixel, hi - lo, depth, d, depth);
  } else {
    if (pixel == depth) return copy(d, src, (hi - lo) * depth);
    for (int64_t i = lo; i < hi; ++i, src += pixel, d += depth) {
      int64_t c = 0;
      for (; c + W <= depth; c += W) gemm::store(d + c, gemm::load(src + c));
      for (; c < depth; ++c) d[c] = src[c];
    }
  }
}

// Copies for piece after piece of a tile. The copies for one piece lie in the order of the taps (d, h), `line` elements
// apart; neighbouring lines of the result share those that both read.
template <class T>
struct Window {
  T* next;
  int64_t line;
  Piece last = {{-1, {0, 0, 0}}, 0, 0};
  T* last_copies = nullptr;

  // The copies for one more piece. source: the group's first channel.
  template <class S>
  const T* add(const Axis* axis, const Piece& piece, const S* source, int64_t pixel, int64_t depth) {
    const Axis &d = axis[0], &h = axis[1], &w = axis[2];
    const Position &p = piece.p, &q = last.p;
    const bool follows = d.taps == 1 && h.offset_step == 1 && h.source_step <= h.taps && p.b == q.b &&
                         p.t[0] == q.t[0] && p.t[1] == q.t[1] + 1 && p.t[2] == q.t[2] && piece.count <= last.count;
    const int64_t segments = d.taps * h.taps, shared = follows ? h.taps - h.source_step : 0;
    T* copies = follows ? last_copies + h.source_step * line : next;
    for (int64_t s = shared; s < segments; ++s) {
      const int64_t from = source_line(axis, p, s / h.taps, s % h.taps);
      copy_line(w, p.t[2], piece.count, from < 0 ? nullptr : source + from * w.source * pixel, pixel, depth,
                copies + s * line);
    }
    last = piece;
    last_copies = copies;
    next = copies + segments * line;
    return copies;
  }
};

}  // namespace
