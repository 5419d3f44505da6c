// Labelled volumes for segmentation, held in memory, and the two sets that come ready-made.
#pragma once

#include <capo/datasets/volume.h>

#include <memory>
#include <string>
#include <vector>

namespace capo {

struct SegmentationCase {
  std::string name;
  std::vector<Volume> channels;  // one per modality, at least one, all of label's extent
  LabelVolume label;             // each voxel in [0, number of classes)
};

struct SegmentationSet {
  std::string name;
  std::vector<std::string> class_names;  // 2 to 256; class 0 is the background
  std::vector<SegmentationCase> cases;

  int num_classes() const { return static_cast<int>(class_names.size()); }
};
using SegmentationSetPtr = std::shared_ptr<const SegmentationSet>;

// Throws, naming the case, unless the set keeps what stands above and has as many channels in every case.
void check_segmentation_set(const SegmentationSet& set);
// normalize_zscore of every channel of every case by itself: nnU-Net's rule for MR and microscopy.
void normalize_zscore(SegmentationSet& set);
// These cases, in this order. Throws when an index is out of range.
SegmentationSet select_cases(const SegmentationSet& set, const std::vector<std::int64_t>& index);

// Which of n cases fold k of `folds` holds out: block k of `folds` consecutive blocks, so that neighbouring slices of
// one tissue seldom stand on both sides. 2 <= folds <= n, 0 <= k < folds.
std::vector<std::int64_t> held_out(std::int64_t n, int folds, int k);

// ISBI 2012 electron microscopy: 30 slices of 512 x 512 as flat cases in the tissue's order, classes membrane (0) and
// cell (1), 4 nm a pixel, slices 50 nm apart. folder: images.bin and labels.bin, 30 x 512 x 512 bytes each.
SegmentationSet read_isbi2012(const std::string& folder);

// Medical Segmentation Decathlon, task 4, in 8 bits: MR volumes of about 36 x 50 x 35 voxels of 1 mm, classes
// background, anterior, posterior. split: "train" (80) or "test" (20). Voxels are byte * unit_per_step, the scanner's
// units. folder: hippocampus-u8.bin and hippocampus-u8.json, which states the other's SHA-256.
SegmentationSet read_hippocampus(const std::string& folder, const std::string& split);

// "isbi2012" (split "train": its labelled slices are all that is public) or "hippocampus", in <root>/<name>; root:
// empty means data_root() (open.h). Where a file is missing, the Error names it and tells how to get the data.
SegmentationSet open_segmentation(const std::string& name, const std::string& root, const std::string& split);

}  // namespace capo
