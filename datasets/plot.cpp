#include <capo/datasets/plot.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace capo {
namespace {

constexpr Color kInk{40, 40, 46}, kSoft{95, 95, 104}, kGrid{228, 228, 233}, kAxis{120, 120, 128};

struct Range {
  double lo = std::numeric_limits<double>::infinity(), hi = -std::numeric_limits<double>::infinity();
  void add(double v) {
    if (!std::isfinite(v)) return;
    lo = std::min(lo, v);
    hi = std::max(hi, v);
  }
  bool empty() const { return lo > hi; }
};

struct Tick {
  double at;
  std::string text;
};

std::string number(double v, int decimals) {
  char text[64];
  if (std::abs(v) >= 1e6 || (decimals > 6 && v != 0)) {
    std::snprintf(text, sizeof text, "%.3g", v);
  } else {
    std::snprintf(text, sizeof text, "%.*f", decimals, v == 0 ? 0.0 : v);
  }
  return text;
}

// Steps of 1, 2 or 5 times a power of ten, about `wanted` of them.
std::vector<Tick> linear_ticks(const Range& r, int wanted) {
  const double raw = (r.hi - r.lo) / std::max(wanted, 1);
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  const double unit = raw / power;
  const double step = power * (unit <= 1 ? 1 : unit <= 2 ? 2 : unit <= 5 ? 5 : 10);
  const int decimals = std::clamp(static_cast<int>(-std::floor(std::log10(step * 1.0001))), 0, 12);
  std::vector<Tick> ticks;
  const double first = std::ceil(r.lo / step - 1e-9);
  for (int i = 0; i < 100; ++i) {
    const double v = (first + i) * step;
    if (v > r.hi + 1e-9 * step) break;
    ticks.push_back({v, number(v, decimals)});
  }
  return ticks;
}

// The range is of log10 values.
std::vector<Tick> log_ticks(const Range& r) {
  std::vector<Tick> ticks;
  const bool fine = r.hi - r.lo < 2.5, coarse = r.hi - r.lo > 8;
  for (int p = static_cast<int>(std::floor(r.lo)); p <= static_cast<int>(std::ceil(r.hi)); ++p) {
    for (const int m : {1, 2, 5}) {
      const double at = p + std::log10(m);
      if ((m > 1 && !fine) || (coarse && p % 2 != 0) || at < r.lo - 1e-9 || at > r.hi + 1e-9) continue;
      char text[32];
      std::snprintf(text, sizeof text, "%g", m * std::pow(10.0, p));
      ticks.push_back({at, text});
    }
  }
  return ticks;
}

// Room around the data; a flat series still needs a height.
void widen(Range& r, double share) {
  if (r.empty()) r = {0, 1};
  double room = (r.hi - r.lo) * share;
  if (r.hi - r.lo <= std::abs(r.hi) * 1e-12) room = r.hi == 0 ? 1 : std::abs(r.hi) * 0.1;
  r.lo -= room;
  r.hi += room;
}

struct Point {
  float y, x;
  bool ok;
};

struct Frame {  // the plotting area and its mapping
  int top, left, height, width;
  Range x, y;
  bool log_y;

