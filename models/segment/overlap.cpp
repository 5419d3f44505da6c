#include <capo/models/segment/label_map_internal.h>
#include <capo/models/segment/overlap.h>

#include <cmath>
#include <limits>

namespace capo::segment {
namespace {

constexpr double kUndefined = std::numeric_limits<double>::quiet_NaN();

double ratio(double a, double b) { return b > 0 ? a / b : kUndefined; }

}  // namespace

double Overlap::dice() const { return ratio(2.0 * static_cast<double>(both), static_cast<double>(predicted + truth)); }
double Overlap::iou() const { return ratio(static_cast<double>(both), static_cast<double>(predicted + truth - both)); }

Overlap operator+(const Overlap& a, const Overlap& b) {
  return {a.both + b.both, a.predicted + b.predicted, a.truth + b.truth};
}

std::vector<Overlap> overlap(const Tensor& prediction, const Tensor& truth, int classes) {
  CAPO_CHECK(classes > 0, "overlap: classes must be positive, got ", classes);
  const auto [p, t] = label_pair("overlap", prediction, truth);
  std::vector<Overlap> out(static_cast<std::size_t>(classes));
  const auto at = [&](const char* which, std::int64_t label, std::size_t i) -> Overlap& {
    CAPO_CHECK(label >= 0 && label < classes, "overlap: labels must be in [0, ", classes, "), got ", label,
               " at pixel ", i, " of the ", which);
    return out[static_cast<std::size_t>(label)];
  };
  for (std::size_t i = 0; i < p.size(); ++i) {
    ++at("prediction", p[i], i).predicted;
    ++at("truth", t[i], i).truth;
    if (p[i] == t[i]) ++out[static_cast<std::size_t>(p[i])].both;
  }
  return out;
}

double mean_of_defined(const std::vector<double>& values) {
  double sum = 0, n = 0;
  for (double v : values)
    if (!std::isnan(v)) sum += v, ++n;
  return ratio(sum, n);
}

double pixel_error(const Tensor& prediction, const Tensor& truth) {
  const auto [p, t] = label_pair("pixel_error", prediction, truth);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < p.size(); ++i) wrong += p[i] != t[i];
  return ratio(static_cast<double>(wrong), static_cast<double>(p.size()));
}

}  // namespace capo::segment
