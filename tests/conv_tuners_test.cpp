// Tuners of convolutions: the weight they add, strides and paddings of every kind, folding, starts, selection by kind.
#include <doctest/doctest.h>

#include <capo/models/nn/conv_layers.h>
#include <capo/models/nn/layers.h>
#include <capo/models/nn/state.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>
#include <capo/ops/matmul.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>
#include <capo/tests/support.h>
#include <capo/tuners/conv_tuners.h>
#include <capo/tuners/presets.h>
#include <capo/tuners/select.h>
#include <capo/tuners/spec.h>

#include <string>
#include <vector>

using namespace capo;
using test::close;
using test::normal;
using test::same_bits;
using testing::bytes_of;
using testing::contains;
using testing::error_of;

namespace {

struct Case {
  const char* name;
  Shape image;  // without the batch
  std::int64_t out;
  Dims kernel;
  ConvOptions options;
};
const Case kCases[] = {
    {"3x3", {7, 6, 4}, 6, {3, 3}, {.pad_before = {1}}},
    {"3x3 / 2", {7, 6, 4}, 6, {3, 3}, {.stride = {2}, .pad_before = {1}}},
    {"3x3 / 2, padded behind alone", {6, 6, 4}, 6, {3, 3}, {.stride = {2}, .pad_before = {0}, .pad_after = {1}}},
    {"3x3 dilated", {7, 8, 4}, 6, {3, 3}, {.pad_before = {2}, .dilation = {2}}},
    {"3x3 unpadded", {7, 6, 4}, 6, {3, 3}, {}},
    {"2x2 / 2 of an odd size", {7, 6, 4}, 6, {2, 2}, {.stride = {2}}},
    {"1x3 / (2, 1)", {7, 6, 4}, 6, {1, 3}, {.stride = {2, 1}, .pad_before = {0, 1}}},
    {"two groups", {7, 6, 4}, 6, {3, 3}, {.pad_before = {1}, .groups = 2}},
    {"depthwise", {7, 6, 4}, 4, {3, 3}, {.stride = {2}, .pad_before = {1}, .groups = 4}},
    {"1x1", {7, 6, 4}, 6, {1, 1}, {}},
    {"one axis", {9, 4}, 6, {3}, {.pad_before = {1}}},
    {"three axes", {5, 4, 6, 2}, 4, {3, 3, 3}, {.stride = {1, 2, 2}, .pad_before = {1}}},
};

struct Net : nn::Layer<Net> {
  explicit Net(const Case& c)
      : Layer(nn::Build{.dtype = f64}), conv(this, "conv", c.image.back(), c.out, c.kernel, c.options) {}
  Tensor forward(const Tensor& x) { return conv(x); }
  nn::Conv conv;
};

Tensor image_of(const Case& c) {
  Shape s{2};
  for (auto n : c.image) s.push_back(n);
  const Tensor x = normal(s, "image");
  set_requires_grad(x, true);
  return x;
}

void randomise(nn::Module& m) {
  const NoGrad off;
  for (nn::Parameter* p : m.parameters()) copy_into(p->value(), normal(p->value().shape(), p->path(), 0, 0.3));
}

const Tensor& parameter(nn::Module& m, const std::string& path) { return nn::find_parameters(m, path)[0]->value(); }

// The tuned model against conv(x, w + delta), values and gradients; then folded.
template <class Delta>
void check_is_a_weight(Net& net, const Tensor& x, const std::vector<Tensor>& leaves, Delta&& delta) {
  const nn::Conv& c = net.conv;
  const Tensor y = net(x), expected = conv(x, c.weight.value() + delta(), c.bias->value(), c.options);
  REQUIRE(y.shape() == expected.shape());
  CHECK(close(y, expected, 1e-12));
  const Tensor cotangent = normal(y.shape(), "cotangent");
  const auto got = grad({y}, leaves, {cotangent}), want = grad({expected}, leaves, {cotangent});
  for (std::size_t i = 0; i < leaves.size(); ++i) CHECK_MESSAGE(close(got[i], want[i], 1e-11), "gradient " << i);

  const NoGrad off;
  const std::string before = bytes_of(c.weight.value());
  tuners::merge_tuners(net);
  CHECK(close(net(x), y, 1e-12));
  CHECK(bytes_of(c.weight.value()) != before);
  tuners::detach_tuners(net);
  CHECK(bytes_of(c.weight.value()) == before);
}

}  // namespace

