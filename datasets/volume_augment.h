// Training augmentation of labelled volumes: what happens to a patch, drawn from one generator per sample.
#pragma once

#include <capo/datasets/segmentation.h>
#include <capo/datasets/spatial_map.h>

namespace capo {

// A change, how probable it is, and the range its strength is drawn from.
struct Draw {
  float probability = 0, low = 0, high = 0;
};

// In this order. Everything is off by default: then a patch is the volume's own voxels.
struct VolumeAugment {
  // Image and labels together; flat patches stay in their plane.
  Draw rotate;                                         // degrees, to either side, about each axis by itself
  std::array<bool, 3> rotate_about{true, true, true};  // z, y, x
  Draw scale;                                          // magnification, one for all axes
  Draw translate;                        // share of the patch's size, to either side, along each axis by itself
  Draw elastic;                          // sd of the control points in voxels
  float elastic_spacing = 32;            // between control points, in voxels
  std::array<float, 3> mirror{};         // probability along z, y, x
  Sampling sampling = Sampling::linear;  // of intensities; labels take the nearest voxel
  Border border = Border::constant;

  // Each channel by itself. A range that holds 1 is nnU-Net's "half below 1, half above" for contrast and gamma.
  Draw noise;           // sd
  Draw blur;            // sigma in voxels
  Draw brightness;      // factor
  Draw contrast;        // factor
  Draw low_resolution;  // zoom
  Draw gamma_inverted;  // exponent
  Draw gamma;           // exponent
  // Given that blur or low_resolution happens, it meets a channel with this probability.
  float per_channel = 1;
};

// nnU-Net v2's defaults (nnUNetTrainer): rotation up to 180 degrees in the plane or 30 about each axis in 3-D, scale
// 0.7 to 1.4, no elastic deformation, all mirrors.
VolumeAugment nnunet_augment(bool flat);
// Throws when a setting is out of its range.
void check_augment(const VolumeAugment& a);

struct LabelledPatch {
  std::vector<std::vector<float>> channels;  // each voxel of the patch, row by row
  std::vector<std::uint8_t> label;
};
// A patch of the case, its first voxel at `start` before it is turned and moved. The same generator state, the same
// bits.
LabelledPatch augmented_patch(const SegmentationCase& c, const Extent& patch, const Extent& start,
                              const VolumeAugment& a, SampleRng& rng);

}  // namespace capo
