// A convolution with the residual sum and activation that follow it in one pass against the ops one after the other,
// and when it is one pass.
#include <capo/autograd/autograd.h>
#include <capo/engine/backend.h>
#include <capo/engine/cpu.h>
#include <capo/models/nn/batch_norms.h>
#include <capo/ops/binary.h>
#include <capo/ops/conv.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>
#include <capo/tests/support.h>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

using namespace capo;
using namespace capo::test;
using namespace capo::testing;

namespace {

struct End {
  const char* name;
  Activation activation;
  bool residual;
  double ceiling;
};
constexpr End kEnds[] = {{"none + residual", Activation::none, true, 0}, {"relu", Activation::relu, false, 0},
                         {"relu + residual", Activation::relu, true, 0}, {"relu6", Activation::relu, false, 6},
                         {"relu of at most 2, + residual", Activation::relu, true, 2}};

struct Geometry {
  const char* name;
  Shape x, w;
  bool bias;
  ConvOptions options;
};
// Whole and partial panels and tiles, sums in several blocks, every way that sources are found.
const Geometry kGeometries[] = {
    {"many channels", {2, 7, 9, 67}, {134, 3, 3, 67}, true, {.pad_before = {1}}},
    {"1x1", {1, 13, 17, 96}, {24, 1, 1, 96}, true, {}},
    {"1x1, summed in blocks, no bias", {1, 9, 11, 700}, {64, 1, 1, 700}, false, {}},
    {"1x1, stride 2", {1, 8, 9, 40}, {72, 1, 1, 40}, true, {.stride = {2}}},
    {"few channels, stride 2", {3, 31, 33, 3}, {37, 3, 3, 3}, true, {.stride = {2}, .pad_before = {1}}},
    {"taps in blocks", {1, 9, 8, 130}, {35, 3, 3, 130}, true, {.pad_before = {1}}},
    {"groups side by side", {1, 13, 13, 64}, {64, 3, 3, 2}, true, {.pad_before = {1}, .groups = 32}},
    {"groups", {2, 6, 7, 64}, {36, 3, 3, 32}, true, {.pad_before = {1}, .groups = 2}},
    {"depthwise", {2, 9, 11, 83}, {83, 3, 3, 1}, true, {.stride = {2}, .pad_before = {1}, .groups = 83}},
    {"depthwise, 5x5, no bias", {2, 7, 9, 37}, {37, 5, 5, 1}, false, {.pad_before = {2}, .groups = 37}},
    {"depthwise, positions without taps", {1, 3, 3, 20}, {20, 3, 3, 1}, true, {.pad_before = {5}, .groups = 20}},
    {"positions without taps", {1, 1, 2, 2}, {20, 3, 3, 2}, true, {.pad_before = {4}}},
    {"3d", {1, 3, 5, 6, 8}, {80, 2, 3, 2, 8}, true, {.stride = {1, 2, 1}, .pad_before = {1}, .dilation = {1, 1, 2}}},
};

struct Inputs {
  Tensor x, w, bias, residual;
};
Inputs inputs_in(const Geometry& g, DType t) {
  Inputs in{cast(normal(g.x, g.name), t),
            cast(normal(g.w, "w"), t),
            g.bias ? cast(normal({g.w[0]}, "bias"), t) : Tensor(),
            {}};
  in.residual = cast(normal(conv(in.x, in.w, {}, g.options).shape(), "residual", 0, 3), t);
  return in;
}
Tensor fused(const Inputs& in, const Geometry& g, const End& e) {
  return conv(in.x, in.w, in.bias, g.options, e.activation, e.residual ? in.residual : Tensor(), e.ceiling);
}
Tensor composed(const Inputs& in, const Geometry& g, const End& e) {
  Tensor y = conv(in.x, in.w, in.bias, g.options);
  if (e.residual) y = y + in.residual;
  if (e.activation == Activation::none) return y;
  return e.ceiling > 0 ? clamp(y, 0, e.ceiling) : relu(y);
}

// Equal numbers; NaN in the same places.
bool equal_values(const Tensor& a, const Tensor& b) {
  const auto x = to_vector<double>(a), y = to_vector<double>(b);
  for (std::size_t i = 0; i < x.size(); ++i)
    if (!(x[i] == y[i] || (std::isnan(x[i]) && std::isnan(y[i])))) return false;
  return a.shape() == b.shape() && a.dtype() == b.dtype() && x.size() == y.size();
}

// The ops that run() hands to the tape.
template <class F>
std::vector<std::string> ops_of(const F& run) {
  std::vector<std::string> seen;
  const OpObserver observer(
      [](const char* op, const Tensor&, void* to) { static_cast<std::vector<std::string>*>(to)->push_back(op); },
      &seen);
  run();
  return seen;
}
using Names = std::vector<std::string>;

}  // namespace

