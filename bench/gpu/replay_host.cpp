// Builds without CUDA: nothing to capture.
#include <capo/bench/gpu/replay.h>

namespace capo::bench {

void profiler(bool) {}

struct Replay::Captured {};
std::shared_ptr<Replay::Captured> Replay::capture() const { return nullptr; }
double Replay::replay() const { return 0; }

}  // namespace capo::bench
