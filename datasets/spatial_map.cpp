#include <capo/datasets/spatial_map.h>

#include <algorithm>
#include <cmath>

namespace capo {
namespace {

using Point = std::array<double, 3>;
using Matrix = std::array<std::array<double, 3>, 3>;

std::array<std::int64_t, 3> sizes(const Extent& e) { return {e.z, e.y, e.x}; }

Matrix product(const Matrix& a, const Matrix& b) {
  Matrix c{};
  for (std::size_t i = 0; i < 3; ++i)
    for (std::size_t j = 0; j < 3; ++j)
      for (std::size_t k = 0; k < 3; ++k) c[i][j] += a[i][k] * b[k][j];
  return c;
}

// Index i of n voxels; -1: beyond a constant border.
std::int64_t inside(std::int64_t i, std::int64_t n, Border border) {
  if (i >= 0 && i < n) return i;
  if (border == Border::constant) return -1;
  if (n == 1) return 0;
  const std::int64_t period = 2 * (n - 1);
  i = ((i % period) + period) % period;
  return i < n ? i : period - i;
}

// Calls f(index in the patch, position in the volume) for every voxel.
template <class F>
void each_position(const SpatialMap& m, F&& f) {
  const auto n = sizes(m.patch);
  CAPO_CHECK(m.warp.empty() || static_cast<std::int64_t>(m.warp.size()) == 3 * m.patch.voxels(),
             "resample: warp must have 3 values per voxel, got ", m.warp.size(), " for ", m.patch);
  std::size_t at = 0;
  for (std::int64_t z = 0; z < n[0]; ++z) {
    for (std::int64_t y = 0; y < n[1]; ++y) {
      for (std::int64_t x = 0; x < n[2]; ++x, ++at) {
        const std::int64_t o[3] = {m.flip[0] ? n[0] - 1 - z : z, m.flip[1] ? n[1] - 1 - y : y,
                                   m.flip[2] ? n[2] - 1 - x : x};
        const double d[3] = {static_cast<double>(o[0]) - 0.5 * static_cast<double>(n[0] - 1),
                             static_cast<double>(o[1]) - 0.5 * static_cast<double>(n[1] - 1),
                             static_cast<double>(o[2]) - 0.5 * static_cast<double>(n[2] - 1)};
        Point p;
        for (std::size_t i = 0; i < 3; ++i)
          p[i] = m.centre[i] + m.matrix[i][0] * d[0] + m.matrix[i][1] * d[1] + m.matrix[i][2] * d[2];
        if (!m.warp.empty()) {
          const float* w = m.warp.data() + 3 * ((o[0] * n[1] + o[1]) * n[2] + o[2]);
          for (std::size_t i = 0; i < 3; ++i) p[i] += static_cast<double>(w[i]);
        }
        f(at, p);
      }
    }
  }
}

// The voxels along one axis that a position draws on, and their weights.
struct Taps {
  std::int64_t index[4];
  float weight[4];
  int count = 0;

  Taps(double at, std::int64_t n, Sampling sampling, Border border) {
    const double floor = std::floor(at);
    const auto first = static_cast<std::int64_t>(floor);
    const auto t = static_cast<float>(at - floor);
    if (t == 0) {
      add(first, 1, n, border);
    } else if (sampling == Sampling::linear) {
      add(first, 1 - t, n, border);
      add(first + 1, t, n, border);
    } else {
      add(first - 1, t * (-0.5f + t * (1 - 0.5f * t)), n, border);
      add(first, 1 + t * t * (1.5f * t - 2.5f), n, border);
      add(first + 1, t * (0.5f + t * (2 - 1.5f * t)), n, border);
      add(first + 2, t * t * (0.5f * t - 0.5f), n, border);
    }
  }

