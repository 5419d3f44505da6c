// The order in which the positions of a tile are multiplied: those whose windows hang over the same ends of the source
// follow one another, so that whole rows of inner tiles skip the taps out there (conv_tile.h). Of 4x4 images under a
// 3x3 kernel that is three products in ten. For ops/cpu files (unnamed namespace, see kernel.h).
#pragma once

#include <capo/ops/cpu/conv_window.h>

namespace {

constexpr int64_t kMostKinds = 1024;

// How far the window at position t hangs over the end of an axis, less how far over its start: grows with t, and equal
// numbers have the same taps outside. At most `reach`, a window's length, either way.
inline int64_t overhang(const Axis& x, int64_t reach, int64_t t) {
  const int64_t first = t * x.source_step + x.offset, beyond = first + reach - x.source;
  return lesser(greater(beyond, int64_t{0}), reach) - lesser(greater(-first, int64_t{0}), reach);
}

// place[i]: the row of position number i, of m. Kinds of windows go to and fro along the last axis, so that those which
// meet in an inner tile mostly share an end.
inline void order_positions(const Axis* axis, const Piece* pieces, int64_t count, int64_t m, int* place) {
  int64_t reach[3], kinds[3];
  for (int a = 0; a < 3; ++a) {
    reach[a] = greater(axis[a].taps - 1, int64_t{0}) * axis[a].offset_step + 1;
    kinds[a] = 2 * reach[a] + 1;
  }
  const int64_t most = kinds[0] * kinds[1] * kinds[2];
  int kind[capo::kConvTile];
  bool differ = false;
  for (int64_t k = 0; k < count && most <= kMostKinds; ++k) {
    const Piece& piece = pieces[k];
    int64_t line = 0;
    for (int a = 0; a < 2; ++a) line = line * kinds[a] + overhang(axis[a], reach[a], piece.p.t[a]) + reach[a];
    const int64_t start = line * kinds[2] + (line % 2 ? kinds[2] - 1 - reach[2] : reach[2]), sign = line % 2 ? -1 : 1;
    for (int64_t i = 0; i < piece.count; ++i) {
      kind[piece.row + i] = static_cast<int>(start + sign * overhang(axis[2], reach[2], piece.p.t[2] + i));
      differ |= kind[piece.row + i] != kind[0];
    }
  }
  if (!differ) {
    for (int64_t i = 0; i < m; ++i) place[i] = static_cast<int>(i);
    return;
  }
  unsigned char next[kMostKinds];
  zero(next, most);
  for (int64_t i = 0; i < m; ++i) ++next[kind[i]];
  int before = 0;
  for (int64_t k = 0; k < most; ++k) {
    const int here = next[k];
    next[k] = static_cast<unsigned char>(before);
    before += here;
  }
  for (int64_t i = 0; i < m; ++i) place[i] = next[kind[i]]++;
}

}  // namespace
