// The allocator of real memory: blocks are kept and reused. The CPU's and a GPU's differ in their source only.
#pragma once

#include <capo/engine/allocator.h>

#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace capo {

// Where blocks come from, and the streams that they are used on.
class MemorySource {
 public:
  virtual ~MemorySource() = default;
  virtual const char* name() const = 0;       // "cpu", "cuda:0": starts the error's text
  virtual void* take(std::size_t bytes) = 0;  // 64-byte aligned; nullptr when there is no room
  virtual void give_back(void* p) = 0;        // at once: must wait itself for what still uses p
  // "; 1 of 80 GiB are free": ends the error's text.
  virtual std::string room() const { return ""; }

  // The calling thread's stream; null: the one that needs no name. See DeviceBackend::mark.
  virtual void* stream() { return nullptr; }
  virtual void* mark(void*) { return nullptr; }
  virtual void wait_and_drop(void* /*stream*/, void* /*mark*/) {}
};

// Blocks of one rounded size are kept and reused; a block of 64 KiB or more may also be one of up to a quarter
// more for which nobody has a use: a gradient then lies where an activation lay. A block that would bring the cache above
// twice the peak and 64 MiB takes the place of blocks of other sizes, which go back to the source, as it does itself when
// there are none; when the source has no room the whole cache goes back and it is asked once more.
//
// A block belongs to the stream on which it was allocated, and may be handed out there again at once: kernels run in that order.
// Released while another stream is current it carries a mark of that stream, for which the next owner's work waits
// (engine/stream.h states the rule).
//
// Pools are for captured graphs, which use the same memory at every replay: what a thread allocates between begin_pool()
// and end_pool() is the pool's, whoever releases it and whenever; what the thread releases there that is not the pool's is kept
// from use. All of it returns to everybody with drop_pool(), or when it is released after that.
class CachingAllocator final : public Allocator {
 public:
  explicit CachingAllocator(MemorySource& source) : source_(source) {}
  void* allocate(std::size_t bytes) override;
  void release(void* p, std::size_t bytes) override;
  MemoryStats stats() const override;
  void reset_peak() override;
  void release_all() override;  // workspaces too, unless a pool lives: its graph may use them

  // At least `bytes` of scratch for one stream, the same block until release_all() or a call for more. Counted apart.
  void* workspace(void* stream, std::size_t bytes);
  std::int64_t workspace_bytes() const;
  // See DeviceBackend::hand_over.
  void hand_over(void* from, void* to, bool live);

  struct Pool;
  void begin_pool();  // one at a time
  Pool* end_pool();
  void drop_pool(Pool* pool);

 private:
  struct Block {
    void* p;
    void* mark;  // null: nothing to wait for
  };
  using Blocks = std::unordered_map<std::size_t, std::vector<Block>>;  // by rounded size
  struct Scratch {
    void* p = nullptr;
    std::size_t bytes = 0;
  };

  Pool* pool_of_caller() const;
  void* reuse(Blocks& blocks, void* stream, std::size_t size, bool may_wait);
  void* reuse_larger(Blocks& blocks, void* stream, std::size_t size);
  void* take(std::size_t bytes, std::size_t size);
  void keep(void* home, Block block, std::size_t size);
  bool make_room(std::size_t size);
  void retire(void* stream, const Scratch& s);
  void drop_cache();

  MemorySource& source_;
  mutable std::mutex mutex_;
  std::unordered_map<void*, Blocks> free_;     // by stream
  std::unordered_map<void*, std::size_t> larger_;  // sizes of live blocks that are larger than what was asked for
  std::unordered_map<void*, void*> home_;      // streams of live blocks, of those that were not allocated on the nameless one
  std::unordered_map<void*, Scratch> scratch_;  // by stream
  std::int64_t scratch_bytes_ = 0;
  MemoryStats stats_;
  std::vector<std::pair<void*, Scratch>> retired_;  // workspaces that graphs may still use, and nobody else
  int pools_ = 0;                                   // not yet dropped
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

// Throws OutOfMemory: the source, what was asked and what is held. given_back: cached bytes that did not help.
[[noreturn]] void fail_no_room(const MemorySource& source, std::size_t bytes, const MemoryStats& held, std::int64_t given_back = 0);

// What else an OutOfMemory says, appended to its text on the thread that fails: autograd names who holds memory for the
// backward pass. It must not allocate tensors. Null: nothing.
using MemoryNote = void (*)(std::string& text);
void set_memory_note(MemoryNote note);

// Bookkeeping that every allocator does alike.
inline void count_allocation(MemoryStats& s, std::size_t rounded) {
  s.live_bytes += static_cast<std::int64_t>(rounded);
  ++s.allocations;
  if (s.live_bytes > s.peak_bytes) s.peak_bytes = s.live_bytes;
}

}  // namespace capo
