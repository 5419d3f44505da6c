// What a device beside the CPU supplies to the engine: memory, copies, streams. Builds with CUDA link one implementation
// (cuda/backend.cpp; in tests the host shim's, tests/shim/backend.cpp), all others none.
#pragma once

#include <capo/engine/allocator.h>
#include <capo/engine/device.h>

#include <cstddef>
#include <memory>
#include <string>

namespace capo {

// Work that a device has been given once and can be given again as a whole. Its memory goes back when it is destroyed.
class CapturedWork {
 public:
  virtual ~CapturedWork() = default;
  virtual void launch() = 0;  // on the device's current stream
};

class DeviceBackend {
 public:
  virtual ~DeviceBackend() = default;

  // Usable devices. 0 when there is none: why_none() then says why ("no driver", "needs sm_80 or newer, found ...").
  virtual int count() = 0;
  virtual std::string why_none() = 0;
  virtual Allocator& allocator(int index) = 0;

  // Between this backend's memory and the host's, or within it. Ordered on the device's current stream. Returns once
  // the host side may be read or reused; device to device it returns at once.
  virtual void copy(void* dst, Device to, const void* src, Device from, std::size_t bytes) = 0;
  // The stream that kernels and copies of this thread go to (a cudaStream_t), and another one for it: a caller's own.
  virtual void* stream(int index) = 0;
  virtual void set_stream(int index, void* stream) = 0;
  // Waits for everything on the current stream; throws what a kernel did wrong.
  virtual void synchronize(int index) = 0;

  // Between the two, on one thread, kernels and copies on the device's current stream are kept and not run. What the
  // thread allocates meanwhile belongs to the work: until that is destroyed, nobody else gets the memory, nor any that
  // the thread releases meanwhile. One capture at a time on a device. abandon_capture(): the same, nothing is kept.
  virtual void begin_capture(int index) = 0;
  virtual std::unique_ptr<CapturedWork> end_capture(int index) = 0;
  virtual void abandon_capture(int index) noexcept = 0;
  // At most 64 KiB from the host, ordered on the current stream; does not wait, and src may be reused at once.
  virtual void upload(int index, void* dst, const void* src, std::size_t bytes) = 0;
};

// Null in builds without CUDA.
DeviceBackend* backend();
// The backend, once `device` is one that it can use; otherwise throws saying what is missing.
DeviceBackend& backend_for(Device device);

// cuda devices that this process can use; 0 in builds without CUDA.
int device_count();
// Waits for the device's current stream. Nothing to do on the CPU.
void synchronize(Device device);
// Throws "<what>: needs the host, ..." when this thread captures a graph: for everything that would read device memory
// on the host, or write host memory to the device.
void refuse_capture(const char* what);
// Bytes from one place to another, whichever of them is the host; see DeviceBackend::copy.
void copy_bytes(void* dst, Device to, const void* src, Device from, std::size_t bytes);

}  // namespace capo