TEST_CASE("residual and activation in the convolution's pass: the values of the ops one after the other") {
  const Isa before = isa();
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    for (const DType t : {f32, f64})
      for (const Geometry& g : kGeometries) {
        const Inputs in = inputs_in(g, t);
        for (const End& e : kEnds)
          CHECK_MESSAGE(equal_values(fused(in, g, e), composed(in, g, e)),
                        cat(g.name, ", ", e.name, ", ", t, ", v", static_cast<int>(level) + 2));
      }
  }
  set_isa(before);
}

TEST_CASE("a data gradient joins what the input's other uses have sent: the bits of the sum made apart") {
  const Isa before = isa();
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    for (const DType t : {f32, f64})
      for (const Geometry& g : kGeometries) {
        const Inputs in = inputs_in(g, t);
        const Tensor dy = cast(normal(in.residual.shape(), "dy"), t), factor = cast(normal(g.x, "factor"), t);
        set_requires_grad(in.x, true);
        const Tensor h = affine(in.x, 1, 0), y = conv(h, in.w, in.bias, g.options), z = h * factor;
        const GradOptions keep{.keep_graph = true};
        const Tensor seed = cast(normal(g.x, "seed"), t), seed_before = clone(seed);
        const auto of = [&](const Tensors& outputs, const Tensors& cotangents) {
          return grad(outputs, {in.x}, cotangents, keep)[0];
        };
        const std::string name = cat(g.name, ", ", t, ", v", static_cast<int>(level) + 2);
        const Tensor alone = of({y}, {dy}), others = of({z}, {seed});
        CHECK_MESSAGE(equal_values(of({y, z}, {dy, seed}), alone + others), name);
        CHECK_MESSAGE(equal_values(of({y, h}, {dy, seed}), alone + seed), name);
        CHECK_MESSAGE(equal_values(seed, seed_before), name);
      }
  }
  set_isa(before);
}

TEST_CASE("a data gradient of short sums takes no second buffer for what it joins") {
  const auto peak_of = [](std::int64_t channels) {
    const Tensor x = cast(normal({2, 40, 40, channels}, "x"), f32);
    const Tensor w = cast(normal({channels, 3, 3, channels}, "w"), f32);
    set_requires_grad(x, true);
    const Tensor y = conv(x, w, {}, {.pad_before = {1}}), z = x * 2, dy = full(y.shape(), 1), dz = full(z.shape(), 1);
    const std::int64_t live = allocator({}).stats().live_bytes;
    allocator({}).reset_peak();
    grad({y, z}, {x}, {dy, dz});
    return static_cast<double>(allocator({}).stats().peak_bytes - live) / static_cast<double>(x.numel() * 4);
  };
  CHECK(peak_of(64) < 1.5);   // 9 x 64: the sum's own place
  CHECK(peak_of(80) > 1.99);  // longer: beside it
}

TEST_CASE("results that are written past the caches") {
  const Geometry large[] = {{"1x1", {1, 700, 200, 3}, {80, 1, 1, 3}, true, {}},
                            {"1x1, partial panels", {1, 700, 200, 3}, {68, 1, 1, 3}, true, {}}};
  for (const Geometry& g : large) {
    const Inputs in = inputs_in(g, f32);
    for (const End& e : {kEnds[2], kEnds[3]}) {
      const Tensor y = fused(in, g, e);
      CHECK(y.numel() * 4 >= (32 << 20));
      CHECK(equal_values(y, composed(in, g, e)));
      // Of a part that is small enough for the caches.
      Inputs part = in;
      part.x = contiguous(slice(in.x, 1, 690, 700)), part.residual = contiguous(slice(in.residual, 1, 690, 700));
      CHECK(equal_values(contiguous(slice(y, 1, 690, 700)), fused(part, g, e)));
    }
  }
}

