// "CUDA devices" in host memory: builds with -DCAPO_CUDA_SHIM=ON run every kernel of cuda/ on the host shim, so that
// the op tests drive them through the library's own path. Every block has its exact size and starts as NaN. Kernels run
// when they are launched; copies beside them as late as the rules allow (streams.h).
#include <capo/engine/backend.h>
#include <capo/engine/caching_allocator.h>
#include <capo/tests/shim/backend.h>
#include <capo/tests/shim/device.h>
#include <capo/tests/shim/streams.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace capo {
namespace {

constexpr int kDevices = 2;

shim::Streams& streams() {
  static auto* s = new shim::Streams;  // immortal, as all here: tensors in static storage give memory back late
  return *s;
}

thread_local std::array<void*, kDevices> chosen{};  // null: the device's own stream
thread_local int current = 0;

class ShimMemory final : public MemorySource {
 public:
  explicit ShimMemory(int index) : index_(index), name_(cat("cuda:", index)) {}
  const char* name() const override { return name_.c_str(); }
  void* take(std::size_t bytes) override {
    const std::lock_guard lock(mutex_);
    const std::size_t limit = shim::device_settings().limit;
    if (bytes > limit || used_ > limit - bytes) return nullptr;
    void* const p = shim::allocate(bytes, "tensor");
    size_[p] = bytes;
    used_ += bytes;
    return p;
  }
  void give_back(void* p, std::size_t) override {
    const std::lock_guard lock(mutex_);
    const auto it = size_.find(p);
    streams().run_into(p, it->second);
    used_ -= it->second;
    size_.erase(it);
    shim::release(p);
  }
  std::string room() const override {
    return cat("; ", shim::device_settings().limit - used(), " bytes of the device are free");
  }
  std::size_t used() const {
    const std::lock_guard lock(mutex_);
    return used_;
  }
  void* stream() override { return chosen[static_cast<std::size_t>(index_)]; }
  void* mark(void* stream) override { return new shim::Streams::Mark(streams().mark(stream ? stream : this)); }
  void wait_and_drop(void*, void* mark) override {
    const auto* m = static_cast<shim::Streams::Mark*>(mark);
    streams().run(*m);
    delete m;
  }

 private:
  int index_;
  std::string name_;
  mutable std::mutex mutex_;
  std::unordered_map<void*, std::size_t> size_;
  std::size_t used_ = 0;
};

// Blocks of exact size that nobody reuses. Those of a capture stay allocated until its work is gone.
class ExactAllocator final : public Allocator {
 public:
  struct Pool {
    std::unordered_set<void*> in_use;
    std::vector<void*> released;
  };

  explicit ExactAllocator(ShimMemory& memory) : memory_(memory) {}
  void* allocate(std::size_t bytes) override {
    const std::lock_guard lock(mutex_);
    void* const p = memory_.take(bytes);
    if (!p) fail_no_room(memory_, bytes, stats_);
    count_allocation(stats_, rounded_bytes(bytes));
    if (open_) open_->in_use.insert(p);
    return p;
  }
  void release(void* p, std::size_t bytes) override {
    const std::lock_guard lock(mutex_);
    stats_.live_bytes -= static_cast<std::int64_t>(rounded_bytes(bytes));
    for (Pool* pool : pools_)
      if (pool->in_use.erase(p) || pool == open_) return pool->released.push_back(p);
    memory_.give_back(p, 0);
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
    for (void* p : pool->released) memory_.give_back(p, 0);
    std::erase(pools_, pool);
    delete pool;
  }

 private:
  ShimMemory& memory_;
  mutable std::mutex mutex_;
  MemoryStats stats_;
  Pool* open_ = nullptr;
  std::vector<Pool*> pools_;
};

class PinnedMemory final : public MemorySource {
 public:
  const char* name() const override { return "pinned host memory"; }
  void* take(std::size_t bytes) override { return std::aligned_alloc(64, (bytes + 63) & ~std::size_t{63}); }
  void give_back(void* p, std::size_t) override { std::free(p); }
};

struct ShimDevice {
  explicit ShimDevice(int index) : memory(index) {}
  ShimMemory memory;  // its address is the device's own stream
  ExactAllocator exact{memory};
  CachingAllocator caching{memory};
  char copies = 0;    // likewise
};
ShimDevice& device(int index) {
  static std::array<ShimDevice*, kDevices> all{new ShimDevice(0), new ShimDevice(1)};
  return *all[static_cast<std::size_t>(index)];
}
void* stream_of(int index, void* stream) { return stream ? stream : &device(index).memory; }
void* name_of(int index, void* stream) { return stream == &device(index).memory ? nullptr : stream; }

class ShimWork final : public CapturedWork {
 public:
  explicit ShimWork(ShimDevice& d)
      : launches(shim::stop_recording()), device_(d), exact_(d.exact.end_pool()), caching_(d.caching.end_pool()) {}
  ~ShimWork() override {
    device_.exact.drop_pool(exact_);
    device_.caching.drop_pool(caching_);
  }
  void launch() override { shim::replay(launches); }
  const std::vector<shim::Launch> launches;

