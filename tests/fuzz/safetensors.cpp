// The safetensors reader: whatever is accepted can be read whole, and survives the writer.
#include <capo/engine/safetensors.h>
#include <capo/tests/fuzz/fuzz.h>

#include <cstring>

namespace {

std::string frame(const std::string& json, std::size_t data_bytes) {
  std::string out;
  for (int i = 0; i < 8; ++i) out += static_cast<char>(json.size() >> (8 * i));
  return out + json + std::string(data_bytes, 'd');
}

// Reads every tensor, then writes all of them and reads that again.
void round_trip(const capo::SafetensorsReader& r, std::size_t file_size) {
  std::vector<capo::TensorSpec> specs;
  std::vector<std::string> bytes;
  std::vector<const void*> data;
  std::size_t total = 0;
  for (const auto& e : r.entries()) {
    capo::fuzz::require(e.bytes() <= file_size && e.shape.size() <= capo::kMaxDims && r.find(e.name) != nullptr);
    total += e.bytes();
    bytes.emplace_back(e.bytes(), '\0');
    r.copy_bytes(e, bytes.back().data(), e.bytes());
    specs.push_back({e.name, e.dtype, e.shape});
  }
  capo::fuzz::require(total <= file_size);
  for (const auto& b : bytes) data.push_back(b.data());
  // The atomic writer needs a folder; /dev/shm keeps it off the disk.
  static const std::string path = capo::cat("/dev/shm/capo-fuzz-", static_cast<long long>(::getpid()));
  capo::write_safetensors(path, specs, data, r.metadata());
  const capo::SafetensorsReader again(path, capo::kHeaderBytesLimit);
  ::unlink(path.c_str());
  capo::fuzz::require(again.metadata() == r.metadata() && again.entries().size() == specs.size());
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const auto& e = again.at(specs[i].name);
    std::string got(e.bytes(), '\0');
    again.copy_bytes(e, got.data(), got.size());
    capo::fuzz::require(e.dtype == specs[i].dtype && e.shape == specs[i].shape && got == bytes[i]);
  }
}

}  // namespace

std::vector<std::string> capo::fuzz::seeds() {
  return {frame("{}", 0), frame("{\"__metadata__\":{\"format\":\"pt\"}}      ", 0),
          frame(R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                R"("b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}})", 26),
          frame(R"({"__metadata__":{"k":"v","é":"\u00e9"},"x.weight":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                R"("e":{"dtype":"F16","shape":[0,4],"data_offsets":[8,8]},)"
                R"("y":{"dtype":"BOOL","shape":[1,1,3],"data_offsets":[8,11]}})", 11),
          frame(R"({"u":{"dtype":"U8","shape":[4],"data_offsets":[4,8]},)"
                R"("i":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}})", 8)};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const capo::fuzz::MemoryFile file(data, size);
  try {
    const capo::SafetensorsReader r(file.path(), 1 << 20);
    round_trip(r, size);
    // Cut short behind the reader's back: an Error, not a signal.
    file.truncate(size / 2);
    for (const auto& e : r.entries()) {
      std::string room(e.bytes(), '\0');
      r.copy_bytes(e, room.data(), room.size());
    }
  } catch (const capo::Error&) {
  }
  return 0;
}
