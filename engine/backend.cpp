#include <capo/engine/backend.h>
#include <capo/engine/error.h>

#include <cstring>

namespace capo {

#if defined(CAPO_WITH_CUDA)
DeviceBackend& linked_backend();  // cuda/backend.cpp or tests/shim/backend.cpp
DeviceBackend* backend() { return &linked_backend(); }
#else
DeviceBackend* backend() { return nullptr; }
#endif

DeviceBackend& backend_for(Device device) {
  CAPO_CHECK(device.is_cuda(), "device: ", device, " has no backend");
  DeviceBackend* b = backend();
  CAPO_CHECK(b, "device: this build has no CUDA (configure with -DCAPO_CUDA=ON), asked for ", device);
  const int n = b->count();
  CAPO_CHECK(n > 0, "device: no usable CUDA device, asked for ", device, ": ", b->why_none());
  CAPO_CHECK(device.index < n, "device: there are ", n, " CUDA devices, asked for ", device);
  return *b;
}

Device usable_device(std::string_view text) {
  const Device device = parse_device(text);
  CAPO_CHECK(!device.is_meta(), "device: must be cpu, cuda or cuda:N to compute on, got ", device);
  if (device.is_cuda()) backend_for(device);
  return device;
}

int device_count() { return backend() ? backend()->count() : 0; }

void synchronize(Device device) {
  if (!device.is_cuda()) return;
  refuse_capture("synchronize");
  backend_for(device).synchronize(device.index);
}

DeviceMemory device_memory(Device device) {
  if (device.is_cuda()) return backend_for(device).memory(device.index);
  DeviceMemory m;
  m.blocks = allocator(device).stats();
  return m;
}

void release_memory(Device device) {
  if (device.is_cuda())
    backend_for(device).release_all(device.index);
  else
    allocator(device).release_all();
}

std::string architecture_problem(int index, int major, int minor) {
  if (major >= 8) return "";
  return cat("cuda:", index, " is sm_", major, minor, ", this build needs sm_80 or newer");
}

void copy_bytes(void* dst, Device to, const void* src, Device from, std::size_t bytes) {
  if (bytes == 0) return;
  if (to.is_cpu() && from.is_cpu()) {
    std::memcpy(dst, src, bytes);
    return;
  }
  if (to.is_cpu() || from.is_cpu()) refuse_capture("copy");
  backend_for(to.is_cuda() ? to : from).copy(dst, to, src, from, bytes);
}

}  // namespace capo
