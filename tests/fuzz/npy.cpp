// The .npy reader: whatever is accepted is no larger than the file, and survives the writer.
#include <capo/engine/npy.h>
#include <capo/tests/fuzz/fuzz.h>

#include <cstring>

namespace {

std::string file_of(const std::string& header, std::size_t data_bytes, int major = 1) {
  const std::size_t length_bytes = major == 1 ? 2 : 4;
  std::string out("\x93NUMPY");
  out += static_cast<char>(major);
  out += '\0';
  for (std::size_t i = 0; i < length_bytes; ++i) out += static_cast<char>((header.size() + 1) >> (8 * i));
  return out + header + '\n' + std::string(data_bytes, '\1');
}

}  // namespace

std::vector<std::string> capo::fuzz::seeds() {
  return {file_of("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }          ", 24),
          file_of("{'descr': '<f8', 'fortran_order': True, 'shape': (2, 3, 1), }", 48, 2),
          file_of("{\"shape\":(),\"descr\":\"<i8\",\"fortran_order\":False}", 8, 3),
          file_of("{'descr': '|b1', 'fortran_order': True, 'shape': (3, 2), }", 6),
          file_of("{'descr': '<f2', 'fortran_order': False, 'shape': (4, 0, 2), }", 0),
          file_of("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1, 1, 1, 1, 1, 5), }", 5)};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const capo::fuzz::MemoryFile file(data, size);
  try {
    const capo::Tensor t = capo::read_npy(file.path());
    capo::fuzz::require(t.is_contiguous() && t.nbytes() < size);
    // The atomic writer needs a folder; /dev/shm keeps it off the disk.
    static const std::string path = capo::cat("/dev/shm/capo-fuzz-npy-", static_cast<long long>(::getpid()));
    capo::write_npy(path, t);
    const capo::Tensor again = capo::read_npy(path);
    ::unlink(path.c_str());
    capo::fuzz::require(again.shape() == t.shape() && again.dtype() == t.dtype());
    capo::fuzz::require(t.numel() == 0 || std::memcmp(again.data(), t.data(), t.nbytes()) == 0);
  } catch (const capo::Error&) {
  }
  return 0;
}
