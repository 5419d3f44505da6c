// A source of memory for tests of the caching allocator.
#pragma once

#include <capo/engine/caching_allocator.h>
#include <capo/engine/error.h>

#include <doctest/doctest.h>

#include <cstdlib>

namespace capo::testing {

// Memory from the heap, streams by name; what waited for what is written down.
class FakeDevice : public MemorySource {
 public:
  ~FakeDevice() override {  // with what a test has not released
    for (const auto& [p, bytes] : size) std::free(p);
  }
  const char* name() const override { return "fake"; }
  void* take(std::size_t bytes) override {
    if (taken + bytes > limit) return nullptr;
    void* p = std::aligned_alloc(64, bytes);
    size[p] = bytes;
    taken += bytes;
    return p;
  }
  void give_back(void* p, std::size_t bytes) override {
    CHECK(bytes == size.at(p));
    taken -= size.at(p);
    size.erase(p);
    std::free(p);
  }
  std::string room() const override { return cat("; ", limit - taken, " are free"); }
  void* stream() override { return current; }
  void* mark(void* stream) override {
    ++marks;
    return new void*(stream);
  }
  void wait_and_drop(void* stream, void* mark) override {
    waits += cat(name_of(stream), "<", name_of(*static_cast<void**>(mark)), " ");
    --marks;
    delete static_cast<void**>(mark);
  }
  std::string name_of(const void* stream) const { return stream == &a ? "a" : stream == &b ? "b" : "own"; }

  std::size_t limit = SIZE_MAX, taken = 0;
  std::unordered_map<void*, std::size_t> size;
  void* current = nullptr;
  int marks = 0;
  std::string waits;
  char a = 0, b = 0;
};

}  // namespace capo::testing
