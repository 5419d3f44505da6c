// The allocator of real memory: blocks are kept and reused. The CPU's and a GPU's differ in their source only.
#pragma once

#include <capo/engine/allocator.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace capo {

// Where memory comes from, and the streams that it is used on.
class MemorySource {
 public:
  virtual ~MemorySource() = default;
  virtual const char* name() const = 0;       // "cpu", "cuda:0": starts the error's text
  virtual void* take(std::size_t bytes) = 0;  // aligned as said below; nullptr when there is no room
  virtual void give_back(void* p, std::size_t bytes) = 0;  // at once: must wait itself for what still uses it
  // "; 1 of 80 GiB are free": ends the error's text.
  virtual std::string room() const { return ""; }

  // What blocks begin at multiples of, a power of two of 64 at least.
  virtual std::size_t alignment() const { return 64; }
  // What is worth taking at once when a block of `bytes` is asked for: the rest serves others.
  virtual std::size_t segment(std::size_t bytes) const { return bytes; }
  // Any part of what was taken may be given back, and parts that touch are one. False: only what take() returned,
  // whole.
  virtual bool divisible() const { return false; }
  // Makes `bytes` more usable right behind `end`, where taken memory ends. False: it cannot.
  virtual bool extend(void* /*end*/, std::size_t /*bytes*/) { return false; }

  // The calling thread's stream; null: the one that needs no name. See DeviceBackend::mark.
  virtual void* stream() { return nullptr; }
  virtual void* mark(void*) { return nullptr; }
  virtual void wait_and_drop(void* /*stream*/, void* /*mark*/) {}
};

// Released memory is kept and reused: a block is cut from the smallest free piece that holds it, and joins its free
// neighbours when it is released. (Pieces that serve one size and little less kept 649 MiB for ResNet-18's 449: the
// sizes of its feature maps halve and double.) A release that would bring the cache above twice the peak and 64 MiB
// gives the largest other pieces back to the source, and itself when there are none; when the source has no room the
// whole cache goes back and it is asked once more.
//
// A block belongs to the stream on which it was allocated, and may be handed out there again at once: kernels run in
// that order. Released while another stream is current it carries a mark of that stream, for which the next owner's
// work waits (engine/stream.h states the rule).
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
  struct Piece {
    std::size_t size;
    void* stream;          // whose it is
    Pool* pool;            // null: everybody's
    bool first;            // nothing is joined to it from below: an indivisible source's memory begins here
    bool free = false;     // may be handed out: lies in the set of its pool or its stream
    void* mark = nullptr;  // of a free one: what the next owner waits for; null: nothing
  };
  using Pieces = std::map<char*, Piece>;  // by address
  using Free = std::set<std::pair<std::size_t, char*>>;
  struct Scratch {
    void* p = nullptr;
    std::size_t bytes = 0;
  };

  std::size_t room_for(std::size_t bytes) const;
  Pool* pool_of_caller() const;
  Free& home_of(const Piece& piece);
  Pieces::iterator find(Free& from, std::size_t size, bool may_wait);
  Pieces::iterator claim(Pieces::iterator at, std::size_t size);
  Pieces::iterator take(std::size_t bytes, std::size_t size, void* stream);
  Pieces::iterator obtain(std::size_t bytes, std::size_t size, void* stream, Pool* pool);
  Pieces::iterator free_piece(Pieces::iterator at);
  void forget(Pieces::iterator at);
  bool whole(Pieces::const_iterator at) const;
  bool give_back(Pieces::iterator at);
  void keep(Pieces::iterator at, void* stream);
  void shrink(Pieces::iterator newest);
  void retire(const Scratch& s);
  void drop_cache();

  MemorySource& source_;
  mutable std::mutex mutex_;
  Pieces pieces_;                           // all that the source gave
  std::unordered_map<void*, Free> free_;    // by stream
  std::unordered_map<void*, Scratch> scratch_;  // by stream
  std::int64_t scratch_bytes_ = 0;
  MemoryStats stats_;
  std::vector<Scratch> retired_;  // workspaces that graphs may still use, and nobody else
  int pools_ = 0;                 // not yet dropped
  Pool* open_ = nullptr;          // the pool that open_thread_ allocates from
  std::thread::id open_thread_;
};

// Every block comes from the source in its exact size and goes back at once: no reuse and no rounding that could hide
// an access outside a block from compute-sanitizer. Slow.
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
[[noreturn]] void fail_no_room(const MemorySource& source, std::size_t bytes, const MemoryStats& held,
                               std::int64_t given_back = 0);

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
