// What the host spends on one eager op before it returns: tiny ops, so that the device never holds the host up.
//   bench_gpu_host_cost [--device cuda] [--rounds 15, times ten]; --device cpu --tiny (there it is the op itself)
#include <capo/autograd/autograd.h>
#include <capo/bench/gpu/harness.h>
#include <capo/engine/backend.h>
#include <capo/ops/binary.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/matmul.h>

#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

using namespace capo;
using namespace capo::bench;

namespace {

// Fewer ops than a launch queue holds, issued while nothing else waits.
constexpr int kBurst = 100;

double burst(Device device, const std::function<void()>& run) {
  synchronize(device);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kBurst; ++i) run();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  synchronize(device);
  return seconds / kBurst;
}

void body(Options o) {
  o.no_more();
  const DType dtype = o.device.is_cuda() ? bf16 : f32;
  const Tensor x = random({16, 64}, dtype, o.device), y = random({16, 64}, dtype, o.device);
  const Tensor w = random({64, 64}, dtype, o.device), b = random({64}, dtype, o.device);
  const Tensor p = random({16, 64}, dtype, o.device);
  set_requires_grad(p, true);
  const auto off = [](std::function<void()> run) {
    return [run = std::move(run)] {
      const NoGrad none;
      run();
    };
  };
  std::vector<Case> cases;
  cases.push_back({"add", 1, off([=] { x + y; })});
  cases.push_back({"add, recorded", 1, [=] { p + y; }});
  cases.push_back({"layer norm", 1, off([=] { layer_norm(x, b, b); })});
  cases.push_back({"linear 16 x 64 x 64", 1, off([=] { linear(x, w, b); })});
  for (Case& c : cases) burst(o.device, c.run);
  for (int round = 0; round < 10 * o.rounds; ++round)
    for (Case& c : cases) c.seconds.push_back(burst(o.device, c.run));

  nlohmann::json rows = nlohmann::json::array();
  for (Case& c : cases) {
    c.calls = kBurst;
    std::printf("%-24s %8.2f us a launched op\n", c.name.c_str(), 1e6 * median(c.seconds));
    rows.push_back({{"case", c.name}, {"capo", figures(c)}});
  }
  print_result({{"bench", "host_cost"}, {"device", to_string(o.device)}, {"tiny", o.tiny}, {"rows", rows}});
}

}  // namespace

int main(int argc, char** argv) { return guarded(argc, argv, body); }
