// A small drawing surface: filled rectangles, smooth lines and discs, text in a built-in font.
#pragma once

#include <capo/datasets/image.h>

#include <string_view>

namespace capo {

struct Color {
  std::uint8_t r = 0, g = 0, b = 0;
};

// RGB, origin at the top left, y down, positions in pixels (a pixel's centre is at +0.5). Drawing outside is clipped.
class Canvas {
 public:
  Canvas(int height, int width, Color background = {255, 255, 255});

  int height() const { return image_.height; }
  int width() const { return image_.width; }
  const Image& image() const { return image_; }

  // Mixes a colour in; alpha in [0, 1].
  void blend(int y, int x, Color color, float alpha);
  void fill_rect(int top, int left, int height, int width, Color color, float alpha = 1);
  void frame_rect(int top, int left, int height, int width, Color color, int thickness = 1);
  // Round caps; coverage is computed per pixel, so slopes are smooth.
  void line(float y0, float x0, float y1, float x1, float thickness, Color color, float alpha = 1);
  void disc(float y, float x, float radius, Color color);
  // Copies an RGB or grey image, each pixel as scale x scale pixels.
  void paste(const Image& image, int top, int left, int scale = 1);

  // Printable ASCII, other bytes as '?'. `size` is the height of a capital letter; (y, x) is the top left of a capital.
  void text(float y, float x, std::string_view text, float size, Color color);
  // Read from bottom to top; (y, x) is the bottom left end of the text's box.
  void text_upwards(float y, float x, std::string_view text, float size, Color color);
  static float text_width(std::string_view text, float size);

 private:
  void draw_text(float y, float x, std::string_view text, float size, Color color, bool upwards);

  Image image_;
};

enum class ColorMap { viridis, inferno };
// v is clamped to [0, 1]; NaN counts as 0.
Color map_color(float v, ColorMap map);

// The i-th of eight distinct line colours (repeats after that).
Color series_color(int i);

}  // namespace capo
