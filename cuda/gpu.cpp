// What launch() asks the CUDA runtime after every kernel.
// Not on the shim: its own launch() checks what it runs.
#include <capo/engine/error.h>

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <unordered_set>
#include <vector>

namespace capo::gpu {

void check_launch(const char* kernel, cudaStream_t stream) {
  static const bool sync = [] {
    const char* text = std::getenv("CAPO_SYNC");
    return text && text[0] == '1';
  }();
  const cudaError_t launched = cudaGetLastError();
  CAPO_CHECK(launched == cudaSuccess, kernel, ": the CUDA launch failed: ", cudaGetErrorString(launched));
  if (!sync) return;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capture);
  if (capture != cudaStreamCaptureStatusNone) return;  // nothing runs, and waiting would end the capture
  const cudaError_t ran = cudaStreamSynchronize(stream);
  CAPO_CHECK(ran == cudaSuccess, kernel, ": the CUDA kernel failed: ", cudaGetErrorString(ran));
}

// Asked once per kernel, device and thread, without a lock. Every thread asks for the same: one that asked for what its
// launch needs would take from another that needs more.
void allow_shared(const void* kernel) {
  static thread_local std::vector<std::unordered_set<const void*>> allowed;  // by device
  int device = 0;
  cudaGetDevice(&device);
  if (allowed.size() <= static_cast<std::size_t>(device)) allowed.resize(static_cast<std::size_t>(device) + 1);
  auto& there = allowed[static_cast<std::size_t>(device)];
  if (there.count(kernel)) return;
  int most = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - static_cast<int>(attributes.sharedSizeBytes));
  if (error == cudaSuccess) there.insert(kernel);  // else the launch fails, and check_launch says so
}

}  // namespace capo::gpu
