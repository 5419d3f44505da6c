#include <capo/engine/backend.h>
#include <capo/engine/stream.h>

namespace capo {
namespace {

// What `stream` is given later comes behind what `first` was given so far.
void order(DeviceBackend& b, int index, void* first, void* stream) {
  if (first == stream) return;
  void* const mark = b.mark(index, first);
  b.wait(index, stream, mark);
  b.drop_mark(index, mark);
}

}  // namespace

StreamScope::StreamScope(Device device, void* stream) : device_(device) {
  if (!device.is_cuda()) return;
  DeviceBackend& b = backend_for(device);
  before_ = b.stream(device.index);
  b.set_stream(device.index, stream);
  inside_ = b.stream(device.index);
  try {  // the memory first: then the order covers all that other threads on the stream before did with it
    b.hand_over(device.index, before_, inside_, false);
    order(b, device.index, before_, inside_);
  } catch (...) {
    b.set_stream(device.index, before_);
    throw;
  }
}

StreamScope::~StreamScope() {
  if (!device_.is_cuda()) return;
  DeviceBackend& b = *backend();
  b.set_stream(device_.index, before_);
  try {
    order(b, device_.index, inside_, before_);
    b.hand_over(device_.index, inside_, before_, true);
  } catch (...) {  // a device that fails here says so again at the next call
  }
}

StreamMark::StreamMark(Device device, void* stream)
    : device_(device), mark_(backend_for(device).mark(device.index, stream)) {}

StreamMark::~StreamMark() {
  if (mark_) backend()->drop_mark(device_.index, mark_);
}

void StreamMark::wait() const {
  if (!mark_) return;
  DeviceBackend& b = backend_for(device_);
  b.wait(device_.index, b.stream(device_.index), mark_);
}

void StreamMark::wait_here() const {
  if (mark_) backend_for(device_).wait_here(device_.index, mark_);
}

}  // namespace capo
