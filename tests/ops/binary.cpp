// Samples of the elementwise functions of two tensors. References are scalar f64 loops over broadcast indices.
#include <capo/ops/binary.h>

#include <capo/autograd/autograd.h>
#include <capo/engine/backend.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <type_traits>

namespace capo::test {
namespace {

const double kInf = HUGE_VAL, kNan = std::nan("");

// The elements of x broadcast to shape, by index arithmetic.
std::vector<double> broadcast(const Tensor& x, const Shape& shape) {
  const auto v = to_vector<double>(x);
  const Dims strides = contiguous_strides(x.shape());
  const int lead = shape.size() - x.rank();
  std::vector<double> out;
  for (std::int64_t k = 0; k < numel(shape); ++k) {
    std::int64_t rest = k, at = 0;
    for (int i = shape.size() - 1; i >= 0; --i) {
      const std::int64_t index = rest % shape[i];
      rest /= shape[i];
      if (i >= lead && x.size(i - lead) != 1) at += index * strides[i - lead];
    }
    out.push_back(v[static_cast<std::size_t>(at)]);
  }
  return out;
}

template <class F>
Tensor mapped(const Tensor& a, const Tensor& b, const F& f) {
  const Shape shape = broadcast_shapes("reference", a.shape(), b.shape());
  auto x = broadcast(a, shape);
  const auto y = broadcast(b, shape);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = f(x[i], y[i]);
  return from_vector<double>(x, shape);
}

Tensor make_bool(const Tensor& t) {
  const auto v = to_vector<double>(t);
  const Tensor y = empty(t.shape(), boolean);
  for (std::size_t i = 0; i < v.size(); ++i) y.data<bool>()[i] = v[i] != 0;
  return y;
}

struct Pair {
  Shape a, b;
};
const Pair kPairs[] = {{{2, 3, 5}, {2, 3, 5}}, {{3, 5}, {5}},          {{4, 1}, {1, 5}}, {{}, {2, 3}},        {{7}, {}},
                       {{2, 3, 5}, {3, 1}},    {{1, 3, 1}, {2, 1, 4}}, {{0, 3}, {1, 3}}, {{2, 8209}, {8209}}, {{}, {}},
                       {{6, 16}, {16}},        {{3, 1, 16}, {4, 16}},  {{3, 4, 16}, {3, 4, 1}}};

using Op = Tensor (*)(const Tensor&, const Tensor&);
using Scalar = double (*)(double, double);

Sample sample(const std::string& label, const Tensor& a, const Tensor& b, Op op, Scalar f) {
  Sample s{label, {a, b}, [op](const Tensors& in) { return Tensors{op(in[0], in[1])}; },
           [f](const Tensors& in) { return Tensors{mapped(in[0], in[1], f)}; }};
  s.second_order = true;
  s.tol = 1e-15;
  s.tol_f32 = 1e-6;
  return s;
}

std::vector<ErrorSample> pair_errors(Op op) {
  return {{"shapes", [op] { op(ones({2, 3}), ones({2})); }, "shapes must broadcast, got [2, 3] and [2]"},
          {"dtypes", [op] { op(ones({2}), ones({2}, f64)); }, "dtypes must be equal"},
          {"devices", [op] { op(ones({2}), ones({2}, f32, kMeta)); }, "devices must be equal"},
          {"bytes", [op] { op(ones({2}, u8), ones({2}, u8)); }, "got u8"}};
}

// i32 and i64, in whole packs and not.
void add_integers(OpCase& c, Op op, Scalar f) {
  for (const Shape& shape : {Shape{3, 4}, Shape{3, 5}}) {
    const Tensor a = integers(shape, "a", -9, 9), b = integers({shape[1]}, "b", -9, 9);
    c.samples.push_back(sample(cat("i64 ", shape), a, b, op, f));
    c.samples.push_back(sample(cat("i32 ", shape), cast(a, i32), cast(b, i32), op, f));
  }
}

// Both operands are kept `gap` apart, so that no difference crosses a tie.
OpCase arithmetic(const std::string& name, Op op, Scalar f, bool integers_too, double gap = 0) {
  OpCase c{name, {}, pair_errors(op)};
  for (const auto& [a, b] : kPairs) {
    const Tensor x = normal(a, name + "a");
    Tensor y = name == "div" ? uniform(b, name + "b", 0.5, 2) : normal(b, name + "b", 0.3);
    if (gap > 0) {  // multiples of `gap` on one side, halves in between on the other
      auto u = to_vector<double>(x), v = to_vector<double>(y);
      for (auto& e : u) e = std::round(e / gap) * gap;
      for (auto& e : v) e = (std::round(e / gap) + 0.5) * gap;
      c.samples.push_back(sample(cat(a, " and ", b), from_vector<double>(u, a), from_vector<double>(v, b), op, f));
    } else {
      c.samples.push_back(sample(cat(a, " and ", b), x, y, op, f));
    }
  }
  if (integers_too) add_integers(c, op, f);
  c.samples.push_back(sample("special values", values({0.0, -0.0, kInf, -kInf, kNan, 1}, {6, 1}),
                             values({0.0, -0.0, kInf, -kInf, kNan, 1}, {6}), op, f));
  c.samples.back().gradient = false;
  return c;
}

OpCase comparison(const std::string& name, Op op, Scalar f) {
  OpCase c{name, {}, pair_errors(op)};
  for (const auto& [a, b] : kPairs) {
    auto u = to_vector<double>(normal(a, "a")), v = to_vector<double>(normal(b, "b"));
    for (auto* list : {&u, &v})
      for (auto& e : *list) e = std::round(2 * e) / 2;  // many ties
    c.samples.push_back(sample(cat(a, " and ", b), from_vector<double>(u, a), from_vector<double>(v, b), op, f));
  }
  add_integers(c, op, f);
  c.samples.push_back(sample("special values", values({0.0, -0.0, kInf, -kInf, kNan, 1}, {6, 1}),
                             values({0.0, -0.0, kInf, -kInf, kNan, 1}, {6}), op, f));
  for (auto& s : c.samples) s.gradient = false;
  return c;
}

OpCase logic(const std::string& name, Op op, Scalar f) {
  OpCase c{name, {}, {}};
  for (const auto& [a, b] : kPairs)
    c.samples.push_back(
        sample(cat(a, " and ", b), make_bool(integers(a, "a", 0, 2)), make_bool(integers(b, "b", 0, 2)), op, f));
  for (auto& s : c.samples) s.gradient = false;
  const Tensor yes = full({2}, 1, boolean);
  c.errors = {{"numbers", [op] { op(ones({2}), ones({2})); }, "needs bool tensors, got f32"},
              {"shapes", [op, yes] { op(yes, full({3}, 1, boolean)); }, "shapes must broadcast"}};
  return c;
}

OpCase where_case() {
  OpCase c{"where", {}, {}};
  struct Three {
    Shape condition, a, b;
  };
  for (const auto& [k, a, b] : {Three{{2, 3, 5}, {2, 3, 5}, {2, 3, 5}}, Three{{3, 1}, {5}, {}}, Three{{}, {2, 3}, {3}},
                                Three{{4}, {}, {}}, Three{{0, 3}, {3}, {1}}, Three{{2, 8209}, {2, 1}, {8209}}}) {
    Sample s{cat(k, " ? ", a, " : ", b), {make_bool(integers(k, "condition", 0, 2)), normal(a, "a"), normal(b, "b")},
             [](const Tensors& in) { return Tensors{where(in[0], in[1], in[2])}; },
             [](const Tensors& in) {
               const Shape shape = broadcast_shapes(
                   "reference", broadcast_shapes("reference", in[0].shape(), in[1].shape()), in[2].shape());
               const auto m = broadcast(in[0], shape);
               auto x = broadcast(in[1], shape);
               const auto y = broadcast(in[2], shape);
               for (std::size_t i = 0; i < x.size(); ++i) x[i] = m[i] != 0 ? x[i] : y[i];
               return Tensors{from_vector<double>(x, shape)};
             }};
    s.second_order = true;
    s.tol = 0;
    s.tol_f32 = 1e-7;
    c.samples.push_back(s);
  }
  const Tensor yes = full({2}, 1, boolean);
  c.errors = {{"condition", [] { where(ones({2}), ones({2}), ones({2})); }, "condition must be bool"},
              {"dtypes", [yes] { where(yes, ones({2}), ones({2}, f64)); }, "must have one dtype"},
              {"devices", [yes] { where(yes, ones({2}), ones({2}, f32, kMeta)); }, "devices must be equal"},
              {"shapes", [yes] { where(yes, ones({3}), ones({3})); }, "shapes must broadcast"}};
  return c;
}

OpCase sum_to_case() {
  OpCase c{"sum_to", {}, {}};
  for (const auto& [from, to] :
       {Pair{{2, 3, 5}, {3, 1}}, Pair{{2, 3, 5}, {2, 3, 5}}, Pair{{2, 3}, {}}, Pair{{4, 3}, {3}}, Pair{{4, 3}, {1, 3}},
        Pair{{1, 3}, {3}}, Pair{{0, 3}, {3}}, Pair{{3, 0}, {3, 1}}, Pair{{601, 70}, {70}}}) {
    const Shape shape = to;
    Sample s{cat(from, " to ", to),
             {normal(from, "sum_to")},
             [shape](const Tensors& in) { return Tensors{sum_to(in[0], shape)}; },
             [shape](const Tensors& in) {
               std::vector<double> where_to;  // which element of the result each element of x belongs to
               for (std::int64_t i = 0; i < numel(shape); ++i) where_to.push_back(static_cast<double>(i));
               const auto at = broadcast(from_vector<double>(where_to, shape), in[0].shape());
               const auto x = to_vector<double>(in[0]);
               std::vector<double> y(where_to.size(), 0.0);
               for (std::size_t i = 0; i < x.size(); ++i) y[static_cast<std::size_t>(at[i])] += x[i];
               return Tensors{from_vector<double>(y, shape)};
             }};
    s.second_order = true;
    c.samples.push_back(s);
  }
  c.errors = {{"more axes", [] { sum_to(ones({3}), {2, 3}); }, "has more axes than [3]"},
              {"other size", [] { sum_to(ones({2, 3}), {2, 4}); }, "[2, 3] does not come from broadcasting [2, 4]"},
              {"other size beside a sum", [] { sum_to(ones({5, 2, 3}), {2, 2}); }, "does not come from broadcasting"}};
  return c;
}

OpCase add_in_place_case() {
  OpCase c{"add_", {}, {}};
  for (const Shape& shape : {Shape{2, 3, 5}, Shape{}, Shape{0, 4}, Shape{33, 501}}) {
    Sample s{to_string(shape), {normal(shape, "a"), normal(shape, "b")},
             [](const Tensors& in) {
               const Tensor a = clone(in[0]);
               add_(a, in[1], -0.3);
               return Tensors{a};
             },
             [](const Tensors& in) {
               return Tensors{mapped(in[0], in[1], [](double x, double y) { return x - 0.3 * y; })};
             }};
    s.gradient = s.half = false;
    c.samples.push_back(s);
  }
  c.errors = {{"shapes", [] { add_(ones({2}), ones({3})); }, "tensors must be alike"},
              {"dtypes", [] { add_(ones({2}), ones({2}, f64)); }, "tensors must be alike"},
              {"devices", [] { add_(ones({2}), ones({2}, f32, kMeta)); }, "tensors must be alike"},
              {"strided", [] { add_(transpose(ones({2, 3}), 0, 1), ones({3, 2})); }, "must be contiguous"},
              {"half", [] { add_(ones({2}, bf16), ones({2}, bf16)); }, "needs f32 or f64"},
              {"shifted onto itself",
               [] {
                 const Tensor x = ones({5});
                 add_(slice(x, 0, 0, 4), slice(x, 0, 1, 5));
               },
               "must not overlap in memory"},
              {"trainable leaf",
               [] {
                 const Tensor w = ones({2});
                 set_requires_grad(w, true);
                 add_(w, ones({2}));
               },
               "needs a NoGrad scope"}};
  return c;
}

OpCase mul_in_place_case() {
  OpCase c{"mul_", {}, {}};
  for (const Shape& shape : {Shape{2, 3, 5}, Shape{}, Shape{0, 4}, Shape{33, 501}}) {
    Sample s{to_string(shape), {normal(shape, "a")},
             [](const Tensors& in) {
               const Tensor a = clone(in[0]);
               mul_(a, -1.7);
               return Tensors{a};
             },
             [](const Tensors& in) {
               return Tensors{mapped(in[0], in[0], [](double x, double) { return -1.7 * x; })};
             }};
    s.gradient = s.half = false;
    c.samples.push_back(s);
  }
  c.errors = {{"strided", [] { mul_(transpose(ones({2, 3}), 0, 1), 2); }, "must be contiguous"},
              {"integers", [] { mul_(ones({2}, i64), 2); }, "needs f32 or f64"}};
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() {
  const auto max = [](double a, double b) { return std::isnan(a) || std::isnan(b) ? kNan : a < b ? b : a; };
  const auto min = [](double a, double b) { return std::isnan(a) || std::isnan(b) ? kNan : b < a ? b : a; };
  return {arithmetic("add", add, [](double a, double b) { return a + b; }, true),
          arithmetic("sub", sub, [](double a, double b) { return a - b; }, true),
          arithmetic("mul", mul, [](double a, double b) { return a * b; }, true),
          arithmetic("div", div, [](double a, double b) { return a / b; }, false),
          arithmetic("maximum", maximum, max, true, 0.25),
          arithmetic("minimum", minimum, min, true, 0.25),
          comparison("equal", equal, [](double a, double b) { return double(a == b); }),
          comparison("not_equal", not_equal, [](double a, double b) { return double(a != b); }),
          comparison("less", less, [](double a, double b) { return double(a < b); }),
          comparison("less_equal", less_equal, [](double a, double b) { return double(a <= b); }),
          comparison("greater", greater, [](double a, double b) { return double(a > b); }),
          comparison("greater_equal", greater_equal, [](double a, double b) { return double(a >= b); }),
          logic("logical_and", logical_and, [](double a, double b) { return double(a != 0 && b != 0); }),
          logic("logical_or", logical_or, [](double a, double b) { return double(a != 0 || b != 0); }),
          where_case(), sum_to_case(), add_in_place_case(), mul_in_place_case()};
}

TEST_CASE("operators with numbers") {
  const Tensor x = values({-1.5, 0.5, 2}, {3});
  const auto is = [](const Tensor& t, const std::vector<double>& v) { return to_vector<double>(t) == v; };
  CHECK(is(x + 1, {-0.5, 1.5, 3}));
  CHECK(is(1 + x, {-0.5, 1.5, 3}));
  CHECK(is(x - 1, {-2.5, -0.5, 1}));
  CHECK(is(1 - x, {2.5, 0.5, -1}));
  CHECK(is(x * -2, {3, -1, -4}));
  CHECK(is(-2 * x, {3, -1, -4}));
  CHECK(is(x / 2, {-0.75, 0.25, 1}));
  CHECK(is(-x, {1.5, -0.5, -2}));
  CHECK(is(greater(x, 0.5), {0, 0, 1}));
  CHECK(is(greater_equal(x, 0.5), {0, 1, 1}));
  CHECK(is(less(x, 0.5), {1, 0, 0}));
  CHECK(is(less_equal(x, 0.5), {1, 1, 0}));
  const Tensor n = from_vector<std::int64_t>({3, -4}, {2});
  CHECK(is(n + 2, {5, -2}));
  CHECK(is(n - 2, {1, -6}));
  CHECK(is(2 - n, {-1, 6}));
  CHECK(is(n * 3, {9, -12}));
  CHECK((n + 2).dtype() == i64);
  CHECK_THROWS_WITH_AS(n * 0.5, "scalar: beside a tensor of i64 it must be whole, got 0.5", Error);
  CHECK_THROWS_AS(less(n, -0.5), Error);
}

TEST_CASE("integer sums, differences and products wrap around") {
  const auto check = [](auto first, Device device) {
    using T = decltype(first);
    using U = std::make_unsigned_t<T>;
    const T low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
    const std::vector<T> ends = {low, low + 1, -1, 0, 1, high - 1, high};
    std::vector<T> a, b, sums, differences, products;
    for (const T x : ends)
      for (const T y : ends) {
        a.push_back(x), b.push_back(y);
        sums.push_back(static_cast<T>(static_cast<U>(x) + static_cast<U>(y)));
        differences.push_back(static_cast<T>(static_cast<U>(x) - static_cast<U>(y)));
        products.push_back(static_cast<T>(static_cast<U>(x) * static_cast<U>(y)));
      }
    const Tensor x = to(from_vector<T>(a, {7, 7}), device), y = to(from_vector<T>(b, {7, 7}), device);
    CHECK(to_vector<T>(x + y) == sums);
    CHECK(to_vector<T>(x - y) == differences);
    CHECK(to_vector<T>(x * y) == products);
    CHECK(to_vector<T>(x + select(y, 0, 0)) == sums);  // broadcast: another loop
    CHECK(to_vector<T>(sum_to(y, {7}))[0] == static_cast<T>(static_cast<U>(low) * 7));
    CHECK(to_vector<T>(select(y, 0, 0) + 1)[6] == low);
  };
  for (int d = 0; d <= (device_count() > 0); ++d) {
    const Device device = d ? Device{DeviceType::cuda, 0} : kCpu;
    check(std::int32_t{}, device);
    check(std::int64_t{}, device);
  }
  CHECK_THROWS_WITH_AS(zeros({2}, i32) + 3e9, "scalar: beside a tensor of i32 it must be in i32, got 3e+09", Error);
  CHECK_THROWS_WITH_AS(less(zeros({2}, i64), 1e300), "scalar: beside a tensor of i64 it must be in i64, got 1e+300",
                       Error);
  CHECK_THROWS_AS(zeros({2}, i64) * kInf, Error);
}

TEST_CASE("where moves every dtype as it is, in one pass") {
  const Tensor yes = make_bool(from_vector<std::int64_t>({1, 0, 1, 0, 0, 1}, {2, 3}));
  const auto all = Dims{2, 3};
  for (const DType t : {f32, f64, bf16, f16, i32, i64, u8, i8, boolean}) {
    const Tensor a = full(all, 1, t), b = full({3}, 0, t);
    const Tensor y = where(yes, a, b);
    CHECK(y.dtype() == t);
    CHECK(to_vector<double>(y) == std::vector<double>{1, 0, 1, 0, 0, 1});
    CHECK(to_vector<double>(where(transpose(yes, 0, 1), b.dtype() == t ? full({1}, 1, t) : b, full({}, 0, t))) ==
          std::vector<double>{1, 0, 0, 0, 1, 1});
  }
  struct Seen {
    int n = 0;
    static void hook(const char*, const Tensor&, void* user) { ++static_cast<Seen*>(user)->n; }
  } seen;
  const OpObserver observer(Seen::hook, &seen);
  where(yes, ones({3}), zeros({2, 1}));
  CHECK(seen.n == 1);  // no expand, no copies
}

TEST_CASE("an OpObserver sees comparisons") {
  struct Seen {
    std::string text;
    static void hook(const char* op, const Tensor&, void* user) { static_cast<Seen*>(user)->text += cat(op, " "); }
  } seen;
  const Tensor x = ones({2});
  set_requires_grad(x, true);
  const OpObserver observer(Seen::hook, &seen);
  const Tensor positive = greater(x, 0.0);
  logical_and(positive, equal(x, x));
  CHECK(seen.text == "greater equal logical_and ");
}

TEST_CASE("add_ within one storage: onto itself, its transpose, its other half") {
  const Tensor x = values({1, 2, 3, 4}, {2, 2});
  add_(x, x);
  CHECK(to_vector<double>(x) == std::vector<double>{2, 4, 6, 8});
  add_(x, transpose(x, 0, 1));
  CHECK(to_vector<double>(x) == std::vector<double>{4, 10, 10, 16});
  add_(slice(x, 0, 0, 1), slice(x, 0, 1, 2));
  CHECK(to_vector<double>(x) == std::vector<double>{14, 26, 10, 16});
}

TEST_CASE("ties give the gradient to the first operand") {
  const Tensor a = values({1, 2}, {2}), b = values({1, 3}, {2});
  set_requires_grad(a, true);
  set_requires_grad(b, true);
  for (auto* op : {&maximum, &minimum}) {
    const auto g = grad({(*op)(a, b)}, {a, b}, {ones({2}, f64)});
    CHECK(to_vector<double>(g[0])[0] == 1);
    CHECK(to_vector<double>(g[1])[0] == 0);
  }
}

TEST_CASE("maximum and minimum: a NaN is the value and takes the gradient") {
  const Tensor a = values({kNan, 1, kNan, kNan, 2}, {5}), b = values({1, kNan, -1, kNan, 3}, {5});
  set_requires_grad(a, true);
  set_requires_grad(b, true);
  for (const bool max : {true, false}) {
    const auto g = grad({max ? maximum(a, b) : minimum(a, b)}, {a, b}, {ones({5}, f64)});
    CHECK(to_vector<double>(g[0]) == std::vector<double>{1, 0, 1, 1, max ? 0.0 : 1.0});
    CHECK(to_vector<double>(g[1]) == std::vector<double>{0, 1, 0, 0, max ? 1.0 : 0.0});
  }
  const Tensor column = values({kNan, 1}, {2, 1}), row = values({0, 2, kNan}, {3});  // broadcast
  set_requires_grad(column, true);
  set_requires_grad(row, true);
  const auto g = grad({maximum(column, row)}, {column, row}, {ones({2, 3}, f64)});
  CHECK(to_vector<double>(g[0]) == std::vector<double>{3, 1});
  CHECK(to_vector<double>(g[1]) == std::vector<double>{0, 1, 1});
}

}  // namespace capo::test
