#include <capo/engine/backend.h>
#include <capo/engine/cpu_memory.h>
#include <capo/engine/error.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace capo {

std::size_t rounded_bytes(std::size_t bytes) {
  return bytes == 0 ? 64 : (bytes + 63) & ~std::size_t{63};
}

namespace {

class MetaAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes) override {
    std::lock_guard lock(mutex_);
    count_allocation(stats_, rounded_bytes(bytes));
    return nullptr;
  }
  void release(void*, std::size_t bytes) override {
    std::lock_guard lock(mutex_);
    stats_.live_bytes -= static_cast<std::int64_t>(rounded_bytes(bytes));
  }
  MemoryStats stats() const override {
    std::lock_guard lock(mutex_);
    return stats_;
  }
  void reset_peak() override {
    std::lock_guard lock(mutex_);
    stats_.peak_bytes = stats_.live_bytes;
  }

 private:
  mutable std::mutex mutex_;
  MemoryStats stats_;
};

// Immortal: tensors in static storage may outlive any destructor order.
CachingAllocator& cached_cpu() {
  static auto* a = new CachingAllocator(cpu_memory());
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
  MemoryStats stats;
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
  return backend_for(device).allocator(device.index);
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
  // Of the heap itself: a sanitizer guards it too.
  auto* raw = static_cast<unsigned char*>(std::aligned_alloc(64, rounded_bytes(bytes) + 2 * kGuard));
  if (!raw) fail_no_room(cpu_memory(), bytes, s.stats);
  std::memset(raw, kGuardByte, kGuard);
  std::memset(raw + kGuard, 0xFF, bytes);  // NaN in every float format
  std::memset(raw + kGuard + bytes, kGuardByte, kGuard);
  s.live.emplace(raw + kGuard, bytes);
  count_allocation(s.stats, rounded_bytes(bytes));
  return raw + kGuard;
}

void DebugAllocator::release(void* p, std::size_t bytes) {
  auto& s = debug_state();
  std::lock_guard lock(s.mutex);
  s.inspect(p, bytes);
  s.live.erase(p);
  s.stats.live_bytes -= static_cast<std::int64_t>(rounded_bytes(bytes));
  std::free(static_cast<unsigned char*>(p) - kGuard);
}

MemoryStats DebugAllocator::stats() const {
  std::lock_guard lock(debug_state().mutex);
  return debug_state().stats;
}
void DebugAllocator::reset_peak() {
  std::lock_guard lock(debug_state().mutex);
  debug_state().stats.peak_bytes = debug_state().stats.live_bytes;
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
