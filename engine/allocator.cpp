#include <capo/engine/allocator.h>
#include <capo/engine/error.h>

#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace capo {

std::size_t rounded_bytes(std::size_t bytes) {
  if (bytes == 0) return 64;
  if (bytes <= 1024) return (bytes + 63) & ~std::size_t{63};
  const std::size_t step = std::bit_floor(bytes) / 8;
  return (bytes + step - 1) / step * step;
}

namespace {

// Live and peak bytes of one allocator.
class Counter {
 public:
  void add(std::int64_t bytes) {
    stats_.live_bytes += bytes;
    ++stats_.allocations;
    if (stats_.live_bytes > stats_.peak_bytes) stats_.peak_bytes = stats_.live_bytes;
  }
  void sub(std::int64_t bytes) { stats_.live_bytes -= bytes; }
  void reset_peak() { stats_.peak_bytes = stats_.live_bytes; }
  MemoryStats stats_;
};

void* system_allocate(std::size_t bytes, const MemoryStats& held) {
  void* p = std::aligned_alloc(64, (bytes + 63) & ~std::size_t{63});
  if (!p)
    throw OutOfMemory(cat("cpu allocator: ", bytes, " bytes asked, the system has no room, ", held.live_bytes,
                          " bytes are in use and ", held.cached_bytes, " cached"));
  return p;
}

// Blocks of one rounded size are kept and reused. A block that would bring the cache above twice the peak and 64 MiB goes
// back to the system.
class CachedCpuAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes) override {
    const std::size_t size = rounded_bytes(bytes);
    std::lock_guard lock(mutex_);
    void* p = nullptr;
    auto it = free_.find(size);
    if (it != free_.end() && !it->second.empty()) {
      p = it->second.back();
      it->second.pop_back();
      counter_.stats_.cached_bytes -= static_cast<std::int64_t>(size);
      ++counter_.stats_.cache_hits;
    } else {
      try {
        p = system_allocate(size, counter_.stats_);
      } catch (const OutOfMemory&) {
        drop_cache();
        p = system_allocate(size, counter_.stats_);
      }
    }
    counter_.add(static_cast<std::int64_t>(size));
    return p;
  }

  void release(void* p, std::size_t bytes) override {
    const std::size_t size = rounded_bytes(bytes);
    std::lock_guard lock(mutex_);
    counter_.sub(static_cast<std::int64_t>(size));
    auto& s = counter_.stats_;
    if (s.cached_bytes + static_cast<std::int64_t>(size) > 2 * s.peak_bytes + (64 << 20)) {
      std::free(p);
      return;
    }
    free_[size].push_back(p);
    s.cached_bytes += static_cast<std::int64_t>(size);
  }

  MemoryStats stats() const override {
    std::lock_guard lock(mutex_);
    return counter_.stats_;
  }
  void reset_peak() override {
    std::lock_guard lock(mutex_);
    counter_.reset_peak();
  }
  void release_all() override {
    std::lock_guard lock(mutex_);
    drop_cache();
  }

 private:
  void drop_cache() {
    for (auto& [size, blocks] : free_)
      for (void* p : blocks) std::free(p);
    free_.clear();
    counter_.stats_.cached_bytes = 0;
  }

  mutable std::mutex mutex_;
  std::unordered_map<std::size_t, std::vector<void*>> free_;
  Counter counter_;
};

class MetaAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes) override {
    std::lock_guard lock(mutex_);
    counter_.add(static_cast<std::int64_t>(rounded_bytes(bytes)));
    return nullptr;
  }
  void release(void*, std::size_t bytes) override {
    std::lock_guard lock(mutex_);
    counter_.sub(static_cast<std::int64_t>(rounded_bytes(bytes)));
  }
  MemoryStats stats() const override {
    std::lock_guard lock(mutex_);
    return counter_.stats_;
  }
  void reset_peak() override {
    std::lock_guard lock(mutex_);
    counter_.reset_peak();
  }

 private:
  mutable std::mutex mutex_;
  Counter counter_;
};

// Immortal: tensors in static storage may outlive any destructor order.
CachedCpuAllocator& cached_cpu() {
  static auto* a = new CachedCpuAllocator;
  return *a;
}
MetaAllocator& meta_allocator() {
  static auto* a = new MetaAllocator;
  return *a;
}
std::atomic<Allocator*> cpu_allocator{nullptr};

constexpr std::size_t kGuard = 64;
constexpr unsigned char kGuardByte = 0xA5;

struct DebugState {
  mutable std::mutex mutex;
  std::unordered_map<void*, std::size_t> live;
  Counter counter;
  std::string damage;

  void inspect(void* p, std::size_t bytes) {
    const auto* user = static_cast<unsigned char*>(p);
    const unsigned char* before = user - kGuard;
    const unsigned char* after = user + bytes;
    for (std::size_t i = 0; i < kGuard; ++i)
      if (before[i] != kGuardByte || after[i] != kGuardByte)
        damage = cat("debug allocator: guard word overwritten ", before[i] != kGuardByte ? "before" : "after",
                     " a block of ", bytes, " bytes");
  }
};
DebugState& debug_state() {
  static auto* s = new DebugState;
  return *s;
}

}  // namespace

Allocator& allocator(Device device) {
  switch (device.type) {
    case DeviceType::cpu: {
      Allocator* a = cpu_allocator.load();
      return a ? *a : cached_cpu();
    }
    case DeviceType::meta: return meta_allocator();
    case DeviceType::cuda: break;
  }
  detail::fail("allocator: no CUDA memory in this build, asked for ", device);
}

Allocator* set_cpu_allocator(Allocator* a) {
  Allocator* before = cpu_allocator.exchange(a);
  return before ? before : &cached_cpu();
}

DebugAllocator& DebugAllocator::instance() {
  static auto* a = new DebugAllocator;
  return *a;
}

void* DebugAllocator::allocate(std::size_t bytes) {
  auto& s = debug_state();
  std::lock_guard lock(s.mutex);
  auto* raw = static_cast<unsigned char*>(system_allocate(bytes + 2 * kGuard, s.counter.stats_));
  std::memset(raw, kGuardByte, kGuard);
  std::memset(raw + kGuard, 0xFF, bytes);  // NaN in every float format
  std::memset(raw + kGuard + bytes, kGuardByte, kGuard);
  s.live.emplace(raw + kGuard, bytes);
  s.counter.add(static_cast<std::int64_t>(rounded_bytes(bytes)));
  return raw + kGuard;
}

void DebugAllocator::release(void* p, std::size_t bytes) {
  auto& s = debug_state();
  std::lock_guard lock(s.mutex);
  s.inspect(p, bytes);
  s.live.erase(p);
  s.counter.sub(static_cast<std::int64_t>(rounded_bytes(bytes)));
  std::free(static_cast<unsigned char*>(p) - kGuard);
}

MemoryStats DebugAllocator::stats() const {
  std::lock_guard lock(debug_state().mutex);
  return debug_state().counter.stats_;
}
void DebugAllocator::reset_peak() {
  std::lock_guard lock(debug_state().mutex);
  debug_state().counter.reset_peak();
}

void DebugAllocator::check() {
  auto& s = debug_state();
  std::lock_guard lock(s.mutex);
  for (auto& [p, bytes] : s.live) s.inspect(p, bytes);
  if (!s.damage.empty()) {
    const std::string text = s.damage;
    s.damage.clear();
    throw Error(text);
  }
}

}  // namespace capo
