// The built-in font: 5 x 8 dots per printable ASCII character (row 7 holds descenders), blank side columns trimmed.
#pragma once

#include <cstdint>

namespace capo::detail {

struct Glyph {
  const std::uint8_t* columns;  // bit 0 = top row
  int width;                    // columns
};

Glyph glyph(char ch);

// Distance from the point (py, px) to the segment from (ay, ax) to (by, bx).
float segment_distance(float py, float px, float ay, float ax, float by, float bx);

// Distance, in dots, from (row, column) to the strokes through the glyph's dots; large when it has none.
// Dot (r, c) has its centre at (r + 0.5, c + 0.5).
float glyph_distance(const Glyph& g, float row, float column);

}  // namespace capo::detail