  float px(double v) const { return static_cast<float>(left + (v - x.lo) / (x.hi - x.lo) * width); }
  float py(double axis) const { return static_cast<float>(top + (y.hi - axis) / (y.hi - y.lo) * height); }
  double axis_y(double v) const {
    if (!log_y) return v;
    return v > 0 ? std::log10(v) : std::numeric_limits<double>::quiet_NaN();
  }
};

std::vector<Point> place(const Series& s, const Frame& f) {
  std::vector<Point> points;
  for (std::size_t i = 0; i < s.y.size(); ++i) {
    const double x = s.x.empty() ? static_cast<double>(i) : s.x[i], y = f.axis_y(s.y[i]);
    const bool ok = std::isfinite(x) && std::isfinite(y);
    // Lines that leave a fixed range end at its edge.
    points.push_back(ok ? Point{f.py(std::clamp(y, f.y.lo, f.y.hi)), f.px(x), true} : Point{0, 0, false});
  }
  return points;
}

void draw_legend(Canvas& canvas, const Frame& f, const std::vector<Series>& series, const std::vector<Color>& colors,
                 const std::vector<std::vector<Point>>& points) {
  constexpr float kSize = 11, kRow = 21;
  float wide = 0;
  int rows = 0;
  for (const auto& s : series) {
    if (s.name.empty()) continue;
    wide = std::max(wide, Canvas::text_width(s.name, kSize));
    ++rows;
  }
  if (rows == 0) return;
  const int w = static_cast<int>(wide) + 54, h = static_cast<int>(kRow * static_cast<float>(rows)) + 12;
  const int tops[2] = {f.top + 10, f.top + f.height - h - 10}, lefts[2] = {f.left + f.width - w - 10, f.left + 10};
  int best_top = tops[0], best_left = lefts[0];
  long best = std::numeric_limits<long>::max();
  for (const int top : tops) {
    for (const int left : lefts) {
      long hits = 0;
      for (const auto& line : points) {
        for (const auto& p : line) {
          const auto y = static_cast<int>(p.y), x = static_cast<int>(p.x);
          hits += p.ok && y > top - 6 && y < top + h + 6 && x > left - 6 && x < left + w + 6;
        }
      }
      if (hits < best) best = hits, best_top = top, best_left = left;
    }
  }
  canvas.fill_rect(best_top, best_left, h, w, {255, 255, 255}, 0.88f);
  canvas.frame_rect(best_top, best_left, h, w, {208, 208, 214});
  float y = static_cast<float>(best_top) + 6 + (kRow - kSize) / 2;
  const auto x = static_cast<float>(best_left);
  for (std::size_t i = 0; i < series.size(); ++i) {
    if (series[i].name.empty()) continue;
    const float mid = y + kSize / 2;
    canvas.line(mid, x + 12, mid, x + 36, series[i].thin ? 1.2f : 2.6f, colors[i], series[i].thin ? 0.55f : 1);
    if (series[i].markers) canvas.disc(mid, x + 24, 3.8f, colors[i]);
    canvas.text(y, x + 45, series[i].name, kSize, kInk);
    y += kRow;
  }
}

// Cut to the room it has, with two dots where something is missing.
std::string fit(std::string text, float size, float room) {
  bool cut = false;
  while (!text.empty() && Canvas::text_width(cut ? text + ".." : text, size) > room) {
    text.pop_back();
    cut = true;
  }
  return cut ? text + ".." : text;
}

}  // namespace

