// References: f64 loops over the set that falls into each result; some values from PyTorch 2.x where marked.
#include <capo/tests/op_test.h>

#include <capo/engine/backend.h>
#include <capo/ops/stats.h>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace capo::test {
namespace {

const double kInf = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();

// f of the values that fall into each result, in row-major order of the kept axes. axes: not negative.
template <class F>
Tensor by_set(const Tensor& x, const Dims& axes, bool keepdim, F f) {
  bool gone[kMaxDims] = {};
  for (auto a : axes) gone[a] = true;
  Shape ones, kept;
  for (int i = 0; i < x.rank(); ++i) {
    gone[i] |= axes.empty();
    ones.push_back(gone[i] ? 1 : x.shape()[i]);
    if (!gone[i]) kept.push_back(x.shape()[i]);
  }
  std::vector<std::vector<double>> sets(static_cast<std::size_t>(numel(ones)));
  const auto v = to_vector<double>(x);
  for (std::size_t k = 0; k < v.size(); ++k) {
    std::int64_t rest = static_cast<std::int64_t>(k), to = 0, step = 1;
    for (int i = x.rank() - 1; i >= 0; --i) {
      if (!gone[i]) {
        to += rest % x.shape()[i] * step;
        step *= x.shape()[i];
      }
      rest /= x.shape()[i];
    }
    sets[static_cast<std::size_t>(to)].push_back(v[k]);
  }
  std::vector<double> out;
  for (const auto& s : sets) out.push_back(f(s));
  return values(out, keepdim ? ones : kept);
}

using Set = std::vector<double>;
double max_of(const Set& s) {
  double m = -kInf;
  for (double v : s) m = std::isnan(v) || std::isnan(m) ? kNan : std::fmax(m, v);
  return m;
}
double min_of(const Set& s) {
  double m = kInf;
  for (double v : s) m = std::isnan(v) || std::isnan(m) ? kNan : std::fmin(m, v);
  return m;
}
double var_of(const Set& s, double correction) {
  double mean = 0, sum = 0;
  for (double v : s) mean += v / static_cast<double>(s.size());
  for (double v : s) sum += (v - mean) * (v - mean);
  return sum / (static_cast<double>(s.size()) - correction);
}
double logsumexp_of(const Set& s) {
  const double m = s.empty() || std::isinf(max_of(s)) ? 0 : max_of(s);
  double sum = 0;
  for (double v : s) sum += std::exp(v - m);
  return std::log(sum) + m;
}
double norm_of(const Set& s, double p) {
  double sum = 0;
  for (double v : s) sum = p == 1 ? sum + std::fabs(v) : p == 2 ? sum + v * v : std::fmax(sum, std::fabs(v));
  return p == 2 ? std::sqrt(sum) : sum;
}

struct Where {
  Dims given, axes;
  bool keepdim;
};

template <class Run, class F>
Sample sample(const std::string& label, const Tensor& x, const Where& w, Run run, F f) {
  Sample s{label,
           {x},
           [=](const Tensors& t) { return Tensors{run(t[0], w.given, w.keepdim)}; },
           [=](const Tensors& t) { return Tensors{by_set(t[0], w.axes, w.keepdim, f)}; }};
  s.second_order = true;
  return s;
}

template <class Run, class F>
std::vector<Sample> common(Run run, F f) {
  return {
      sample("last axis", normal({5, 7}, "a"), {{-1}, {1}, false}, run, f),
      sample("outer axes, keepdim", normal({3, 5, 66}, "a"), {{0, 1}, {0, 1}, true}, run, f),
      sample("outer and inner", normal({3, 4, 5}, "a"), {{0, -1}, {0, 2}, false}, run, f),
      sample("all", normal({4, 3, 2}, "a"), {{}, {}, false}, run, f),
      sample("shifted mean", normal({2, 300}, "a", 30), {{1}, {1}, false}, run, f),
      sample("no result", normal({0, 3}, "a"), {{1}, {1}, true}, run, f),
  };
}

OpCase extreme_case(bool largest) {
  const auto run = [=](const Tensor& x, const Dims& a, bool k) { return largest ? max(x, a, k) : min(x, a, k); };
  const auto f = [=](const Set& s) { return largest ? max_of(s) : min_of(s); };
  OpCase c{largest ? "max" : "min", common(run, f), {}};
  c.samples.push_back(sample("size 1", normal({3, 1}, "a"), {{1}, {1}, false}, run, f));
  for (const std::int64_t n : {1031, 2064})
    c.samples.push_back(sample(cat("rows of ", n), normal({2, n}, "a"), {{1}, {1}, false}, run, f));
  for (const std::int64_t n : {40, 41})
    for (const DType t : {i32, i64})
      for (const int axis : {0, 1})
        c.samples.push_back(sample(cat(t, " rows of ", n, " over ", axis), cast(integers({3, n}, "i", -99, 99), t),
                                   {{axis}, {axis}, false}, run, f));
  c.samples.push_back(
      sample("NaN and infinities", values({1, kNan, 3, kInf, 5, -kInf}, {3, 2}), {{1}, {1}, false}, run, f));
  c.samples.back().gradient = false;
  if (largest)
    c.errors = {{"empty set",
                 [] {
                   max(normal({3, 0}, "a"), {1});
                 },
                 "not be empty"},
                {"axis", [] { max(normal({3}, "a"), {1}); }, "axis"},
                {"twice",
                 [] {
                   max(normal({3, 2}, "a"), {1, -1});
                 },
                 "twice"}};
  else
    c.errors = {{"empty set",
                 [] {
                   min(normal({3, 0}, "a"), {1});
                 },
                 "not be empty"},
                {"axis", [] { min(normal({3}, "a"), {1}); }, "axis"},
                {"bool", [] { min(cast(normal({3}, "a"), boolean)); }, "needs"}};
  return c;
}

OpCase var_case() {
  const auto run = [](const Tensor& x, const Dims& a, bool k) { return var(x, a, k); };
  const auto f = [](const Set& s) { return var_of(s, 1); };
  OpCase c{"var", common(run, f), {}};
  c.samples.push_back(sample(
      "biased", normal({4, 9}, "a"), {{0}, {0}, false},
      [](const Tensor& x, const Dims& a, bool k) { return var(x, a, k, 0); },
      [](const Set& s) { return var_of(s, 0); }));
  // One pass would lose every digit here in f32.
  c.samples.push_back(
      sample("mean 10,000", values({10000, 10001, 10002, 9999, 9998, 10000}, {6}), {{}, {}, false}, run, f));
  c.samples.back().grad_tol = 1e-5;
  c.samples.push_back(
      sample("one value", normal({3, 1}, "a"), {{1}, {1}, false}, run, [](const Set&) { return kNan; }));
  c.samples.back().gradient = false;
  c.errors = {{"dtype", [] { var(integers({3}, "a", 0, 5)); }, "floating"},
              {"axis", [] { var(normal({3}, "a"), {2}); }, "axis"},
              {"twice",
               [] {
                 var(normal({3, 2}, "a"), {0, -2});
               },
               "twice"}};
  return c;
}

OpCase logsumexp_case() {
  const auto run = [](const Tensor& x, const Dims& a, bool k) { return logsumexp(x, a, k); };
  OpCase c{"logsumexp", common(run, logsumexp_of), {}};
  c.samples.push_back(
      sample("huge and tiny", values({1000, 1001, -1000, -1001}, {2, 2}), {{1}, {1}, false}, run, logsumexp_of));
  c.samples.push_back(sample("one -inf", values({-kInf, 1, 2}, {3}), {{}, {}, false}, run, logsumexp_of));
  c.samples.back().gradient = false;
  c.samples.push_back(sample("all -inf, +inf, NaN", values({-kInf, -kInf, kInf, 1, kNan, 2}, {3, 2}), {{1}, {1}, false},
                             run, [](const Set& s) {
                               return std::isnan(s[0]) ? kNan : std::isinf(s[0]) ? s[0] : logsumexp_of(s);
                             }));
  c.samples.back().gradient = false;
  c.samples.push_back(
      sample("empty set", normal({2, 0}, "a"), {{1}, {1}, false}, run, [](const Set&) { return -kInf; }));
  c.samples.back().gradient = false;
  c.errors = {{"dtype", [] { logsumexp(integers({3}, "a", 0, 5)); }, "floating"},
              {"axis", [] { logsumexp(normal({3}, "a"), {-2}); }, "axis"}};
  return c;
}

OpCase norm_case() {
  OpCase c{"norm", {}, {}};
  for (double p : {1.0, 2.0, kInf}) {
    auto more = common([p](const Tensor& x, const Dims& a, bool k) { return norm(x, p, a, k); },
                       [p](const Set& s) { return norm_of(s, p); });
    for (auto& s : more) {
      s.label += p == 1 ? ", p = 1" : p == 2 ? ", p = 2" : ", p = infinity";
      c.samples.push_back(s);
    }
  }
  c.errors = {{"p", [] { norm(normal({3}, "a"), 3); }, "p must be"},
              {"dtype", [] { norm(integers({3}, "a", 0, 5)); }, "floating"},
              {"empty set",
               [] {
                 norm(normal({3, 0}, "a"), kInf, {1});
               },
               "not be empty"}};
  return c;
}

OpCase cumsum_case() {
  const auto one = [](const std::string& label, const Tensor& x, int axis, std::int64_t given, bool reverse) {
    Sample s{label,
             {x},
             [=](const Tensors& t) { return Tensors{cumsum(t[0], given, reverse)}; },
             [=](const Tensors& t) {
               auto v = to_vector<double>(t[0]);
               std::int64_t inner = 1;
               for (int i = axis + 1; i < t[0].rank(); ++i) inner *= t[0].shape()[i];
               const std::int64_t n = t[0].shape()[axis], total = t[0].numel();
               for (std::int64_t k = 0; k < total; ++k) {
                 const std::int64_t i = reverse ? total - 1 - k : k, place = i / inner % n;
                 if (!reverse && place > 0) v[static_cast<std::size_t>(i)] += v[static_cast<std::size_t>(i - inner)];
                 if (reverse && place < n - 1) v[static_cast<std::size_t>(i)] += v[static_cast<std::size_t>(i + inner)];
               }
               return Tensors{values(v, t[0].shape())};
             }};
    s.second_order = true;
    return s;
  };
  OpCase c{"cumsum", {}, {}};
  c.samples = {one("last axis", normal({3, 50}, "a"), 1, -1, false),
               one("middle axis, wide", normal({2, 5, 67}, "a", 3), 1, 1, false),
               one("reversed", normal({4, 3}, "a"), 0, 0, true),
               one("size 1", normal({1, 3}, "a"), 0, 0, false),
               one("empty", normal({3, 0}, "a"), 1, 1, false),
               one("long, shifted mean", normal({5000}, "a", 100), 0, 0, false)};
  c.samples.back().gradient = false;  // differences of sums near 250,000 say little
  for (const int axis : {0, 1})
    for (const DType t : {i32, i64})
      c.samples.push_back(one(cat(t, " over ", axis), cast(integers({3, 40}, "i", -99, 99), t), axis, axis, false));
  c.samples.push_back(one("a line of i64", integers({1100}, "i", -99, 99), 0, 0, false));
  c.samples.push_back(one("a line of i32", cast(integers({1100}, "i", -99, 99), i32), 0, 0, false));
  c.errors = {{"axis", [] { cumsum(normal({3}, "a"), 1); }, "axis"},
              {"dtype", [] { cumsum(cast(normal({3}, "a"), boolean), 0); }, "needs"}};
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() {
  return {extreme_case(true), extreme_case(false), var_case(), logsumexp_case(), norm_case(), cumsum_case()};
}

// Where finite differences say nothing. PyTorch 2.x gives the same, but NaN for logsumexp.
TEST_CASE("integer running sums wrap around") {
  for (int d = 0; d <= (device_count() > 0); ++d) {
    const Device device = d ? Device{DeviceType::cuda, 0} : kCpu;
    const Tensor x = to(from_vector<std::int64_t>({INT64_MAX, 1, 1, -1, -2, INT64_MIN}, {6}), device);
    CHECK(to_vector<std::int64_t>(cumsum(x, 0)) ==
          std::vector<std::int64_t>{INT64_MAX, INT64_MIN, INT64_MIN + 1, INT64_MIN, INT64_MAX - 1, -2});
    CHECK(to_vector<std::int64_t>(cumsum(full({3, 40}, INT32_MAX, i32, device), 0))[119] == INT32_MAX - 2);
  }
}

TEST_CASE("stats: gradients at ties, zeros and infinities") {
  const auto gradient = [](const std::vector<double>& x, const auto& f) {
    const Tensor leaf = values(x, {static_cast<std::int64_t>(x.size())});
    set_requires_grad(leaf, true);
    return to_vector<double>(grad({f(leaf)}, {leaf})[0]);
  };
  using V = std::vector<double>;
  CHECK(gradient({2, 5, 5, 1}, [](const Tensor& x) { return max(x); }) == V{0, 0.5, 0.5, 0});
  CHECK(gradient({1, 5, 5, 1}, [](const Tensor& x) { return min(x); }) == V{0.5, 0, 0, 0.5});
  CHECK(gradient({0, 0}, [](const Tensor& x) { return norm(x); }) == V{0, 0});
  CHECK(gradient({3, -4, 4}, [](const Tensor& x) { return norm(x, kInf); }) == V{0, -0.5, 0.5});
  CHECK(gradient({-kInf, -kInf}, [](const Tensor& x) { return logsumexp(x); }) == V{0, 0});
}

}  // namespace capo::test
