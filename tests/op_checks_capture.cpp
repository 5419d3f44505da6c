// Check (l): every op as part of a captured graph (engine/graph.h).
#include <capo/engine/backend.h>
#include <capo/engine/graph.h>
#include <capo/tests/op_checks.h>

#include <algorithm>

namespace capo::test {
namespace {

constexpr Device kDevice{DeviceType::cuda, 0};

// Ops whose draws come from a generator that the sample makes, and which would be gone at the replay:
// tests/graph_test.cpp has them.
bool draws(const std::string& op) {
  return op == "dropout" || op == "drop_path" || op == "rand_uniform" || op == "rand_normal";
}

}  // namespace

// An op that needs the host must say so by name; those that may are listed here.
void check_captured(const Subject& s, const Tensors& inputs, const Result& eager) {
  if (draws(s.op)) return;
  Tensors there, cotangents;
  for (const Tensor& t : inputs) there.push_back(t.defined() ? empty(t.shape(), t.dtype(), kDevice) : Tensor());
  for (std::size_t k = 0; k < eager.outputs.size(); ++k) {
    const Tensor& y = eager.outputs[k];
    const bool floating = y.defined() && is_floating(y.dtype());
    cotangents.push_back(floating ? on_device(cotangent_of(y, k), kDevice) : Tensor());
  }
  Graph graph(kDevice);
  Result got;
  try {
    graph.capture([&] {
      got = differentiable(s) ? differentiate(s.sample.run, there, s.wanted, cotangents)
                              : Result{forward(s.sample.run, there), {}};
    });
  } catch (const Error& e) {
    const std::string text = e.what();
    static const char* const kHost[] = {"global_norm", "all_finite", "to"};
    const auto refuses = [&](const char* name) { return text.rfind(cat(name, ": needs the host"), 0) == 0; };
    if (std::any_of(std::begin(kHost), std::end(kHost), refuses)) return;
    throw;
  }
  for (std::size_t i = 0; i < inputs.size(); ++i)
    if (inputs[i].defined()) {
      const Tensor packed = on_device(inputs[i], kDevice);
      copy_bytes(there[i].data(), kDevice, packed.data(), kDevice, packed.nbytes());
    }
  graph.replay();
  compare_bits("captured and replayed", {on_device(got.outputs, kCpu), on_device(got.gradients, kCpu)}, eager);
}

}  // namespace capo::test
