// What a device beside the CPU supplies to the engine: memory, copies, streams. Builds with CUDA link one
// implementation (cuda/backend.cpp; in tests the host shim's, tests/shim/backend.cpp), all others none.
#pragma once

#include <capo/engine/allocator.h>
#include <capo/engine/device.h>

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace capo {

// Work that a device has been given once and can be given again as a whole. Its memory goes back when it is destroyed.
class CapturedWork {
 public:
  virtual ~CapturedWork() = default;
  virtual void launch() = 0;  // on the device's current stream
};

// What a device's memory holds now.
struct DeviceMemory {
  MemoryStats blocks;           // tensors
  std::int64_t workspace = 0;   // scratch of streams, kept beside them (cuBLASLt's), not in blocks.live_bytes
  std::int64_t pinned = 0;      // host memory for uploads, in use and cached; of all devices together
  std::int64_t free = 0, total = 0;  // as the driver sees it, other processes included
};

// "" for an architecture that our kernels run on, else why not: "cuda:1 is sm_75, this build needs sm_80 or newer".
std::string architecture_problem(int index, int major, int minor);

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
  // The stream that kernels and copies of this thread go to (a cudaStream_t), and another one for it; null: our own
  // again. stream() also makes the device the thread's current one. set_stream() orders nothing: callers take a
  // StreamScope.
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

  // Streams beside the current one. Here a null stream is the device's own.
  virtual void* copy_stream(int index) = 0;  // of uploads that overlap with the computation
  // A mark stands behind all that `stream` was given so far. wait() holds back what `stream` is given later,
  // wait_here() the host. A mark may be dropped at any time.
  virtual void* mark(int index, void* stream) = 0;
  virtual void wait(int index, void* stream, void* mark) = 0;
  virtual void wait_here(int index, void* mark) = 0;
  virtual void drop_mark(int index, void* mark) noexcept = 0;
  // Marks that keep the time at which the stream came by, for profiles. milliseconds() waits for `to`.
  virtual void* clock_mark(int index, void* stream) = 0;
  virtual double milliseconds(int index, void* from, void* to) = 0;
  virtual void drop_clock_mark(int index, void* mark) noexcept = 0;
  // Page-locked memory of the host. copy_async() brings it to the device and returns at once: before a mark behind it
  // was waited for, src must not change and dst must not be read.
  virtual Allocator& pinned() = 0;
  virtual void copy_async(int index, void* stream, void* dst, const void* src, std::size_t bytes) = 0;
  // All memory of `from` becomes memory of `to`, which has waited for it; live blocks too when `from` is about to end.
  virtual void hand_over(int index, void* from, void* to, bool live) = 0;

  // At least `bytes` of scratch for a stream's work, one kernel after another; kept until release_all().
  virtual void* workspace(int index, void* stream, std::size_t bytes) = 0;
  virtual DeviceMemory memory(int index) = 0;
  // Waits for the device, then gives back what is cached, workspaces and unused pinned memory.
  virtual void release_all(int index) = 0;
};

// Null in builds without CUDA.
DeviceBackend* backend();
// The backend, once `device` is one that it can use; otherwise throws saying what is missing.
DeviceBackend& backend_for(Device device);

// cuda devices that this process can use; 0 in builds without CUDA.
int device_count();
// parse_device() for a device to compute on: throws on meta too, and where backend_for() would.
Device usable_device(std::string_view text);
// Waits for the device's current stream. Nothing to do on the CPU.
void synchronize(Device device);
// Throws "<what>: needs the host, ..." when this thread captures a graph: for everything that would read device memory
// on the host, or write host memory to the device.
void refuse_capture(const char* what);
bool capturing_graph();  // whether this thread does
// A device's memory now; on the CPU and meta what their allocators count.
DeviceMemory device_memory(Device device);
// Gives back all that is cached for a device. What stays is live tensors and the driver's context. Other threads must
// not use the device meanwhile.
void release_memory(Device device);
// Bytes from one place to another, whichever of them is the host; see DeviceBackend::copy.
void copy_bytes(void* dst, Device to, const void* src, Device from, std::size_t bytes);

}  // namespace capo