TEST_CASE("LoRA at a convolution adds b a to its weight") {
  for (const Case& c : kCases) {
    CAPTURE(c.name);
    Net net(c);
    const Tensor x = image_of(c), bare = net(x);
    const std::int64_t rank = 2 * c.options.groups;
    tuners::apply_spec(net, cat("conv: lora(rank=", rank, ", alpha=3)"));
    CHECK(same_bits(net(x), bare));  // b = 0
    const Tensor &w = net.conv.weight.value(), &a = parameter(net, "conv.lora.a"), &b = parameter(net, "conv.lora.b");
    CHECK(nn::parameter_count(net, true) == rank * (w.numel() / c.out + c.out / c.options.groups));
    randomise(net);
    const double scale = 3.0 / static_cast<double>(rank);
    check_is_a_weight(net, x, {x, a, b}, [&] {
      std::vector<Tensor> groups;
      const std::int64_t g = c.options.groups, rows = c.out / g;
      for (std::int64_t i = 0; i < g; ++i)
        groups.push_back(matmul(reshape(slice(b, 0, i * rows, (i + 1) * rows), {rows, 2}),
                                reshape(slice(a, 0, 2 * i, 2 * i + 2), {2, w.numel() / c.out})));
      return reshape(concat(groups, 0), w.shape()) * scale;
    });
  }
}

TEST_CASE("a residual adapter adds to the middle tap") {
  for (const Case& c : kCases) {
    CAPTURE(c.name);
    Net net(c);
    const Tensor x = image_of(c), bare = net(x);
    tuners::apply_spec(net, "conv: residual_adapter(scale=0.5)");
    CHECK(same_bits(net(x), bare));
    const Tensor &w = net.conv.weight.value(), &v = parameter(net, "conv.residual_adapter.weight");
    CHECK(nn::parameter_count(net, true) == c.out * c.image.back() / c.options.groups);
    randomise(net);
    check_is_a_weight(net, x, {x, v}, [&] {
      std::int64_t taps = 1, middle = 0;
      for (auto k : c.kernel) taps *= k, middle = middle * k + (k - 1) / 2;
      std::vector<Tensor> parts;
      for (std::int64_t t = 0; t < taps; ++t) {
        const Tensor at = reshape(v, {c.out, 1, w.size(-1)});
        parts.push_back(t == middle ? at * 0.5 : at * 0.0);
      }
      return reshape(concat(parts, 1), w.shape());
    });
  }
}

TEST_CASE("an adapter behind a convolution") {
  Net net(kCases[1]);
  const Tensor x = image_of(kCases[1]), bare = net(x);
  tuners::apply_spec(net, "conv: u_adapter(dim=3, act=relu)");
  CHECK(same_bits(net(x), bare));
  randomise(net);
  const auto p = [&](const char* name) { return parameter(net, cat("conv.u_adapter.", name)); };
  const Tensor y = conv(x, net.conv.weight, net.conv.bias->value(), net.conv.options);
  CHECK(close(net(x), y + linear(relu(linear(y, p("down.weight"), p("down.bias"))), p("up.weight"), p("up.bias")),
              1e-12));
}

