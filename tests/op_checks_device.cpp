// Check (i): the device's kernels against the f64 result on the CPU, in every precision; the same bits twice.
#include <capo/engine/backend.h>
#include <capo/tests/op_checks.h>

#include <algorithm>

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

}  // namespace

std::vector<std::string> missing_kernels() { return missing(); }

void check_device(const Subject& s) {
  if (device_count() == 0 || s.inputs.empty()) return;
  const Sample& sample = s.sample;
  const auto attempt = [&](DType t) {
    const Tensors there = has_floating(s.inputs) ? in_dtype(s.inputs, t) : s.inputs, rounded = in_dtype(there, f64);
    if (is_half(t) && !all_finite_values(rounded)) return true;  // out of f16's range
    const Result exact = run_all(s, rounded);
    if (is_half(t) && (!all_finite_values(in_dtype(exact.outputs, t)) || !all_finite_values(in_dtype(exact.gradients, t)))) return true;
    Result got, again;
    if (!run_there(s, there, got)) return false;
    const double unit = t == bf16 ? 0x1p-8 : t == f16 ? 0x1p-11 : 0;  // rounding of the storage, a few of them in a row
    compare(cat(t, " output"), got.outputs, exact.outputs, 6 * unit + sample.tol_f32);
    compare(cat(t, " gradient"), got.gradients, exact.gradients, 24 * unit + gradient_tolerance(sample));
    run_there(s, there, again);
    compare_bits(cat(t, " second run"), again, got);
    return true;
  };
  if (!sample.f32) return;
  if (!attempt(f32) || !sample.half || !has_floating(s.inputs)) return;
  attempt(bf16);
  attempt(f16);
}

}  // namespace capo::test
