// The module tree, initial values, freezing, layouts, and the layers that no model test covers.
#include <doctest/doctest.h>

#include <capo/models/nn/attention.h>
#include <capo/models/nn/conv_layers.h>
#include <capo/models/nn/layers.h>
#include <capo/models/nn/state.h>
#include <capo/ops/binary.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>
#include <capo/tests/temp_folder.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

using namespace capo;
using namespace capo::testing;
using test::close;
using test::normal;
using test::same_bits;

namespace {

struct ConvNet : nn::Layer<ConvNet> {
  explicit ConvNet(const nn::Build& build = {})
      : Layer(build),
        conv1(this, "conv1", 3, 8, {3, 3}, {.stride = {2}, .pad_before = {1}}, false),
        bn1(this, "bn1", 8),
        conv2(this, "conv2", 8, 4, {1, 1}),
        gn(this, "gn", 2, 4) {}
  Tensor forward(const Tensor& x) { return gn(conv2(relu(bn1(conv1(x))))); }
  nn::Conv conv1;
  nn::BatchNorm bn1;
  nn::Conv conv2;
  nn::GroupNorm gn;
};

struct Root : nn::Layer<Root> {
  explicit Root(const nn::Build& build = {}) : Layer(build) {}
  Tensor forward(const Tensor& x) { return x; }
};

}  // namespace

TEST_CASE("a convolutional net: shapes, PyTorch layout outside, files") {
  ConvNet a({.seed = 1}), b({.seed = 2});
  const Tensor x = cast(normal({2, 9, 9, 3}, "x"), f32);
  CHECK(a(x).shape() == Shape{2, 5, 5, 4});
  CHECK(a.conv1.weight.value().shape() == Shape{8, 3, 3, 3});
  CHECK(a.conv1.path() == "conv1");
  const auto dict = nn::state_dict(a);
  std::string names;
  for (const auto& t : dict) names += t.name + " ";
  CHECK(names ==
        "conv1.weight bn1.weight bn1.bias bn1.running_mean bn1.running_var conv2.weight conv2.bias gn.weight gn.bias ");
  // [8, 3, 3, 3] has one shape in both layouts: only the declared layout tells them apart.
  CHECK(same_bits(dict[0].value, contiguous(permute(a.conv1.weight.value().detach(), {0, 3, 1, 2}))));
  CHECK(dict[5].value.shape() == Shape{4, 8, 1, 1});
  TempFolder folder;
  nn::save_weights(a, folder / "a.safetensors", f32);
  nn::load_weights(b, folder / "a.safetensors");
  const NoGrad off;
  CHECK(same_bits(a(x), b(x)));
}

TEST_CASE("layouts go both ways") {
  const Tensor t = normal({2, 3, 4, 5}, "t");
  for (nn::Layout layout : {nn::Layout::plain, nn::Layout::conv, nn::Layout::conv_transpose}) {
    const Tensor file = nn::to_file_layout(t, layout);
    CHECK(file.shape() == (layout == nn::Layout::plain ? Shape{2, 3, 4, 5} : Shape{2, 5, 3, 4}));
    CHECK(same_bits(nn::from_file_layout(file, layout), t));
  }
  CHECK(nn::to_file_layout(normal({2, 3, 4}, "t"), nn::Layout::conv).shape() == Shape{2, 4, 3});
  CHECK(nn::to_file_layout(normal({2, 3, 4, 5, 6}, "t"), nn::Layout::conv).shape() == Shape{2, 6, 3, 4, 5});
}

TEST_CASE("batch norm's statistics: in training, once per checkpoint, never when frozen") {
  const Tensor x = cast(normal({4, 9, 9, 3}, "x", 1.0, 2.0), f32);
  const auto statistics = [](ConvNet& m) { return to_vector<double>(m.bn1.running_mean.value()); };
  ConvNet net;
  const auto start = statistics(net);
  net(x);
  CHECK(statistics(net) == start);  // eval
  net.train();
  net(x);
  const auto once = statistics(net);
  CHECK(once != start);

  ConvNet again;
  again.train();
  std::vector<Tensor> inside;
  for (nn::Parameter* p : again.parameters()) inside.push_back(p->value());
  const Tensor y =
      checkpoint([&](const std::vector<Tensor>& in) { return std::vector<Tensor>{again(in[0])}; }, {x}, inside)[0];
  CHECK(statistics(again) == once);
  backward(y, cast(normal(y.shape(), "dy"), f32));
  CHECK(statistics(again) == once);

  ConvNet frozen;
  frozen.train();
  nn::freeze(frozen, "bn1");
  const Tensor before = frozen(x);
  CHECK(statistics(frozen) == start);
  frozen.train(false);
  CHECK(same_bits(before.detach(), frozen(x).detach()));
}

