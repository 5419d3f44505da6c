#include <capo/ops/binary.h>
#include <capo/ops/modulate.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>
#include <capo/tests/per_sample.h>

namespace capo::test {
namespace {

// inputs: x, shift, scale
Sample modulate_sample(const std::string& label, const Shape& x, const Shape& factor) {
  Sample s;
  s.label = label;
  s.inputs = {normal(x, "x", 0.4), normal(factor, "shift", -0.3), normal(factor, "scale", 0.2)};
  s.run = [](const Tensors& in) -> Tensors { return {modulate(in[0], in[1], in[2])}; };
  s.reference = [](const Tensors& in) -> Tensors {
    return {in[0] * (spread(in[2], in[0]) + 1.0) + spread(in[1], in[0])};
  };
  s.second_order = true;
  return s;
}

// inputs: x, g, residual
Sample gate_sample(const std::string& label, const Shape& x, const Shape& factor) {
  Sample s;
  s.label = label;
  s.inputs = {normal(x, "x", 0.4), normal(factor, "g", 0.2), normal(x, "residual")};
  s.run = [](const Tensors& in) -> Tensors { return {gate(in[0], in[1], in[2])}; };
  s.reference = [](const Tensors& in) -> Tensors { return {in[2] + in[0] * spread(in[1], in[0])}; };
  s.second_order = true;
  return s;
}

std::vector<Sample> samples(Sample (*of)(const std::string&, const Shape&, const Shape&)) {
  return {
      of("small", {2, 3, 5}, {2, 5}),
      of("one for all", {2, 3, 5}, {5}),
      of("rank 1", {7}, {7}),
      of("rank 2, a row for each sample", {4, 9}, {4, 9}),
      of("images", {2, 3, 4, 6}, {2, 6}),
      of("odd columns, several chunks of rows", {2, 150, 37}, {2, 37}),
      of("one for all, several chunks of rows", {3, 70, 33}, {33}),
      of("whole packs, several tiles of columns", {2, 67, 264}, {2, 264}),
      of("whole packs, one for all", {2, 9, 520}, {520}),
      of("no samples", {0, 3, 8}, {0, 8}),
      of("no rows", {2, 0, 8}, {2, 8}),
      of("no columns", {2, 3, 0}, {2, 0}),
  };
}

OpCase modulate_case() {
  const Tensor x = normal({2, 3, 5}, "x"), each = normal({2, 5}, "each"), all = normal({5}, "all");
  return {"modulate",
          samples(modulate_sample),
          {{"shift size", [=] { modulate(x, normal({2, 4}, "s"), each); }, "shift must be [5] or [2, 5]"},
           {"scale of other samples", [=] { modulate(x, each, normal({3, 5}, "s")); }, "scale must be [5] or [2, 5]"},
           {"scale like x", [=] { modulate(x, each, x); }, "scale must be [5] or [2, 5]"},
           {"shift and scale unlike", [=] { modulate(x, all, each); }, "must have one shape"},
           {"mixed dtypes", [=] { modulate(x, each, cast(each, f32)); }, "scale is"},
           {"mixed devices", [=] { modulate(empty({2, 3, 5}, f64, kMeta), each, each); }, "shift is"},
           {"scalar x", [] { modulate(values({1}, {}), values({1}, {1}), values({1}, {1})); }, "last axis"},
           {"integers", [=] { modulate(integers({2, 3, 5}, "i", 0, 4), each, each); }, "floating"}}};
}

OpCase gate_case() {
  const Tensor x = normal({2, 3, 5}, "x"), g = normal({2, 5}, "g");
  return {"gate",
          samples(gate_sample),
          {{"g size", [=] { gate(x, normal({3}, "g"), x); }, "g must be [5] or [2, 5]"},
           {"residual shape", [=] { gate(x, g, normal({3, 5}, "r")); }, "residual and x must be alike"},
           {"residual dtype", [=] { gate(x, g, cast(x, f32)); }, "residual and x must be alike"},
           {"mixed dtypes", [=] { gate(x, cast(g, f32), x); }, "g is"}}};
}

}  // namespace

std::vector<OpCase> op_cases() { return {modulate_case(), gate_case()}; }

}  // namespace capo::test
