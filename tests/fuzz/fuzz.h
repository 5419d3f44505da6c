// A fuzz target is one file that defines the two functions below. Linked with replay.cpp it is a program that mutates
// the target's seeds deterministically (CI, no libFuzzer); linked with -fsanitize=fuzzer it is a libFuzzer target.
// A target lets capo::Error pass as the right answer to bad input; anything else that escapes is a finding.
#pragma once

#include <capo/engine/error.h>

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace capo::fuzz {

// Valid inputs to start from.
std::vector<std::string> seeds();

// A property that must hold whatever the input; abort() is what fuzzers look for.
inline void require(bool ok) {
  if (!ok) std::abort();
}

// The input as a file with a path, kept in memory.
class MemoryFile {
 public:
  MemoryFile(const std::uint8_t* data, std::size_t size) : fd_(::memfd_create("fuzz", 0)) {
    require(fd_ >= 0);
    require(::write(fd_, data, size) == static_cast<ssize_t>(size));
  }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const { return cat("/proc/self/fd/", fd_); }
  void truncate(std::size_t size) const { require(::ftruncate(fd_, static_cast<off_t>(size)) == 0); }

 private:
  int fd_;
};

}  // namespace capo::fuzz
