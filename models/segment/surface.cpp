#include <capo/models/segment/distance.h>
#include <capo/models/segment/label_map_internal.h>
#include <capo/models/segment/surface.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace capo::segment {
namespace {

constexpr double kUndefined = std::numeric_limits<double>::quiet_NaN();

std::vector<std::int64_t> surface(const Grid& grid, int axes, const std::vector<std::int64_t>& map,
                                  std::int64_t label) {
  std::vector<std::int64_t> on(map.size(), 0);
  for (std::size_t i = 0; i < map.size(); ++i) {
    if (map[i] != label) continue;
    bool outside = grid.at_border(static_cast<std::int64_t>(i), axes);
    grid.for_each_neighbour(static_cast<std::int64_t>(i),
                            [&](std::int64_t next) { outside |= map[static_cast<std::size_t>(next)] != label; });
    on[i] = outside;
  }
  return on;
}

std::vector<double> distances(const std::vector<std::int64_t>& from, const std::vector<std::int64_t>& to,
                              const Shape& shape, const std::vector<double>& spacing) {
  const std::vector<double> all = to_vector<double>(distance_to(from_vector(to, shape), spacing));
  std::vector<double> d;
  for (std::size_t i = 0; i < from.size(); ++i)
    if (from[i]) d.push_back(all[i]);
  return d;
}

double at_percentile(std::vector<double> d, double percentile) {
  std::sort(d.begin(), d.end());
  const double rank = percentile / 100 * static_cast<double>(d.size() - 1);
  const auto low = static_cast<std::size_t>(rank);
  const double share = rank - static_cast<double>(low);
  return share > 0 ? d[low] + share * (d[low + 1] - d[low]) : d[low];
}

}  // namespace

double SurfaceDistances::hausdorff(double percentile) const {
  CAPO_CHECK(percentile >= 0 && percentile <= 100, "hausdorff: percentile must be in [0, 100], got ", percentile);
  if (prediction.empty() && truth.empty()) return kUndefined;
  if (prediction.empty() || truth.empty()) return HUGE_VAL;
  return std::max(at_percentile(prediction, percentile), at_percentile(truth, percentile));
}

double SurfaceDistances::mean() const {
  double sum = 0;
  for (const auto* d : {&prediction, &truth})
    for (double x : *d) sum += x;
  return sum / static_cast<double>(prediction.size() + truth.size());
}

double SurfaceDistances::dice(double tolerance) const {
  CAPO_CHECK(tolerance >= 0, "surface dice: tolerance must not be negative, got ", tolerance);
  std::int64_t near = 0;
  for (const auto* d : {&prediction, &truth})
    near += std::count_if(d->begin(), d->end(), [=](double x) { return x <= tolerance; });
  return static_cast<double>(near) / static_cast<double>(prediction.size() + truth.size());
}

SurfaceDistances surface_distances(const Tensor& prediction, const Tensor& truth, std::int64_t label,
                                   const std::vector<double>& spacing) {
  const auto [p, t] = label_pair("surface_distances", prediction, truth);
  const Grid grid("surface_distances", prediction.shape());
  const auto on_p = surface(grid, prediction.rank(), p, label), on_t = surface(grid, prediction.rank(), t, label);
  return {distances(on_p, on_t, prediction.shape(), spacing), distances(on_t, on_p, prediction.shape(), spacing)};
}

}  // namespace capo::segment
