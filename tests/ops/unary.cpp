// Samples of the elementwise functions of one tensor. References are scalar f64 loops on libm.
#include <capo/autograd/autograd.h>
#include <capo/engine/cpu.h>
#include <capo/ops/binary.h>
#include <capo/ops/unary.h>
#include <capo/tests/op_test.h>
#include <capo/tests/support.h>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace capo::test {
namespace {

using Scalar = double (*)(double x, double p, double q);

struct Entry {
  UnaryKind kind;
  Scalar f;
  double low, high;   // where random inputs are drawn
  double p = 0, q = 0;
  double tol_f32 = 2e-6;
  bool kink = false;  // at zero (or at p, q): keep inputs away from it
};

const double kInf = std::numeric_limits<double>::infinity();

double normal_cdf(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }
double logistic(double x) { return 1 / (1 + std::exp(-x)); }

const Entry kEntries[] = {
    {UnaryKind::abs, [](double x, double, double) { return std::fabs(x); }, -3, 3, 0, 0, 2e-6, true},
    {UnaryKind::neg, [](double x, double, double) { return -x; }, -3, 3},
    {UnaryKind::sign, [](double x, double, double) { return x > 0 ? 1.0 : x < 0 ? -1.0 : x; }, -3, 3, 0, 0, 2e-6, true},
    {UnaryKind::floor, [](double x, double, double) { return std::floor(x); }, -3, 3, 0, 0, 2e-6, true},
    {UnaryKind::exp, [](double x, double, double) { return std::exp(x); }, -6, 4},
    {UnaryKind::log, [](double x, double, double) { return std::log(x); }, 0.05, 5},
    {UnaryKind::sqrt, [](double x, double, double) { return std::sqrt(x); }, 0.05, 5},
    {UnaryKind::rsqrt, [](double x, double, double) { return 1 / std::sqrt(x); }, 0.05, 5},
    {UnaryKind::reciprocal, [](double x, double, double) { return 1 / x; }, 0.2, 5},
    {UnaryKind::square, [](double x, double, double) { return x * x; }, -3, 3},
    {UnaryKind::sin, [](double x, double, double) { return std::sin(x); }, -7, 7},
    {UnaryKind::cos, [](double x, double, double) { return std::cos(x); }, -7, 7},
    {UnaryKind::tanh, [](double x, double, double) { return std::tanh(x); }, -4, 4},
    {UnaryKind::sigmoid, [](double x, double, double) { return logistic(x); }, -6, 6},
    {UnaryKind::relu, [](double x, double, double) { return x <= 0 ? 0 : x; }, -3, 3, 0, 0, 2e-6, true},
    {UnaryKind::leaky_relu, [](double x, double p, double) { return x > 0 ? x : p * x; }, -3, 3, 0.2, 0, 2e-6, true},
    {UnaryKind::gelu, [](double x, double, double) { return x * normal_cdf(x); }, -5, 5},
    {UnaryKind::gelu_tanh,
     [](double x, double, double) {
       return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
     },
     -5, 5},
    {UnaryKind::quick_gelu, [](double x, double, double) { return x * logistic(1.702 * x); }, -5, 5},
    {UnaryKind::silu, [](double x, double, double) { return x * logistic(x); }, -6, 6},
    {UnaryKind::softplus, [](double x, double, double) { return std::log1p(std::exp(x)); }, -6, 6},
    {UnaryKind::erf, [](double x, double, double) { return std::erf(x); }, -3, 3},
    {UnaryKind::clamp, [](double x, double p, double q) { return x < p ? p : x > q ? q : x; },
     -3, 3, -0.7, 1.3, 2e-6, true},
    {UnaryKind::pow, [](double x, double p, double) { return std::pow(x, p); }, 0.2, 3, 2.5},
    {UnaryKind::affine, [](double x, double p, double q) { return p * x + q; }, -3, 3, -1.5, 0.25},
};

// Moves values that lie within 0.01 of a kink (whole numbers, p, q) off it.
Tensor away_from_kinks(const Tensor& t, const Entry& e) {
  auto v = to_vector<double>(t);
  for (auto& x : v)
    for (const double kink : {std::round(x), e.p, e.q})
      if (std::fabs(x - kink) < 0.01) x += 0.03;
  return from_vector<double>(v, t.shape());
}

Sample make(const Entry& e, const std::string& label, const Tensor& x) {
  Sample s{label, {x}, [e](const Tensors& in) { return Tensors{unary(e.kind, in[0], e.p, e.q)}; },
           [e](const Tensors& in) {
             auto v = to_vector<double>(in[0]);
             for (auto& a : v) a = e.f(a, e.p, e.q);
             return Tensors{from_vector<double>(v, in[0].shape())};
           }};
  s.second_order = true;
  s.tol_f32 = e.tol_f32;
  return s;
}

OpCase make_case(const Entry& e) {
  const std::string name = name_of(e.kind);
  OpCase c{name, {}, {}};
  for (const Shape& shape : {Shape{2, 3, 5}, Shape{}, Shape{1, 7, 1}, Shape{0, 4}, Shape{2, 8209}}) {
    const Tensor x = uniform(shape, name + to_string(shape), e.low, e.high);
    c.samples.push_back(make(e, to_string(shape), e.kink ? away_from_kinks(x, e) : x));
  }
  c.samples.push_back(
      make(e, "special values", values({0.0, -0.0, 1, -1, 2, 30, -30, kInf, -kInf, std::nan("")}, {2, 5})));
  c.samples.back().gradient = false;
  const auto run = [e](const Tensor& x) { unary(e.kind, x, e.p, e.q); };
  c.errors = {{"integers", [run] { run(ones({2}, i64)); }, "x must be floating, got i64 [2] cpu"},
              {"bool", [run] { run(ones({2}, boolean)); }, "x must be floating, got bool"},
              {"undefined", [run] { run(Tensor()); }, "tensor: used while undefined"}};
  if (e.kind == UnaryKind::clamp)
    c.errors.push_back({"bounds", [] { clamp(ones({2}), 1, 0); }, "low must be at most high, got 1 and 0"});
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() {
  std::vector<OpCase> cases;
  for (const auto& e : kEntries) cases.push_back(make_case(e));
  return cases;
}

TEST_CASE("f32 approximations keep to their range and to 8 ulp") {
  struct Bound {
    UnaryKind kind;
    double low, high, ulp;
  };
  const testing::IsaScope restore;
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    for (const auto& [kind, low, high, ulp] :
         {Bound{UnaryKind::exp, -87, 88, 2}, Bound{UnaryKind::log, 1e-30, 10, 2}, Bound{UnaryKind::log, 0.9, 1.1, 2},
          Bound{UnaryKind::tanh, -12, 12, 8}, Bound{UnaryKind::tanh, -0.01, 0.01, 8}, Bound{UnaryKind::erf, -6, 6, 8},
          Bound{UnaryKind::sigmoid, -30, 30, 4}, Bound{UnaryKind::softplus, -30, 30, 4},
          Bound{UnaryKind::silu, -30, 30, 4}}) {
      const Tensor x = cast(arange(100003, f64) * ((high - low) / 100002) + low, f32);
      // f64 is libm's.
      const auto y = to_vector<double>(unary(kind, x)), exact = to_vector<double>(unary(kind, cast(x, f64)));
      double worst = 0, largest = 0;
      for (std::size_t i = 0; i < y.size(); ++i) {
        const auto r = static_cast<float>(std::fabs(exact[i]));
        if (r < 1e-30f) continue;
        worst = std::fmax(worst, std::fabs(y[i] - exact[i]) / (std::nextafter(r, HUGE_VALF) - r));
        largest = std::fmax(largest, std::fabs(y[i]));
      }
      INFO(name_of(kind), " ", to_string(level), " in [", low, ", ", high, "]");
      CHECK(worst <= ulp);
      if (kind == UnaryKind::tanh || kind == UnaryKind::erf || kind == UnaryKind::sigmoid) CHECK(largest <= 1);
    }
    for (const float v : to_vector<float>(gelu(cast(arange(4001, f64) * -0.0025 - 1, f32))))
      REQUIRE(v <= 0);  // the tail below -1
  }
}

TEST_CASE("relu and pow at their corners") {
  const Tensor x = values({std::nan(""), 0, -0.0, 1, -1}, {5});
  set_requires_grad(x, true);
  const auto slope = [&](const Tensor& y) { return to_vector<double>(grad({y}, {x}, {ones({5}, f64)})[0]); };
  CHECK(slope(relu(x)) == std::vector<double>{1, 0, 0, 1, 0});  // NaN passes, as in PyTorch
  CHECK(slope(pow(x, 0)) == std::vector<double>{0, 0, 0, 0, 0});
  CHECK(std::signbit(to_vector<double>(abs(x))[2]) == false);
}

}  // namespace capo::test
