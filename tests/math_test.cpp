// The CPU's f32 mathematics against f64 libm, walked over every float of either sign, on every instruction set: the
// bounds that ops/cpu/math.h states. Denormals count as zero on the way in and out (parallel_for flushes them).
#include <capo/engine/cpu.h>
#include <capo/ops/copy.h>
#include <capo/ops/softmax.h>
#include <capo/ops/unary.h>
#include <capo/tests/support.h>

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>

using namespace capo;
using namespace capo::testing;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNormal = 0x1p-126;

double ulp_of(double v) {  // of f32
  int exponent = 0;
  std::frexp(std::fmax(std::fabs(v), kNormal), &exponent);
  return std::ldexp(1.0, exponent - 24);
}

double cdf(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }
double pdf(double x) { return std::exp(-0.5 * x * x) / std::sqrt(2 * 3.14159265358979323846); }
double logistic(double x) { return 1 / (1 + std::exp(-x)); }
double tanh_gelu_u(double x) { return std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x); }

// A function and the bound |y - f(x)| <= ulps ulp(size(x)) + absolute, where size is |f(x)| or, of a sum whose terms
// cancel, the size of the terms.
struct Function {
  const char* name;
  Tensor (*run)(const Tensor&);
  double (*f)(double);
  double (*size)(double);  // null: |f|
  double ulps, ulps_v2, absolute;
  double least, most;      // where the bound holds
};

Tensor slope_of(UnaryKind kind, const Tensor& x) {
  const Tensor one = full(x.shape(), 1);
  return unary_backward(kind, one, x, 0, 0);
}

const Function kFunctions[] = {
    {"exp", exp, std::exp, nullptr, 1, 1.1, kNormal, -kInf, kInf},
    {"log", log, std::log, nullptr, 1, 1.5, 0, 0, kInf},
    {"tanh", tanh, std::tanh, nullptr, 6, 7, 0, -kInf, kInf},
    {"erf", erf, std::erf, nullptr, 6, 8, 0, -kInf, kInf},
    {"sigmoid", sigmoid, logistic, nullptr, 2.5, 2.5, 1.2e-38, -kInf, kInf},
    {"silu", silu, [](double x) { return x / (1 + std::exp(-x)); }, nullptr, 2.5, 2.5, 3e-37, -1e30, kInf},
    {"silu'", [](const Tensor& x) { return slope_of(UnaryKind::silu, x); },
     [](double x) { return logistic(x) * (1 + x * logistic(-x)); },
     [](double x) { return logistic(x) * (1 + std::fabs(x) * logistic(-x)); }, 12, 12, 2e-36, -1e30, 1e30},
    {"softplus", softplus, [](double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x))); }, nullptr, 3,
     3, 1.2e-38, -kInf, kInf},
    {"gelu", gelu, [](double x) { return x * cdf(x); }, nullptr, 7, 60, 2e-37, -1e30, kInf},
    {"gelu'", [](const Tensor& x) { return slope_of(UnaryKind::gelu, x); },
     [](double x) { return cdf(x) + x * pdf(x); }, [](double x) { return cdf(x) + std::fabs(x) * pdf(x); }, 7, 60,
     1e-36, -1e30, 1e30},
    {"gelu_tanh", gelu_tanh, [](double x) { return x / (1 + std::exp(-2 * tanh_gelu_u(x))); }, nullptr, 200, 300, 1e-36,
     -1e12, kInf},
    {"gelu_tanh'", [](const Tensor& x) { return slope_of(UnaryKind::gelu_tanh, x); },
     [](double x) {
       const double c = std::fmax(-30.0, std::fmin(30.0, x)), s = logistic(2 * tanh_gelu_u(c));
       return s + c * s * logistic(-2 * tanh_gelu_u(c)) * 2 * std::sqrt(2 / 3.14159265358979323846) *
                      (1 + 3 * 0.044715 * c * c);
     },
     [](double x) {
       const double c = std::fmax(-30.0, std::fmin(30.0, x)), s = logistic(2 * tanh_gelu_u(c));
       return s + std::fabs(c) * s * logistic(-2 * tanh_gelu_u(c)) * 2 * std::sqrt(2 / 3.14159265358979323846) *
                      (1 + 3 * 0.044715 * c * c);
     },
     200, 300, 2e-35, -1e30, 1e30},
    {"sin", sin, std::sin, nullptr, 1, 1, 0, -1e30, 1e30},
    {"cos", cos, std::cos, nullptr, 1, 1, 0, -1e30, 1e30},
};

