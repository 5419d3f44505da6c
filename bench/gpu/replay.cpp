#include <capo/bench/gpu/replay.h>
#include <capo/engine/backend.h>

#include <algorithm>
#include <chrono>
#include <cmath>

namespace capo::bench {

Replay::Replay(Device device, std::function<void()> run, double least) : device_(device), run_(std::move(run)) {
  run_();
  calls_ = 2;
  const double one = loop();  // the first call is cold
  calls_ = std::clamp(static_cast<int>(std::ceil(least / std::max(one, 1e-9))), 1, 200);
  captured_ = capture();
}

double Replay::loop() const {
  synchronize(device_);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls_; ++i) run_();
  synchronize(device_);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / calls_;
}

double Replay::seconds() { return captured_ ? replay() : loop(); }
bool Replay::captured() const { return captured_ != nullptr; }

}  // namespace capo::bench
