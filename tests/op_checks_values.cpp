// Checks (a), (b), (d), (h): shapes on meta, values, precisions, layouts, bits.
#include <capo/engine/cpu.h>
#include <capo/engine/threads.h>
#include <capo/tests/op_checks.h>
#include <capo/tests/support.h>

#include <algorithm>
#include <cmath>

namespace capo::test {
namespace {

Tensors reference_of(const Sample& sample, const Tensors& inputs) {
  const NoGrad off;
  return sample.reference(inputs);
}

// A reference gives the result's dtype, or f64 for anything.
void against_reference(const std::string& what, const Tensors& outputs, const Tensors& reference, DType precision,
                       double tol) {
  compare(what, outputs, reference, tol);
  for (std::size_t k = 0; k < outputs.size(); ++k) {
    if (!outputs[k].defined()) continue;
    const DType got = outputs[k].dtype(), wanted = reference[k].dtype();
    const bool fits = got == wanted || wanted == f64 || (is_floating(wanted) && got == precision);
    expect(fits, cat(what, " ", k, " is ", got, ", the reference ", wanted));
  }
}

// Output dtypes follow the inputs' precision.
void expect_dtypes(const Tensors& outputs, const Tensors& in_f64, DType precision) {
  expect(outputs.size() == in_f64.size(), cat(outputs.size(), " outputs instead of ", in_f64.size()));
  for (std::size_t k = 0; k < outputs.size(); ++k) {
    if (!outputs[k].defined() || !in_f64[k].defined()) continue;
    const DType wanted = in_f64[k].dtype() == f64 ? precision : in_f64[k].dtype();
    expect(outputs[k].dtype() == wanted, cat("output ", k, " is ", outputs[k].dtype(), " for ", precision, " inputs"));
  }
}

}  // namespace

void check_meta(const Subject& s) {
  if (s.inputs.empty()) return;
  const Result real = run_all(s, s.inputs), meta = run_all(s, on_meta(s.inputs));
  const auto alike = [](const char* what, const Tensors& a, const Tensors& b) {
    expect(a.size() == b.size(), cat(a.size(), " ", what, "s instead of ", b.size()));
    for (std::size_t k = 0; k < a.size(); ++k) {
      expect(a[k].defined() == b[k].defined(), cat(what, " ", k, " is defined on one device only"));
      if (!a[k].defined()) continue;
      expect(a[k].device().is_meta(), cat(what, " ", k, " left the meta device"));
      expect(a[k].shape() == b[k].shape() && a[k].dtype() == b[k].dtype(),
             cat(what, " ", k, " is ", describe(a[k]), ", the real one ", describe(b[k])));
    }
  };
  alike("output", meta.outputs, real.outputs);
  alike("gradient", meta.gradients, real.gradients);
}

void check_value(const Subject& s) {
  Tensors before;
  for (const auto& t : s.inputs) before.push_back(lay_out(t, Layout::plain));
  against_reference("output", forward(s.sample.run, s.inputs), reference_of(s.sample, s.inputs), f64, s.sample.tol);
  compare_bits("input after the call", s.inputs, before);
}

void check_f32(const Subject& s) {
  if (!s.sample.f32 || !has_floating(s.inputs)) return;
  const Tensors single = in_dtype(s.inputs, f32), rounded = in_dtype(single, f64);
  const Result got = run_all(s, single), exact = run_all(s, rounded);
  expect_dtypes(got.outputs, exact.outputs, f32);
  compare("output", got.outputs, reference_of(s.sample, rounded), s.sample.tol_f32);
  if (differentiable(s)) compare("gradient", got.gradients, exact.gradients, gradient_tolerance(s.sample));
}

void check_half(const Subject& s) {
  if (!s.sample.f32 || !s.sample.half || !has_floating(s.inputs)) return;
  for (const DType t : {bf16, f16}) {
    const Tensors half = in_dtype(s.inputs, t), rounded = in_dtype(half, f64);
    if (!all_finite_values(rounded)) continue;  // out of f16's range
    const Tensors reference = reference_of(s.sample, rounded);
    if (!all_finite_values(reference)) continue;
    const Result got = run_all(s, half), exact = run_all(s, rounded);
    expect_dtypes(got.outputs, exact.outputs, t);
    if (!all_finite_values(in_dtype(reference, t))) continue;
    const double unit = t == bf16 ? 0x1p-8 : 0x1p-11;  // rounding of the storage, a few of them in a row
    compare(cat(t, " output"), got.outputs, reference, 6 * unit + s.sample.tol_f32);
    if (!differentiable(s) || !all_finite_values(in_dtype(exact.gradients, t))) continue;
    compare(cat(t, " gradient"), got.gradients, exact.gradients, 24 * unit + gradient_tolerance(s.sample));
  }
}

void check_layouts(const Subject& s) {
  if (!s.sample.strided || s.inputs.empty()) return;
  const double tol = std::fmax(s.sample.tol, 1e-12);
  const auto alike = [&](const std::string& what, const Tensors& strided, const Result& plain, Layout cotangents) {
    Result got;
    if (differentiable(s))
      got = differentiate(s.sample.run, strided, s.wanted, cotangents);
    else
      got.outputs = forward(s.sample.run, strided);
    compare(what + " inputs, output", got.outputs, plain.outputs, tol);
    compare(what + " inputs, gradient", got.gradients, plain.gradients, 10 * tol);
  };
  const Result plain = run_all(s, s.inputs);
  for (const Layout layout : {Layout::transposed, Layout::sliced}) {
    const std::string name = layout == Layout::transposed ? "transposed" : "sliced";
    Tensors all;
    for (const auto& t : s.inputs) all.push_back(lay_out(t, layout));
    alike(name, all, plain, layout);
    for (std::size_t i = 0; s.inputs.size() > 1 && i < s.inputs.size(); ++i) {
      Tensors one = s.inputs;
      one[i] = all[i];
      alike(cat(name, " ", i), one, plain, Layout::plain);
    }
  }
  for (std::size_t i = 0; i < s.inputs.size(); ++i) {
    const Tensor& t = s.inputs[i];
    if (!t.defined() || is_integer(t.dtype())) continue;
    for (const int axis : {0, t.rank() - 1}) {
      if (axis < 0 || (axis == 0 && t.rank() == 1 && t.numel() < 2)) continue;
      Tensors view = s.inputs, copy = s.inputs;
      view[i] = repeat_first(t, axis, true);
      copy[i] = repeat_first(t, axis, false);
      alike(cat("expanded ", i), view, run_all(s, copy), Layout::plain);
    }
  }
}

void check_repeat(const Subject& s) { compare_bits("second run", run_all(s, s.inputs), run_all(s, s.inputs)); }

void check_threads(const Subject& s) {
  const testing::ThreadsScope restore;
  const Tensors inputs = s.sample.f32 ? in_dtype(s.inputs, f32) : s.inputs;
  set_num_threads(1);
  const Result one = run_all(s, inputs);
  for (const int n : {2, 3, 5}) {
    set_num_threads(n);
    compare_bits(cat(n, " threads against 1"), run_all(s, inputs), one);
  }
}

void check_isa(const Subject& s) {
  const testing::IsaScope restore;
  const Tensors single = in_dtype(s.inputs, f32), rounded = in_dtype(single, f64);
  const Tensors reference64 = reference_of(s.sample, s.inputs), reference32 = reference_of(s.sample, rounded);
  const Result exact = run_all(s, rounded);
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    compare(cat(to_string(level), " f64 output"), forward(s.sample.run, s.inputs), reference64, s.sample.tol);
    if (!s.sample.f32) continue;
    const Result got = run_all(s, single);
    compare(cat(to_string(level), " f32 output"), got.outputs, reference32, s.sample.tol_f32);
    compare(cat(to_string(level), " f32 gradient"), got.gradients, exact.gradients, gradient_tolerance(s.sample));
  }
}

}  // namespace capo::test
