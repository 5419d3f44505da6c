#include <capo/ops/binary.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>
#include <capo/tests/per_sample.h>

#include <doctest/doctest.h>

namespace capo::test {
namespace {

Tensor scaled(Tensor h, const Tensor& w, const Tensor& b) {
  if (w.defined()) h = h * spread(w, h);
  return b.defined() ? h + spread(b, h) : h;
}

Tensor layer_norm_by_ops(const Tensor& x, const Tensor& w, const Tensor& b, double eps) {
  const Tensor centred = x - mean(x, {-1}, true);
  return scaled(centred / sqrt(mean(square(centred), {-1}, true) + eps), w, b);
}

Tensor rms_norm_by_ops(const Tensor& x, const Tensor& w, double eps) {
  return scaled(x / sqrt(mean(square(x), {-1}, true) + eps), w, {});
}

// inputs: x, weight, bias
Sample layer_sample(const std::string& label, const Tensors& inputs, double eps = 1e-6) {
  Sample s;
  s.label = label;
  s.inputs = inputs;
  s.run = [eps](const Tensors& in) -> Tensors { return {layer_norm(in[0], in[1], in[2], eps)}; };
  s.reference = [eps](const Tensors& in) -> Tensors { return {layer_norm_by_ops(in[0], in[1], in[2], eps)}; };
  s.second_order = true;
  return s;
}

Sample rms_sample(const std::string& label, const Tensors& inputs, double eps = 1e-6) {
  Sample s;
  s.label = label;
  s.inputs = inputs;
  s.run = [eps](const Tensors& in) -> Tensors { return {rms_norm(in[0], in[1], eps)}; };
  s.reference = [eps](const Tensors& in) -> Tensors { return {rms_norm_by_ops(in[0], in[1], eps)}; };
  s.second_order = true;
  return s;
}

using AddForm = AddNorm (*)(const Tensors&, double);
AddNorm by_add_layer(const Tensors& in, double eps) { return add_layer_norm(in[0], in[1], in[2], in[3], eps); }
AddNorm by_add_rms(const Tensors& in, double eps) { return add_rms_norm(in[0], in[1], in[2], eps); }

enum class Read { both, sum, y };  // what the caller goes on with: the other output's cotangent is undefined

// inputs: x, r, weight, bias (none for rms)
Sample add_sample(const std::string& label, const Tensors& inputs, Read read = Read::both, double eps = 1e-6) {
  const bool rms = inputs.size() == 3;
  const AddForm form = rms ? by_add_rms : by_add_layer;
  const auto pick = [read](const Tensor& sum, const Tensor& y) -> Tensors {
    return read == Read::both ? Tensors{sum, y} : Tensors{read == Read::sum ? sum : y};
  };
  Sample s;
  s.label = label;
  s.inputs = inputs;
  s.run = [=](const Tensors& in) {
    const AddNorm out = form(in, eps);
    return pick(out.sum, out.y);
  };
  s.reference = [=](const Tensors& in) {
    const Tensor sum = in[0] + in[1];
    return pick(sum, rms ? rms_norm_by_ops(sum, in[2], eps) : layer_norm_by_ops(sum, in[2], in[3], eps));
  };
  s.second_order = true;
  return s;
}

// The same call with x as an f32 stream, where the sample runs in 16 bits.
Sample as_stream(const std::string& label, Sample s) {
  s.label = label;
  s.run = [run = s.run](const Tensors& in) {
    if (!is_half(in[0].dtype())) return run(in);
    Tensors wide = in;
    wide[0] = cast(in[0], f32);
    Tensors out = run(wide);
    for (Tensor& y : out) y = cast(y, in[0].dtype());
    return out;
  };
  return s;
}

Tensor x_of(const Shape& shape, double mean = 0.3, double std = 1.5) {
  return normal(shape, cat("x", shape), mean, std);
}
Tensor weight_of(std::int64_t c) { return normal({c}, "weight", 1, 0.3); }
Tensor weights_of(std::int64_t b, std::int64_t c) { return normal({b, c}, "weights", 1, 0.3); }
Tensor biases_of(std::int64_t b, std::int64_t c) { return normal({b, c}, "biases", -0.2, 0.5); }
Tensor r_of(const Shape& shape) { return normal(shape, cat("r", shape), -0.1, 0.8); }
Tensor bias_of(std::int64_t c) { return normal({c}, "bias", -0.2, 0.5); }

OpCase layer_norm_case() {
  OpCase c{"layer_norm", {}, {}};
  c.samples = {
      layer_sample("small", {x_of({2, 3, 5}), weight_of(5), bias_of(5)}),
      layer_sample("no weight, no bias", {x_of({3, 7}), {}, {}}),
      layer_sample("weight only", {x_of({3, 7}), weight_of(7), {}}),
      layer_sample("bias only", {x_of({3, 7}), {}, bias_of(7)}),
      layer_sample("rank 1, one lane block", {x_of({32}), weight_of(32), bias_of(32)}),
      layer_sample("odd columns, several chunks of rows", {x_of({2, 75, 37}), weight_of(37), bias_of(37)}),
      layer_sample("big eps", {x_of({4, 18}), weight_of(18), bias_of(18)}, 0.5),
      layer_sample("whole packs, several chunks of rows", {x_of({70, 520}), weight_of(520), bias_of(520)}),
      layer_sample("whole packs, no weight", {x_of({3, 264}), {}, {}}),
      layer_sample("whole packs, a long row", {x_of({2, 1544}), weight_of(1544), bias_of(1544)}),
      layer_sample("a weight for each sample", {x_of({2, 3, 5}), weights_of(2, 5), biases_of(2, 5)}),
      layer_sample("a weight for each row", {x_of({4, 6}), weights_of(4, 6), {}}),
      layer_sample("a bias for each sample of images", {x_of({2, 2, 3, 7}), {}, biases_of(2, 7)}),
      layer_sample("a weight for each sample, chunks", {x_of({2, 70, 37}), weights_of(2, 37), biases_of(2, 37)}),
      layer_sample("each sample's weight, whole packs", {x_of({3, 66, 264}), weights_of(3, 264), biases_of(3, 264)}),
      layer_sample("each sample's weight, a long row", {x_of({2, 2, 1544}), weights_of(2, 1544), biases_of(2, 1544)}),
      layer_sample("a weight for each of no samples", {x_of({0, 3, 6}), weights_of(0, 6), biases_of(0, 6)}),
      layer_sample("a weight for each sample without rows", {x_of({2, 0, 6}), weights_of(2, 6), biases_of(2, 6)}),
      layer_sample("empty rows", {x_of({0, 6}), weight_of(6), bias_of(6)}),
      layer_sample("empty columns", {x_of({3, 0}), weight_of(0), bias_of(0)}),
  };
  Sample one = layer_sample("rows of one element", {x_of({4, 1}), weight_of(1), bias_of(1)}, 1e-3);
  Sample shifted = layer_sample("mean 10,000", {x_of({3, 129}, 1e4, 1), weight_of(129), bias_of(129)});
  shifted.tol = 1e-11;
  shifted.grad_tol = 1e-5;
  shifted.second_order = true;
  shifted.tol_f32 = 2e-5;  // the kept mean is rounded to an ulp of 10,000, a thousandth of the spread
  shifted.half = false;    // bf16 cannot tell the elements apart
  Sample huge = layer_sample("one huge row", {x_of({1, 70001}, -3, 2), weight_of(70001), bias_of(70001)});
  huge.grad_tol = 1e-5;
  c.samples.push_back(one);
  c.samples.push_back(as_stream("stream", c.samples[0]));
  c.samples.push_back(as_stream("stream, whole packs", c.samples[7]));
  c.samples.push_back(shifted);
  c.samples.push_back(huge);
  const Tensor x = x_of({2, 3, 5});
  c.errors = {
      {"weight size", [=] { layer_norm(x, weight_of(4), bias_of(5)); }, "weight must be [5]"},
      {"bias rank", [=] { layer_norm(x, weight_of(5), normal({1, 5}, "b")); }, "bias must be [5] or [2, 5]"},
      {"weight and bias unlike", [=] { layer_norm(x, weights_of(2, 5), bias_of(5)); }, "must have one shape"},
      {"weights of other samples", [=] { layer_norm(x, weights_of(3, 5)); }, "weight must be [5] or [2, 5]"},
      {"scalar x", [] { layer_norm(values({1}, {})); }, "last axis"},
      {"eps", [=] { layer_norm(x, weight_of(5), bias_of(5), 0); }, "eps must be > 0"},
      {"mixed dtypes", [=] { layer_norm(cast(x, f32), weight_of(5), bias_of(5)); }, "mixed dtypes"},
      {"mixed devices", [=] { layer_norm(empty({2, 5}, f64, kMeta), weight_of(5)); }, "is on"},
      {"integers", [] { layer_norm(integers({2, 5}, "i", 0, 4)); }, "floating"},
  };
  return c;
}

OpCase rms_norm_case() {
  OpCase c{"rms_norm", {}, {}};
  c.samples = {
      rms_sample("small", {x_of({2, 3, 5}), weight_of(5)}),
      rms_sample("no weight", {x_of({3, 7}), {}}),
      rms_sample("rows of one element", {x_of({4, 1}), weight_of(1)}, 0.1),
      rms_sample("odd columns, several chunks of rows", {x_of({150, 37}), weight_of(37)}),
      rms_sample("mean 10,000", {x_of({3, 33}, 1e4, 1), weight_of(33)}),
      rms_sample("one huge row", {x_of({1, 40001}, 1, 2), weight_of(40001)}),
      rms_sample("whole packs, several chunks of rows", {x_of({66, 1032}), weight_of(1032)}),
      rms_sample("whole packs, a long row", {x_of({2, 1544}), weight_of(1544)}),
      rms_sample("empty", {x_of({0, 6}), weight_of(6)}),
  };
  c.samples[4].half = false;  // squares leave f16
  c.samples[4].grad_tol = 1e-5;
  c.samples[5].grad_tol = 1e-5;
  const Tensor x = x_of({2, 3, 5});
  c.errors = {
      {"weight size", [=] { rms_norm(x, weight_of(3)); }, "weight must be [5]"},
      {"eps", [=] { rms_norm(x, weight_of(5), -1e-6); }, "eps must be > 0"},
      {"mixed dtypes", [=] { rms_norm(x, cast(weight_of(5), f32)); }, "mixed dtypes"},
  };
  return c;
}

OpCase add_layer_norm_case() {
  OpCase c{"add_layer_norm", {}, {}};
  const auto of = [](const Shape& shape) -> Tensors {
    const std::int64_t n = shape[shape.size() - 1];
    return {x_of(shape), r_of(shape), weight_of(n), bias_of(n)};
  };
  const Tensor shared = x_of({3, 9});
  c.samples = {
      add_sample("small", of({2, 3, 5})),
      add_sample("only y is read", of({2, 3, 5}), Read::y),
      add_sample("only the sum is read", of({2, 3, 5}), Read::sum),
      add_sample("no weight, no bias, big eps", {x_of({3, 7}), r_of({3, 7}), {}, {}}, Read::both, 0.5),
      add_sample("weight only", {x_of({3, 7}), r_of({3, 7}), weight_of(7), {}}),
      add_sample("a weight for each sample", {x_of({2, 70, 9}), r_of({2, 70, 9}), weights_of(2, 9), biases_of(2, 9)}),
      add_sample("x twice", {shared, shared, weight_of(9), bias_of(9)}),
      add_sample("odd columns, several chunks of rows", of({2, 75, 37})),
      add_sample("whole packs, several chunks of rows", of({70, 520})),
      add_sample("whole packs, a long row", of({2, 1544})),
      add_sample("empty rows", of({0, 6})),
      add_sample("empty columns", of({3, 0})),
      as_stream("stream", add_sample("", of({2, 3, 5}))),
      as_stream("stream, only y is read", add_sample("", of({2, 3, 5}), Read::y)),
      as_stream("stream, only the sum is read", add_sample("", of({2, 3, 5}), Read::sum)),
      as_stream("stream, no weight", add_sample("", {x_of({3, 7}), r_of({3, 7}), {}, {}})),
      as_stream("stream, whole packs, several chunks of rows", add_sample("", of({70, 520}))),
      as_stream("stream, whole packs, a long row", add_sample("", of({2, 1544}))),
      as_stream("stream, a weight for each sample",
                add_sample("", {x_of({2, 70, 9}), r_of({2, 70, 9}), weights_of(2, 9), biases_of(2, 9)})),
  };
  const Tensor x = x_of({2, 3, 5}), r = r_of({2, 3, 5});
  c.errors = {
      {"shapes", [=] { add_layer_norm(x, r_of({3, 5})); }, "x and r must be alike"},
      {"a narrow stream", [=] { add_layer_norm(cast(x, bf16), cast(r, f32)); }, "x and r must be alike"},
      {"a stream's weight", [=] { add_layer_norm(cast(x, f32), cast(r, bf16), cast(weight_of(5), f16)); },
       "mixed dtypes"},
      {"dtypes", [=] { add_layer_norm(x, cast(r, f32)); }, "x and r must be alike"},
      {"weight size", [=] { add_layer_norm(x, r, weight_of(4)); }, "weight must be [5]"},
      {"eps", [=] { add_layer_norm(x, r, {}, {}, 0); }, "eps must be > 0"},
  };
  return c;
}

OpCase add_rms_norm_case() {
  OpCase c{"add_rms_norm", {}, {}};
  const auto of = [](const Shape& shape) -> Tensors {
    return {x_of(shape), r_of(shape), weight_of(shape[shape.size() - 1])};
  };
  c.samples = {
      add_sample("small", of({2, 3, 5})),
      add_sample("only y is read", of({2, 3, 5}), Read::y),
      add_sample("no weight", {x_of({3, 7}), r_of({3, 7}), {}}),
      add_sample("odd columns, several chunks of rows", of({150, 37})),
      add_sample("whole packs, several chunks of rows", of({66, 1032})),
      add_sample("whole packs, a long row", of({2, 1544})),
      add_sample("empty", of({0, 6})),
      as_stream("stream, odd columns", add_sample("", of({70, 37}))),
      as_stream("stream, whole packs", add_sample("", of({9, 264}))),
  };
  const Tensor x = x_of({2, 5});
  c.errors = {
      {"shapes", [=] { add_rms_norm(x, r_of({5})); }, "x and r must be alike"},
      {"weight size", [=] { add_rms_norm(x, r_of({2, 5}), weight_of(3)); }, "weight must be [5]"},
  };
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() {
  return {layer_norm_case(), rms_norm_case(), add_layer_norm_case(), add_rms_norm_case()};
}

TEST_CASE(
    "an f32 stream: the sum is not rounded, y and the residual's gradient are 16-bit, the stream's gradient is f32") {
  const Tensor x = cast(x_of({4, 9}), f32), r = cast(r_of({4, 9}), bf16), w = cast(weight_of(9), bf16),
               b = cast(bias_of(9), bf16);
  for (const Tensor& t : {x, r, w, b}) set_requires_grad(t, true);
  const AddNorm out = add_layer_norm(x, r, w, b);
  CHECK(same_bits(out.sum.detach(), x.detach() + cast(r.detach(), f32)));
  CHECK(same_bits(out.y.detach(),
                  cast(layer_norm(out.sum.detach(), cast(w, f32).detach(), cast(b, f32).detach()), bf16)));
  CHECK(layer_norm(x, w, b).dtype() == bf16);
  CHECK(layer_norm(x, cast(w, f32), cast(b, f32)).dtype() == f32);
  const auto g = grad({out.sum, out.y}, {x, r, w, b}, {ones({4, 9}, f32), ones({4, 9}, bf16)});
  CHECK(g[0].dtype() == f32);
  CHECK(same_bits(g[1], cast(g[0], bf16)));
  CHECK(g[2].dtype() == bf16);
}

}  // namespace capo::test
