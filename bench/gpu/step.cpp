// One row of models.h: training steps, wall clock around synchronised batches of them; peak memory from the allocator.
//   bench_gpu_step --row vit_b16 [--device cuda] [--dtype bf16] [--batch N] [--rounds 15]
//                  [--graph | --infer] [--serve | --profile]
// --serve, for bench/gpu/pair.py: after the warm-up a line "READY {json}", then for every line "N" on the input N steps
// and a line "ROUND {json}"; the RESULT line at the input's end. --profile: after the warm-up one step, shown to a
// profiler. --graph: the step as one captured graph. --infer: the forward pass alone. On the CPU the memory of a step
// is also told as what one step adds to the resident size.
#include <capo/bench/gpu/models.h>
#include <capo/bench/gpu/replay.h>
#include <capo/engine/backend.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>

using namespace capo;
using namespace capo::bench;

namespace {

// Seconds of one step.
double timed(TrainStep& step, Device device, int steps) {
  synchronize(device);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < steps; ++i) step.run();
  synchronize(device);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / steps;
}

void say(const char* word, const nlohmann::json& what) {
  std::printf("%s %s\n", word, what.dump().c_str());
  std::fflush(stdout);
}

void body(Options o) {
  const Row& wanted = row(o.value("--row", "vit_b16"));
  const DType dtype = o.dtype();
  const int batch = std::atoi(o.value("--batch", "0").c_str());
  const bool serve = o.has("--serve"), profile = o.has("--profile"), graph = o.has("--graph"), infer = o.has("--infer");
  o.no_more();

  TrainStep step(wanted, dtype, o.device, o.tiny, batch);
  if (infer) step.infer();
  const int warm = o.tiny ? 1 : o.device.is_cuda() ? 5 : 2;
  timed(step, o.device, warm);
  const double first_loss = step.loss();
  if (profile) {
    profiler(true);
    const double seconds = timed(step, o.device, 1);
    profiler(false);
    return print_result({{"bench", "profile"}, {"row", wanted.name}, {"seconds", seconds}});
  }
  std::int64_t resident = 0, resident_step = 0;
  if (!o.device.is_cuda()) {
    reset_resident_peak();
    resident = resident_bytes();
    step.run();
    resident_step = resident_peak_bytes() - resident;
  }
  // Live: weights, the optimiser's state, the batch. The rest of the peak is what a step needs.
  allocator(o.device).reset_peak();
  const std::int64_t live = allocator(o.device).stats().live_bytes;
  if (graph) step.capture();  // a graph's memory is taken here: replays allocate nothing
  const double guess = timed(step, o.device, o.tiny || !o.device.is_cuda() ? 1 : 3);
  nlohmann::json result{{"bench", "step"}, {"engine", "capo"},
                        {"variant", infer ? "infer" : graph ? "graph" : "eager"}, {"row", wanted.name},
                        {"device", to_string(o.device)}, {"dtype", to_string(dtype)},
                        {"tiny", o.tiny}, {"batch", step.batch()},
                        {"parameters", step.parameters(false)}, {"trainable", step.parameters(true)},
                        {"flops_per_image", step.flops_per_image()}};
  std::vector<double> rounds;
  const auto round = [&](int steps) {
    rounds.push_back(timed(step, o.device, steps));
    return rounds.back();
  };
  if (serve) {
    say("READY", {{"seconds", guess}});
    for (std::string line; std::getline(std::cin, line);)
      say("ROUND", {{"seconds", round(std::max(1, std::atoi(line.c_str())))}});
  } else {
    const int steps = o.tiny ? 1 : std::max(3, static_cast<int>(std::ceil(0.5 / guess)));
    for (int i = 0; i < o.rounds; ++i) round(steps);
  }
  const MemoryStats memory = allocator(o.device).stats();
  const double loss = step.loss();
  CAPO_CHECK(std::isfinite(loss), "bench: the loss of ", wanted.name, " is ", loss);
  result["peak_bytes"] = memory.peak_bytes;
  result["live_bytes"] = live;
  result["step_bytes"] = memory.peak_bytes - live;
  result["resident_bytes"] = resident;
  result["resident_step_bytes"] = resident_step;
  result["cached_bytes"] = memory.cached_bytes;
  result["losses"] = {first_loss, loss};
  if (!rounds.empty()) {
    result["seconds"] = median(rounds);
    result["rounds"] = rounds;
    result["images_per_second"] = static_cast<double>(step.batch()) / median(rounds);
    std::printf("%s: %.2f ms a step, %.0f images/s, peak %.2f GiB\n", wanted.name, 1e3 * median(rounds),
                static_cast<double>(step.batch()) / median(rounds),
                static_cast<double>(memory.peak_bytes) / 1073741824.0);
  }
  print_result(result);
}

}  // namespace

int main(int argc, char** argv) { return guarded(argc, argv, body); }
