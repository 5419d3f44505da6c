// CUDA builds: the calls as one graph on the engine's stream, timed by events.
#include <capo/bench/gpu/replay.h>
#include <capo/engine/backend.h>
#include <capo/engine/error.h>

#include <cuda_profiler_api.h>
#include <cuda_runtime_api.h>

#include <cstdio>

namespace capo::bench {
namespace {

void check(cudaError_t code, const char* what) {
  CAPO_CHECK(code == cudaSuccess, "bench: ", what, ": ", cudaGetErrorString(code));
}

cudaStream_t stream_of(Device device) { return static_cast<cudaStream_t>(backend_for(device).stream(device.index)); }

}  // namespace

void profiler(bool on) { check(on ? cudaProfilerStart() : cudaProfilerStop(), "switching a profiler"); }

struct Replay::Captured {
  cudaStream_t stream = nullptr;
  cudaGraphExec_t graph = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  ~Captured() {
    if (graph) cudaGraphExecDestroy(graph);
    if (begin) cudaEventDestroy(begin);
    if (end) cudaEventDestroy(end);
  }
};

std::shared_ptr<Replay::Captured> Replay::capture() const {
  if (!device_.is_cuda()) return nullptr;
  auto made = std::make_shared<Captured>();
  made->stream = stream_of(device_);
  synchronize(device_);
  // Relaxed: a block that the warm cache lacks may still be taken from the system.
  check(cudaStreamBeginCapture(made->stream, cudaStreamCaptureModeRelaxed), "starting a capture");
  std::string problem;
  try {
    for (int i = 0; i < calls_; ++i) run_();
  } catch (const std::exception& e) {
    problem = e.what();
  }
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(made->stream, &graph);
  if (problem.empty() && ended != cudaSuccess) problem = cudaGetErrorString(ended);
  cudaGetLastError();
  if (problem.empty()) {
    check(cudaGraphInstantiate(&made->graph, graph, 0), "making a graph");
    check(cudaEventCreate(&made->begin), "making an event");
    check(cudaEventCreate(&made->end), "making an event");
  }
  if (graph) cudaGraphDestroy(graph);
  if (problem.empty()) return made;
  std::fprintf(stderr, "not captured, timed as a loop of launches: %s\n", problem.c_str());
  return nullptr;
}

double Replay::replay() const {
  check(cudaEventRecord(captured_->begin, captured_->stream), "recording an event");
  check(cudaGraphLaunch(captured_->graph, captured_->stream), "launching a graph");
  check(cudaEventRecord(captured_->end, captured_->stream), "recording an event");
  check(cudaEventSynchronize(captured_->end), "waiting for an event");
  float ms = 0;
  check(cudaEventElapsedTime(&ms, captured_->begin, captured_->end), "reading an event");
  return 1e-3 * ms / calls_;
}

}  // namespace capo::bench
