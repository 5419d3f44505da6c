#include <capo/ops/batch_norm.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>

namespace capo::test {
namespace {

constexpr double kEps = 1e-5;

struct Settings {
  bool training = true;
  double momentum = 0.1;
  bool update_running = true;
  Activation activation = Activation::none;
  double slope = 0, ceiling = 0;
};

// y and the running statistics after the call.
Tensors by_ops(const Tensors& in, const Settings& o) {
  const Tensor &x = in[0], &w = in[1], &b = in[2];
  const std::int64_t c = x.size(-1), n = x.numel() / c;
  const Tensor v = reshape(x, {n, c});
  Tensor running_mean = in[3], running_var = in[4], m = running_mean, var = running_var;
  if (o.training) {
    m = mean(v, {0});
    var = mean(square(v - m), {0});
    if (o.update_running && running_mean.defined() && n > 0) {
      running_mean = running_mean * (1 - o.momentum) + m * o.momentum;
      running_var =
          running_var * (1 - o.momentum) + var * (o.momentum * static_cast<double>(n) / static_cast<double>(n - 1));
    }
  }
  Tensor y = reshape((v - m) / sqrt(var + kEps), x.shape());
  if (w.defined()) y = y * w;
  if (b.defined()) y = y + b;
  if (in.size() > 5) y = y + in[5];
  if (o.activation == Activation::silu) y = silu(y);
  if (o.activation == Activation::relu)
    y = o.ceiling > 0 ? clamp(y, 0, o.ceiling) : o.slope == 0 ? relu(y) : leaky_relu(y, o.slope);
  return {y, running_mean, running_var};
}

// inputs: x, weight, bias, running_mean, running_var, and perhaps a residual
Sample sample(const std::string& label, const Tensors& inputs, const Settings& o = {}) {
  Sample s;
  s.label = label;
  s.inputs = inputs;
  s.run = [o](const Tensors& in) -> Tensors {
    const Tensor m = in[3].defined() ? clone(in[3]) : in[3], v = in[4].defined() ? clone(in[4]) : in[4];
    return {batch_norm(in[0], in[1], in[2], m, v, o.training, o.momentum, kEps, o.update_running, o.activation,
                       in.size() > 5 ? in[5] : Tensor(), o.slope, o.ceiling), m, v};
  };
  s.reference = [o](const Tensors& in) { return by_ops(in, o); };
  s.wanted = {true, inputs[1].defined(), inputs[2].defined(), false, false};
  if (inputs.size() > 5) s.wanted.push_back(true);
  s.second_order = true;
  return s;
}

Tensors inputs_of(const Shape& shape, double mean = 0.3, double std = 1.5) {
  const std::int64_t c = shape.back();
  return {normal(shape, cat("x", shape), mean, std), normal({c}, "weight", 1, 0.3), normal({c}, "bias", -0.2, 0.5),
          normal({c}, "running mean", 0.1, 0.5), uniform({c}, "running var", 0.5, 2)};
}
Tensors with_residual(Tensors inputs) {
  inputs.push_back(normal(inputs[0].shape(), "residual", 0.1, 0.8));
  return inputs;
}
Tensors without(Tensors inputs, std::initializer_list<int> which) {
  for (int i : which) inputs[static_cast<std::size_t>(i)] = Tensor();
  return inputs;
}

}  // namespace

std::vector<OpCase> op_cases() {
  const Settings evaluation{.training = false}, with_relu{.activation = Activation::relu};
  const Settings relu_evaluation{.training = false, .activation = Activation::relu};
  const Settings with_ceiling{.activation = Activation::relu, .ceiling = 0.5};
  OpCase c{"batch_norm", {}, {}};
  c.samples = {
      sample("training", inputs_of({2, 3, 5, 4})),
      sample("training, rank 2", inputs_of({7, 3})),
      sample("training, several chunks, odd", inputs_of({3, 11, 13, 67})),
      sample("training, more columns than a block", inputs_of({5, 1030})),
      sample("training, one channel", inputs_of({4, 3, 1})),
      sample("training, momentum 1", inputs_of({6, 5}), {.momentum = 1}),
      sample("training, statistics left alone", inputs_of({6, 5}), {.update_running = false}),
      sample("training, no running statistics", without(inputs_of({6, 5}), {3, 4})),
      sample("training, no weight, no bias", without(inputs_of({6, 5}), {1, 2})),
      sample("training, bias only", without(inputs_of({6, 5}), {1})),
      sample("evaluation", inputs_of({2, 3, 5, 4}), evaluation),
      sample("evaluation, one row", inputs_of({1, 1, 4}), evaluation),
      sample("evaluation, no weight, no bias", without(inputs_of({70, 9}), {1, 2}), evaluation),
      sample("evaluation, empty batch", inputs_of({0, 3, 4}), evaluation),
      sample("training, relu", inputs_of({2, 3, 5, 4}), with_relu),
      sample("training, relu, several chunks, odd", inputs_of({3, 11, 13, 67}), with_relu),
      sample("training, relu, no weight, no bias", without(inputs_of({6, 5}), {1, 2}), with_relu),
      sample("training, residual", with_residual(inputs_of({2, 3, 5, 4}))),
      sample("training, residual, relu", with_residual(inputs_of({2, 3, 5, 4})), with_relu),
      sample("training, residual, relu, several chunks", with_residual(inputs_of({3, 11, 13, 72})), with_relu),
      sample("training, residual, relu, more columns than a block", with_residual(inputs_of({5, 1030})), with_relu),
      sample("training, residual, leaky relu", with_residual(inputs_of({2, 3, 5, 4})),
             {.activation = Activation::relu, .slope = 0.1}),
      sample("training, relu to a ceiling", inputs_of({2, 3, 5, 4}), with_ceiling),
      sample("training, relu to a ceiling, several chunks, odd", inputs_of({3, 11, 13, 67}), with_ceiling),
      sample("training, relu to a ceiling, whole packs, several chunks", inputs_of({3, 11, 13, 72}), with_ceiling),
      sample("training, residual, relu to a ceiling", with_residual(inputs_of({2, 3, 5, 8})), with_ceiling),
      sample("evaluation, relu to a ceiling", inputs_of({9, 3}),
             {.training = false, .activation = Activation::relu, .ceiling = 0.5}),
      sample("training, silu", inputs_of({3, 7, 8}), {.activation = Activation::silu}),
      sample("training, residual, silu", with_residual(inputs_of({3, 7, 8})), {.activation = Activation::silu}),
      sample("training, residual, relu, empty batch", with_residual(inputs_of({0, 3, 4})), with_relu),
      sample("evaluation, relu", inputs_of({2, 3, 5, 4}), relu_evaluation),
      sample("evaluation, relu, no weight, no bias", without(inputs_of({70, 9}), {1, 2}), relu_evaluation),
      sample("evaluation, residual", with_residual(inputs_of({2, 3, 4})), evaluation),
      sample("evaluation, residual, relu", with_residual(inputs_of({2, 3, 5, 4})), relu_evaluation),
      sample("evaluation, residual, relu, several chunks", with_residual(inputs_of({70, 2, 24})), relu_evaluation),
      sample("evaluation, residual, silu", with_residual(inputs_of({9, 3})),
             {.training = false, .activation = Activation::silu}),
  };
  Sample empty_batch = sample("training, empty batch", inputs_of({0, 3, 4}));
  Sample shifted = sample("training, mean 10,000", inputs_of({90, 5}, 1e4, 1));
  shifted.tol = 1e-11;
  shifted.grad_tol = 1e-5;
  shifted.tol_f32 = 2e-4;  // the kept mean is rounded to an ulp of 10,000, a thousandth of the spread
  shifted.half = false;
  c.samples.push_back(empty_batch);
  c.samples.push_back(shifted);

  const Tensors in = inputs_of({4, 3});
  const auto run = [](const Tensors& t, bool training = true, double momentum = 0.1, double eps = 1e-5) {
    batch_norm(t[0], t[1], t[2], t[3], t[4], training, momentum, eps);
  };
  const auto with = [in](std::size_t i, const Tensor& t) {
    Tensors out = in;
    out[i] = t;
    return out;
  };
  c.errors = {
      {"weight size", [=] { run(with(1, normal({4}, "w"))); }, "weight must be [3]"},
      {"running size", [=] { run(with(3, normal({2}, "m"))); }, "running_mean must be [3]"},
      {"rank", [=] { run(with(0, normal({3}, "x"))); }, "rank >= 2"},
      {"one value per channel", [=] { run(with(0, normal({1, 1, 3}, "x"))); }, "more than one value per channel"},
      {"no statistics", [=] { run(without(in, {3, 4}), false); }, "needs running_mean"},
      {"half of the statistics", [=] { run(without(in, {3})); }, "must come together"},
      {"eps", [=] { run(in, true, 0.1, 0); }, "eps must be > 0"},
      {"momentum", [=] { run(in, true, 1.5); }, "momentum must be in [0, 1]"},
      {"mixed dtypes", [=] { run(with(0, cast(in[0], f32))); }, "mixed dtypes"},
      {"activation",
       [=] { batch_norm(in[0], in[1], in[2], in[3], in[4], true, 0.1, 1e-5, true, Activation::gelu_tanh); },
       "activation must be none, relu or silu"},
      {"residual shape", [=] { batch_norm(in[0], in[1], in[2], in[3], in[4], true, 0.1, 1e-5, true, Activation::relu,
                                          normal({1, 3}, "r")); }, "residual must be"},
      {"residual dtype", [=] { batch_norm(in[0], in[1], in[2], in[3], in[4], true, 0.1, 1e-5, true, Activation::relu,
                                          cast(in[0], f32)); }, "residual must be"},
      {"ceiling without relu",
       [=] { batch_norm(in[0], in[1], in[2], in[3], in[4], true, 0.1, 1e-5, true, Activation::silu, {}, 0, 6); },
       "ceiling must be >= 0 and belongs to relu without a slope, got 6 with silu"},
      {"ceiling and slope",
       [=] { batch_norm(in[0], in[1], in[2], in[3], in[4], true, 0.1, 1e-5, true, Activation::relu, {}, 0.1, 6); },
       "got 6 with relu and slope 0.1"},
      {"ceiling below 0",
       [=] { batch_norm(in[0], in[1], in[2], in[3], in[4], true, 0.1, 1e-5, true, Activation::relu, {}, 0, -1); },
       "ceiling must be >= 0"},
      {"mixed devices", [=] { run(with(0, empty({4, 3}, f64, kMeta))); }, "is on"},
  };
  return {c};
}

}  // namespace capo::test
