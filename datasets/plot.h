// Pictures of results: line plots, sheets of captioned images, heat maps over images. Write them with write_png.
#pragma once

#include <capo/datasets/canvas.h>

#include <string>
#include <vector>

namespace capo {

struct Series {
  std::string name = {};       // legend text; no entry when empty
  std::vector<double> x = {};  // empty: 0, 1, 2, ...
  std::vector<double> y = {};  // non-finite values break the line
  bool markers = false;   // a dot at each point
  bool thin = false;      // a pale thin line, e.g. raw values behind a smoothed series
  int color = -1;         // series_color index; -1: position in the list
};

struct PlotOptions {
  std::string title, x_label, y_label;
  int width = 900, height = 600;
  bool log_y = false;                      // base 10; values <= 0 are left out
  double y_min = 0, y_max = 0;             // fixed range when y_min < y_max, otherwise from the data
};

// A line plot with axes, ticks, grid and a legend in the emptiest corner. An empty plot has axes only.
Image plot(const std::vector<Series>& series, const PlotOptions& options = {});

struct Caption {
  std::string text;       // '\n' starts a new line
  Color color = {60, 60, 60};  // of the text and of the image's frame
};

// Images in rows of `columns`, each pixel as scale x scale, captions (none, or one per image) below. Cells take the
// largest image's size; caption lines are cut to the cell's width.
Image contact_sheet(const std::vector<Image>& images, const std::vector<Caption>& captions, int columns, int scale = 1);

// Mixes a map of height x width floats, upsampled bilinearly, over an RGB image; the map's finite minimum and maximum
// become the colour map's ends. alpha in [0, 1] is the share of the heat colour.
Image heat_overlay(const Image& image, const float* map, int height, int width, float alpha = 0.55f,
                   ColorMap colors = ColorMap::inferno);

}  // namespace capo