 private:
  void add(std::int64_t i, float w, std::int64_t n, Border border) {
    const std::int64_t at = inside(i, n, border);
    if (at < 0) return;  // weighs 0
    index[count] = at;
    weight[count++] = w;
  }
};

// 4 cubic B-spline weights at t in [0, 1) between the second and third control point.
std::array<float, 4> spline(double t) {
  return {static_cast<float>((1 - t) * (1 - t) * (1 - t) / 6), static_cast<float>((3 * t * t * t - 6 * t * t + 4) / 6),
          static_cast<float>((-3 * t * t * t + 3 * t * t + 3 * t + 1) / 6), static_cast<float>(t * t * t / 6)};
}

// `values` [outer, control, inner] to [outer, n, inner].
std::vector<float> spread(const std::vector<float>& values, std::size_t outer, std::size_t control, std::size_t n,
                          std::size_t inner, double spacing) {
  std::vector<float> out(outer * n * inner);
  for (std::size_t i = 0; i < n; ++i) {
    const double at = static_cast<double>(i) / spacing;
    const auto first = static_cast<std::size_t>(at);
    const auto w = spline(at - static_cast<double>(first));
    for (std::size_t o = 0; o < outer; ++o) {
      const float* from = values.data() + (o * control + first) * inner;
      float* to = out.data() + (o * n + i) * inner;
      for (std::size_t k = 0; k < inner; ++k)
        to[k] = w[0] * from[k] + w[1] * from[inner + k] + w[2] * from[2 * inner + k] + w[3] * from[3 * inner + k];
    }
  }
  return out;
}

}  // namespace

SpatialMap plain_map(const Extent& patch, const Extent& start) {
  SpatialMap m;
  m.patch = patch;
  const auto n = sizes(patch), s = sizes(start);
  for (std::size_t i = 0; i < 3; ++i) m.centre[i] = static_cast<double>(s[i]) + 0.5 * static_cast<double>(n[i] - 1);
  return m;
}

std::array<std::array<double, 3>, 3> turn_and_scale(const std::array<double, 3>& radians, double scale) {
  CAPO_CHECK(scale > 0, "turn_and_scale: scale must be positive, got ", scale);
  Matrix m{{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    if (radians[axis] == 0) continue;
    const std::size_t i = axis == 0 ? 1 : 0, j = axis == 2 ? 1 : 2;  // the plane that turns
    Matrix r{{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
    r[i][i] = r[j][j] = std::cos(radians[axis]);
    r[i][j] = -std::sin(radians[axis]);
    r[j][i] = std::sin(radians[axis]);
    m = product(m, r);
  }
  for (auto& row : m)
    for (auto& v : row) v /= scale;
  return m;
}

std::vector<float> elastic_warp(const Extent& patch, double spacing, double sd, SampleRng& rng) {
  CAPO_CHECK(spacing >= 2 && sd >= 0, "elastic_warp: spacing must be at least 2 voxels and sd not negative, got ",
             spacing, " and ", sd);
  const auto n = sizes(patch);
  std::array<std::size_t, 3> to{}, control{};
  for (std::size_t i = 0; i < 3; ++i) {
    to[i] = static_cast<std::size_t>(n[i]);
    control[i] = static_cast<std::size_t>(static_cast<double>(n[i] - 1) / spacing) + 4;
  }
  std::vector<float> field(control[0] * control[1] * control[2] * 3);
  for (std::size_t i = 0; i < field.size(); ++i) {
    const auto v = static_cast<float>(sd * rng.normal());
    field[i] = n[i % 3] == 1 ? 0 : v;
  }
  field = spread(field, 1, control[0], to[0], control[1] * control[2] * 3, spacing);
  field = spread(field, to[0], control[1], to[1], control[2] * 3, spacing);
  return spread(field, to[0] * to[1], control[2], to[2], 3, spacing);
}

std::vector<float> resample(const Volume& v, const SpatialMap& map, Sampling sampling, Border border) {
  std::vector<float> out(static_cast<std::size_t>(map.patch.voxels()));
  const auto n = sizes(v.extent);
  each_position(map, [&](std::size_t at, const Point& p) {
    const Taps z(p[0], n[0], sampling, border), y(p[1], n[1], sampling, border), x(p[2], n[2], sampling, border);
    float sum = 0;
    for (int i = 0; i < z.count; ++i) {
      for (int j = 0; j < y.count; ++j) {
        const float* row = v.voxels.data() + (z.index[i] * n[1] + y.index[j]) * n[2];
        float part = 0;
        for (int k = 0; k < x.count; ++k) part += x.weight[k] * row[x.index[k]];
        sum += z.weight[i] * y.weight[j] * part;
      }
    }
    out[at] = sum;
  });
  return out;
}

std::vector<std::uint8_t> resample(const LabelVolume& v, const SpatialMap& map, Border border) {
  std::vector<std::uint8_t> out(static_cast<std::size_t>(map.patch.voxels()));
  const auto n = sizes(v.extent);
  each_position(map, [&](std::size_t at, const Point& p) {
    std::int64_t i[3];
    for (std::size_t a = 0; a < 3; ++a) i[a] = inside(static_cast<std::int64_t>(std::floor(p[a] + 0.5)), n[a], border);
    out[at] = i[0] < 0 || i[1] < 0 || i[2] < 0 ? std::uint8_t{0} : v.at(i[0], i[1], i[2]);
  });
  return out;
}

}  // namespace capo
