// What launch() asks the CUDA runtime after every kernel.
// Not on the shim: its own launch() checks what it runs.
#include <capo/engine/error.h>

#include <cuda_runtime_api.h>

#include <cstdlib>

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

}  // namespace capo::gpu
