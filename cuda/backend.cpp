// The engine's CUDA devices through the CUDA runtime: memory, copies, streams.
// Not on the shim: the CUDA runtime's own; tests/shim/backend.cpp takes its place.
#include <capo/cuda/runtime.h>
#include <capo/engine/backend.h>
#include <capo/engine/caching_allocator.h>

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace capo {
namespace gpu {

void check_cuda(int code, const char* what) {
  if (code == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(code);
  cudaGetLastError();  // not to be found again by the next call
  detail::fail(what, ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
}

}  // namespace gpu

DeviceBackend& linked_backend();

namespace {

using gpu::check_cuda;

constexpr int kMaxDevices = 16;

class UseDevice {
 public:
  explicit UseDevice(int index) {
    check_cuda(cudaGetDevice(&before_), "cuda: asking for the current device");
    if (before_ != index) check_cuda(cudaSetDevice(index), "cuda: choosing a device");
  }
  ~UseDevice() { cudaSetDevice(before_); }
  UseDevice(const UseDevice&) = delete;
  UseDevice& operator=(const UseDevice&) = delete;

 private:
  int before_ = 0;
};

// Lets this thread call what is refused while it captures a stream: cudaMalloc, which touches no stream.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Events of one device, made once and used again.
class Events {
 public:
  Events(int index, unsigned flags) : index_(index), flags_(flags) {}
  cudaEvent_t take() {
    {
      const std::lock_guard lock(mutex_);
      if (!spare_.empty()) {
        const cudaEvent_t e = spare_.back();
        spare_.pop_back();
        return e;
      }
    }
    const UseDevice use(index_);
    cudaEvent_t e;
    check_cuda(cudaEventCreateWithFlags(&e, flags_), "cuda: making an event");
    return e;
  }
  void give_back(cudaEvent_t e) {
    const std::lock_guard lock(mutex_);
    spare_.push_back(e);
  }
  void* mark(cudaStream_t stream) {
    const UseDevice use(index_);
    const cudaEvent_t e = take();
    const cudaError_t error = cudaEventRecord(e, stream);
    if (error != cudaSuccess) give_back(e);
    check_cuda(error, "cuda: marking a stream");
    return e;
  }

 private:
  int index_;
  unsigned flags_;
  std::mutex mutex_;
  std::vector<cudaEvent_t> spare_;
};

class CudaMemory final : public MemorySource {
 public:
  explicit CudaMemory(int index)
      : events(index, cudaEventDisableTiming),
        clocks(index, cudaEventDefault),
        index_(index),
        name_(cat("cuda:", index)) {}
  const char* name() const override { return name_.c_str(); }
  void* take(std::size_t bytes) override {
    const UseDevice use(index_);
    const RelaxedCapture relaxed;
    void* p = nullptr;
    const cudaError_t error = cudaMalloc(&p, bytes);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    check_cuda(error, "cuda: allocating memory");
    return p;
  }
  void give_back(void* p, std::size_t) override {
    const UseDevice use(index_);
    cudaFree(p);  // waits for the device; at process exit the driver may be gone already: nothing to do about it
  }
  std::string room() const override {
    const UseDevice use(index_);
    std::size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) != cudaSuccess) return "";
    return cat("; ", free >> 20, " of the device's ", total >> 20, " MiB are free");
  }
  std::size_t alignment() const override { return 256; }  // cudaMalloc's, which cuBLASLt's heuristics count on
  // cudaMalloc is slow and a freed segment waits for the whole device: few, and shared by what is small.
  std::size_t segment(std::size_t bytes) const override {
    constexpr std::size_t kMiB = 1 << 20;
    return bytes <= kMiB ? 2 * kMiB : bytes < 10 * kMiB ? 20 * kMiB : (bytes + 2 * kMiB - 1) / (2 * kMiB) * (2 * kMiB);
  }
  void* stream() override { return chosen[static_cast<std::size_t>(index_)]; }
  // Called while memory is released, where nothing may throw: a stream that cannot be marked is waited for.
  void* mark(void* stream) override {
    const auto s = static_cast<cudaStream_t>(stream ? stream : own);
    try {
      return events.mark(s);
    } catch (const Error&) {
      cudaStreamSynchronize(s);
      return nullptr;
    }
  }
  void wait_and_drop(void* stream, void* mark) override {
    const auto e = static_cast<cudaEvent_t>(mark);
    if (cudaStreamWaitEvent(static_cast<cudaStream_t>(stream ? stream : own), e, 0) != cudaSuccess)
      cudaEventSynchronize(e);
    events.give_back(e);
  }

  Events events, clocks;
  void* own = nullptr;  // the device's own stream: the nameless one
  static thread_local std::array<void*, kMaxDevices> chosen;  // this thread's, by device; null: the device's own

 private:
  int index_;
  std::string name_;
};
thread_local std::array<void*, kMaxDevices> CudaMemory::chosen{};

class PinnedMemory final : public MemorySource {
 public:
  const char* name() const override { return "pinned host memory"; }
  void* take(std::size_t bytes) override {
    void* p = nullptr;
    const cudaError_t error = cudaHostAlloc(&p, bytes, cudaHostAllocPortable);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    check_cuda(error, "cuda: allocating pinned memory");
    return p;
  }
  void give_back(void* p, std::size_t) override { cudaFreeHost(p); }
};

// CAPO_CACHE=0 in the environment: every tensor is a cudaMalloc of its own, for compute-sanitizer.
bool without_cache() {
  static const bool off = [] {
    const char* text = std::getenv("CAPO_CACHE");
    return text && text[0] == '0';
  }();
  return off;
}

// One device. The default stream of this library is one of its own that does not wait for the legacy stream.
struct CudaDevice {
  explicit CudaDevice(int i) : index(i), memory(i), allocator(memory), plain(memory) {
    const UseDevice use(i);
    cudaStream_t s;
    check_cuda(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cuda: making a stream");
    memory.own = s;
    check_cuda(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cuda: making a stream");
    copies = s;
  }
  cudaStream_t stream_of(void* stream) const { return static_cast<cudaStream_t>(stream ? stream : memory.own); }
  // As the allocator names it: null is the device's own.
  void* name_of(void* stream) const { return stream == memory.own ? nullptr : stream; }
  int index;
  CudaMemory memory;
  CachingAllocator allocator;
  PlainAllocator plain;
  void* copies = nullptr;
};

// A graph of one device, with the memory that its kernels use.
class CudaWork final : public CapturedWork {
 public:
  CudaWork(CudaDevice& device, CachingAllocator::Pool* pool, cudaGraphExec_t graph)
      : device_(device), pool_(pool), graph_(graph) {}
  ~CudaWork() override {
    const UseDevice use(device_.index);
    cudaGraphExecDestroy(graph_);
    device_.allocator.drop_pool(pool_);
  }
  void launch() override;

 private:
  CudaDevice& device_;
  CachingAllocator::Pool* pool_;
  cudaGraphExec_t graph_;
};

// Why the runtime counts no devices.
std::string driver_problem(cudaError_t error) {
  int driver = 0, ours = 0;
  const bool versions = cudaDriverGetVersion(&driver) == cudaSuccess && cudaRuntimeGetVersion(&ours) == cudaSuccess;
  if (error != cudaErrorInsufficientDriver || !versions) return cudaGetErrorString(error);
  if (driver == 0) return "no NVIDIA driver is installed";
  const auto text = [](int v) { return cat(v / 1000, ".", v % 1000 / 10); };
  return cat("the NVIDIA driver serves CUDA ", text(driver), " at most, this build needs ", text(ours));
}

class CudaBackend final : public DeviceBackend {
 public:
  CudaBackend() {
    int n = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess) {
      cudaGetLastError();
      why_ = driver_problem(error);
      return;
    }
    if (n == 0) why_ = "the driver sees no device";
    several_ = n > 1;
    for (int i = 0; i < n && i < kMaxDevices; ++i) {
      int major = 0, minor = 0;
      check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i),
                 "cuda: asking for the architecture");
      check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i),
                 "cuda: asking for the architecture");
      why_ = architecture_problem(i, major, minor);
      if (!why_.empty()) break;
      count_ = i + 1;
    }
  }

  int count() override { return count_; }
  std::string why_none() override { return why_; }
  Allocator& allocator(int index) override {
    CudaDevice& d = device(index);
    if (without_cache()) return d.plain;
    return d.allocator;
  }

  void copy(void* dst, Device to, const void* src, Device from, std::size_t bytes) override {
    const int index = to.is_cuda() ? to.index : from.index;
    const UseDevice use(index);
    const auto s = static_cast<cudaStream_t>(stream(index));
    const bool two = to.is_cuda() && from.is_cuda() && to.index != from.index;
    if (two) order(device(from.index), stream(from.index), device(index), s);
    check_cuda(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, s), "cuda: copying");
    if (two) order(device(index), s, device(from.index), stream(from.index));  // src may be released now
    if (to.is_cpu() || from.is_cpu()) check_cuda(cudaStreamSynchronize(s), "cuda: copying");
  }

  void* stream(int index) override {
    if (several_) make_current(index);
    void* s = CudaMemory::chosen[static_cast<std::size_t>(index)];
    return s ? s : device(index).memory.own;
  }
  void set_stream(int index, void* stream) override {
    CudaMemory::chosen[static_cast<std::size_t>(index)] = device(index).name_of(stream);
  }

  void synchronize(int index) override {
    const UseDevice use(index);
    check_cuda(cudaStreamSynchronize(static_cast<cudaStream_t>(stream(index))), "cuda: waiting for the stream");
  }

  // Of this thread only: other threads may go on using the device. What is pending on the stream runs before it.
  void begin_capture(int index) override {
    CAPO_CHECK(!without_cache(), "graph: CAPO_CACHE=0 gives a graph no memory of its own");
    const UseDevice use(index);
    CachingAllocator& memory = device(index).allocator;
    memory.begin_pool();
    const auto s = static_cast<cudaStream_t>(stream(index));
    const cudaError_t error = cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal);
    if (error == cudaSuccess) return;
    memory.drop_pool(memory.end_pool());
    check_cuda(error, "graph: beginning a capture");
  }
  std::unique_ptr<CapturedWork> end_capture(int index) override {
    const UseDevice use(index);
    CudaDevice& d = device(index);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t runnable = nullptr;
    cudaError_t error = cudaStreamEndCapture(static_cast<cudaStream_t>(stream(index)), &graph);
    CachingAllocator::Pool* const pool = d.allocator.end_pool();
    if (error == cudaSuccess) error = cudaGraphInstantiate(&runnable, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    if (error != cudaSuccess) d.allocator.drop_pool(pool);
    check_cuda(error, "graph: ending a capture");
    return std::make_unique<CudaWork>(d, pool, runnable);
  }
  void abandon_capture(int index) noexcept override {
    const UseDevice use(index);
    cudaGraph_t graph = nullptr;
    cudaStreamEndCapture(static_cast<cudaStream_t>(stream(index)), &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    CachingAllocator& memory = device(index).allocator;
    memory.drop_pool(memory.end_pool());
  }
  // The runtime stages up to 64 KiB of pageable memory before it returns: no pinned buffer that a later step could
  // overwrite too early, and no wait.
  void upload(int index, void* dst, const void* src, std::size_t bytes) override {
    CAPO_CHECK(bytes <= std::size_t{64} << 10, "upload: takes at most 64 KiB, got ", bytes, " bytes");
    const UseDevice use(index);
    check_cuda(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream(index))),
               "cuda: uploading");
  }

  void* copy_stream(int index) override { return device(index).copies; }
  void* mark(int index, void* stream) override {
    CudaDevice& d = device(index);
    return d.memory.events.mark(d.stream_of(stream));
  }
  void wait(int index, void* stream, void* mark) override {
    const UseDevice use(index);
    check_cuda(cudaStreamWaitEvent(device(index).stream_of(stream), static_cast<cudaEvent_t>(mark), 0),
               "cuda: ordering streams");
  }
  void wait_here(int, void* mark) override {
    check_cuda(cudaEventSynchronize(static_cast<cudaEvent_t>(mark)), "cuda: waiting for a mark");
  }
  void drop_mark(int index, void* mark) noexcept override {
    device(index).memory.events.give_back(static_cast<cudaEvent_t>(mark));
  }

  void* clock_mark(int index, void* stream) override {
    CudaDevice& d = device(index);
    return d.memory.clocks.mark(d.stream_of(stream));
  }
  double milliseconds(int, void* from, void* to) override {
    float ms = 0;
    check_cuda(cudaEventSynchronize(static_cast<cudaEvent_t>(to)), "cuda: waiting for a mark");
    check_cuda(cudaEventElapsedTime(&ms, static_cast<cudaEvent_t>(from), static_cast<cudaEvent_t>(to)),
               "cuda: reading a clock");
    return ms;
  }
  void drop_clock_mark(int index, void* mark) noexcept override {
    device(index).memory.clocks.give_back(static_cast<cudaEvent_t>(mark));
  }

  Allocator& pinned() override { return pinned_; }
  void copy_async(int index, void* stream, void* dst, const void* src, std::size_t bytes) override {
    const UseDevice use(index);
    check_cuda(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, device(index).stream_of(stream)),
               "cuda: uploading");
  }
  void hand_over(int index, void* from, void* to, bool live) override {
    CudaDevice& d = device(index);
    d.allocator.hand_over(d.name_of(from), d.name_of(to), live);
  }

  void* workspace(int index, void* stream, std::size_t bytes) override {
    CudaDevice& d = device(index);
    return d.allocator.workspace(d.name_of(stream), bytes);
  }
  DeviceMemory memory(int index) override {
    CudaDevice& d = device(index);
    DeviceMemory m;
    m.blocks = allocator(index).stats();
    m.workspace = d.allocator.workspace_bytes();
    const MemoryStats pinned = pinned_.stats();
    m.pinned = pinned.live_bytes + pinned.cached_bytes;
    const UseDevice use(index);
    std::size_t free = 0, total = 0;
    check_cuda(cudaMemGetInfo(&free, &total), "cuda: asking for free memory");
    m.free = static_cast<std::int64_t>(free);
    m.total = static_cast<std::int64_t>(total);
    return m;
  }
  void release_all(int index) override {
    const UseDevice use(index);
    check_cuda(cudaDeviceSynchronize(), "cuda: waiting for the device");
    device(index).allocator.release_all();
    pinned_.release_all();
  }

 private:
  CudaDevice& device(int index) {
    auto& slot = devices_[static_cast<std::size_t>(index)];
    if (CudaDevice* d = slot.load(std::memory_order_acquire)) return *d;
    const std::lock_guard lock(mutex_);
    if (!slot.load(std::memory_order_relaxed)) slot.store(new CudaDevice(index), std::memory_order_release);
    return *slot.load(std::memory_order_relaxed);
  }
  // The runtime knows this thread's device without a call to the driver.
  static void make_current(int index) {
    int now = -1;
    check_cuda(cudaGetDevice(&now), "cuda: asking for the current device");
    if (now != index) check_cuda(cudaSetDevice(index), "cuda: choosing a device");
  }
  // What stream `later` of device b is given from now on comes behind what `first` of device a was given.
  static void order(CudaDevice& a, void* first, CudaDevice& b, void* later) {
    void* const mark = a.memory.events.mark(static_cast<cudaStream_t>(first));
    const UseDevice use(b.index);
    const cudaError_t error = cudaStreamWaitEvent(static_cast<cudaStream_t>(later), static_cast<cudaEvent_t>(mark), 0);
    a.memory.events.give_back(static_cast<cudaEvent_t>(mark));
    check_cuda(error, "cuda: ordering streams");
  }

  int count_ = 0;
  bool several_ = false;  // devices that the process sees, usable or not
  std::string why_;
  std::mutex mutex_;
  std::array<std::atomic<CudaDevice*>, kMaxDevices> devices_{};
  PinnedMemory pinned_memory_;
  CachingAllocator pinned_{pinned_memory_};
};

void CudaWork::launch() {
  const UseDevice use(device_.index);
  check_cuda(cudaGraphLaunch(graph_, static_cast<cudaStream_t>(linked_backend().stream(device_.index))),
             "graph: launching");
}

}  // namespace

DeviceBackend& linked_backend() {
  static auto* b = new CudaBackend;  // immortal: tensors in static storage give memory back late
  return *b;
}

}  // namespace capo
