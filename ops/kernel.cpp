#include <capo/engine/backend.h>
#include <capo/ops/kernel.h>

namespace capo::detail {

void fail_no_kernel(const char* name, Device device) {
  fail(name, ": no ", device.is_cuda() ? "CUDA" : "such", " kernel in this build, tensors are on ", device);
}

void* current_stream(Device device) { return backend_for(device).stream(device.index); }

}  // namespace capo::detail