TEST_CASE("the tree: paths, names, errors") {
  Root root;
  nn::Linear fc(&root, "fc", 3, 4);
  CHECK(fc.path() == "fc");
  CHECK(fc.weight.path() == "fc.weight");
  CHECK(fc.weight.kind() == nn::Kind::base);
  CHECK(&fc.root() == &root);
  CHECK(contains(error_of([&] { nn::Linear(&root, "fc", 1, 1); }), "two children named fc"));
  CHECK(contains(error_of([&] { nn::Linear(&root, "a.b", 1, 1); }), "one path segment"));
  CHECK(contains(error_of([&] { nn::Linear(&root, "", 1, 1); }), "one path segment"));
  CHECK(contains(error_of([&] { nn::Linear(nullptr, "x", 1, 1); }), "needs a parent"));
  CHECK(contains(error_of([&] { fc.weight.set(zeros({3, 4})); }), "fc.weight: a new value must be"));
  CHECK(contains(error_of([&] { fc.reapply(zeros({3})); }), "fc: cannot be applied"));
  CHECK(contains(error_of([&] { nn::find_parameters(root, "fc.wieght"); }), "near: fc.weight"));
  CHECK(root.children().size() == 1);
  {
    nn::Linear gone(&root, "gone", 2, 2);
    CHECK(root.children().size() == 2);
  }
  CHECK(root.children().size() == 1);
  CHECK(nn::parameter_count(root) == 16);
  CHECK(contains(nn::summary(root), "fc.weight"));
  CHECK(contains(nn::summary(root), "16 parameters, 16 trainable"));

  const Tensor fresh = ones({4, 3});
  fc.weight.set(fresh);
  CHECK(fc.weight.trainable());
  nn::freeze(root, "fc");
  CHECK(nn::parameter_count(root, true) == 0);
  fc.weight.set(zeros({4, 3}));
  CHECK(!fc.weight.trainable());
  nn::unfreeze(root, "*.bias");
  CHECK(nn::parameter_count(root, true) == 4);
  CHECK_THROWS_AS(nn::freeze(root, "nothing"), Error);
}

TEST_CASE("initial values") {
  struct Many : nn::Layer<Many> {
    explicit Many(const nn::Build& b) : Layer(b) {}
    nn::Parameter zero{this, "zero", {50, 200}, nn::Init::zero()}, one{this, "one", {50, 200}, nn::Init::one()};
    nn::Parameter constant{this, "constant", {50, 200}, nn::Init::constant(0.3)};
    nn::Parameter uniform{this, "uniform", {50, 200}, nn::Init::uniform(0.5)};
    nn::Parameter normal{this, "normal", {50, 200}, nn::Init::normal(2.0)};
    nn::Parameter cut{this, "cut", {50, 200}, nn::Init::trunc_normal(1.0)};
    nn::Parameter xavier{this, "xavier", {50, 200}, nn::Init::xavier()};
    nn::Parameter kaiming{this, "kaiming", {50, 2, 100}, nn::Init::kaiming(std::sqrt(5.0))};
  };
  const Many m({.seed = 1}), other({.seed = 2}), wide({.seed = 1, .dtype = f64}), half({.seed = 1, .dtype = bf16});
  const auto moments = [](const nn::Parameter& p) {
    double sum = 0, squares = 0, most = 0;
    const auto v = to_vector<double>(p.value());
    for (double x : v) sum += x, squares += x * x, most = std::max(most, std::abs(x));
    const double n = static_cast<double>(v.size());
    return std::vector<double>{sum / n, std::sqrt(squares / n), most};
  };
  const auto check = [&](const nn::Parameter& p, double mean, double rms, double most) {
    const auto got = moments(p);
    CHECK_MESSAGE(std::abs(got[0] - mean) <= 0.04 * rms, p.path());
    CHECK_MESSAGE(got[1] == doctest::Approx(rms).epsilon(0.03), p.path());
    CHECK_MESSAGE(got[2] <= most * 1.000001, p.path());
  };
  check(m.one, 1, 1, 1);
  check(m.constant, 0.3, 0.3, 0.3);
  check(m.uniform, 0, 0.5 / std::sqrt(3.0), 0.5);
  check(m.normal, 0, 2, 12);
  check(m.cut, 0, 0.959, 2);
  const double bound = std::sqrt(6.0 / 250);
  check(m.xavier, 0, bound / std::sqrt(3.0), bound);
  check(m.kaiming, 0, 1 / std::sqrt(200.0 * 3), 1 / std::sqrt(200.0));
  CHECK(moments(m.zero)[2] == 0);
  CHECK(!same_bits(m.normal.value().detach(), other.normal.value().detach()));
  CHECK(same_bits(cast(wide.normal.value().detach(), f32), m.normal.value().detach()));  // one draw for every dtype
  CHECK(same_bits(cast(m.normal.value().detach(), bf16), half.normal.value().detach()));
}

TEST_CASE("layers that are one op") {
  Root root({.dtype = f64});
  const Tensor x = normal({2, 5, 6}, "x");
  nn::RmsNorm rms(&root, "rms", 6);
  CHECK(close(rms(x).detach(), (x * rsqrt(affine(matmul(x * x, full({6, 1}, 1.0 / 6, f64)), 1, 1e-6))), 1e-12));
  nn::Embedding table(&root, "table", 7, 3);
  const Tensor ids = from_vector<std::int64_t>({6, 0, 6, 2}, {2, 2});
  CHECK(table(ids).shape() == Shape{2, 2, 3});
  CHECK(same_bits(select(flatten(table(ids), 0, 1), 0, 3).detach(), select(table.weight.value(), 0, 2).detach()));
  nn::LayerScale scale(&root, "scale", 6, 0.5);
  CHECK(close(scale(x).detach(), x * 0.5, 0));
  nn::Dropout drop(&root, "drop", 0.5);
  CHECK(drop(x).same(x));
  root.train();
  CHECK(!same_bits(drop(x), x));
}

TEST_CASE("a fused activation is the same as an unfused one") {
  Root root({.dtype = f64});
  nn::Linear fc(&root, "fc", 6, 9);
  const Tensor x = normal({4, 6}, "x");
  nn::Tap idle;
  const NoGrad off;
  for (Activation act : {Activation::none, Activation::relu, Activation::gelu, Activation::gelu_tanh,
                         Activation::quick_gelu, Activation::silu}) {
    const Tensor fused = fc.with_activation(x, act);
    fc.attach_observer(&idle);
    CHECK_MESSAGE(close(fc.with_activation(x, act), fused, 1e-14), name_of(act));
    fc.detach_observers();
  }
}
