// Samples of sums and means. The reference adds every element in long double.
#include <capo/autograd/autograd.h>
#include <capo/engine/backend.h>
#include <capo/ops/reduce.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>

#include <doctest/doctest.h>

#include <cmath>

namespace capo::test {
namespace {

Tensor reference(const Tensor& x, const Dims& axes, bool keepdim, bool mean) {
  bool reduced[kMaxDims] = {};
  for (const auto a : axes) reduced[a < 0 ? a + x.rank() : a] = true;
  Shape kept, shape;
  std::int64_t count = 1;
  for (int i = 0; i < x.rank(); ++i) {
    reduced[i] |= axes.empty();
    kept.push_back(reduced[i] ? 1 : x.size(i));
    if (reduced[i]) count *= x.size(i);
    if (!reduced[i] || keepdim) shape.push_back(kept[i]);
  }
  const auto v = to_vector<double>(x);
  const Dims strides = contiguous_strides(kept);
  std::vector<long double> sums(static_cast<std::size_t>(numel(kept)), 0.0L);
  for (std::size_t k = 0; k < v.size(); ++k) {
    auto rest = static_cast<std::int64_t>(k), at = std::int64_t{0};
    for (int i = x.rank() - 1; i >= 0; --i) {
      if (!reduced[i]) at += rest % x.size(i) * strides[i];
      rest /= x.size(i);
    }
    sums[static_cast<std::size_t>(at)] += v[k];
  }
  std::vector<double> out;
  for (const auto s : sums) out.push_back(static_cast<double>(mean ? s / static_cast<long double>(count) : s));
  return from_vector<double>(out, shape);
}

OpCase make_case(const std::string& name, bool mean_of) {
  OpCase c{name, {}, {}};
  const auto op = [=](const Tensor& x, const Dims& axes, bool keepdim) {
    return mean_of ? mean(x, axes, keepdim) : sum(x, axes, keepdim);
  };
  const auto add = [&](const std::string& label, const Tensor& x, const Dims& axes, bool keepdim) -> Sample& {
    Sample s{cat(label, x.shape(), " over ", axes, keepdim ? " kept" : ""), {x},
             [=](const Tensors& in) { return Tensors{op(in[0], axes, keepdim)}; },
             [=](const Tensors& in) { return Tensors{reference(in[0], axes, keepdim, mean_of)}; }};
    s.second_order = true;
    s.tol = 1e-14;
    s.tol_f32 = 2e-6;
    s.gradient = !mean_of || x.numel() > 0 || numel(reference(x, axes, keepdim, true).shape()) == 0;  // else NaN
    c.samples.push_back(s);
    return c.samples.back();
  };
  for (const bool keepdim : {false, true}) {
    for (const Dims& axes : {Dims{}, Dims{0}, Dims{1}, Dims{-1}, Dims{0, 2}, Dims{2, 1}, Dims{0, 1, 2}})
      add("", normal({3, 5, 7}, name), axes, keepdim);
    add("", normal({}, name), {}, keepdim);
    add("", normal({1, 4, 1}, name), {0, 2}, keepdim);
    add("", normal({1, 1}, name), {1}, keepdim);
    add("", normal({2, 0, 3}, name), {0}, keepdim);
    add("", normal({2, 0, 3}, name), {1}, keepdim);
    add("", normal({0}, name), {}, keepdim);
  }
  add("", normal({2, 3, 2, 3, 2}, name), {1, 3}, false);
  add("", normal({2, 3, 2, 3, 2, 2, 1, 2}, name), {0, 2, 4, 7}, false);
  add("columns ", normal({1031, 65}, name), {0}, false);       // the bias gradient
  add("channels ", normal({3, 11, 13, 66}, name), {1, 2}, false);  // the pooling
  add("columns by eights ", normal({700, 72}, name), {0}, false);
  add("two axes of columns ", normal({3, 40, 5, 16}, name), {0, 2}, false);
  add("two axes of rows ", normal({5, 6, 160, 16}, name), {0, 2, 3}, false);
  add("rows ", normal({17, 1031}, name), {1}, false);
  add("shifted ", normal({3, 4099}, name, 10000), {1}, false);
  add("huge row ", normal({2, 8 * 4096}, name, 1), {1}, false);  // in parts of 4,096
  for (const std::int64_t n : {8 * 4096 + 1, 9 * 4096 - 1, 40961}) {  // and a tail
    add("huge row with a tail ", normal({2, n}, name, 1), {1}, false);
    add("huge columns with a tail ", normal({n, 3}, name, 1), {0}, false);
  }
  add("huge rows of two axes with a tail ", normal({3, 2, 40961}, name, 1), {0, 2}, true);
  add("huge, both axes inside ", normal({211, 2, 173}, name, 1), {0, 2}, false);
  add("huge row of two axes ", normal({64, 1024}, name, 1), {}, true);
  add("huge row, outer axis too ", normal({2, 8, 4096}, name, 1), {0, 2, 1}, false);
  Sample& special =
      add("special values ", values({HUGE_VAL, 1, -HUGE_VAL, 2, HUGE_VAL, -HUGE_VAL, std::nan(""), 3, 1, 2}, {5, 2}),
          {1}, false);
  special.gradient = false;
  for (const Shape& shape : {Shape{5, 7}, Shape{3, 41}, Shape{3, 40}, Shape{40, 8}})
    for (const int axis : {0, 1})
      if (!mean_of) {
        const Tensor x = integers(shape, name, -1000000, 1000000);
        add("i64 ", x, {axis}, false);
        add("i32 ", cast(x, i32), {axis}, false);
      }
  c.errors = {{"axis", [=] { op(ones({2, 3}), {2}, false); }, "axis must be in [-2, 2), got 2"},
              {"axis twice", [=] { op(ones({2, 3}), {1, -1}, false); }, "name one twice"},
              {"bool", [=] { op(full({2}, 1, boolean), {}, false); }, "got bool [2] cpu"}};
  if (mean_of) c.errors.push_back({"integers", [=] { op(ones({2}, i64), {}, false); }, "needs a floating tensor"});
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() { return {make_case("sum", false), make_case("mean", true)}; }

TEST_CASE("the f32 error of a long sum stays small in every layout") {
  const std::int64_t n = 1 << 20;
  const Tensor x = uniform({1024, 1024}, "long", 0, 1);
  double exact = 0;
  for (const double v : to_vector<double>(cast(x, f32))) exact += v;
  const Tensor y = cast(x, f32);
  CHECK(sum(y).item() == doctest::Approx(exact).epsilon(3e-7));
  CHECK(sum(transpose(y, 0, 1)).item() == doctest::Approx(exact).epsilon(3e-7));
  const Tensor wide = empty({n, 2});
  copy_into(slice(wide, 1, 0, 1), reshape(y, {n, 1}));
  CHECK(sum(slice(wide, 1, 0, 1)).item() == doctest::Approx(exact).epsilon(2e-6));   // stride 2
  CHECK(sum(expand(ones({1}), {n})).item() == static_cast<double>(n));               // stride 0
  CHECK(mean(slice(wide, 1, 0, 1), {0}).item() == doctest::Approx(exact / static_cast<double>(n)).epsilon(2e-6));
}

TEST_CASE("integer sums wrap around") {
  for (int d = 0; d <= (device_count() > 0); ++d) {
    const Device device = d ? Device{DeviceType::cuda, 0} : kCpu;
    CHECK(to_vector<std::int64_t>(sum(full({5}, INT32_MAX, i32, device)))[0] == INT32_MAX - 4);
    CHECK(to_vector<std::int64_t>(sum(full({40961}, INT32_MIN, i32, device)))[0] == INT32_MIN);
    const Tensor ends = to(from_vector<std::int64_t>({INT64_MAX, 1, INT64_MIN, INT64_MIN}, {2, 2}), device);
    CHECK(to_vector<std::int64_t>(sum(ends, {1})) == std::vector<std::int64_t>{INT64_MIN, 0});
    CHECK(to_vector<std::int64_t>(sum(ends, {0})) == std::vector<std::int64_t>{-1, INT64_MIN + 1});
  }
}

TEST_CASE("a sum keeps nothing and its mean of nothing is NaN") {
  const Tensor x = normal({3, 4}, "x");
  set_requires_grad(x, true);
  const SavedBytes saved;
  const Tensor y = mean(x, {0}), z = sum(x);
  CHECK(saved.total() == 0);
  CHECK(std::isnan(mean(zeros({0})).item()));
  CHECK(sum(zeros({0})).item() == 0);
}

}  // namespace capo::test
