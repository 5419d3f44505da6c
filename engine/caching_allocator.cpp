#include <capo/engine/caching_allocator.h>
#include <capo/engine/error.h>

#include <atomic>
#include <cstdio>
#include <utility>

namespace capo {
namespace {

std::atomic<MemoryNote> memory_note{nullptr};

std::string mib(std::int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / 1048576.0);
  return text;
}

}  // namespace

void set_memory_note(MemoryNote note) { memory_note.store(note); }

void fail_no_room(const MemorySource& source, std::size_t bytes, const MemoryStats& held, std::int64_t given_back) {
  std::string text = cat(source.name(), " allocator: ", bytes, " bytes asked (", mib(static_cast<std::int64_t>(bytes)),
                         "), the system has no room, ", held.live_bytes, " bytes are in use (", mib(held.live_bytes), ") and ",
                         held.cached_bytes, " cached");
  if (given_back > 0) text += cat(", after ", given_back, " cached bytes were given back");
  text += source.room();
  if (const MemoryNote note = memory_note.load()) note(text);
  throw OutOfMemory(text);
}

// free: for the pool's own use again. kept: released by others while it was open, with their streams.
struct CachingAllocator::Pool {
  struct Kept {
    void *p, *home;
    std::size_t size;
  };
  Blocks free;
  std::vector<Kept> kept;
};

// The pool that the calling thread is to allocate from, or null.
CachingAllocator::Pool* CachingAllocator::pool_of_caller() const {
  return open_ && open_thread_ == std::this_thread::get_id() ? open_ : nullptr;
}

// A block of this rounded size for use on `stream`, or null.
void* CachingAllocator::reuse(Blocks& blocks, void* stream, std::size_t size, bool may_wait) {
  const auto it = blocks.find(size);
  if (it == blocks.end() || it->second.empty() || (it->second.back().mark && !may_wait)) return nullptr;
  const Block block = it->second.back();
  it->second.pop_back();
  stats_.cached_bytes -= static_cast<std::int64_t>(size);
  ++stats_.cache_hits;
  if (block.mark) source_.wait_and_drop(stream, block.mark);
  return block.p;
}

// The least block that is larger than this rounded size by a quarter at most, or null. (By half, ViT-Ti/4 at batch 64 held 8 % more:
// small tensors kept the blocks of large ones.)
void* CachingAllocator::reuse_larger(Blocks& blocks, void* stream, std::size_t size) {
  constexpr std::size_t kLeast = 64 << 10;
  if (size < kLeast) return nullptr;
  for (std::size_t next = rounded_bytes(size + 1); next <= size + size / 4; next = rounded_bytes(next + 1))
    if (void* p = reuse(blocks, stream, next, true)) return larger_.emplace(p, next), p;
  return nullptr;
}

// From the source, `size` being the rounded bytes; once more without the cache where it has no room, unless a graph is captured:
// then nothing may go back.
void* CachingAllocator::take(std::size_t bytes, std::size_t size) {
  void* p = source_.take(size);
  if (p) return p;
  const std::int64_t cached = stats_.cached_bytes;
  if (cached > 0 && !open_) {
    drop_cache();
    p = source_.take(size);
  }
  if (!p) fail_no_room(source_, bytes, stats_, open_ ? 0 : cached);
  return p;
}

void* CachingAllocator::allocate(std::size_t bytes) {
  const std::size_t size = rounded_bytes(bytes);
  void* const stream = source_.stream();
  const std::lock_guard lock(mutex_);
  Pool* const pool = pool_of_caller();
  void* p = pool ? reuse(pool->free, stream, size, false) : nullptr;
  if (!p) p = reuse(free_[stream], stream, size, !pool);  // what is captured cannot wait for what was not
  if (!p && !pool) p = reuse_larger(free_[stream], stream, size);
  if (!p) p = take(bytes, size);
  if (stream) home_[p] = stream;
  if (pool) owner_.emplace(p, pool);
  count_allocation(stats_, size);
  return p;
}

void CachingAllocator::release(void* p, std::size_t bytes) {
  std::size_t size = rounded_bytes(bytes);
  void* const stream = source_.stream();
  const std::lock_guard lock(mutex_);
  stats_.live_bytes -= static_cast<std::int64_t>(size);
  if (const auto it = larger_.find(p); it != larger_.end()) {
    size = it->second;
    larger_.erase(it);
  }
  void* home = nullptr;
  if (const auto it = home_.find(p); it != home_.end()) {
    home = it->second;
    home_.erase(it);
  }
  if (const auto it = owner_.find(p); it != owner_.end()) {
    it->second->free[size].push_back({p, nullptr});
    owner_.erase(it);
  } else if (Pool* const pool = pool_of_caller()) {
    pool->kept.push_back({p, home, size});
  } else {
    return keep(home, {p, home == stream ? nullptr : source_.mark(stream)}, size);
  }
  stats_.cached_bytes += static_cast<std::int64_t>(size);
}