TEST_CASE("a NaN passes every end; an infinity is cut") {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const Geometry dense{"dense", {1, 1, 4, 1}, {20, 1, 1, 1}, false, {}},
      depthwise{"depthwise", {1, 1, 4, 20}, {20, 1, 1, 1}, false, {.groups = 20}};
  for (const Geometry* g : {&dense, &depthwise}) {
    Inputs in = inputs_in(*g, f64);
    in.w = ones(in.w.shape(), f64);
    in.x = expand(values({nan, infinity, -infinity, 1}, {1, 1, 4, 1}), g->x);
    for (const End& e : kEnds) {
      const auto y = to_vector<double>(fused(in, *g, e));
      CHECK(std::isnan(y[0]));
      CHECK(y[20] == (e.ceiling > 0 ? e.ceiling : infinity));
      CHECK(y[40] == (e.activation == Activation::none ? -infinity : 0));
    }
  }
}

TEST_CASE("one pass where nothing needs a gradient, recorded ops where something does") {
  const Geometry& g = kGeometries[0];
  const End &e = kEnds[4];
  const Inputs in = inputs_in(g, f64);
  CHECK(ops_of([&] { fused(in, g, e); }) == Names{"conv"});
  const Tensors leaves{in.x, in.w, in.bias, in.residual};
  const Tensor dy = normal(in.residual.shape(), "dy");
  for (const Tensor& leaf : leaves) {
    set_requires_grad(leaf, true);
    CHECK(ops_of([&] { fused(in, g, e); }) == Names{"conv", "add", "clamp"});
    {
      const NoGrad off;
      CHECK(ops_of([&] { fused(in, g, e); }) == Names{"conv"});
    }
    CHECK(same_bits(grad({fused(in, g, e)}, {leaf}, {dy})[0], grad({composed(in, g, e)}, {leaf}, {dy})[0]));
    set_requires_grad(leaf, false);
  }
}

TEST_CASE("16-bit values are rounded once, whether a gradient is needed or not") {
  const Geometry& g = kGeometries[0];
  for (const DType t : {bf16, f16}) {
    const Inputs in = inputs_in(g, t),
                 wide{cast(in.x, f32), cast(in.w, f32), cast(in.bias, f32), cast(in.residual, f32)};
    for (const End& e : kEnds) {
      const Tensor want = cast(composed(wide, g, e), t);
      CHECK(equal_values(fused(in, g, e), want));
      set_requires_grad(in.x, true);
      CHECK(equal_values(fused(in, g, e), want));
      set_requires_grad(in.x, false);
    }
  }
}

TEST_CASE("layers: a folded norm's activation joins its convolution, taps see what they always saw") {
  struct Model : nn::Layer<Model> {
    nn::Conv first{this, "first", 8, 8, {3, 3}, {.pad_before = {1}}, false};
    nn::BatchNorm norm{this, "norm", 8};
    nn::Conv second{this, "second", 8, 8, {1, 1}};
    Model() : Layer(nn::Build{.dtype = f64}) { norm.set_source(&first); }
    Tensor forward(const Tensor& x) {
      return second.with_activation(norm.after(first, x, Activation::relu, x, 6), Activation::relu, x, 2);
    }
  } model;
  model.train(false);
  const NoGrad off;
  model.norm.running_mean.set(normal({8}, "mean"));
  const Tensor x = normal({2, 5, 6, 8}, "x"), before = model(x);
  const auto passes = [&] { return ops_of([&] { model(x); }).size(); };
  CHECK(nn::fold_batch_norms(model) == 1);
  CHECK(passes() == 2);
  CHECK(close(model(x), before, 1e-13));
  struct Seen : nn::Tap {
    Tensor apply(const nn::Site& s) override { return y = s.y; }
    using Tap::apply;
    Tensor y;
  } tap;
  const Tensor bare = conv(x, model.first.weight, model.first.bias->value(), model.first.options);
  for (nn::Module* m : {static_cast<nn::Module*>(&model.first), static_cast<nn::Module*>(&model.norm)}) {
    m->attach_observer(&tap);
    CHECK(passes() == 4);  // the sum and the clamp apart
    CHECK(same_bits(tap.y, bare));
    CHECK(close(model(x), before, 1e-13));
    m->detach_observers();
    tap.y = {};
  }
  CHECK(close(model.second.with_activation(x, Activation::silu, x), silu(model.second(x) + x), 1e-14));
  model.train();
  CHECK(contains(error_of([&] { model(x); }), "norm: is folded into its convolution"));
}
