// Distances between the surfaces of two segmentations, with voxel spacing.
#pragma once

#include <capo/engine/tensor.h>

#include <cstdint>
#include <vector>

namespace capo::segment {

// A class's surface is made of its voxels that have a side on another class or on the volume's border. Distances are
// Euclidean, between voxel centres, to the nearest voxel of the other surface.
//
// A class that only one of the maps holds: hausdorff and mean are infinite, dice is 0. One that neither holds has no
// values: NaN (mean_of_defined, overlap.h, leaves them out).
struct SurfaceDistances {
  std::vector<double> prediction,
      truth;  // of each voxel of the one's surface to the other's; row-major order of voxels

  // The greater of the two directions' percentiles (linear between ranks, as numpy.percentile). 95: Hausdorff-95; 100:
  // the Hausdorff distance.
  double hausdorff(double percentile = 95) const;
  // Of all voxels of both surfaces (average symmetric surface distance).
  double mean() const;
  // The share of both surfaces' voxels within the tolerance: the surface Dice of Nikolov et al. 2021, voxels counted in
  // place of areas.
  double dice(double tolerance) const;
};
// Of the voxels with this label in two maps [H, W] or [D, H, W] of one shape, of integer or bool dtype, on any device.
// spacing: of each axis, positive; empty: ones.
SurfaceDistances surface_distances(const Tensor& prediction, const Tensor& truth, std::int64_t label,
                                   const std::vector<double>& spacing = {});

}  // namespace capo::segment
