#include <capo/datasets/canvas.h>
#include <capo/datasets/font.h>

#include <algorithm>
#include <cmath>

namespace capo {
namespace {

struct Span {
  int from, to;  // [from, to)
};

Span pixels_near(float a, float b, float reach, int limit) {
  const float lo = std::clamp(std::min(a, b) - reach, 0.0f, static_cast<float>(limit));
  const float hi = std::clamp(std::max(a, b) + reach + 1, 0.0f, static_cast<float>(limit));
  return {static_cast<int>(lo), static_cast<int>(hi)};
}

float coverage(float distance, float radius) { return std::clamp(radius + 0.5f - distance, 0.0f, 1.0f); }

}  // namespace

Canvas::Canvas(int height, int width, Color background) {
  CAPO_CHECK(height > 0 && width > 0 && height <= 16384 && width <= 16384, "Canvas: sides must be in [1, 16384], got ",
             height, " x ", width);
  image_ = Image(height, width, 3);
  fill_rect(0, 0, height, width, background);
}

void Canvas::blend(int y, int x, Color color, float alpha) {
  if (y < 0 || x < 0 || y >= height() || x >= width()) return;
  std::uint8_t* p = image_.at(y, x);
  const float old[3] = {static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2])};
  const float now[3] = {static_cast<float>(color.r), static_cast<float>(color.g), static_cast<float>(color.b)};
  for (int c = 0; c < 3; ++c) p[c] = static_cast<std::uint8_t>(old[c] + (now[c] - old[c]) * alpha + 0.5f);
}

void Canvas::fill_rect(int top, int left, int h, int w, Color color, float alpha) {
  const int y1 = std::min(top + h, height()), x1 = std::min(left + w, width());
  for (int y = std::max(top, 0); y < y1; ++y) {
    for (int x = std::max(left, 0); x < x1; ++x) blend(y, x, color, alpha);
  }
}

void Canvas::frame_rect(int top, int left, int h, int w, Color color, int thickness) {
  fill_rect(top, left, thickness, w, color);
  fill_rect(top + h - thickness, left, thickness, w, color);
  fill_rect(top, left, h, thickness, color);
  fill_rect(top, left + w - thickness, h, thickness, color);
}

void Canvas::line(float y0, float x0, float y1, float x1, float thickness, Color color, float alpha) {
  if (!std::isfinite(y0 + x0 + y1 + x1)) return;
  const float radius = thickness / 2;
  const Span ys = pixels_near(y0, y1, radius + 1, height());
  for (int y = ys.from; y < ys.to; ++y) {
    const Span xs = pixels_near(x0, x1, radius + 1, width());
    for (int x = xs.from; x < xs.to; ++x) {
      const float d =
          detail::segment_distance(static_cast<float>(y) + 0.5f, static_cast<float>(x) + 0.5f, y0, x0, y1, x1);
      if (d < radius + 0.5f) blend(y, x, color, alpha * coverage(d, radius));
    }
  }
}

void Canvas::disc(float y, float x, float radius, Color color) { line(y, x, y, x, 2 * radius, color); }

void Canvas::paste(const Image& image, int top, int left, int scale) {
  CAPO_CHECK(image.channels == 1 || image.channels == 3, "Canvas: only grey and RGB images can be pasted, got ",
             image.channels, " channels");
  for (int y = 0; y < image.height; ++y) {
    for (int x = 0; x < image.width; ++x) {
      const std::uint8_t* p = image.at(y, x);
      fill_rect(top + y * scale, left + x * scale, scale, scale,
                image.channels == 3 ? Color{p[0], p[1], p[2]} : Color{p[0], p[0], p[0]});
    }
  }
}

// Each set dot of the 5 x 8 font is joined to its set neighbours by strokes, so that letters are smooth at any size.
void Canvas::draw_text(float y, float x, std::string_view text, float size, Color color, bool upwards) {
  const float cell = size / 7, radius = std::max(0.62f * cell, 0.5f);
  float pen = 0;
  for (const char ch : text) {
    const detail::Glyph g = detail::glyph(ch);
    // The glyph's box on the canvas, with a margin for round caps.
    const float left = pen, wide = cell * static_cast<float>(g.width), tall = cell * 8;
    const auto place = [&](float v, float u) {  // glyph frame (down, right) -> canvas
      return upwards ? std::pair(y - u, x + v) : std::pair(y + v, x + u);
    };
    const auto a = place(-cell, left - cell), b = place(tall + cell, left + wide + cell);
    const Span ys = pixels_near(a.first, b.first, 1, height()), xs = pixels_near(a.second, b.second, 1, width());
    for (int py = ys.from; py < ys.to; ++py) {
      for (int px = xs.from; px < xs.to; ++px) {
        const float fy = static_cast<float>(py) + 0.5f, fx = static_cast<float>(px) + 0.5f;
        const float v = upwards ? fx - x : fy - y, u = (upwards ? y - fy : fx - x) - left;
        const float d = cell * detail::glyph_distance(g, v / cell, u / cell);
        if (d < radius + 0.5f) blend(py, px, color, coverage(d, radius));
      }
    }
    pen += cell * static_cast<float>(g.width + 1);
  }
}

void Canvas::text(float y, float x, std::string_view text, float size, Color color) {
  draw_text(y, x, text, size, color, false);
}

void Canvas::text_upwards(float y, float x, std::string_view text, float size, Color color) {
  draw_text(y, x, text, size, color, true);
}

float Canvas::text_width(std::string_view text, float size) {
  int cells = 0;
  for (const char ch : text) cells += detail::glyph(ch).width + 1;
  return static_cast<float>(std::max(cells - 1, 0)) * size / 7;
}

Color map_color(float v, ColorMap map) {
  // Polynomial fits of matplotlib's maps (Matt Zucker, public domain).
  static constexpr float kViridis[7][3] = {
      {0.2777273f, 0.0054073f, 0.3340998f},   {0.1050930f, 1.4046135f, 1.3845902f},
      {-0.3308618f, 0.2148476f, 0.0950952f},  {-4.6342305f, -5.7991010f, -19.3324410f},
      {6.2282699f, 14.1799334f, 56.6905526f}, {4.7763850f, -13.7451454f, -65.3530326f},
      {-5.4354559f, 4.6458526f, 26.3124352f}};
  static constexpr float kInferno[7][3] = {
      {0.0002189f, 0.0016510f, -0.0194809f},    {0.1065134f, 0.5639564f, 3.9327124f},
      {11.6024931f, -3.9728540f, -15.9423941f}, {-41.7039961f, 17.4363989f, 44.3541452f},
      {77.1629357f, -33.4023589f, -81.8073093f}, {-71.3194282f, 32.6260643f, 73.2095199f},
      {25.1311262f, -12.2426690f, -23.0703250f}};
  const auto* k = map == ColorMap::viridis ? kViridis : kInferno;
  const float t = v > 0 ? std::min(v, 1.0f) : 0.0f;
  std::uint8_t out[3];
  for (int c = 0; c < 3; ++c) {
    float sum = 0;
    for (int i = 6; i >= 0; --i) sum = sum * t + k[i][c];
    out[c] = static_cast<std::uint8_t>(std::clamp(sum, 0.0f, 1.0f) * 255 + 0.5f);
  }
  return {out[0], out[1], out[2]};
}

Color series_color(int i) {
  static constexpr Color kColors[8] = {{31, 119, 180}, {230, 97, 1},  {44, 140, 60},  {197, 38, 46},
                                       {123, 82, 171}, {140, 86, 75}, {23, 160, 178}, {90, 90, 90}};
  return kColors[((i % 8) + 8) % 8];
}

}  // namespace capo
