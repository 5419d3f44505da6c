// The table every op's test fills: samples, error samples, references. tests/op_checks.cpp runs the checks (a)-(k) on
// each of them; tests/ops/<stem>.cpp only says what the inputs are and what the answer is.
#pragma once

#include <capo/autograd/autograd.h>
#include <capo/engine/tensor.h>
#include <capo/ops/copy.h>

#include <functional>
#include <string>
#include <vector>

namespace capo::test {

using Tensors = std::vector<Tensor>;
using Fn = std::function<Tensors(const Tensors&)>;

// One call of an op. Inputs are made in f64 (indices in i64, masks in bool); the checks derive f32, meta, strided and
// frozen variants from them.
struct Sample {
  std::string label;
  Tensors inputs;
  Fn run;        // the op under test
  Fn reference;  // composite of other ops, for a primitive a scalar f64 loop in the test; never the kernel itself
  // Which inputs are differentiated; empty means every floating input.
  std::vector<bool> wanted = {};
  bool gradient = true;        // false for samples at kinks, ties, infinities: values only
  bool second_order = false;   // true: gradgradcheck must pass. false: it may pass or must throw by name
  double tol = 1e-12;          // f64 value against the reference, relative to max|reference| (+ the same as a floor)
  double tol_f32 = 2e-6;       // f32 against the f64 reference, likewise
  double grad_tol = 1e-6;      // gradcheck, relative to max(1, |directional derivative|)
  bool f32 = true;             // false: the op has no f32 form
  bool as_is = false;          // true, with f32 = false: check "device" runs it in its own dtypes, to within tol
  bool strided = true;         // false: the op's contract demands contiguous inputs
  bool random = false;         // result depends on a Generator: `run` must make its own, seeded
  bool half = true;            // false: not all floating inputs may be bf16 or f16 (statistics that stay f32)
};

// A call that must throw capo::Error. The text must start with the op's name and contain `must_contain`.
struct ErrorSample {
  std::string label;
  std::function<void()> run;
  std::string must_contain;
};

struct OpCase {
  std::string name;  // as in ops.def
  std::vector<Sample> samples;
  std::vector<ErrorSample> errors;
};

// Defined once per tests/ops/<stem>.cpp: the cases of every op of the stem (a missing one fails the test).
std::vector<OpCase> op_cases();

// Where a sample without inputs makes its result: the CPU, but in check "device" the device.
Device& creation_device();

// Helpers for making inputs; all seeded by the text, f64, contiguous.
Tensor normal(const Shape& shape, const std::string& seed, double mean = 0, double std = 1);
Tensor uniform(const Shape& shape, const std::string& seed, double low, double high);
Tensor integers(const Shape& shape, const std::string& seed, std::int64_t low, std::int64_t high);  // i64, [low, high)
Tensor values(const std::vector<double>& v, const Shape& shape);  // f64

// max|a - b| <= tol * (floor + max|b|), false on NaN in one of them only, on shapes or dtypes that differ.
bool close(const Tensor& a, const Tensor& b, double tol, double floor = 1.0);
bool same_bits(const Tensor& a, const Tensor& b);

// Gradcheck for tests outside the table: analytic gradients of `run` against central differences in f64, with random
// cotangents and directions (the full Jacobian when small). Returns "" or a text saying what failed.
std::string gradcheck(const Fn& run, const Tensors& inputs, const std::vector<bool>& wanted = {}, double tol = 1e-6);

// Runs every check, or the one named, on one case and returns the failures as texts (empty = passed). The planted-bug
// tests call it too.
std::vector<std::string> check_case(const OpCase& c, const std::string& only = "");

}  // namespace capo::test
