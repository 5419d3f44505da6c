// The hippocampus set's index beside a fixed file of voxels: what is accepted is a sound set.
#include <capo/datasets/segmentation.h>
#include <capo/engine/sha256.h>
#include <capo/tests/fuzz/fuzz.h>
#include <capo/tests/temp_folder.h>

#include <fstream>

namespace {

const std::string voxels(60, '\1');

std::string volume(int image_at, int label_at, const char* shape) {
  return capo::cat("{\"name\":\"a\",\"split\":\"train\",\"shape_zyx\":", shape, ",\"image_offset\":", image_at,
                   ",\"label_offset\":", label_at, ",\"unit_per_step\":1.5,\"voxel_mm\":[1.0,1.0,2e0]}");
}

}  // namespace

std::vector<std::string> capo::fuzz::seeds() {
  const std::string head = cat("{\"sha256\":\"", sha256_hex(voxels), "\",\"volumes\":[");
  return {head + volume(0, 24, "[2,3,4]") + "]}",
          head + volume(0, 59, "[1,1,1]") + ",\n" + volume(30, 0, "[3,1,10]") + "]}"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace capo;
  static const testing::TempFolder folder;
  static const std::string written = folder.file("hippocampus-u8.bin", voxels);
  std::ofstream(folder / "hippocampus-u8.json", std::ios::binary)
      << std::string_view(reinterpret_cast<const char*>(data), size);
  try {
    check_segmentation_set(read_hippocampus(folder.path(), "train"));
  } catch (const Error&) {
  }
  return 0;
}
