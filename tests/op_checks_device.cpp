// Check (i): the device's kernels against the f64 result on the CPU, in every precision; the same bits twice, on the
// host shim in every order of threads.
#include <capo/engine/backend.h>
#include <capo/tests/op_checks.h>

#include <algorithm>

#if defined(CAPO_TEST_SHIM)
#include <capo/tests/shim/control.h>
#endif

namespace capo::test {
namespace {

constexpr Device kDevice{DeviceType::cuda, 0};

std::vector<std::string>& missing() {
  static std::vector<std::string> names;
  return names;
}

Result to_host(const Result& r) { return {on_device(r.outputs, kCpu), on_device(r.gradients, kCpu)}; }

// The sample on the device, or false when a kernel that it needs does not exist yet.
bool run_there(const Subject& s, const Tensors& inputs, Result& result) {
  try {
    result = to_host(run_all(s, on_device(inputs, kDevice)));
    return true;
  } catch (const Error& e) {
    const std::string text = e.what();
    const auto at = text.find(": no CUDA kernel");
    if (at == std::string::npos) throw;
    const std::string name = text.substr(0, at);
    if (std::find(missing().begin(), missing().end(), name) == missing().end()) missing().push_back(name);
    return false;
  }
}

#if defined(CAPO_TEST_SHIM)
// Runs again under the orders from `begin` on; the shim is back in the first one afterwards, whatever happens.
struct FirstOrder {
  FirstOrder() { shim::config() = shim::orders().front(); }
  ~FirstOrder() { shim::config() = shim::orders().front(); }
};
template <class Run>
void rerun(std::size_t begin, const Run& run) {
  for (std::size_t i = begin; i < shim::orders().size(); ++i) {
    shim::config() = shim::orders()[i];
    run(cat(shim::kOrderNames[static_cast<int>(shim::config().order)], " order"));
  }
}
#else
struct FirstOrder {
  FirstOrder() {}
};
template <class Run>
void rerun(std::size_t, const Run& run) {
  run("second run");
}
#endif

}  // namespace

std::vector<std::string> missing_kernels() { return missing(); }

Device& creation_device() {
  static Device device = kCpu;
  return device;
}

namespace {

// Back on the CPU afterwards.
struct CreateThere {
  CreateThere() { creation_device() = kDevice; }
  ~CreateThere() { creation_device() = kCpu; }
};

// The sample again under the other orders (from `begin` on), against the bits of `got`.
void again(const Subject& s, const Tensors& inputs, const std::string& what, const Result& got, std::size_t begin = 1) {
  rerun(begin, [&](const std::string& how) {
    Result result;
    run_there(s, inputs, result);
    compare_bits(cat(what, ", ", how), result, got);
  });
}

void run_as_is(const Subject& s) {
  const Result exact = run_all(s, s.inputs);
  const FirstOrder restore;
  const CreateThere there;
  Result got;
  if (!run_there(s, s.inputs, got)) return;
  compare("output", got.outputs, exact.outputs, s.sample.tol);
  compare("gradient", got.gradients, exact.gradients, s.sample.tol);
  again(s, s.inputs, "as it is", got);
}

// False when a kernel is missing.
bool run_in(DType t, const Subject& s) {
  const Tensors there = has_floating(s.inputs) ? in_dtype(s.inputs, t) : s.inputs, rounded = in_dtype(there, f64);
  if (is_half(t) && !all_finite_values(rounded)) return true;  // out of f16's range
  const Result exact = run_all(s, rounded);
  if (is_half(t) &&
      (!all_finite_values(in_dtype(exact.outputs, t)) || !all_finite_values(in_dtype(exact.gradients, t))))
    return true;
  const FirstOrder restore;
  Result got;
  if (!run_there(s, there, got)) return false;
  const double unit = t == bf16 ? 0x1p-8 : t == f16 ? 0x1p-11 : 0;  // rounding of the storage, a few of them in a row
  compare(cat(t, " output"), got.outputs, exact.outputs, 6 * unit + s.sample.tol_f32);
  compare(cat(t, " gradient"), got.gradients, exact.gradients, 24 * unit + gradient_tolerance(s.sample));
  again(s, there, to_string(t), got, t == f16 ? 2 : 1);  // f16 takes bf16's paths: the seeded order is enough
  if (t == f32) check_captured(s, there, got);
  return true;
}

}  // namespace

void check_device(const Subject& s) {
  if (device_count() == 0) return;
  if (s.sample.as_is) return run_as_is(s);
  if (!s.sample.f32 || s.inputs.empty()) return;
  if (!run_in(f32, s) || !s.sample.half || !has_floating(s.inputs)) return;
  run_in(bf16, s);
  run_in(f16, s);
}

}  // namespace capo::test