 private:
  ShimDevice& device_;
  ExactAllocator::Pool* exact_;
  CachingAllocator::Pool* caching_;
};

class ShimBackend final : public DeviceBackend {
 public:
  int count() override { return shim::device_settings().devices; }
  std::string why_none() override { return shim::device_settings().why_none; }
  Allocator& allocator(int index) override {
    if (shim::device_settings().caching) return device(index).caching;
    return device(index).exact;
  }
  void copy(void* dst, Device to, const void* src, Device from, std::size_t bytes) override {
    for (const Device d : {to, from})
      if (d.is_cuda()) streams().run_all(stream(d.index));
    if (to.is_cuda() && from.is_cuda()) return shim::copy(dst, src, bytes);
    if (to.is_cpu()) shim::check_written(src, bytes);
    std::memcpy(dst, src, bytes);
    shim::mark_initialised(dst, bytes);
  }

  // What it is asked for is to be given work: copies that the stream was given before come first.
  void* stream(int index) override {
    current = index;
    void* const s = stream_of(index, chosen[static_cast<std::size_t>(index)]);
    streams().run_all(s);
    return s;
  }
  void set_stream(int index, void* stream) override {
    chosen[static_cast<std::size_t>(index)] = name_of(index, stream);
  }
  void synchronize(int index) override { stream(index); }

  void* copy_stream(int index) override { return &device(index).copies; }
  void* mark(int index, void* stream) override {
    return new shim::Streams::Mark(streams().mark(stream_of(index, stream)));
  }
  void wait(int, void*, void* mark) override { streams().run(*static_cast<shim::Streams::Mark*>(mark)); }
  void wait_here(int, void* mark) override { streams().run(*static_cast<shim::Streams::Mark*>(mark)); }
  void drop_mark(int, void* mark) noexcept override { delete static_cast<shim::Streams::Mark*>(mark); }
  // The host's clock: what the shim's kernels take means nothing.
  void* clock_mark(int, void*) override {
    return new std::chrono::steady_clock::time_point(std::chrono::steady_clock::now());
  }
  double milliseconds(int, void* from, void* to) override {
    using Point = std::chrono::steady_clock::time_point;
    return std::chrono::duration<double, std::milli>(*static_cast<Point*>(to) - *static_cast<Point*>(from)).count();
  }
  void drop_clock_mark(int, void* mark) noexcept override {
    delete static_cast<std::chrono::steady_clock::time_point*>(mark);
  }
  Allocator& pinned() override { return pinned_; }
  void copy_async(int index, void* stream, void* dst, const void* src, std::size_t bytes) override {
    streams().copy(stream_of(index, stream), dst, src, bytes);
  }
  void hand_over(int index, void* from, void* to, bool live) override {
    device(index).caching.hand_over(name_of(index, from), name_of(index, to), live);
  }

  void begin_capture(int index) override {
    device(index).caching.begin_pool();
    device(index).exact.begin_pool();
    shim::start_capture();
  }
  std::unique_ptr<CapturedWork> end_capture(int index) override { return std::make_unique<ShimWork>(device(index)); }
  void abandon_capture(int index) noexcept override { ShimWork(device(index)); }
  void upload(int index, void* dst, const void* src, std::size_t bytes) override {
    stream(index);
    std::memcpy(dst, src, bytes);
    shim::mark_initialised(dst, bytes);
  }

  void* workspace(int index, void* stream, std::size_t bytes) override {
    return device(index).caching.workspace(name_of(index, stream), bytes);
  }
  DeviceMemory memory(int index) override {
    DeviceMemory m;
    m.blocks = allocator(index).stats();
    m.workspace = device(index).caching.workspace_bytes();
    const MemoryStats pinned = pinned_.stats();
    m.pinned = pinned.live_bytes + pinned.cached_bytes;
    m.total = static_cast<std::int64_t>(std::min<std::size_t>(shim::device_settings().limit, INT64_MAX));
    m.free = m.total - static_cast<std::int64_t>(device(index).memory.used());
    return m;
  }
  void release_all(int index) override {
    streams().run_all();
    device(index).caching.release_all();
    pinned_.release_all();
  }

 private:
  PinnedMemory pinned_memory_;
  CachingAllocator pinned_{pinned_memory_};
};

}  // namespace

namespace shim {

DeviceSettings& device_settings() {
  static auto* s = new DeviceSettings;
  return *s;
}
int current_device() { return current; }
std::size_t used_bytes(int index) { return device(index).memory.used(); }
std::size_t waiting_copies() { return streams().waiting(); }
const std::vector<Launch>& launches_of(const CapturedWork& work) { return static_cast<const ShimWork&>(work).launches; }

}  // namespace shim

DeviceBackend& linked_backend() {
  static auto* b = new ShimBackend;
  return *b;
}

}  // namespace capo
