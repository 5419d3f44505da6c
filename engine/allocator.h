// Memory: who hands it out and who counts it.
//
// Sizes are counted in steps of 64 bytes, the same on every device, so that a plan made on the meta device is the plan
// of the real run.
#pragma once

#include <capo/engine/device.h>

#include <cstddef>
#include <cstdint>

namespace capo {

struct MemoryStats {
  std::int64_t live_bytes = 0;     // handed out and not yet given back
  std::int64_t peak_bytes = 0;     // highest live_bytes since reset_peak()
  std::int64_t cached_bytes = 0;   // held for reuse
  std::int64_t allocations = 0;    // calls of allocate()
  std::int64_t cache_hits = 0;     // of which served without the system
};

// allocate() never returns memory that is not 64-byte aligned; nullptr only on the meta device. Thread safe.
class Allocator {
 public:
  virtual ~Allocator() = default;
  virtual void* allocate(std::size_t bytes) = 0;             // throws OutOfMemory
  virtual void release(void* p, std::size_t bytes) = 0;      // bytes as asked for
  virtual MemoryStats stats() const = 0;
  virtual void reset_peak() = 0;                             // peak_bytes = live_bytes
  virtual void release_all() {}                              // gives cached memory back to the system
};

// What a block of `bytes` counts as; 64 for none.
std::size_t rounded_bytes(std::size_t bytes);

// The allocator in use for a device; throws for one without memory in this build. The CPU's caches; meta's only counts.
Allocator& allocator(Device device);

// Replaces the CPU allocator for new storages and returns the one before; storages keep the allocator that made them.
Allocator* set_cpu_allocator(Allocator* a);

// NaN-fills every block, surrounds it with guard words checked at release (a damaged one throws at check()), no reuse.
// Slow; on in all op tests.
class DebugAllocator : public Allocator {
 public:
  static DebugAllocator& instance();
  void* allocate(std::size_t bytes) override;
  void release(void* p, std::size_t bytes) override;
  MemoryStats stats() const override;
  void reset_peak() override;
  // Throws when a guard word of a live or released block was overwritten since the last call.
  void check();
};

}  // namespace capo
