// Several calls of one function, timed together.
#pragma once

#include <capo/engine/device.h>

#include <functional>
#include <memory>

namespace capo::bench {

// Between profiler(true) and profiler(false) a profiler that was told to wait (ncu --profile-from-start off) looks on.
void profiler(bool on);

// On CUDA the calls are captured once as a graph and replayed between two events, so that only the device's time
// counts. A function that cannot be captured is launched in a loop (captured() is false: host time may then show). On
// the CPU the wall clock times the loop. The function's results must be temporaries, and its inputs must outlive the
// Replay.
class Replay {
 public:
  // Runs it three times first. As many calls as take `least` seconds, at most 200.
  Replay(Device device, std::function<void()> run, double least);
  double seconds();  // of one call
  int calls() const { return calls_; }
  bool captured() const;

 private:
  struct Captured;  // of CUDA builds
  std::shared_ptr<Captured> capture() const;
  double replay() const;
  double loop() const;

  Device device_;
  std::function<void()> run_;
  int calls_ = 1;
  std::shared_ptr<Captured> captured_;
};

}  // namespace capo::bench
