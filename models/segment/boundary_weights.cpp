#include <capo/models/segment/boundary_weights.h>
#include <capo/models/segment/distance.h>
#include <capo/models/segment/label_map_internal.h>

#include <algorithm>
#include <cmath>
#include <map>

namespace capo::segment {
namespace {

struct Box {
  std::int64_t low[3] = {INT64_MAX, INT64_MAX, INT64_MAX}, high[3] = {0, 0, 0};  // high: one past
};

}  // namespace

Tensor boundary_weights(const Tensor& cells, const BoundaryWeights& o) {
  CAPO_CHECK(o.w0 >= 0 && o.sigma > 0, "boundary_weights: w0 must not be negative, sigma positive, got ", o.w0, " and ",
             o.sigma);
  const Grid grid("boundary_weights", cells.shape());
  const std::vector<std::int64_t> label = labels_of("boundary_weights", cells);
  std::map<std::int64_t, Box> boxes;
  std::size_t inside = 0;
  for (std::size_t i = 0; i < label.size(); ++i) {
    if (!label[i]) continue;
    ++inside;
    Box& b = boxes[label[i]];
    for (int a = 0; a < 3; ++a) {
      const std::int64_t x = grid.place(a, static_cast<std::int64_t>(i));
      b.low[a] = std::min(b.low[a], x);
      b.high[a] = std::max(b.high[a], x + 1);
    }
  }

  // Only cells within 8 sigma of a pixel count for it: each one's distances are made in its box, so much larger.
  std::vector<double> nearest(label.size(), HUGE_VAL), second(label.size(), HUGE_VAL);
  const auto margin = static_cast<std::int64_t>(std::ceil(8 * o.sigma));
  for (auto& [cell, b] : boxes) {
    Shape shape;
    for (int a = 0; a < 3; ++a) {
      b.low[a] = std::max<std::int64_t>(0, b.low[a] - margin);
      b.high[a] = std::min(grid.size(a), b.high[a] + margin);
      shape.push_back(b.high[a] - b.low[a]);
    }
    std::vector<std::int64_t> at;
    at.reserve(static_cast<std::size_t>(numel(shape)));
    for (auto z = b.low[0]; z < b.high[0]; ++z)
      for (auto y = b.low[1]; y < b.high[1]; ++y)
        for (auto x = b.low[2]; x < b.high[2]; ++x) at.push_back(z * grid.step(0) + y * grid.step(1) + x);
    std::vector<std::int64_t> own(at.size());
    for (std::size_t i = 0; i < at.size(); ++i) own[i] = label[static_cast<std::size_t>(at[i])] == cell;
    const std::vector<double> d = to_vector<double>(distance_to(from_vector(own, shape)));
    for (std::size_t i = 0; i < at.size(); ++i) {
      double &first = nearest[static_cast<std::size_t>(at[i])], &next = second[static_cast<std::size_t>(at[i])];
      next = std::min(next, std::max(first, d[i]));
      first = std::min(first, d[i]);
    }
  }

  const double all = static_cast<double>(label.size()), cell_pixels = static_cast<double>(inside);
  const bool balanced = o.balance && inside > 0 && inside < label.size();
  std::vector<float> w(label.size());
  for (std::size_t i = 0; i < w.size(); ++i) {
    double x = !balanced ? 1 : all / (2 * (label[i] ? cell_pixels : all - cell_pixels));
    const double d = nearest[i] + second[i];
    if (!label[i] && d <= 8 * o.sigma) x += o.w0 * std::exp(-d * d / (2 * o.sigma * o.sigma));
    w[i] = static_cast<float>(x);
  }
  return from_vector(w, cells.shape());
}

}  // namespace capo::segment
