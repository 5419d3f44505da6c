#include <capo/ops/softmax.h>
#include <capo/tests/op_test.h>

#include <cmath>
#include <limits>

namespace capo::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Scalar loops over [outer, n, inner].
Tensor by_loops(const Tensor& x, int axis, bool log) {
  const auto v = to_vector<double>(x);
  std::vector<double> y(v.size());
  const std::int64_t n = x.size(axis);
  std::int64_t inner = 1;
  for (int i = (axis + x.rank()) % x.rank() + 1; i < x.rank(); ++i) inner *= x.shape()[i];
  for (std::int64_t k = 0; k < x.numel(); ++k) {
    if (k / inner % n) continue;  // first element of its row
    const auto at = [&](std::int64_t i) { return static_cast<std::size_t>(k + i * inner); };
    double top = -kInf, total = 0;
    for (std::int64_t i = 0; i < n; ++i) top = std::fmax(top, v[at(i)]);
    for (std::int64_t i = 0; i < n; ++i) total += std::exp(v[at(i)] - top);
    for (std::int64_t i = 0; i < n; ++i)
      y[at(i)] = log ? v[at(i)] - top - std::log(total) : std::exp(v[at(i)] - top) / total;
  }
  return values(y, x.shape());
}

OpCase case_of(const std::string& name, bool log) {
  const auto run = [log](const Tensor& x, int axis) { return log ? log_softmax(x, axis) : softmax(x, axis); };
  const auto sample = [&](const std::string& label, const Tensor& x, int axis) {
    Sample s;
    s.label = label;
    s.inputs = {x};
    s.run = [run, axis](const Tensors& in) -> Tensors { return {run(in[0], axis)}; };
    s.reference = [log, axis](const Tensors& in) -> Tensors { return {by_loops(in[0], axis, log)}; };
    s.second_order = true;
    return s;
  };
  OpCase c{name, {}, {}};
  c.samples = {
      sample("last axis", normal({2, 3, 7}, "a", 0, 2), -1),
      sample("first axis", normal({5, 3, 2}, "b", 0, 2), 0),
      sample("middle axis", normal({2, 6, 3}, "c", 0, 2), 1),
      sample("rank 1", normal({33}, "d"), 0),
      sample("rows of one element", normal({4, 1}, "e"), -1),
      sample("rows of 197", normal({61, 197}, "f", 0, 3), -1),
      sample("short rows, many", normal({3, 70, 3}, "q", 0, 2), -1),
      sample("rows of 16, by eights", normal({9, 16}, "l", 0, 2), -1),
      sample("rows of 301", normal({3, 301}, "o", 0, 2), -1),
      sample("rows of 1,000", normal({3, 1000}, "m", 0, 2), -1),
      sample("rows of 2,064", normal({2, 2064}, "n", 0, 2), -1),
      sample("empty", normal({0, 5}, "g"), -1),
      sample("empty rows", normal({3, 0}, "h"), -1),
  };
  Sample shifted = sample("mean 10,000", normal({3, 65}, "i", 1e4, 2), -1);
  shifted.half = false;
  shifted.grad_tol = 1e-5;  // differences of numbers near 10,000
  shifted.tol = 1e-10;
  Sample wide = sample("logits from -90 to 90", uniform({4, 50}, "j", -90, 90), -1);
  Sample huge = sample("one huge row", normal({1, 60001}, "k"), -1);
  Sample masked = sample("minus infinity", values({1, -kInf, 2, -kInf, 0, 3}, {2, 3}), -1);
  masked.gradient = false;
  Sample nan = sample("nothing but minus infinity, then NaN", values({-kInf, -kInf, NAN, 1}, {2, 2}), -1);
  nan.gradient = false;
  nan.reference = [](const Tensors&) -> Tensors { return {values({NAN, NAN, NAN, NAN}, {2, 2})}; };
  for (const auto& s : {shifted, wide, huge, masked, nan}) c.samples.push_back(s);
  c.errors = {
      {"axis", [=] { run(normal({2, 3}, "x"), 2); }, "axis must be in"},
      {"scalar", [=] { run(values({1}, {}), -1); }, "must have an axis"},
      {"integers", [=] { run(integers({2, 3}, "x", 0, 5), -1); }, "floating"},
  };
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() { return {case_of("softmax", false), case_of("log_softmax", true)}; }

}  // namespace capo::test
