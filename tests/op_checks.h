// Shared by the op_checks*.cpp files: how a sample is run, and how results are compared. Nothing here uses ops/, so
// that the copies and views that the checks need cannot hide a bug in the ops they test.
#pragma once

#include <capo/tests/op_test.h>

#include <stdexcept>

namespace capo::test {

// One sample under test. Its inputs are fresh copies from the debug allocator, in f64.
struct Subject {
  const std::string& op;
  const Sample& sample;
  Tensors inputs;
  std::vector<bool> wanted;  // as many as inputs
};

// A check reports by throwing; check_case turns that into a text.
void expect(bool ok, const std::string& text);

// ---- tensors on the host (op_checks_host.cpp)
std::vector<double> host(const Tensor& t);
// The same elements with other strides: "transposed" (first axis fastest), "sliced" (odd positions of a longer row
// filled with NaN, at an offset), "plain" (contiguous).
enum class Layout { plain, transposed, sliced };
Tensor lay_out(const Tensor& t, Layout layout);
// Every element along `axis` equal to the first: as a stride-0 view, or the same values contiguous.
Tensor repeat_first(const Tensor& t, int axis, bool view);
// Floating tensors in another floating dtype, all others as they are.
Tensors in_dtype(const Tensors& tensors, DType dtype);
Tensors on_meta(const Tensors& tensors);
// The same elements in another device's memory (contiguous), and back.
Tensor on_device(const Tensor& t, Device device);
Tensors on_device(const Tensors& tensors, Device device);
// "" when |a - b| <= tol * (floor + max|b|) everywhere (equal infinities and NaN in both count as equal).
std::string difference(const Tensor& a, const Tensor& b, double tol, double floor = 1.0);

// ---- running (op_checks_run.cpp)
struct Result {
  Tensors outputs;
  Tensors gradients;  // one per input; undefined where not wanted or zero
};
// Forward only, under NoGrad; the guards around every block are inspected.
Tensors forward(const Fn& run, const Tensors& inputs);
// Forward and backward with random cotangents (the same for every dtype). Inputs are taken as leaves.
Result differentiate(const Fn& run, const Tensors& inputs, const std::vector<bool>& wanted,
                     Layout cotangents = Layout::plain);
// The same with these cotangents, one per output, where the output is on the tape.
Result differentiate(const Fn& run, const Tensors& inputs, const std::vector<bool>& wanted, const Tensors& cotangents);
Tensor cotangent_of(const Tensor& y, std::size_t output, Layout layout = Layout::plain);
Tensors leaves_of(const Tensors& inputs, const std::vector<bool>& wanted);
Tensors cotangents_of(const Tensors& outputs, Layout layout = Layout::plain);
void compare(const std::string& what, const Tensors& a, const Tensors& b, double tol);  // undefined means zero
void compare_bits(const std::string& what, const Tensors& a, const Tensors& b);
void compare_bits(const std::string& what, const Result& a, const Result& b);
bool any(const std::vector<bool>& v);
// Values, and gradients where the sample has any.
Result run_all(const Subject& s, const Tensors& inputs);
// Gradients lose about a digit against values: sums of products, derivatives near cancellation.
inline double gradient_tolerance(const Sample& sample) { return 20 * sample.tol_f32; }
bool has_floating(const Tensors& inputs);
bool all_finite_values(const Tensors& tensors);
inline bool differentiable(const Subject& s) { return s.sample.gradient && any(s.wanted); }

// ---- the checks; letters as in docs of the op table
void check_meta(const Subject& s);          // (a)
void check_value(const Subject& s);         // (b) f64
void check_f32(const Subject& s);           // (b)
void check_half(const Subject& s);          // (b)
void check_layouts(const Subject& s);       // (d)
void check_gradient(const Subject& s);      // (e)
void check_subsets(const Subject& s);       // (f)
void check_second_order(const Subject& s);  // (g)
void check_repeat(const Subject& s);        // (h)
void check_threads(const Subject& s);       // (h)
void check_isa(const Subject& s);           // (h)
void check_device(const Subject& s);        // (i)
void check_nothing_kept(const Subject& s);  // (k)
// (l), called by (i): captured as a graph while the inputs hold other values, replayed with theirs: the bits of
// `eager`, which is on the host. The device's.
void check_captured(const Subject& s, const Tensors& inputs, const Result& eager);
// Kernels that check_device found missing: their names, once each. Empty in builds without a device.
std::vector<std::string> missing_kernels();

}  // namespace capo::test
