// Grids of voxels in host memory, and where they lie in the world. A flat image is a volume of one slice.
#pragma once

#include <capo/engine/error.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace capo {

// Sizes (or positions) along z: slices, y: rows, x: columns.
struct Extent {
  std::int64_t z = 1, y = 1, x = 1;
  std::int64_t voxels() const { return z * y * x; }
  friend bool operator==(const Extent&, const Extent&) = default;
};
std::string to_string(const Extent& e);  // "[36, 50, 35]"

// Where voxels lie, in the terms of NIfTI-1 (nifti1.h), as they were stated: Capo computes with voxels alone and keeps
// this for what it writes. World coordinates grow to the patient's right, front and head, in `unit`.
struct Geometry {
  enum class Unit : std::uint8_t { unknown = 0, metre = 1, millimetre = 2, micrometre = 3 };

  std::array<float, 3> spacing{1, 1, 1};  // between voxels along z, y, x; positive
  Unit unit = Unit::millimetre;
  // The scanner's frame. code 0: not stated, 1 scanner, 2 aligned, 3 Talairach, 4 MNI 152, 5 another template.
  std::int16_t qform_code = 0;
  float qfac = 1;                  // 1, or -1: z is turned over
  std::array<float, 3> quatern{};  // b, c, d of the unit quaternion a + bi + cj + dk, a >= 0
  std::array<float, 3> qoffset{};  // of the first voxel
  // A second frame: any affine map of voxel indices (x, y, z, 1); the same codes.
  std::int16_t sform_code = 0;
  std::array<std::array<float, 4>, 3> srow{};

  friend bool operator==(const Geometry&, const Geometry&) = default;
};

// World coordinates of voxel (x, y, z): m[i][0] x + m[i][1] y + m[i][2] z + m[i][3]. The second frame where stated,
// else the scanner's, else spacing alone (methods 3, 2, 1 of nifti1.h).
using Affine = std::array<std::array<double, 4>, 3>;
Affine voxel_to_world(const Geometry& g);

template <class T>
struct VolumeOf {
  Extent extent{0, 0, 0};
  Geometry geometry;
  std::vector<T> voxels;  // row by row: voxels[(z * extent.y + y) * extent.x + x]

  VolumeOf() = default;
  explicit VolumeOf(const Extent& e, T value = {}, const Geometry& g = {})
      : extent(e), geometry(g), voxels(static_cast<std::size_t>(e.voxels()), value) {}
  std::size_t index(std::int64_t z, std::int64_t y, std::int64_t x) const {
    return static_cast<std::size_t>((z * extent.y + y) * extent.x + x);
  }
  T& at(std::int64_t z, std::int64_t y, std::int64_t x) { return voxels[index(z, y, x)]; }
  const T& at(std::int64_t z, std::int64_t y, std::int64_t x) const { return voxels[index(z, y, x)]; }
};
using Volume = VolumeOf<float>;              // intensities
using LabelVolume = VolumeOf<std::uint8_t>;  // one class per voxel

// (v - mean) / sd over all voxels, sums in f64, sd of the population; a constant volume becomes 0. Throws when a
// voxel is not finite; `name` starts the text.
void normalize_zscore(Volume& v, const std::string& name);

}  // namespace capo
