#include <capo/models/segment/distance.h>
#include <capo/models/segment/label_map_internal.h>

#include <algorithm>
#include <cmath>

namespace capo::segment {
namespace {

constexpr double kFar = HUGE_VAL;

// d[i] = min_j f[j] + (spacing (i - j))^2 along one line of n values, `step` apart, in place.
class Envelope {
 public:
  explicit Envelope(std::int64_t longest)
      : value_(static_cast<std::size_t>(longest)),
        apex_(static_cast<std::size_t>(longest)),
        from_(static_cast<std::size_t>(longest)) {}

  void lower(double* line, std::int64_t n, std::int64_t step, double spacing) {
    const double s2 = spacing * spacing;
    std::size_t count = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      const double f = line[j * step];
      if (f == kFar) continue;
      double start = -kFar;  // where parabola j becomes the lowest
      while (count > 0) {
        const double k = apex_[count - 1], x = static_cast<double>(j);
        start = ((f - value_[count - 1]) / s2 + x * x - k * k) / (2 * (x - k));
        if (start > from_[count - 1]) break;
        --count;
        start = -kFar;
      }
      value_[count] = f;
      apex_[count] = static_cast<double>(j);
      from_[count++] = start;
    }
    if (count == 0) return;
    std::size_t k = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const double x = static_cast<double>(i);
      while (k + 1 < count && from_[k + 1] < x) ++k;
      line[i * step] = value_[k] + s2 * (x - apex_[k]) * (x - apex_[k]);
    }
  }

 private:
  std::vector<double> value_, apex_, from_;
};

}  // namespace

Tensor distance_to(const Tensor& mask, const std::vector<double>& spacing) {
  const Grid grid("distance_to", mask.shape());
  const std::size_t axes = static_cast<std::size_t>(mask.rank());
  CAPO_CHECK(spacing.empty() || spacing.size() == axes, "distance_to: spacing must have ", axes, " entries, got ",
             spacing.size());
  for (double s : spacing) CAPO_CHECK(s > 0 && s < kFar, "distance_to: spacing must be positive, got ", s);
  const std::vector<std::int64_t> inside = labels_of("distance_to", mask);
  std::vector<double> d(inside.size());
  for (std::size_t i = 0; i < d.size(); ++i) d[i] = inside[i] ? 0 : kFar;
  Envelope envelope(std::max({grid.size(0), grid.size(1), grid.size(2)}));
  for (int a = 3 - mask.rank(); a < 3; ++a) {
    const double s = spacing.empty() ? 1 : spacing[static_cast<std::size_t>(a - 3 + mask.rank())];
    for (std::size_t i = 0; i < d.size(); ++i)
      if (grid.place(a, static_cast<std::int64_t>(i)) == 0) envelope.lower(&d[i], grid.size(a), grid.step(a), s);
  }
  for (double& x : d) x = std::sqrt(x);
  return from_vector(d, mask.shape());
}

}  // namespace capo::segment
