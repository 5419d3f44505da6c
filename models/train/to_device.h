// Brings another source's batches to a device ahead of their use.
#pragma once

#include <capo/models/train/batch.h>

#include <memory>

namespace capo::train {

// The batches of `source`, on `device`. A thread takes them from the source, copies them through page-locked memory on
// a stream of its own, and stays up to `prefetch` batches ahead, so that reading, copying and computing overlap; never
// beyond the epoch of the newest next() or seek(). The thread's current stream waits for a batch's copy in next();
// nothing else waits for the device. The device holds up to 1 + prefetch batches.
//
// On the CPU it is the source itself. `source` stands at its beginning, must outlive this, and is read by nobody else.
// What it throws is rethrown by next(), at its place in the order and again at each further call until seek().
class ToDevice final : public BatchSource {
 public:
  // prefetch: 1 to 16.
  ToDevice(BatchSource& source, Device device, int prefetch = 1);
  ~ToDevice() override;

  std::int64_t batches_per_epoch() const override;
  Batch next() override;
  // Where next() stands already nothing is done: what was brought ahead stays.
  void seek(std::int64_t epoch, std::int64_t batch) override;

 private:
  struct Impl;
  BatchSource& source_;
  std::unique_ptr<Impl> impl_;  // null on the CPU
};

}  // namespace capo::train