Image plot(const std::vector<Series>& series, const PlotOptions& o) {
  CAPO_CHECK(o.width >= 200 && o.height >= 150, "plot: must be at least 200 wide and 150 high, got ", o.width, " x ",
             o.height);
  Frame f{};
  f.log_y = o.log_y;
  for (const auto& s : series) {
    CAPO_CHECK(s.x.empty() || s.x.size() == s.y.size(), "plot: series \"", s.name, "\" must have one x per y, got ",
               s.x.size(), " and ", s.y.size());
    for (std::size_t i = 0; i < s.y.size(); ++i) {
      const double y = f.axis_y(s.y[i]);
      if (!std::isfinite(y)) continue;
      f.x.add(s.x.empty() ? static_cast<double>(i) : s.x[i]);
      f.y.add(y);
    }
  }
  widen(f.x, 0.02);
  if (o.y_min < o.y_max) {
    f.y = {f.axis_y(o.y_min), f.axis_y(o.y_max)};
    CAPO_CHECK(std::isfinite(f.y.lo), "plot: a logarithmic range must be positive, got ", o.y_min);
  } else {
    widen(f.y, 0.06);
  }

  constexpr float kTickSize = 11, kLabelSize = 12.5f, kTitleSize = 16;
  f.top = o.title.empty() ? 24 : 56;
  f.height = o.height - f.top - (o.x_label.empty() ? 42 : 66);
  const auto y_ticks = o.log_y ? log_ticks(f.y) : linear_ticks(f.y, std::max(f.height / 70, 2));
  float tick_width = 0;
  for (const auto& t : y_ticks) tick_width = std::max(tick_width, Canvas::text_width(t.text, kTickSize));
  f.left = static_cast<int>(tick_width) + (o.y_label.empty() ? 28 : 56);
  f.width = o.width - f.left - 26;
  const auto x_ticks = linear_ticks(f.x, std::max(f.width / 100, 2));

  Canvas canvas(o.height, o.width);
  const float bottom = static_cast<float>(f.top + f.height), left = static_cast<float>(f.left);
  for (const auto& t : y_ticks) {
    const float y = f.py(t.at);
    canvas.fill_rect(static_cast<int>(y), f.left, 1, f.width, kGrid);
    canvas.text(y - kTickSize / 2, left - 10 - Canvas::text_width(t.text, kTickSize), t.text, kTickSize, kSoft);
  }
  for (const auto& t : x_ticks) {
    const float x = f.px(t.at);
    canvas.fill_rect(f.top, static_cast<int>(x), f.height, 1, kGrid);
    canvas.fill_rect(f.top + f.height, static_cast<int>(x), 5, 1, kAxis);
    canvas.text(bottom + 12, x - Canvas::text_width(t.text, kTickSize) / 2, t.text, kTickSize, kSoft);
  }
  canvas.fill_rect(f.top + f.height, f.left, 1, f.width, kAxis);
  canvas.fill_rect(f.top, f.left, f.height + 1, 1, kAxis);

  std::vector<Color> colors;
  std::vector<std::vector<Point>> points;
  for (std::size_t i = 0; i < series.size(); ++i) {
    const Series& s = series[i];
    colors.push_back(series_color(s.color >= 0 ? s.color : static_cast<int>(i)));
    points.push_back(place(s, f));
    const auto& line = points.back();
    for (std::size_t k = 0; k < line.size(); ++k) {
      const Point& p = line[k];
      if (!p.ok) continue;
      const bool joined = k > 0 && line[k - 1].ok, lonely = !joined && (k + 1 == line.size() || !line[k + 1].ok);
      if (joined)
        canvas.line(line[k - 1].y, line[k - 1].x, p.y, p.x, s.thin ? 1.2f : 2.4f, colors[i], s.thin ? 0.45f : 1);
      if (s.markers || lonely) canvas.disc(p.y, p.x, 3.8f, colors[i]);
    }
  }
  draw_legend(canvas, f, series, colors, points);

  const float middle = left + static_cast<float>(f.width) / 2;
  canvas.text(20, middle - Canvas::text_width(o.title, kTitleSize) / 2, o.title, kTitleSize, kInk);
  canvas.text(static_cast<float>(o.height) - 25, middle - Canvas::text_width(o.x_label, kLabelSize) / 2, o.x_label,
              kLabelSize, kInk);
  canvas.text_upwards(
      static_cast<float>(f.top) + static_cast<float>(f.height) / 2 + Canvas::text_width(o.y_label, kLabelSize) / 2, 14,
      o.y_label, kLabelSize, kInk);
  return canvas.image();
}