// Every 4,099th float: both signs, zeros, denormals, infinities; NaNs apart.
Tensor walk(double least, double most) {
  std::vector<float> values;
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += 4099) {
    const auto word = static_cast<std::uint32_t>(bits);
    float v;
    std::memcpy(&v, &word, 4);
    if (v >= least && v <= most) values.push_back(v);
  }
  for (const float v : {0.0f, -0.0f, 1.0f, -1.0f})
    if (v >= least && v <= most) values.push_back(v);
  return from_vector(values, {static_cast<std::int64_t>(values.size())});
}

float at(Tensor (*f)(const Tensor&), float x) {
  return static_cast<float>(f(from_vector(std::vector<float>{x}, {1})).item());
}

template <class F>
void on_every_isa(const F& f) {
  const IsaScope restore;
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    f(level);
  }
}

}  // namespace

TEST_CASE("f32 mathematics keeps its bounds over the whole range, on every instruction set") {
  for (const Function& f : kFunctions) {
    const Tensor x = walk(f.least, f.most);
    const std::int64_t n = x.numel();
    REQUIRE(n > 100000);
    std::vector<double> exact(static_cast<std::size_t>(n)), size(exact);
    for (std::int64_t i = 0; i < n; ++i) {
      const double v = x.data<float>()[i], read = std::fabs(v) < kNormal ? std::copysign(0.0, v) : v;
      const auto k = static_cast<std::size_t>(i);
      exact[k] = f.f(read);
      size[k] = f.size ? f.size(read) : exact[k];
    }
    on_every_isa([&](Isa level) {
      const Tensor y = f.run(x);
      const double ulps = level == Isa::v2 ? f.ulps_v2 : f.ulps;
      double worst = 0, where = 0;
      int broken = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        const auto k = static_cast<std::size_t>(i);
        const double got = y.data<float>()[i], want = exact[k];
        const auto nearest = static_cast<float>(want);
        if (got == static_cast<double>(nearest)) continue;  // infinities too
        const double error = std::fabs(got - want),
                     over = std::fmax(error - std::fmax(f.absolute, kNormal), 0.0) / ulp_of(size[k]);
        if (!(over <= ulps)) ++broken;
        if (!(over <= worst)) worst = over, where = x.data<float>()[i];
      }
      CHECK_MESSAGE(broken == 0, std::string(f.name)
                                     << " on " << to_string(level) << ": " << broken << " of " << n << " beyond "
                                     << ulps << " ulp, the worst by " << worst << " at " << where);
      MESSAGE(std::string(f.name) << " on " << to_string(level) << ": at most " << worst << " ulp, at " << where);
    });
  }
}

TEST_CASE("f32 mathematics: special values") {
  const auto nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  on_every_isa([&](Isa) {
    for (const Function& f : kFunctions) CHECK_MESSAGE(std::isnan(at(f.run, nan)), std::string(f.name));
    CHECK(at(exp, inf) == inf);
    CHECK(at(exp, -inf) == 0);
    CHECK(at(exp, 0) == 1);
    CHECK(at(exp, 88.75f) == inf);
    CHECK(at(exp, -104) == 0);
    CHECK(at(log, 0) == -inf);
    CHECK(at(log, 1) == 0);
    CHECK(at(log, inf) == inf);
    CHECK(std::isnan(at(log, -1)));
    for (const float s : {1.0f, -1.0f}) {
      CHECK(std::fabs(at(tanh, s * inf) - s) < 4e-7f);
      CHECK(at(erf, s * inf) == s);
      CHECK(std::signbit(at(tanh, s * 0.0f)) == (s < 0));
      CHECK(std::signbit(at(erf, s * 0.0f)) == (s < 0));
      CHECK(std::signbit(at(gelu, s * 0.0f)) == (s < 0));
    }
    CHECK(at(sigmoid, inf) == 1);
    CHECK(at(sigmoid, -inf) == 0);
    CHECK(at(gelu, inf) == inf);
    CHECK(at(silu, inf) == inf);
    CHECK(at(gelu, -1e30f) == 0);
    CHECK(at(silu, -1e30f) == 0);
    CHECK(at([](const Tensor& x) { return slope_of(UnaryKind::gelu, x); }, 1e30f) == 1);
    CHECK(at([](const Tensor& x) { return slope_of(UnaryKind::gelu, x); }, -1e30f) == 0);
    CHECK(at([](const Tensor& x) { return slope_of(UnaryKind::gelu_tanh, x); }, 1e30f) == 1);
    CHECK(at([](const Tensor& x) { return slope_of(UnaryKind::gelu_tanh, x); }, -1e30f) == 0);
  });
}

