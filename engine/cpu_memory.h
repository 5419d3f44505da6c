// Where the CPU's memory comes from.
#pragma once

#include <capo/engine/caching_allocator.h>

#include <map>

namespace capo {

// A stretch of addresses twice as large as the machine's memory, filled from below: memory that is given back and taken
// again lies where it lay, and everything free can be one piece. Asked of the system in huge pages. Not thread safe:
// its allocator locks. Reserving costs nothing; where addresses are limited (ulimit -v) stretches are as large as they
// can be, and several.
class AddressSpace final : public MemorySource {
 public:
  // most: bytes in use at once; more is refused, as if the system had none.
  explicit AddressSpace(std::size_t most) : most_(most) {}
  ~AddressSpace() override;
  const char* name() const override { return "cpu"; }
  void* take(std::size_t bytes) override;
  void give_back(void* p, std::size_t bytes) override;
  bool divisible() const override { return true; }
  bool extend(void* end, std::size_t bytes) override;

 private:
  struct Stretch {
    char *begin, *end;
  };
  bool reserve(std::size_t bytes);

  std::size_t most_, used_ = 0;
  std::vector<Stretch> stretches_;
  char *top_ = nullptr, *end_ = nullptr;  // of the newest stretch: what was never taken
  std::map<char*, std::size_t> holes_;    // given back, by address; none touch
};

// One for the process. Under AddressSanitizer and ThreadSanitizer it is their own heap.
MemorySource& cpu_memory();

}  // namespace capo
