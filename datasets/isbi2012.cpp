#include <capo/datasets/segmentation.h>
#include <capo/engine/files.h>

namespace capo {
namespace {

constexpr std::int64_t kSlices = 30, kSide = 512;

std::string read_stack(const std::string& path) {
  constexpr auto kBytes = static_cast<std::size_t>(kSlices * kSide * kSide);
  std::string bytes = read_file(path, kBytes);
  CAPO_CHECK(bytes.size() == kBytes, path, ": must have 30 x 512 x 512 bytes, got ", bytes.size());
  return bytes;
}

}  // namespace

SegmentationSet read_isbi2012(const std::string& folder) {
  const std::string images = read_stack(folder + "/images.bin"), labels = read_stack(folder + "/labels.bin");
  Geometry place;
  place.spacing = {0.05f, 0.004f, 0.004f};
  place.unit = Geometry::Unit::micrometre;
  SegmentationSet set{"isbi2012", {"membrane", "cell"}, {}};
  for (std::int64_t z = 0; z < kSlices; ++z) {
    const Extent e{1, kSide, kSide};
    SegmentationCase c{cat("slice ", z), {Volume(e, 0, place)}, LabelVolume(e, 0, place)};
    const auto first = static_cast<std::size_t>(z * e.voxels());
    for (std::size_t i = 0; i < c.label.voxels.size(); ++i) {
      c.channels[0].voxels[i] = static_cast<float>(static_cast<unsigned char>(images[first + i]));
      c.label.voxels[i] = static_cast<std::uint8_t>(labels[first + i]);
      CAPO_CHECK(c.label.voxels[i] <= 1, folder, "/labels.bin: labels must be 0 or 1, got ",
                 static_cast<int>(c.label.voxels[i]), " at byte ", first + i);
    }
    set.cases.push_back(std::move(c));
  }
  return set;
}

}  // namespace capo
