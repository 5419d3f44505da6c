// The NIfTI reader: whatever is accepted survives the writer, voxels and geometry. Packed inputs are tried as they are
// and, since few mutations get past their checksum, mutations of plain files also packed.
#include <capo/datasets/gzip.h>
#include <capo/datasets/nifti.h>
#include <capo/engine/files.h>
#include <capo/tests/fuzz/fuzz.h>

#include <cstring>

namespace {

// The atomic writer needs a folder; /dev/shm keeps it off the disk.
std::string scratch(const char* end) {
  return capo::cat("/dev/shm/capo-fuzz-nifti-", static_cast<long long>(::getpid()), end);
}

void read_all(const std::string& bytes) {
  const capo::fuzz::MemoryFile file(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  try {
    const capo::Volume v = capo::read_nifti(file.path());
    capo::fuzz::require(v.extent.voxels() == static_cast<std::int64_t>(v.voxels.size()));
    const std::string path = scratch(".nii");
    capo::write_nifti(path, v);
    const capo::Volume again = capo::read_nifti(path);
    ::unlink(path.c_str());
    capo::fuzz::require(again.extent == v.extent && again.geometry == v.geometry);
    capo::fuzz::require(std::memcmp(again.voxels.data(), v.voxels.data(), v.voxels.size() * sizeof(float)) == 0);
    const capo::LabelVolume labels = capo::read_nifti_labels(file.path(), 7);
    for (const auto l : labels.voxels) capo::fuzz::require(l < 7);
  } catch (const capo::Error&) {
  }
}

}  // namespace

std::vector<std::string> capo::fuzz::seeds() {
  std::vector<std::string> all;
  Volume v({2, 3, 4});
  for (std::size_t i = 0; i < v.voxels.size(); ++i) v.voxels[i] = static_cast<float>(i % 7);
  v.geometry.qform_code = 1;
  v.geometry.quatern = {0.5f, 0.5f, 0.5f};
  v.geometry.sform_code = 2;
  v.geometry.srow[1] = {0, 1, 0, -4};
  const std::string path = scratch("-seed.nii");
  for (const auto type :
       {NiftiType::u8, NiftiType::i16, NiftiType::i32, NiftiType::f32, NiftiType::f64, NiftiType::u16}) {
    write_nifti(path, v, {.type = type, .big_endian = type == NiftiType::i16});
    all.push_back(read_file(path, 1 << 20));
  }
  ::unlink(path.c_str());
  all.push_back(gzip(all[0]));
  return all;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  read_all(bytes);
  if (!capo::is_gzip(bytes) && size % 4 == 0) read_all(capo::gzip(bytes));
  return 0;
}
