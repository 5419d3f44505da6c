#include <capo/datasets/volume.h>

#include <cmath>

namespace capo {

std::string to_string(const Extent& e) { return cat("[", e.z, ", ", e.y, ", ", e.x, "]"); }

Affine voxel_to_world(const Geometry& g) {
  Affine m{};
  if (g.sform_code > 0) {
    for (std::size_t i = 0; i < 3; ++i)
      for (std::size_t j = 0; j < 4; ++j) m[i][j] = static_cast<double>(g.srow[i][j]);
    return m;
  }
  const double step[3] = {static_cast<double>(g.spacing[2]), static_cast<double>(g.spacing[1]),
                          static_cast<double>(g.spacing[0])};
  if (g.qform_code == 0) {
    for (std::size_t i = 0; i < 3; ++i) m[i][i] = step[i];
    return m;
  }
  double b = static_cast<double>(g.quatern[0]), c = static_cast<double>(g.quatern[1]),
         d = static_cast<double>(g.quatern[2]);
  double a = 1 - (b * b + c * c + d * d);
  if (a < 1e-7) {  // half a turn, rounded: b, c, d alone have length 1
    const double scale = 1 / std::sqrt(b * b + c * c + d * d);
    b *= scale, c *= scale, d *= scale, a = 0;
  } else {
    a = std::sqrt(a);
  }
  const double r[3][3] = {{a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)},
                          {2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)},
                          {2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c}};
  for (std::size_t i = 0; i < 3; ++i) {
    for (std::size_t j = 0; j < 3; ++j) m[i][j] = r[i][j] * step[j] * (j == 2 && g.qfac < 0 ? -1 : 1);
    m[i][3] = static_cast<double>(g.qoffset[i]);
  }
  return m;
}

void normalize_zscore(Volume& v, const std::string& name) {
  const auto n = static_cast<double>(v.voxels.size());
  double sum = 0, squares = 0;
  for (const float x : v.voxels) sum += static_cast<double>(x);
  CAPO_CHECK(std::isfinite(sum), name, ": intensities must be finite to be normalised");
  const double mean = n > 0 ? sum / n : 0;
  for (const float x : v.voxels) squares += (static_cast<double>(x) - mean) * (static_cast<double>(x) - mean);
  const double sd = n > 0 ? std::sqrt(squares / n) : 0, scale = sd > 0 ? 1 / sd : 0;
  for (float& x : v.voxels) x = static_cast<float>((static_cast<double>(x) - mean) * scale);
}

}  // namespace capo