Image contact_sheet(const std::vector<Image>& images, const std::vector<Caption>& captions, int columns, int scale) {
  CAPO_CHECK(!images.empty() && columns > 0 && scale > 0,
             "contact_sheet: needs images, columns > 0 and scale > 0, got ", images.size(), " images, columns ",
             columns, ", scale ", scale);
  CAPO_CHECK(captions.empty() || captions.size() == images.size(),
             "contact_sheet: captions must be none or one per image, got ", captions.size(), " for ", images.size());
  constexpr int kGap = 8, kFrame = 2;
  int cell_h = 1, cell_w = 1;
  for (const auto& im : images) {
    cell_h = std::max(cell_h, im.height * scale);
    cell_w = std::max(cell_w, im.width * scale);
  }
  const int n = static_cast<int>(images.size()), rows = (n + columns - 1) / columns, cols = std::min(columns, n);
  const float size = cell_w < 90 ? 7.0f : 9.0f;
  const int line_h = static_cast<int>(size) + 5;
  int lines = 0;
  for (const auto& c : captions)
    lines = std::max(lines, static_cast<int>(std::count(c.text.begin(), c.text.end(), '\n')) + 1);
  const int text_h = captions.empty() ? 0 : line_h * lines + 4;
  const int step_y = cell_h + 2 * kFrame + text_h + kGap, step_x = cell_w + 2 * kFrame + kGap;
  Canvas canvas(rows * step_y + kGap, cols * step_x + kGap);
  for (int i = 0; i < n; ++i) {
    const Image& im = images[static_cast<std::size_t>(i)];
    const int top = kGap + i / columns * step_y, left = kGap + i % columns * step_x;
    const int y = top + kFrame + (cell_h - im.height * scale) / 2, x = left + kFrame + (cell_w - im.width * scale) / 2;
    canvas.paste(im, y, x, scale);
    if (captions.empty()) continue;
    const Caption& c = captions[static_cast<std::size_t>(i)];
    canvas.frame_rect(y - kFrame, x - kFrame, im.height * scale + 2 * kFrame, im.width * scale + 2 * kFrame, c.color,
                      kFrame);
    const auto room = static_cast<float>(cell_w + 2 * kFrame);
    int text_y = top + cell_h + 2 * kFrame + 4;
    for (std::size_t from = 0; from <= c.text.size(); text_y += line_h) {
      const std::size_t end = std::min(c.text.find('\n', from), c.text.size());
      const std::string text = fit(c.text.substr(from, end - from), size, room);
      canvas.text(static_cast<float>(text_y), static_cast<float>(left) + (room - Canvas::text_width(text, size)) / 2,
                  text, size, c.color);
      from = end + 1;
    }
  }
  return canvas.image();
}

Image heat_overlay(const Image& image, const float* map, int height, int width, float alpha, ColorMap colors) {
  CAPO_CHECK(image.channels == 3 && image.height > 0 && image.width > 0, "heat_overlay: image must be RGB, got ",
             image.height, " x ", image.width, " x ", image.channels);
  CAPO_CHECK(map && height > 0 && width > 0 && alpha >= 0 && alpha <= 1,
             "heat_overlay: needs a map and alpha in [0, 1], got ", height, " x ", width, " and ", alpha);
  Range r;
  for (std::int64_t i = 0; i < std::int64_t{height} * width; ++i) r.add(static_cast<double>(map[i]));
  const auto lo = static_cast<float>(r.empty() ? 0 : r.lo);
  const float scale = r.empty() || r.hi <= r.lo ? 0.0f : static_cast<float>(1 / (r.hi - r.lo));

  // Half-pixel centres, edges repeated.
  const auto source = [](int i, int out, int in) {
    return std::clamp((static_cast<float>(i) + 0.5f) * static_cast<float>(in) / static_cast<float>(out) - 0.5f, 0.0f,
                      static_cast<float>(in - 1));
  };
  const auto at = [&](int y, int x) {
    const float v = map[static_cast<std::ptrdiff_t>(y) * width + x];
    return std::isfinite(v) ? (v - lo) * scale : 0.0f;
  };
  Image out = image;
  for (int y = 0; y < image.height; ++y) {
    const float sy = source(y, image.height, height);
    const int y0 = static_cast<int>(sy), y1 = std::min(y0 + 1, height - 1);
    for (int x = 0; x < image.width; ++x) {
      const float sx = source(x, image.width, width);
      const int x0 = static_cast<int>(sx), x1 = std::min(x0 + 1, width - 1);
      const float fy = sy - static_cast<float>(y0), fx = sx - static_cast<float>(x0);
      const float v =
          (at(y0, x0) * (1 - fx) + at(y0, x1) * fx) * (1 - fy) + (at(y1, x0) * (1 - fx) + at(y1, x1) * fx) * fy;
      const Color c = map_color(v, colors);
      const float heat[3] = {static_cast<float>(c.r), static_cast<float>(c.g), static_cast<float>(c.b)};
      std::uint8_t* p = out.at(y, x);
      for (int k = 0; k < 3; ++k) {
        p[k] = static_cast<std::uint8_t>(static_cast<float>(p[k]) * (1 - alpha) + heat[k] * alpha + 0.5f);
      }
    }
  }
  return out;
}

}  // namespace capo
