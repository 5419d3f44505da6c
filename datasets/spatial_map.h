// Which point of a volume each voxel of a patch shows: turned, scaled, shifted, warped, mirrored. One map serves an
// image and its labels, so that they move together.
#pragma once

#include <capo/datasets/sample_rng.h>
#include <capo/datasets/volume.h>

namespace capo {

// Positions are in voxels of the volume, (z, y, x). The voxel at o of the patch, mirrored where `flip` says so, shows
//   centre + matrix (o - (patch - 1) / 2) + warp(o).
// Angles and scales are those of the voxel grid: for voxels far from cubic, resample first or turn about z alone.
struct SpatialMap {
  Extent patch;
  std::array<double, 3> centre{};
  std::array<std::array<double, 3>, 3> matrix{{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
  std::array<bool, 3> flip{};
  std::vector<float> warp;  // 3 per voxel of the patch, or empty
};

// The patch as it lies in the volume, its first voxel at `start` (which may lie outside).
SpatialMap plain_map(const Extent& patch, const Extent& start);
// Turned by radians about z, then y, then x, and magnified by `scale` > 0 (2: twice as large, half as much is seen).
std::array<std::array<double, 3>, 3> turn_and_scale(const std::array<double, 3>& radians_zyx, double scale);
// A smooth random displacement: control points `spacing` >= 2 voxels apart with normal components of `sd` voxels,
// joined by cubic B-splines (the U-Net paper's coarse grid). Axes of length 1 are not displaced.
std::vector<float> elastic_warp(const Extent& patch, double spacing, double sd, SampleRng& rng);

enum class Border {
  constant,  // beyond the volume: intensity 0 and label 0
  mirror     // the volume, mirrored about its outermost voxels
};
enum class Sampling {
  linear,
  cubic  // Keys' kernel, a = -1/2; may exceed the values' range
};

// The patch's intensities, row by row. At whole positions the volume's own values, to the bit.
std::vector<float> resample(const Volume& v, const SpatialMap& map, Sampling sampling, Border border);
// The nearest voxel's labels.
std::vector<std::uint8_t> resample(const LabelVolume& v, const SpatialMap& map, Border border);

}  // namespace capo
