#include <capo/ops/loss.h>
#include <capo/ops/unary.h>
#include <capo/tests/op_test.h>

#include <doctest/doctest.h>

#include <cmath>

namespace capo::test {
namespace {

using R = Reduction;
using Pointwise = double (*)(double x, double t, double p);

// Scalar loop and reduction over two tensors of one shape.
Tensor by_loop(const Tensor& x, const Tensor& t, Pointwise f, double p, R reduction) {
  const auto a = to_vector<double>(x), b = to_vector<double>(t);
  std::vector<double> y;
  double total = 0;
  for (std::size_t i = 0; i < a.size(); ++i) total += y.emplace_back(f(a[i], b[i], p));
  if (reduction == R::none) return values(y, x.shape());
  if (reduction == R::mean) total /= static_cast<double>(a.size());
  if (reduction == R::batchmean) total /= static_cast<double>(x.size(0));
  return values({total}, {});
}

Sample sample(const std::string& label, const Tensor& x, const Tensor& t,
              const std::function<Tensor(Tensor, Tensor)>& run, Pointwise f, R reduction, double p = 0) {
  Sample s;
  s.label = label;
  s.inputs = {x, t};
  s.run = [run](const Tensors& in) -> Tensors { return {run(in[0], in[1])}; };
  s.reference = [=](const Tensors& in) -> Tensors { return {by_loop(in[0], in[1], f, p, reduction)}; };
  s.second_order = true;
  return s;
}

double bce(double x, double t, double pos) {
  const auto softplus = [](double v) { return std::fmax(v, 0.0) + std::log1p(std::exp(-std::fabs(v))); };
  return pos * t * softplus(-x) + (1 - t) * softplus(x);
}
double squared(double x, double t, double) { return (x - t) * (x - t); }
double smooth(double x, double t, double beta) {
  const double d = std::fabs(x - t);
  return d < beta ? 0.5 * d * d / beta : d - 0.5 * beta;
}
double huber_of(double x, double t, double delta) {
  const double d = std::fabs(x - t);
  return d < delta ? 0.5 * d * d : delta * (d - 0.5 * delta);
}
double divergence(double x, double t, double) { return t > 0 ? t * (std::log(t) - x) : 0; }
double log_divergence(double x, double t, double) { return std::exp(t) * (t - x); }

// Errors that every loss shares.
std::vector<ErrorSample> errors_of(const std::function<void(Tensor, Tensor, R)>& run, bool batchmean = false) {
  const Tensor x = normal({2, 3}, "x");
  std::vector<ErrorSample> e = {
      {"shape", [=] { run(x, normal({3}, "t"), R::mean); }, "target must be [2, 3]"},
      {"mixed dtypes", [=] { run(x, cast(x, f32), R::mean); }, "mixed dtypes"},
      {"mixed devices", [=] { run(x, empty({2, 3}, f64, kMeta), R::mean); }, "target is on"},
      {"integers", [=] { run(integers({2}, "i", 0, 3), integers({2}, "i", 0, 3), R::mean); }, "floating"},
  };
  if (!batchmean) e.push_back({"batchmean", [=] { run(x, x, R::batchmean); }, "batchmean"});
  return e;
}

OpCase bce_case() {
  OpCase c{"bce_with_logits", {}, {}};
  const auto plain = [](R r) {
    return [r](const Tensor& x, const Tensor& t) { return bce_with_logits(x, t, {{}, {}, r}); };
  };
  c.samples = {
      sample("mean", normal({3, 5}, "a", 0, 3), uniform({3, 5}, "ta", 0, 1), plain(R::mean), bce, R::mean, 1),
      sample("sum", normal({2, 1, 4}, "b", 0, 3), uniform({2, 1, 4}, "tb", 0, 1), plain(R::sum), bce, R::sum, 1),
      sample("none, large logits", uniform({40}, "c", -60, 60), uniform({40}, "tc", 0, 1), plain(R::none), bce, R::none,
             1),
      sample("empty, sum", normal({0, 3}, "d"), normal({0, 3}, "d"), plain(R::sum), bce, R::sum, 1),
      sample("pos_weight", normal({3, 5}, "e", 0, 2), uniform({3, 5}, "te", 0, 1),
             [](const Tensor& x, const Tensor& t) {
               return bce_with_logits(x, t, {{}, full({5}, 2.5, x.dtype(), x.device())});
             },
             bce, R::mean, 2.5),
  };
  Sample weighted;
  weighted.label = "weight per row and pos_weight per class, all differentiated";
  weighted.inputs = {normal({3, 4}, "f"), uniform({3, 4}, "tf", 0, 1), uniform({3, 1}, "wf", 0.5, 2),
                     uniform({4}, "pf", 0.5, 2)};
  weighted.run = [](const Tensors& in) -> Tensors { return {bce_with_logits(in[0], in[1], {in[2], in[3], R::none})}; };
  weighted.reference = [](const Tensors& in) -> Tensors {
    const auto x = to_vector<double>(in[0]), t = to_vector<double>(in[1]), w = to_vector<double>(in[2]),
               p = to_vector<double>(in[3]);
    std::vector<double> y;
    for (std::size_t i = 0; i < x.size(); ++i) y.push_back(w[i / 4] * bce(x[i], t[i], p[i % 4]));
    return {values(y, {3, 4})};
  };
  weighted.second_order = true;
  c.samples.push_back(weighted);
  c.errors = errors_of([](const Tensor& x, const Tensor& t, R r) { bce_with_logits(x, t, {{}, {}, r}); });
  const Tensor x = normal({2, 3}, "x");
  c.errors.push_back({"weight", [=] { bce_with_logits(x, x, {normal({2}, "w"), {}}); }, "bce_with_logits: "});
  c.errors.push_back({"weight too large", [=] { bce_with_logits(x, x, {normal({4, 2, 3}, "w"), {}}); },
                      "must broadcast to x"});
  return c;
}

template <class F>
OpCase simple_case(const std::string& name, F f, Pointwise point, double p) {
  OpCase c{name, {}, {}};
  const auto with = [f](R r) { return [f, r](const Tensor& x, const Tensor& t) { return f(x, t, r); }; };
  c.samples = {
      sample("mean", normal({3, 5}, "a", 0, 2), normal({3, 5}, "ta"), with(R::mean), point, R::mean, p),
      sample("sum", normal({2, 1, 7}, "b", 0, 2), normal({2, 1, 7}, "tb"), with(R::sum), point, R::sum, p),
      sample("none", normal({41}, "c", 0, 2), normal({41}, "tc"), with(R::none), point, R::none, p),
      sample("scalar", normal({}, "d", 0, 2), normal({}, "td"), with(R::mean), point, R::mean, p),
      sample("empty, sum", normal({3, 0}, "e"), normal({3, 0}, "te"), with(R::sum), point, R::sum, p),
      sample("empty, mean: NaN", normal({0}, "e"), normal({0}, "te"), with(R::mean), point, R::mean, p),
      sample("many", normal({70, 333}, "f"), normal({70, 333}, "tf"), with(R::mean), point, R::mean, p),
  };
  c.samples[5].gradient = false;
  c.errors = errors_of([f](const Tensor& x, const Tensor& t, R r) { f(x, t, r); });
  return c;
}

OpCase kl_case() {
  OpCase c{"kl_div", {}, {}};
  const auto with = [](R r, bool log) {
    return [r, log](const Tensor& x, const Tensor& t) { return kl_div(x, t, r, log); };
  };
  const auto target = [](const Shape& s) { return uniform(s, cat("t", s), 0.05, 1); };
  c.samples = {
      sample("batchmean", normal({3, 5}, "a", -2), target({3, 5}), with(R::batchmean, false), divergence, R::batchmean),
      sample("mean", normal({2, 1, 7}, "b", -2), target({2, 1, 7}), with(R::mean, false), divergence, R::mean),
      sample("none", normal({41}, "c", -2), target({41}), with(R::none, false), divergence, R::none),
      sample("empty, sum", normal({0, 2}, "d"), normal({0, 2}, "d"), with(R::sum, false), divergence, R::sum),
      sample("log target", normal({3, 5}, "e", -2), normal({3, 5}, "te", -2), with(R::batchmean, true), log_divergence,
             R::batchmean),
  };
  Sample zero = sample("target with zeros", normal({2, 3}, "z"), values({0, 0.5, 0.5, 0, 0, 1}, {2, 3}),
                       with(R::batchmean, false), divergence, R::batchmean);
  zero.wanted = {true, false};  // log t has no finite slope at 0
  c.samples.push_back(zero);
  c.errors = errors_of([](const Tensor& x, const Tensor& t, R r) { kl_div(x, t, r); }, true);
  c.errors.push_back({"batchmean of a scalar", [] { kl_div(values({1}, {}), values({1}, {})); }, "first axis"});
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() {
  const auto smooth_case = [](double beta) {
    return simple_case(
        "smooth_l1", [beta](const Tensor& x, const Tensor& t, R r) { return smooth_l1(x, t, beta, r); }, smooth, beta);
  };
  OpCase l1 = smooth_case(1);
  for (double beta : {0.3, 0.0})
    for (const auto& s : smooth_case(beta).samples) {
      l1.samples.push_back(s);
      l1.samples.back().label += cat(", beta ", beta);
    }
  l1.errors.push_back({"beta", [] { smooth_l1(normal({2}, "x"), normal({2}, "t"), -1); }, "beta must be >= 0"});
  OpCase h = simple_case(
      "huber", [](const Tensor& x, const Tensor& t, R r) { return huber(x, t, 0.7, r); }, huber_of, 0.7);
  h.errors.push_back({"delta", [] { huber(normal({2}, "x"), normal({2}, "t"), 0); }, "delta must be > 0"});
  return {bce_case(),
          simple_case(
              "mse", [](const Tensor& x, const Tensor& t, R r) { return mse(x, t, r); }, squared, 0),
          l1, h, kl_case()};
}

TEST_CASE("kl_div: a class without probability on either side gives 0, with finite gradients") {
  using Values = std::vector<double>;
  const double inf = HUGE_VAL;
  const auto run = [](const Tensor& x, const Tensor& t, bool log_target) {
    set_requires_grad(x, true);
    set_requires_grad(t, true);
    const Tensor y = kl_div(x, t, R::none, log_target);
    const auto g = grad({y}, {x, t}, {ones({4}, f64)});
    return std::vector<Values>{to_vector<double>(y), to_vector<double>(g[0]), to_vector<double>(g[1])};
  };
  const auto plain = run(values({-inf, -2, -1, -inf}, {4}), values({0, 0, 1, 0.5}, {4}), false);
  CHECK(plain[0] == Values{0, 0, 1, inf});
  CHECK(plain[1] == Values{0, 0, -1, -0.5});
  CHECK(plain[2] == Values{0, 2, 2, inf});  // t = 0 beside a finite x: -x
  const auto log_target = run(values({-inf, -2, -1, -inf}, {4}), values({-inf, -inf, 0, 0}, {4}), true);
  CHECK(log_target[0] == Values{0, 0, 1, inf});
  CHECK(log_target[1] == Values{0, 0, -1, -1});
  CHECK(log_target[2] == Values{0, 0, 2, inf});
}

}  // namespace capo::test
