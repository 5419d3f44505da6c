// Work inside a stream of the caller's, and points in a stream's work.
//
// Rules of memory and streams. A block belongs to the stream that was current when it was allocated, and goes back to
// it. Released while another stream is current, it is handed out again only behind what that stream had been given by
// then. So a tensor may be released once all that used it went to its own stream or to the releasing thread's current
// one; whoever uses it on a third stream lets one of these two wait for that first.
#pragma once

#include <capo/engine/device.h>

#include <utility>

namespace capo {

// While alive, what this thread does on `device` (kernels, copies, memory) goes to `stream`, a cudaStream_t of that
// device; null: the library's own.
//
//   { const StreamScope scope(x.device(), my_stream);  y = model(x); }   // y may be read in the order of my_stream
//
// Entering, `stream` waits for the thread's stream before; leaving, that one waits for `stream`: tensors cross in both
// directions without further care, and nothing blocks the host. Scopes nest. `stream` must live as long as the scope,
// no longer: its memory goes to the stream before. Nothing happens on the CPU and on meta.
class StreamScope {
 public:
  StreamScope(Device device, void* stream);
  ~StreamScope();
  StreamScope(const StreamScope&) = delete;
  StreamScope& operator=(const StreamScope&) = delete;

 private:
  Device device_;
  void *before_ = nullptr, *inside_ = nullptr;
};

// A point in the work of a CUDA stream: behind all that it was given when the mark was made.
class StreamMark {
 public:
  StreamMark() = default;  // behind nothing: waiting returns
  StreamMark(Device device, void* stream);
  ~StreamMark();
  StreamMark(StreamMark&& o) noexcept : device_(o.device_), mark_(std::exchange(o.mark_, nullptr)) {}
  StreamMark& operator=(StreamMark o) noexcept {
    std::swap(device_, o.device_);
    std::swap(mark_, o.mark_);
    return *this;
  }
  void wait() const;       // the thread's current stream goes on behind it
  void wait_here() const;  // the host does

 private:
  Device device_;
  void* mark_ = nullptr;
};

}  // namespace capo
