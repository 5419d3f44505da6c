#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/group_norm.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>

namespace capo::test {
namespace {

struct Settings {
  double eps = 1e-5;
  Activation activation = Activation::none;
  double slope = 0;
};
constexpr Settings kSilu{.activation = Activation::silu}, kRelu{.activation = Activation::relu},
    kLeaky{.activation = Activation::relu, .slope = 0.01};

Tensor activate(const Tensor& z, const Settings& o) {
  if (o.activation == Activation::silu) return silu(z);
  if (o.activation == Activation::relu) return o.slope == 0 ? relu(z) : leaky_relu(z, o.slope);
  return z;
}

Tensor by_ops(const Tensor& x, std::int64_t groups, const Tensor& w, const Tensor& b, const Settings& o) {
  const std::int64_t c = x.size(-1);
  std::int64_t positions = 1;
  for (int i = 1; i < x.rank() - 1; ++i) positions *= x.shape()[i];
  const Tensor v = reshape(x, {x.size(0), positions, groups, c / groups});
  const Tensor centred = v - mean(v, {1, 3}, true);
  Tensor y = reshape(centred / sqrt(mean(square(centred), {1, 3}, true) + o.eps), x.shape());
  if (w.defined()) y = y * w;
  return activate(b.defined() ? y + b : y, o);
}

// inputs: x, weight, bias
Sample sample(const std::string& label, std::int64_t groups, const Tensors& inputs, const Settings& o = {}) {
  Sample s;
  s.label = label;
  s.inputs = inputs;
  s.run = [groups, o](const Tensors& in) -> Tensors {
    return {group_norm(in[0], groups, in[1], in[2], o.eps, o.activation, o.slope)};
  };
  s.reference = [groups, o](const Tensors& in) -> Tensors { return {by_ops(in[0], groups, in[1], in[2], o)}; };
  s.second_order = true;
  return s;
}

Sample instance_sample(const std::string& label, const Tensors& inputs, const Settings& o = {}) {
  Sample s = sample(label, inputs[0].size(-1), inputs, o);
  s.run = [o](const Tensors& in) -> Tensors {
    return {instance_norm(in[0], in[1], in[2], o.eps, o.activation, o.slope)};
  };
  return s;
}

Tensor x_of(const Shape& shape, double mean = 0.3, double std = 1.5) {
  return normal(shape, cat("x", shape), mean, std);
}
Tensor weight_of(std::int64_t c) { return normal({c}, "weight", 1, 0.3); }
Tensor bias_of(std::int64_t c) { return normal({c}, "bias", -0.2, 0.5); }

OpCase group_case() {
  OpCase c{"group_norm", {}, {}};
  c.samples = {
      sample("small", 2, {x_of({2, 3, 5, 6}), weight_of(6), bias_of(6)}),
      sample("one group", 1, {x_of({3, 4, 5}), weight_of(5), bias_of(5)}),
      sample("a group per channel", 7, {x_of({2, 5, 7}), weight_of(7), bias_of(7)}),
      sample("no weight, no bias", 3, {x_of({2, 4, 9}), {}, {}}),
      sample("weight only", 3, {x_of({2, 4, 9}), weight_of(9), {}}),
      sample("bias only", 3, {x_of({2, 4, 9}), {}, bias_of(9)}),
      sample("rank 2", 2, {x_of({3, 8}), weight_of(8), bias_of(8)}),
      sample("volume", 2, {x_of({1, 2, 3, 2, 4}), weight_of(4), bias_of(4)}),
      sample("several chunks, odd", 5, {x_of({2, 13, 11, 15}), weight_of(15), bias_of(15)}),
      sample("wide groups", 2, {x_of({1, 70, 150}), weight_of(150), bias_of(150)}),
      sample("more columns than a block", 4, {x_of({1, 3, 1036}), weight_of(1036), bias_of(1036)}),
      sample("whole packs, several chunks", 4, {x_of({2, 9, 9, 132}), weight_of(132), bias_of(132)}),
      sample("size-1 groups", 1, {x_of({3, 1, 1}), weight_of(1), bias_of(1)}, {.eps = 0.1}),
      sample("no samples", 2, {x_of({0, 3, 4}), weight_of(4), bias_of(4)}),
      sample("no positions", 2, {x_of({2, 0, 4}), weight_of(4), bias_of(4)}),
      sample("silu", 2, {x_of({2, 3, 5, 6}), weight_of(6), bias_of(6)}, kSilu),
      sample("silu, no weight, no bias", 3, {x_of({2, 4, 9}), {}, {}}, kSilu),
      sample("silu, bias only", 3, {x_of({2, 4, 9}), {}, bias_of(9)}, kSilu),
      sample("silu, several chunks, odd", 5, {x_of({2, 13, 11, 15}), weight_of(15), bias_of(15)}, kSilu),
      sample("silu, whole packs, several chunks", 4, {x_of({2, 9, 9, 132}), weight_of(132), bias_of(132)}, kSilu),
      sample("silu, more columns than a block", 4, {x_of({1, 3, 1040}), weight_of(1040), bias_of(1040)}, kSilu),
      sample("silu, no samples", 2, {x_of({0, 3, 4}), weight_of(4), bias_of(4)}, kSilu),
      sample("relu", 2, {x_of({2, 3, 5, 6}), weight_of(6), bias_of(6)}, kRelu),
      sample("relu, wide groups", 2, {x_of({1, 70, 152}), weight_of(152), bias_of(152)}, kRelu),
      sample("leaky relu", 4, {x_of({2, 3, 8}), weight_of(8), bias_of(8)}, kLeaky),
  };
  Sample shifted = sample("mean 10,000", 2, {x_of({2, 100, 6}, 1e4, 1), weight_of(6), bias_of(6)});
  shifted.tol = 1e-11;
  shifted.grad_tol = 1e-5;
  shifted.tol_f32 = 2e-4;  // the kept mean is rounded to an ulp of 10,000, a thousandth of the spread
  shifted.half = false;
  c.samples.push_back(shifted);
  const Tensor x = x_of({2, 3, 6});
  c.errors = {
      {"groups", [=] { group_norm(x, 4); }, "groups must divide the 6 channels"},
      {"no groups", [=] { group_norm(x, 0); }, "groups must divide"},
      {"weight size", [=] { group_norm(x, 2, weight_of(3)); }, "weight must be [6]"},
      {"rank", [=] { group_norm(normal({6}, "x"), 2); }, "must be [B, spatial..., C]"},
      {"eps", [=] { group_norm(x, 2, {}, {}, 0); }, "eps must be > 0"},
      {"activation", [=] { group_norm(x, 2, {}, {}, 1e-5, Activation::gelu); },
       "activation must be none, relu or silu, got gelu"},
      {"slope", [=] { group_norm(x, 2, {}, {}, 1e-5, Activation::silu, 0.1); }, "slope belongs to relu"},
      {"mixed dtypes", [=] { group_norm(cast(x, f32), 2, weight_of(6)); }, "mixed dtypes"},
      {"mixed devices", [=] { group_norm(empty({2, 6}, f64, kMeta), 2, weight_of(6)); }, "is on"},
  };
  return c;
}

OpCase instance_case() {
  OpCase c{"instance_norm", {}, {}};
  c.samples = {
      instance_sample("small", {x_of({2, 3, 5, 6}), weight_of(6), bias_of(6)}),
      instance_sample("no weight, no bias", {x_of({2, 5, 3}), {}, {}}),
      instance_sample("several chunks, odd", {x_of({1, 150, 67}), weight_of(67), bias_of(67)}),
      instance_sample("one channel", {x_of({3, 7, 1}), weight_of(1), bias_of(1)}),
      instance_sample("no samples", {x_of({0, 3, 4}), weight_of(4), bias_of(4)}),
      instance_sample("leaky relu", {x_of({2, 3, 5, 6}), weight_of(6), bias_of(6)}, kLeaky),
      instance_sample("leaky relu, no weight, no bias", {x_of({2, 5, 3}), {}, {}}, kLeaky),
      instance_sample("leaky relu, several chunks, whole packs", {x_of({1, 150, 64}), weight_of(64), bias_of(64)},
                      kLeaky),
      instance_sample("relu", {x_of({1, 70, 9}), weight_of(9), bias_of(9)}, kRelu),
  };
  const Tensor x = x_of({2, 3, 6});
  c.errors = {
      {"one position", [=] { instance_norm(x_of({2, 1, 6})); }, "more than one spatial position"},
      {"weight size", [=] { instance_norm(x, weight_of(3)); }, "weight must be [6]"},
      {"eps", [=] { instance_norm(x, {}, {}, -1); }, "eps must be > 0"},
      {"activation", [=] { instance_norm(x, {}, {}, 1e-5, Activation::quick_gelu); },
       "activation must be none, relu or silu"},
  };
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() { return {group_case(), instance_case()}; }

}  // namespace capo::test
