// The allocator of real memory: blocks are kept and reused. The CPU's and a GPU's differ in their source only.
#pragma once

#include <capo/engine/allocator.h>

#include <mutex>
#include <unordered_map>
#include <vector>

namespace capo {

// Where blocks come from.
class MemorySource {
 public:
  virtual ~MemorySource() = default;
  virtual const char* name() const = 0;       // "cpu", "cuda:0": starts the error's text
  virtual void* take(std::size_t bytes) = 0;  // 64-byte aligned; nullptr when there is no room
  virtual void give_back(void* p) = 0;
};

// Blocks of one rounded size are kept and reused. A block that would bring the cache above twice the peak and 64 MiB goes
// back to the source; when the source has no room the whole cache goes back and it is asked once more. A released block may be handed out at once: memory of a
// device must be used in the order of one stream.
class CachingAllocator final : public Allocator {
 public:
  explicit CachingAllocator(MemorySource& source) : source_(source) {}
  void* allocate(std::size_t bytes) override;
  void release(void* p, std::size_t bytes) override;
  MemoryStats stats() const override;
  void reset_peak() override;
  void release_all() override;

 private:
  void drop_cache();

  MemorySource& source_;
  mutable std::mutex mutex_;
  std::unordered_map<std::size_t, std::vector<void*>> free_;
  MemoryStats stats_;
};

// Every block comes from the source in its exact size and goes back at once: no reuse and no rounding that could hide an
// access outside a block from compute-sanitizer. Slow.
class PlainAllocator final : public Allocator {
 public:
  explicit PlainAllocator(MemorySource& source) : source_(source) {}
  void* allocate(std::size_t bytes) override;
  void release(void* p, std::size_t bytes) override;
  MemoryStats stats() const override;
  void reset_peak() override;

 private:
  MemorySource& source_;
  mutable std::mutex mutex_;
  MemoryStats stats_;
};

// Throws OutOfMemory: the source, what was asked and what is held.
[[noreturn]] void fail_no_room(const MemorySource& source, std::size_t bytes, const MemoryStats& held);

// Bookkeeping that every allocator does alike.
inline void count_allocation(MemoryStats& s, std::size_t rounded) {
  s.live_bytes += static_cast<std::int64_t>(rounded);
  ++s.allocations;
  if (s.live_bytes > s.peak_bytes) s.peak_bytes = s.live_bytes;
}

}  // namespace capo