TEST_CASE("what does not fit a convolution is refused") {
  const auto error = [](const Case& c, const char* spec) {
    Net net(c);
    return error_of([&] { tuners::apply_spec(net, spec); });
  };
  CHECK(contains(error(kCases[7], "conv: lora(rank=3)"),
                 "lora: rank must be a positive multiple of the 2 groups of conv, got 3"));
  CHECK(contains(error(kCases[0], "conv: lora(slices=q)"), "lora: slices need a fused qkv, conv is a Conv"));
  CHECK(contains(error(kCases[0], "conv: residual_adapter(dim=3)"),
                 "residual_adapter has no argument \"dim\"; it has scale"));
  Net wide({"", {5, 5, 4}, 4, {3, 3}, {.pad_before = {2}}});
  tuners::apply_spec(wide, "conv: residual_adapter()");
  const std::string outside = error_of([&] { wide(normal({1, 5, 5, 4}, "x")); });
  CHECK(contains(outside,
                 "residual_adapter: the middle tap of conv must stay inside its input along every axis, but reads "
                 "[-1, 6)"));
}

namespace {
struct Mixed : nn::Layer<Mixed> {
  Mixed() : Layer(nn::Build{.dtype = f64}) {}
  Tensor forward(const Tensor& x) { return head(bn(depthwise(point(conv(x))))); }
  nn::Conv conv{this, "conv", 3, 4, {3, 3}};
  nn::Conv point{this, "point", 4, 4, {1, 1}};
  nn::Conv depthwise{this, "depthwise", 4, 4, {1, 3}, {.groups = 4}, false};
  nn::BatchNorm bn{this, "bn", 4};
  struct Head : nn::Layer<Head> {
    explicit Head(nn::Module* up) : Layer(up, "head", nn::Kind::head) {}
    Tensor forward(const Tensor& x) { return fc(x); }
    nn::Linear fc{this, "fc", 4, 2};
  } head{this};
};
std::string names(const std::vector<nn::Module*>& modules) {
  std::string all;
  for (const nn::Module* m : modules) all += m->path() + " ";
  return all;
}
}  // namespace

TEST_CASE("every norm layer is a norm") {
  struct Norms : nn::Layer<Norms> {
    Norms() : Layer(nn::Build{}) {}
    Tensor forward(const Tensor& x) { return instance(group(batch(layer(x)))); }
    nn::LayerNorm layer{this, "layer", 4};
    nn::BatchNorm batch{this, "batch", 4};
    nn::GroupNorm group{this, "group", 2, 4};
    nn::InstanceNorm instance{this, "instance", 4};
  } m;
  CHECK(names(tuners::select(m, "@norm")) == "layer batch group instance ");
}

TEST_CASE("layers by kind") {
  Mixed m;
  CHECK(names(tuners::select(m, "@conv")) == "conv point ");
  CHECK(names(tuners::select(m, "@grouped_conv")) == "depthwise ");
  CHECK(names(tuners::select(m, "@spatial_conv")) == "conv depthwise ");
  CHECK(names(tuners::select(m, "@norm")) == "bn ");
  CHECK(names(tuners::select(m, "@linear")) == "head.fc ");
  CHECK(names(tuners::select(m, "@head")) == "head ");
  CHECK(names(tuners::select(m, "he**@linear")) == "head.fc ");
  CHECK(contains(error_of([&] { tuners::select(m, "c*@norm"); }), "spec: \"c*@norm\" matches no such layer"));
  CHECK(contains(error_of([&] { tuners::select(m, "@pool"); }),
                 "unknown kind of layer \"@pool\"; known: head, norm, linear, conv, grouped_conv, spatial_conv"));
  tuners::apply_spec(m, "@norm: train; @head: train");
  CHECK(nn::parameter_count(m, true) == 8 + 10);
  for (const auto& method : tuners::kConvMethods) {
    CHECK(tuners::find_method(method.name) == &method);
    tuners::apply_spec(m, method.name);
    const auto attached = tuners::tuners_of(m);
    REQUIRE(attached.size() == 2);
    CHECK(attached[1]->target().path() == (std::string(method.name) == "residual-adapter" ? "depthwise" : "point"));
    tuners::detach_tuners(m);
  }
  tuners::apply_spec(m, "@conv: lora(rank=1); @head: train");
  CHECK(names(tuners::select(m, "@conv")) == "conv point ");  // tuners' own layers are not the model's
  CHECK(nn::parameter_count(m, true) == 27 + 4 + 4 + 4 + 10);
}
