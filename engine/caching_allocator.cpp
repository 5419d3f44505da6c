#include <capo/engine/caching_allocator.h>
#include <capo/engine/error.h>

namespace capo {

void fail_no_room(const MemorySource& source, std::size_t bytes, const MemoryStats& held) {
  throw OutOfMemory(cat(source.name(), " allocator: ", bytes, " bytes asked, the system has no room, ", held.live_bytes,
                        " bytes are in use and ", held.cached_bytes, " cached"));
}

void* CachingAllocator::allocate(std::size_t bytes) {
  const std::size_t size = rounded_bytes(bytes);
  const std::lock_guard lock(mutex_);
  void* p = nullptr;
  const auto it = free_.find(size);
  if (it != free_.end() && !it->second.empty()) {
    p = it->second.back();
    it->second.pop_back();
    stats_.cached_bytes -= static_cast<std::int64_t>(size);
    ++stats_.cache_hits;
  } else {
    p = source_.take(size);
    if (!p) {
      drop_cache();
      p = source_.take(size);
    }
    if (!p) fail_no_room(source_, bytes, stats_);
  }
  count_allocation(stats_, size);
  return p;
}

void CachingAllocator::release(void* p, std::size_t bytes) {
  const std::size_t size = rounded_bytes(bytes);
  const std::lock_guard lock(mutex_);
  stats_.live_bytes -= static_cast<std::int64_t>(size);
  if (stats_.cached_bytes + static_cast<std::int64_t>(size) > 2 * stats_.peak_bytes + (64 << 20)) {
    source_.give_back(p);
    return;
  }
  free_[size].push_back(p);
  stats_.cached_bytes += static_cast<std::int64_t>(size);
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
    for (void* p : blocks) source_.give_back(p);
  free_.clear();
  stats_.cached_bytes = 0;
}

}  // namespace capo
