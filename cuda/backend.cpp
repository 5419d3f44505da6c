// The engine's CUDA devices through the CUDA runtime: memory, copies, streams.
// Not on the shim: the CUDA runtime's own; tests/shim/backend.cpp takes its place.
#include <capo/cuda/runtime.h>
#include <capo/engine/backend.h>
#include <capo/engine/caching_allocator.h>

#include <cuda_runtime_api.h>

#include <array>
#include <cstdlib>
#include <memory>

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

class CudaMemory final : public MemorySource {
 public:
  explicit CudaMemory(int index) : index_(index), name_(cat("cuda:", index)) {}
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
  void give_back(void* p) override {
    const UseDevice use(index_);
    cudaFree(p);  // at process exit the driver may be gone already: nothing to do about it
  }

 private:
  int index_;
  std::string name_;
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
    own = s;
  }
  int index;
  CudaMemory memory;
  CachingAllocator allocator;
  PlainAllocator plain;
  void* own = nullptr;
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

class CudaBackend final : public DeviceBackend {
 public:
  CudaBackend() {
    int n = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess) {
      cudaGetLastError();
      why_ = cudaGetErrorString(error);
      return;
    }
    if (n == 0) why_ = "the driver sees no device";
    for (int i = 0; i < n && i < kMaxDevices; ++i) {
      int major = 0, minor = 0;
      check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i), "cuda: asking for the architecture");
      check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i), "cuda: asking for the architecture");
      if (major < 8) {
        why_ = cat("cuda:", i, " is sm_", major, minor, ", this build needs sm_80 or newer");
        break;
      }
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
    check_cuda(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, s), "cuda: copying");
    if (to.is_cpu() || from.is_cpu()) check_cuda(cudaStreamSynchronize(s), "cuda: copying");
  }

  void* stream(int index) override {
    void* s = chosen_[static_cast<std::size_t>(index)];
    return s ? s : device(index).own;
  }
  void set_stream(int index, void* stream) override { chosen_[static_cast<std::size_t>(index)] = stream; }

  void synchronize(int index) override {
    const UseDevice use(index);
    check_cuda(cudaStreamSynchronize(static_cast<cudaStream_t>(stream(index))), "cuda: waiting for the stream");
  }

  // Of this thread only: other threads may go on using the device. What is pending on the stream runs before the work does.
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
  // The runtime stages up to 64 KiB of pageable memory before it returns: no pinned buffer that a later step could overwrite
  // too early, and no wait.
  void upload(int index, void* dst, const void* src, std::size_t bytes) override {
    CAPO_CHECK(bytes <= std::size_t{64} << 10, "upload: takes at most 64 KiB, got ", bytes, " bytes");
    const UseDevice use(index);
    check_cuda(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream(index))),
               "cuda: uploading");
  }

 private:
  CudaDevice& device(int index) {
    const std::lock_guard lock(mutex_);
    auto& d = devices_[static_cast<std::size_t>(index)];
    if (!d) d = new CudaDevice(index);
    return *d;
  }

  int count_ = 0;
  std::string why_;
  std::mutex mutex_;
  std::array<CudaDevice*, kMaxDevices> devices_{};
  static thread_local std::array<void*, kMaxDevices> chosen_;
};
thread_local std::array<void*, kMaxDevices> CudaBackend::chosen_{};

void CudaWork::launch() {
  const UseDevice use(device_.index);
  check_cuda(cudaGraphLaunch(graph_, static_cast<cudaStream_t>(linked_backend().stream(device_.index))), "graph: launching");
}

}  // namespace

DeviceBackend& linked_backend() {
  static auto* b = new CudaBackend;  // immortal: tensors in static storage give memory back late
  return *b;
}

}  // namespace capo