// Gives blocks of other sizes back until `size` more bytes fit under the limit: a program that goes on to other shapes would
// otherwise keep those of the first ones for good and fault its own in again at every step.
bool CachingAllocator::make_room(std::size_t size) {
  const std::int64_t most = 2 * stats_.peak_bytes + (64 << 20) - static_cast<std::int64_t>(size);
  for (auto& [stream, blocks] : free_)
    for (auto& [other, list] : blocks)
      while (stats_.cached_bytes > most && other != size && !list.empty()) {
        const Block block = list.back();
        list.pop_back();
        if (block.mark) source_.wait_and_drop(stream, block.mark);
        source_.give_back(block.p);
        stats_.cached_bytes -= static_cast<std::int64_t>(other);
      }
  return stats_.cached_bytes <= most;
}

void CachingAllocator::keep(void* home, Block block, std::size_t size) {
  if (!open_ && !make_room(size)) {
    if (block.mark) source_.wait_and_drop(home, block.mark);
    source_.give_back(block.p);
    return;
  }
  free_[home][size].push_back(block);
  stats_.cached_bytes += static_cast<std::int64_t>(size);
}

// A workspace that its stream no longer needs.
void CachingAllocator::retire(void* stream, const Scratch& s) {
  if (pools_ > 0) return retired_.emplace_back(stream, s), void();
  scratch_bytes_ -= static_cast<std::int64_t>(s.bytes);
  keep(stream, {s.p, nullptr}, s.bytes);
}

void* CachingAllocator::workspace(void* stream, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  Scratch& s = scratch_[stream];
  if (s.bytes >= bytes) return s.p;
  const std::size_t size = rounded_bytes(bytes);
  void* p = reuse(free_[stream], stream, size, !pool_of_caller());
  if (!p) p = take(bytes, size);
  if (s.p) retire(stream, s);
  s = {p, size};
  scratch_bytes_ += static_cast<std::int64_t>(size);
  return p;
}

std::int64_t CachingAllocator::workspace_bytes() const {
  const std::lock_guard lock(mutex_);
  return scratch_bytes_;
}

void CachingAllocator::hand_over(void* from, void* to, bool live) {
  if (from == to) return;
  const std::lock_guard lock(mutex_);
  if (live) {
    for (auto& [p, stream] : home_)
      if (stream == from) stream = to;
    std::erase_if(home_, [](const auto& entry) { return entry.second == nullptr; });
    if (const auto it = scratch_.find(from); it != scratch_.end()) {
      retire(to, it->second);
      scratch_.erase(it);
    }
  }
  if (const auto pool = free_.find(from); pool != free_.end()) {
    const Blocks blocks = std::move(pool->second);
    free_.erase(pool);
    for (const auto& [size, list] : blocks) free_[to][size].insert(free_[to][size].end(), list.begin(), list.end());
  }
}

void CachingAllocator::begin_pool() {
  const std::lock_guard lock(mutex_);
  CAPO_CHECK(!open_, source_.name(), " allocator: a graph is being captured already");
  open_ = new Pool;
  ++pools_;
  open_thread_ = std::this_thread::get_id();
}

CachingAllocator::Pool* CachingAllocator::end_pool() {
  const std::lock_guard lock(mutex_);
  return std::exchange(open_, nullptr);
}

// The work may still run on the caller's stream.
void CachingAllocator::drop_pool(Pool* pool) {
  void* const stream = source_.stream();
  const std::lock_guard lock(mutex_);
  const auto put_back = [&](void* home, void* p, std::size_t size) {
    stats_.cached_bytes -= static_cast<std::int64_t>(size);
    keep(home, {p, home == stream ? nullptr : source_.mark(stream)}, size);
  };
  for (const auto& [size, list] : pool->free)
    for (const Block& b : list) put_back(nullptr, b.p, size);
  for (const Pool::Kept& k : pool->kept) put_back(k.home, k.p, k.size);
  std::erase_if(owner_, [pool](const auto& entry) { return entry.second == pool; });
  delete pool;
  if (--pools_ > 0) return;
  for (const auto& [home, s] : std::exchange(retired_, {})) retire(home, s);
}

MemoryStats CachingAllocator::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void CachingAllocator::reset_peak() {
  const std::lock_guard lock(mutex_);
  stats_.peak_bytes = stats_.live_bytes;
}

void CachingAllocator::release_all() {
  const std::lock_guard lock(mutex_);
  drop_cache();
  if (pools_ > 0) return;
  for (const auto& [stream, s] : scratch_) source_.give_back(s.p);
  scratch_.clear();
  scratch_bytes_ = 0;
}

void* PlainAllocator::allocate(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  void* p = source_.take(bytes > 0 ? bytes : 1);
  if (!p) fail_no_room(source_, bytes, stats_);
  count_allocation(stats_, rounded_bytes(bytes));
  return p;
}

void PlainAllocator::release(void* p, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  stats_.live_bytes -= static_cast<std::int64_t>(rounded_bytes(bytes));
  source_.give_back(p);
}

MemoryStats PlainAllocator::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void PlainAllocator::reset_peak() {
  const std::lock_guard lock(mutex_);
  stats_.peak_bytes = stats_.live_bytes;
}

void CachingAllocator::drop_cache() {
  for (const auto& [stream, blocks] : free_)
    for (const auto& [size, list] : blocks)
      for (const Block& b : list) {
        if (b.mark) source_.wait_and_drop(stream, b.mark);
        source_.give_back(b.p);
        stats_.cached_bytes -= static_cast<std::int64_t>(size);
      }
  free_.clear();
}

}  // namespace capo
