// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011). The same bits on every device and for any
// thread count, because element i of a draw depends on (seed, stream, offset + i / 4, i mod 4) only.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace capo {

struct Philox4 {
  std::uint32_t v[4];
};

// One block of four 32-bit words for (seed, stream, counter).
constexpr Philox4 philox(std::uint64_t seed, std::uint64_t stream, std::uint64_t counter) {
  std::uint32_t c0 = static_cast<std::uint32_t>(counter), c1 = static_cast<std::uint32_t>(counter >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(stream), c3 = static_cast<std::uint32_t>(stream >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0, p1 = std::uint64_t{0xCD9E8D57u} * c2;
    const std::uint32_t n0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0,
                        n2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 64-bit FNV-1a of a name: how a module path becomes a stream.
constexpr std::uint64_t stream_of(std::string_view name) {
  std::uint64_t h = 0xcbf29ce484222325ull;
  for (char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  return h;
}

// Where a generator stands, in device memory: what a captured graph changes between replays (engine/graph.h).
struct RngPlace {
  std::uint64_t seed, offset;
};

// Where one random op reads its numbers; a trivially copyable value that a gradient may keep.
struct RngRange {
  std::uint64_t seed = 0, stream = 0, offset = 0;  // offset in blocks of four words
  const RngPlace* place = nullptr;  // captured: kernels take the seed from here and add its offset
};

// A stream of draws. reserve(n) hands out the next n elements' range and advances by whole blocks; checkpointing
// replays ranges. One generator belongs to one thread at a time.
class Generator {
 public:
  explicit Generator(std::uint64_t seed = 0, std::uint64_t stream = 0) : seed_(seed), stream_(stream) {}

  RngRange reserve(std::int64_t elements);

  std::uint64_t seed() const { return seed_; }
  std::uint64_t stream() const { return stream_; }
  std::uint64_t offset() const { return offset_; }
  void set_offset(std::uint64_t offset) { offset_ = offset; }  // resume
  void reseed(std::uint64_t seed) {
    seed_ = seed;
    offset_ = 0;
  }

 private:
  std::uint64_t seed_, stream_, offset_ = 0;
};

// While alive on this thread, remembers where each generator stood at its first use. Setting them back to it is how a
// checkpointed segment draws the same numbers twice (autograd/checkpoint.cpp).
class GeneratorLog {
 public:
  GeneratorLog();
  ~GeneratorLog();
  GeneratorLog(const GeneratorLog&) = delete;
  GeneratorLog& operator=(const GeneratorLog&) = delete;
  struct Entry {
    Generator* generator;
    std::uint64_t seed, offset;
  };
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  friend class Generator;
  std::vector<Entry> entries_;
  GeneratorLog* outer_;
};

// While a graph is captured on this thread: makes the ranges that reserve() hands out relative to the place of their
// generator on the device.
class RngCapture {
 public:
  virtual void relate(Generator& generator, RngRange& range) = 0;
  // Null when this thread captures nothing. set() returns the one before.
  static RngCapture* current();
  static RngCapture* set(RngCapture* capture);

 protected:
  ~RngCapture() = default;
};

}  // namespace capo
