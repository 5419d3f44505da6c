#include <capo/datasets/open.h>
#include <capo/datasets/segmentation.h>

#include <algorithm>
#include <filesystem>

namespace capo {

void check_segmentation_set(const SegmentationSet& set) {
  CAPO_CHECK(!set.cases.empty(), set.name, ": a segmentation set must have cases");
  CAPO_CHECK(set.class_names.size() >= 2 && set.class_names.size() <= 256, set.name, ": needs 2 to 256 classes, got ",
             set.class_names.size());
  for (const auto& c : set.cases) {
    CAPO_CHECK(!c.channels.empty() && c.channels.size() == set.cases[0].channels.size(), set.name, ", ", c.name,
               ": every case must have the same number of channels, at least one, got ", c.channels.size());
    const Extent& e = c.label.extent;
    CAPO_CHECK(e.z >= 1 && e.y >= 1 && e.x >= 1 && static_cast<std::int64_t>(c.label.voxels.size()) == e.voxels(),
               set.name, ", ", c.name, ": labels must fill a volume, got ", c.label.voxels.size(), " voxels for ", e);
    for (const auto& v : c.channels) {
      CAPO_CHECK(v.extent == e && v.voxels.size() == c.label.voxels.size(), set.name, ", ", c.name, ": image must be ",
                 e, " to match its labels, got ", v.extent);
    }
    const auto highest = *std::max_element(c.label.voxels.begin(), c.label.voxels.end());
    CAPO_CHECK(highest < set.num_classes(), set.name, ", ", c.name, ": labels must be less than ", set.num_classes(),
               ", got ", static_cast<int>(highest));
  }
}

void normalize_zscore(SegmentationSet& set) {
  for (auto& c : set.cases)
    for (auto& v : c.channels) normalize_zscore(v, cat(set.name, ", ", c.name));
}

SegmentationSet select_cases(const SegmentationSet& set, const std::vector<std::int64_t>& index) {
  SegmentationSet out{set.name, set.class_names, {}};
  for (const auto i : index) {
    CAPO_CHECK(i >= 0 && i < static_cast<std::int64_t>(set.cases.size()), set.name, ": case must be in [0, ",
               set.cases.size(), "), got ", i);
    out.cases.push_back(set.cases[static_cast<std::size_t>(i)]);
  }
  return out;
}

std::vector<std::int64_t> held_out(std::int64_t n, int folds, int k) {
  CAPO_CHECK(folds >= 2 && folds <= n && k >= 0 && k < folds,
             "held_out: needs 2 <= folds <= n and 0 <= fold < folds, got fold ", k, " of ", folds, " over ", n,
             " cases");
  std::vector<std::int64_t> out;
  for (std::int64_t i = n * k / folds; i < n * (k + 1) / folds; ++i) out.push_back(i);
  return out;
}

SegmentationSet open_segmentation(const std::string& name, const std::string& root_or_empty, const std::string& split) {
  CAPO_CHECK(name == "isbi2012" || name == "hippocampus", name,
             ": unknown segmentation set; known are isbi2012 and hippocampus");
  const bool isbi = name == "isbi2012";
  const std::string folder = (root_or_empty.empty() ? data_root() : root_or_empty) + "/" + name;
  const std::string file = folder + (isbi ? "/images.bin" : "/hippocampus-u8.bin");
  std::error_code ignored;
  CAPO_CHECK(std::filesystem::exists(file, ignored), file,
             ": not found; data sets lie in the folder CAPO_DATA names, or else in ~/.cache/capo; get ", name,
             " with scripts/get-data ", name, " --from FOLDER");
  CAPO_CHECK(!isbi || split == "train", name, ": split must be train, the set has no other with labels, got ", split);
  return isbi ? read_isbi2012(folder) : read_hippocampus(folder, split);
}

}  // namespace capo
