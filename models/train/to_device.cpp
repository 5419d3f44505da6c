#include <capo/autograd/autograd.h>
#include <capo/engine/backend.h>
#include <capo/engine/stream.h>
#include <capo/models/train/to_device.h>
#include <capo/ops/copy.h>

#include <array>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

namespace capo::train {
namespace {

// Page-locked memory that one batch goes through.
class Staging {
 public:
  explicit Staging(DeviceBackend& backend) : backend_(backend) {}
  ~Staging() {
    try {
      copied.wait_here();
    } catch (const Error&) {  // the device failed; who uses it next hears of it
    }
    if (p_) backend_.pinned().release(p_, bytes_);
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Room for `bytes`, no longer read by an earlier copy.
  char* room(std::size_t bytes) {
    copied.wait_here();
    if (bytes > bytes_) {
      if (p_) backend_.pinned().release(p_, bytes_);
      p_ = nullptr;
      p_ = backend_.pinned().allocate(bytes);
      bytes_ = bytes;
    }
    return static_cast<char*>(p_);
  }
  StreamMark copied;

 private:
  DeviceBackend& backend_;
  void* p_ = nullptr;
  std::size_t bytes_ = 0;
};

std::size_t padded(const Tensor& t) {
  return t.defined() && t.device().is_cpu() ? (t.nbytes() + 63) & ~std::size_t{63} : 0;
}

}  // namespace

struct ToDevice::Impl {
  struct Place {
    std::int64_t epoch = 0, batch = 0;
    friend bool operator==(const Place&, const Place&) = default;
  };
  struct Ahead {
    Batch batch;
    StreamMark arrived;
    std::exception_ptr error;
  };

  Impl(BatchSource& s, Device d, int n)
      : source(s), device(d), prefetch(static_cast<std::size_t>(n)), backend(backend_for(d)) {}

  BatchSource& source;
  const Device device;
  const std::size_t prefetch;
  DeviceBackend& backend;

  std::mutex mutex;
  std::condition_variable work, ready;
  bool stop = false, busy = false, failed = false, sought = false;
  std::uint64_t generation = 0;  // counts seeks: what was in work then is thrown away
  Place wanted, fetched;         // what next() gives, and what the thread takes next
  std::int64_t epoch = -1;       // that may be brought ahead
  std::deque<Ahead> done;
  std::thread thread;

  void step(Place& place) const {
    if (++place.batch < source.batches_per_epoch()) return;
    place.batch = 0;
    ++place.epoch;
  }

  // `from` is the tensor's part of the staging memory; it moves on.
  Tensor upload(const Tensor& t, char*& from) {
    if (!t.defined()) return t;
    if (!t.device().is_cpu()) return to(t, device);
    const Tensor packed = contiguous(t), there = empty(t.shape(), t.dtype(), device);
    if (t.numel() > 0) {
      std::memcpy(from, packed.data(), packed.nbytes());
      backend.copy_async(device.index, backend.copy_stream(device.index), there.data(), from, packed.nbytes());
    }
    from += padded(t);
    return there;
  }

  Ahead bring(Staging& staging) {
    Ahead a;
    try {
      const NoGrad off;
      const Batch host = source.next();
      char* from = staging.room(padded(host.x) + padded(host.labels) + padded(host.soft));
      a.batch.x = upload(host.x, from);
      a.batch.labels = upload(host.labels, from);
      a.batch.soft = upload(host.soft, from);
      a.arrived = StreamMark(device, backend.copy_stream(device.index));
    } catch (...) {
      a.error = std::current_exception();
    }
    try {
      staging.copied = StreamMark(device, backend.copy_stream(device.index));
    } catch (...) {
      a.error = std::current_exception();
    }
    return a;
  }

  void run() {
    // Of this thread: memory made here belongs to it.
    backend.set_stream(device.index, backend.copy_stream(device.index));
    Staging first(backend), second(backend);
    std::array<Staging*, 2> staging{&first, &second};
    std::unique_lock lock(mutex);
    for (;;) {
      work.wait(lock, [&] { return stop || (!failed && done.size() < prefetch && fetched.epoch == epoch); });
      if (stop) return;
      const std::uint64_t mine = generation;
      busy = true;
      lock.unlock();
      Ahead a = bring(*staging[0]);
      std::swap(staging[0], staging[1]);
      lock.lock();
      busy = false;
      if (mine == generation) {
        failed = static_cast<bool>(a.error);
        done.push_back(std::move(a));
        step(fetched);
      }
      ready.notify_all();
    }
  }
};

ToDevice::ToDevice(BatchSource& source, Device device, int prefetch) : source_(source) {
  CAPO_CHECK(prefetch >= 1 && prefetch <= 16, "to_device: prefetch must be in [1, 16], got ", prefetch);
  CAPO_CHECK(!device.is_meta(), "to_device: meta holds no values");
  if (device.is_cpu()) return;
  impl_ = std::make_unique<Impl>(source, device, prefetch);
  impl_->thread = std::thread([m = impl_.get()] { m->run(); });
}

ToDevice::~ToDevice() {
  if (!impl_) return;
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->stop = true;
  }
  impl_->work.notify_all();
  impl_->thread.join();
}

std::int64_t ToDevice::batches_per_epoch() const { return source_.batches_per_epoch(); }

Batch ToDevice::next() {
  if (!impl_) return source_.next();
  Impl& m = *impl_;
  Impl::Ahead a;
  {
    std::unique_lock lock(m.mutex);
    m.epoch = m.wanted.epoch;
    m.work.notify_all();
    m.ready.wait(lock, [&] { return !m.done.empty(); });
    if (m.done.front().error) std::rethrow_exception(m.done.front().error);
    a = std::move(m.done.front());
    m.done.pop_front();
    m.step(m.wanted);
  }
  m.work.notify_all();
  a.arrived.wait();
  return a.batch;
}

void ToDevice::seek(std::int64_t epoch, std::int64_t batch) {
  if (!impl_) return source_.seek(epoch, batch);
  Impl& m = *impl_;
  const Impl::Place place{epoch, batch};
  std::unique_lock lock(m.mutex);
  if (!m.sought || m.failed || !(place == m.wanted)) {
    ++m.generation;
    m.done.clear();
    m.ready.wait(lock, [&] { return !m.busy; });
    m.source.seek(epoch, batch);
    m.wanted = m.fetched = place;
    m.failed = false;
    m.sought = true;
  }
  m.epoch = epoch;
  lock.unlock();
  m.work.notify_all();
}

}  // namespace capo::train
