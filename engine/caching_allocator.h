// The allocator of real memory: blocks are kept and reused. The CPU's and a GPU's differ in their source only.
#pragma once

#include <capo/engine/allocator.h>

#include <mutex>
#include <thread>
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
//
// Pools are for captured graphs, which use the same memory at every replay: what a thread allocates between
// begin_pool() and end_pool() is the pool's, whoever releases it and whenever; what the thread releases there that is
// not the pool's is kept from use. All of it returns to everybody with drop_pool(), or when it is released after that.
class CachingAllocator final : public Allocator {
 public:
  explicit CachingAllocator(MemorySource& source) : source_(source) {}
  void* allocate(std::size_t bytes) override;
  void release(void* p, std::size_t bytes) override;
  MemoryStats stats() const override;
  void reset_peak() override;
  void release_all() override;

  struct Pool;
  void begin_pool();  // one at a time
  Pool* end_pool();
  void drop_pool(Pool* pool);

 private:
  using Blocks = std::unordered_map<std::size_t, std::vector<void*>>;
  void* reuse(Blocks& blocks, std::size_t size);
  void put_back(void* p, std::size_t size);
  void drop_cache();

  MemorySource& source_;
  mutable std::mutex mutex_;
  Blocks free_;
  MemoryStats stats_;
  Pool* open_ = nullptr;  // the pool that open_thread_ allocates from
  std::thread::id open_thread_;
  std::unordered_map<void*, Pool*> owner_;  // of blocks in use that belong to a pool
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
