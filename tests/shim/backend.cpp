// One "CUDA device" in host memory: builds with -DCAPO_CUDA_SHIM=ON run every kernel of cuda/ on the host shim, so that
// the op tests drive them through the library's own path. Every block has its exact size and starts as NaN.
#include <capo/engine/caching_allocator.h>
#include <capo/tests/shim/backend.h>

#include <mutex>
#include <unordered_set>

namespace capo {
namespace {

// Blocks of exact size that nobody reuses. Those of a capture stay allocated until its work is gone.
class ExactAllocator final : public Allocator {
 public:
  struct Pool {
    std::unordered_set<void*> in_use;
    std::vector<void*> released;
  };

  void* allocate(std::size_t bytes) override {
    const std::lock_guard lock(mutex_);
    count_allocation(stats_, rounded_bytes(bytes));
    void* const p = shim::allocate(bytes, "tensor");
    if (open_) open_->in_use.insert(p);
    return p;
  }
  void release(void* p, std::size_t bytes) override {
    const std::lock_guard lock(mutex_);
    stats_.live_bytes -= static_cast<std::int64_t>(rounded_bytes(bytes));
    for (Pool* pool : pools_)
      if (pool->in_use.erase(p) || pool == open_) return pool->released.push_back(p);
    shim::release(p);
  }
  MemoryStats stats() const override {
    const std::lock_guard lock(mutex_);
    return stats_;
  }
  void reset_peak() override {
    const std::lock_guard lock(mutex_);
    stats_.peak_bytes = stats_.live_bytes;
  }

  void begin_pool() {
    const std::lock_guard lock(mutex_);
    pools_.push_back(open_ = new Pool);
  }
  Pool* end_pool() {
    const std::lock_guard lock(mutex_);
    return std::exchange(open_, nullptr);
  }
  void drop_pool(Pool* pool) {
    const std::lock_guard lock(mutex_);
    for (void* p : pool->released) shim::release(p);
    std::erase(pools_, pool);
    delete pool;
  }

 private:
  mutable std::mutex mutex_;
  MemoryStats stats_;
  Pool* open_ = nullptr;
  std::vector<Pool*> pools_;
};

class ShimMemory final : public MemorySource {
 public:
  const char* name() const override { return "cuda:0"; }
  void* take(std::size_t bytes) override { return shim::allocate(bytes, "tensor"); }
  void give_back(void* p) override { shim::release(p); }
};

struct Memory {
  ExactAllocator exact;
  ShimMemory source;
  CachingAllocator caching{source};
  bool cached = false;
};
Memory& memory() {
  static auto* m = new Memory;  // immortal: tensors in static storage give memory back late
  return *m;
}

class ShimWork final : public CapturedWork {
 public:
  ShimWork() : launches(shim::stop_recording()), exact_(memory().exact.end_pool()), caching_(memory().caching.end_pool()) {}
  ~ShimWork() override {
    memory().exact.drop_pool(exact_);
    memory().caching.drop_pool(caching_);
  }
  void launch() override { shim::replay(launches); }
  const std::vector<shim::Launch> launches;

 private:
  ExactAllocator::Pool* exact_;
  CachingAllocator::Pool* caching_;
};

class ShimBackend final : public DeviceBackend {
 public:
  int count() override { return 1; }
  std::string why_none() override { return ""; }
  Allocator& allocator(int) override {
    if (memory().cached) return memory().caching;
    return memory().exact;
  }
  void copy(void* dst, Device to, const void* src, Device from, std::size_t bytes) override {
    if (to.is_cuda() && from.is_cuda()) return shim::copy(dst, src, bytes);
    if (to.is_cpu()) shim::check_written(src, bytes);
    std::memcpy(dst, src, bytes);
    shim::mark_initialised(dst, bytes);
  }
  void* stream(int) override { return stream_; }
  void set_stream(int, void* stream) override { stream_ = stream; }
  void synchronize(int) override {}

  void begin_capture(int) override {
    memory().caching.begin_pool();
    memory().exact.begin_pool();
    shim::start_capture();
  }
  std::unique_ptr<CapturedWork> end_capture(int) override { return std::make_unique<ShimWork>(); }
  void abandon_capture(int) noexcept override { ShimWork(); }
  void upload(int, void* dst, const void* src, std::size_t bytes) override {
    std::memcpy(dst, src, bytes);
    shim::mark_initialised(dst, bytes);
  }

 private:
  void* stream_ = nullptr;
};

}  // namespace

namespace shim {
bool use_caching_allocator(bool on) { return std::exchange(memory().cached, on); }
const std::vector<Launch>& launches_of(const CapturedWork& work) { return static_cast<const ShimWork&>(work).launches; }
}  // namespace shim

DeviceBackend& linked_backend() {
  static auto* b = new ShimBackend;  // immortal: tensors in static storage give memory back late
  return *b;
}

}  // namespace capo
