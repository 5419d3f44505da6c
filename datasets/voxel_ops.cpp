#include <capo/datasets/voxel_ops.h>

#include <algorithm>
#include <cmath>

namespace capo {
namespace {

struct Moments {
  double mean = 0, sd = 0;
};

Moments moments(const float* v, std::int64_t n) {
  double sum = 0, squares = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(v[i]);
  const double mean = sum / static_cast<double>(n);
  for (std::int64_t i = 0; i < n; ++i)
    squares += (static_cast<double>(v[i]) - mean) * (static_cast<double>(v[i]) - mean);
  return {mean, std::sqrt(squares / static_cast<double>(n))};
}

// -1 becomes 1, n becomes n - 2.
std::int64_t mirrored(std::int64_t i, std::int64_t n) {
  if (n == 1) return 0;
  const std::int64_t period = 2 * (n - 1);
  i = ((i % period) + period) % period;
  return i < n ? i : period - i;
}

// Lines along one axis: `n` values, `step` apart.
struct Lines {
  std::int64_t n, step;
};
Lines lines(const Extent& e, int axis) {
  if (axis == 0) return {e.z, e.y * e.x};
  return axis == 1 ? Lines{e.y, e.x} : Lines{e.x, 1};
}

// Calls f(first value) for every line along the axis.
template <class F>
void each_line(float* v, const Extent& e, int axis, F&& f) {
  const Lines l = lines(e, axis);
  for (std::int64_t outer = 0; outer < e.voxels(); outer += l.n * l.step)
    for (std::int64_t inner = 0; inner < l.step; ++inner) f(v + outer + inner);
}

}  // namespace

void add_noise(float* v, const Extent& e, float sd, SampleRng& rng) {
  CAPO_CHECK(sd >= 0, "add_noise: sd must not be negative, got ", sd);
  for (std::int64_t i = 0; i < e.voxels(); ++i) v[i] += sd * static_cast<float>(rng.normal());
}

void blur(float* v, const Extent& e, float sigma) {
  CAPO_CHECK(sigma >= 0 && sigma <= 100, "blur: sigma must be in [0, 100], got ", sigma);
  const auto reach = static_cast<std::int64_t>(4 * sigma + 0.5f);
  if (reach == 0) return;
  std::vector<float> weight(static_cast<std::size_t>(2 * reach + 1));
  double sum = 0;
  for (std::int64_t k = -reach; k <= reach; ++k)
    sum += std::exp(-0.5 * static_cast<double>(k * k) / static_cast<double>(sigma * sigma));
  for (std::int64_t k = -reach; k <= reach; ++k)
    weight[static_cast<std::size_t>(k + reach)] =
        static_cast<float>(std::exp(-0.5 * static_cast<double>(k * k) / static_cast<double>(sigma * sigma)) / sum);
  std::vector<float> line;
  for (int axis = 0; axis < 3; ++axis) {
    const Lines l = lines(e, axis);
    if (l.n == 1) continue;
    line.resize(static_cast<std::size_t>(l.n + 2 * reach));
    each_line(v, e, axis, [&](float* p) {
      for (std::int64_t i = -reach; i < l.n + reach; ++i)
        line[static_cast<std::size_t>(i + reach)] = p[mirrored(i, l.n) * l.step];
      for (std::int64_t i = 0; i < l.n; ++i) {
        float s = 0;
        for (std::size_t k = 0; k < weight.size(); ++k) s += weight[k] * line[static_cast<std::size_t>(i) + k];
        p[i * l.step] = s;
      }
    });
  }
}

void change_brightness(float* v, const Extent& e, float factor) {
  for (std::int64_t i = 0; i < e.voxels(); ++i) v[i] *= factor;
}

void change_contrast(float* v, const Extent& e, float factor) {
  const std::int64_t n = e.voxels();
  const auto mean = static_cast<float>(moments(v, n).mean);
  const auto [low, high] = std::minmax_element(v, v + n);
  const float lo = *low, hi = *high;
  for (std::int64_t i = 0; i < n; ++i) v[i] = std::clamp(mean + (v[i] - mean) * factor, lo, hi);
}

void change_gamma(float* v, const Extent& e, float exponent, bool inverted) {
  CAPO_CHECK(exponent > 0, "change_gamma: exponent must be positive, got ", exponent);
  const std::int64_t n = e.voxels();
  if (inverted)
    for (std::int64_t i = 0; i < n; ++i) v[i] = -v[i];
  const Moments before = moments(v, n);
  const auto [low, high] = std::minmax_element(v, v + n);
  const float lo = *low, range = *high - lo;
  if (range > 0) {
    for (std::int64_t i = 0; i < n; ++i) v[i] = std::pow((v[i] - lo) / range, exponent) * range + lo;
    const Moments after = moments(v, n);
    const double scale = after.sd > 0 ? before.sd / after.sd : 1;
    for (std::int64_t i = 0; i < n; ++i)
      v[i] = static_cast<float>((static_cast<double>(v[i]) - after.mean) * scale + before.mean);
  }
  if (inverted)
    for (std::int64_t i = 0; i < n; ++i) v[i] = -v[i];
}

void lower_resolution(float* v, const Extent& e, float zoom) {
  CAPO_CHECK(zoom > 0 && zoom <= 1, "lower_resolution: zoom must be in (0, 1], got ", zoom);
  std::vector<float> line, coarse;
  // Down and up along one axis at a time: nearest and linear interpolation are both separable.
  for (int axis = 0; axis < 3; ++axis) {
    const Lines l = lines(e, axis);
    const auto m = std::max<std::int64_t>(1, std::llround(static_cast<double>(l.n) * static_cast<double>(zoom)));
    if (m == l.n) continue;
    coarse.resize(static_cast<std::size_t>(m));
    const double step = static_cast<double>(l.n) / static_cast<double>(m);
    each_line(v, e, axis, [&](float* p) {
      for (std::int64_t j = 0; j < m; ++j) {
        const auto nearest = static_cast<std::int64_t>((static_cast<double>(j) + 0.5) * step);
        coarse[static_cast<std::size_t>(j)] = p[std::min(nearest, l.n - 1) * l.step];
      }
      for (std::int64_t i = 0; i < l.n; ++i) {
        const double at = std::clamp((static_cast<double>(i) + 0.5) / step - 0.5, 0.0, static_cast<double>(m - 1));
        const auto j = static_cast<std::size_t>(at);
        const auto t = static_cast<float>(at - static_cast<double>(j));
        const float a = coarse[j], b = coarse[std::min(j + 1, coarse.size() - 1)];
        p[i * l.step] = a + (b - a) * t;
      }
    });
  }
}

}  // namespace capo
