// One "CUDA device" in host memory: builds with -DCAPO_CUDA_SHIM=ON run every kernel of cuda/ on the host shim, so that
// the op tests drive them through the library's own path. Every block has its exact size and starts as NaN.
#include <capo/engine/backend.h>
#include <capo/engine/caching_allocator.h>
#include <capo/tests/shim/shim.hpp>

namespace capo {
namespace {

class ShimAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes) override {
    const std::lock_guard lock(mutex_);
    count_allocation(stats_, rounded_bytes(bytes));
    return shim::allocate(bytes, "tensor");
  }
  void release(void* p, std::size_t bytes) override {
    const std::lock_guard lock(mutex_);
    stats_.live_bytes -= static_cast<std::int64_t>(rounded_bytes(bytes));
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

 private:
  mutable std::mutex mutex_;
  MemoryStats stats_;
};

class ShimBackend final : public DeviceBackend {
 public:
  int count() override { return 1; }
  std::string why_none() override { return ""; }
  Allocator& allocator(int) override { return allocator_; }
  void copy(void* dst, Device, const void* src, Device, std::size_t bytes) override {
    std::memcpy(dst, src, bytes);
    shim::mark_initialised(dst, bytes);
  }
  void* stream(int) override { return stream_; }
  void set_stream(int, void* stream) override { stream_ = stream; }
  void synchronize(int) override {}

 private:
  ShimAllocator allocator_;
  void* stream_ = nullptr;
};

}  // namespace

DeviceBackend& linked_backend() {
  static auto* b = new ShimBackend;  // immortal: tensors in static storage give memory back late
  return *b;
}

}  // namespace capo
