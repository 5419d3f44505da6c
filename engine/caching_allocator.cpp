#include <capo/engine/caching_allocator.h>
#include <capo/engine/error.h>

#include <utility>

namespace capo {

void fail_no_room(const MemorySource& source, std::size_t bytes, const MemoryStats& held) {
  throw OutOfMemory(cat(source.name(), " allocator: ", bytes, " bytes asked, the system has no room, ", held.live_bytes,
                        " bytes are in use and ", held.cached_bytes, " cached"));
}

// free: for the pool's own use again. kept: released by others while it was open.
struct CachingAllocator::Pool {
  Blocks free, kept;
};

// A block of this rounded size, or null.
void* CachingAllocator::reuse(Blocks& blocks, std::size_t size) {
  const auto it = blocks.find(size);
  if (it == blocks.end() || it->second.empty()) return nullptr;
  void* const p = it->second.back();
  it->second.pop_back();
  stats_.cached_bytes -= static_cast<std::int64_t>(size);
  ++stats_.cache_hits;
  return p;
}

void* CachingAllocator::allocate(std::size_t bytes) {
  const std::size_t size = rounded_bytes(bytes);
  const std::lock_guard lock(mutex_);
  Pool* const pool = open_ && open_thread_ == std::this_thread::get_id() ? open_ : nullptr;
  void* p = pool ? reuse(pool->free, size) : nullptr;
  if (!p) p = reuse(free_, size);
  if (!p) p = source_.take(size);
  if (!p && !open_) {  // while a graph is captured nothing may go back
    drop_cache();
    p = source_.take(size);
  }
  if (!p) fail_no_room(source_, bytes, stats_);
  if (pool) owner_.emplace(p, pool);
  count_allocation(stats_, size);
  return p;
}

void CachingAllocator::release(void* p, std::size_t bytes) {
  const std::size_t size = rounded_bytes(bytes);
  const std::lock_guard lock(mutex_);
  stats_.live_bytes -= static_cast<std::int64_t>(size);
  if (const auto it = owner_.find(p); it != owner_.end()) {
    it->second->free[size].push_back(p);
    owner_.erase(it);
  } else if (open_ && open_thread_ == std::this_thread::get_id()) {
    open_->kept[size].push_back(p);
  } else {
    return put_back(p, size);
  }
  stats_.cached_bytes += static_cast<std::int64_t>(size);
}

void CachingAllocator::put_back(void* p, std::size_t size) {
  if (!open_ && stats_.cached_bytes + static_cast<std::int64_t>(size) > 2 * stats_.peak_bytes + (64 << 20)) {
    source_.give_back(p);
    return;
  }
  free_[size].push_back(p);
  stats_.cached_bytes += static_cast<std::int64_t>(size);
}

void CachingAllocator::begin_pool() {
  const std::lock_guard lock(mutex_);
  CAPO_CHECK(!open_, source_.name(), " allocator: a graph is being captured already");
  open_ = new Pool;
  open_thread_ = std::this_thread::get_id();
}

CachingAllocator::Pool* CachingAllocator::end_pool() {
  const std::lock_guard lock(mutex_);
  return std::exchange(open_, nullptr);
}

void CachingAllocator::drop_pool(Pool* pool) {
  const std::lock_guard lock(mutex_);
  for (const Blocks* blocks : {&pool->free, &pool->kept})
    for (const auto& [size, list] : *blocks)
      for (void* p : list) {
        stats_.cached_bytes -= static_cast<std::int64_t>(size);
        put_back(p, size);
      }
  std::erase_if(owner_, [pool](const auto& entry) { return entry.second == pool; });
  delete pool;
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
  for (auto& [size, blocks] : free_)
    for (void* p : blocks) {
      source_.give_back(p);
      stats_.cached_bytes -= static_cast<std::int64_t>(size);
    }
  free_.clear();
}

}  // namespace capo