TEST_CASE("f32 mathematics: GELU of a value does not depend on the values beside it") {
  std::vector<float> mixed;  // near and far ones side by side
  for (double v = -5; v < 5; v += 0.0023)
    mixed.insert(mixed.end(), {static_cast<float>(v), static_cast<float>(-v), static_cast<float>(3 * v)});
  const std::int64_t n = static_cast<std::int64_t>(mixed.size());
  const Tensor x = from_vector(mixed, {n}), one = full({1}, 1);
  on_every_isa([&](Isa level) {
    const Tensor y = gelu(x), slope = slope_of(UnaryKind::gelu, x);
    int others = 0;
    for (std::int64_t i = 0; i < n; ++i) {  // alone, where y[i] had sixteen about it or was among the last
      const Tensor v = from_vector(std::vector<float>{x.data<float>()[i]}, {1});
      others += gelu(v).data<float>()[0] != y.data<float>()[i];
      others += unary_backward(UnaryKind::gelu, one, v, 0, 0).data<float>()[0] != slope.data<float>()[i];
    }
    CHECK_MESSAGE(others == 0, to_string(level));
  });
}

TEST_CASE("f32 mathematics: the exponential in softmax") {
  std::vector<float> pairs;
  for (double d = 0; d > -87.3; d -= 0.00037) pairs.insert(pairs.end(), {0.0f, static_cast<float>(d)});
  const std::int64_t n = static_cast<std::int64_t>(pairs.size()) / 2;
  const Tensor x = from_vector(pairs, {n, 2});
  on_every_isa([&](Isa level) {
    const Tensor y = softmax(x);
    double worst = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const double e = std::exp(static_cast<double>(x.data<float>()[2 * i + 1]));
      const double first = y.data<float>()[2 * i], second = y.data<float>()[2 * i + 1];
      worst = std::fmax(worst, std::fabs(second / first - e) / ulp_of(e));
    }
    CHECK_MESSAGE(worst <= 3, to_string(level) << ": " << worst);  // 1.5 of the exponential, the rest of two products
    MESSAGE("softmax on " << to_string(level) << ": at most " << worst << " ulp");
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const Tensor ends = softmax(from_vector(std::vector<float>{0, -inf, 88, 0, nan, 0}, {3, 2}));
    CHECK(ends.data<float>()[0] == 1);
    CHECK(ends.data<float>()[1] == 0);
    CHECK(ends.data<float>()[3] == 0);  // below 2^-126
    CHECK(std::isnan(ends.data<float>()[5]));
  });
}

TEST_CASE("f32 mathematics: bounded and monotone tails") {
  // From 0 outwards in steps of an eightieth, which no error of a few ulp can turn round.
  const auto steps = [](double from, double to) {
    std::vector<float> v;
    for (double x = from; x <= to; x += 0.0125) v.push_back(static_cast<float>(x));
    return from_vector(v, {static_cast<std::int64_t>(v.size())});
  };
  const auto rises = [](const Tensor& y) {
    int falls = 0;
    for (std::int64_t i = 1; i < y.numel(); ++i) falls += y.data<float>()[i] < y.data<float>()[i - 1];
    return falls == 0;
  };
  const auto within = [](const Tensor& y, float least, float most) {
    for (std::int64_t i = 0; i < y.numel(); ++i)
      if (!(y.data<float>()[i] >= least && y.data<float>()[i] <= most)) return false;
    return true;
  };
  on_every_isa([&](Isa) {
    const Tensor all = steps(-30, 30), left = steps(-30, -0.8), right = steps(0, 3);
    CHECK(rises(tanh(steps(-5, 5))));
    CHECK(rises(erf(steps(-3, 3))));
    CHECK(rises(sigmoid(steps(-30, 10))));
    CHECK(rises(exp(all)));
    CHECK(within(tanh(all), -1, 1));
    CHECK(within(erf(all), -1, 1));
    CHECK(within(sigmoid(all), 0, 1));
    CHECK(rises(gelu(right)));
    CHECK(rises(neg(gelu(left))));  // falls towards its least value at -0.75
    CHECK(within(gelu(left), -0.17f, 0));
    CHECK(within(gelu_tanh(left), -0.171f, 0));
  });
}
