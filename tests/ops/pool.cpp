// References: f64 loops over windows. The "PyTorch 2.x" samples hold that library's own numbers.
#include <capo/tests/op_test.h>

#include <capo/ops/pool.h>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace capo::test {
namespace {

struct Box {
  std::int64_t from[3], to[3];
};

// f(box in input coordinates, outside included) over every output pixel and channel of x [B, spatial.., C].
template <class BoxOf, class F>
Tensor by_window(const Tensor& x, const Dims& out, BoxOf box_of, F f) {
  const int space = out.size(), lead = 3 - space;
  std::int64_t n[3] = {1, 1, 1}, o[3] = {1, 1, 1};
  Shape shape = x.shape();
  for (int i = 0; i < space; ++i) {
    n[lead + i] = x.shape()[1 + i];
    o[lead + i] = shape[1 + i] = out[i];
  }
  const std::int64_t channels = x.size(-1);
  const auto v = to_vector<double>(x);
  std::vector<double> result;
  for (std::int64_t b = 0; b < x.size(0); ++b)
    for (std::int64_t k = 0; k < o[0] * o[1] * o[2]; ++k) {
      const std::int64_t at[3] = {k / o[2] / o[1], k / o[2] % o[1], k % o[2]};
      Box box;
      for (int i = 0; i < 3; ++i) {
        if (i < lead)
          box.from[i] = 0, box.to[i] = 1;
        else
          box_of(i - lead, at[i], n[i], box.from[i], box.to[i]);
      }
      for (std::int64_t c = 0; c < channels; ++c) {
        std::vector<double> inside;
        std::int64_t all = 0;
        for (auto i = box.from[0]; i < box.to[0]; ++i)
          for (auto j = box.from[1]; j < box.to[1]; ++j)
            for (auto l = box.from[2]; l < box.to[2]; ++l) {
              ++all;
              if (i < 0 || i >= n[0] || j < 0 || j >= n[1] || l < 0 || l >= n[2]) continue;
              inside.push_back(v[static_cast<std::size_t>((((b * n[0] + i) * n[1] + j) * n[2] + l) * channels + c)]);
            }
        result.push_back(f(inside, static_cast<double>(all)));
      }
    }
  return values(result, shape);
}

template <class F>
Tensor windows(const Tensor& x, const Dims& kernel, const Dims& stride, const Dims& padding, F f) {
  Dims out;
  for (int i = 0; i < kernel.size(); ++i)
    out.push_back((x.shape()[1 + i] + 2 * padding[i] - kernel[i]) / stride[i] + 1);
  return by_window(
      x, out,
      [&](int axis, std::int64_t o, std::int64_t, std::int64_t& from, std::int64_t& to) {
        from = o * stride[axis] - padding[axis];
        to = from + kernel[axis];
      },
      f);
}

double max_of(const std::vector<double>& s, double) {
  double m = -std::numeric_limits<double>::infinity();
  for (double v : s) m = std::isnan(v) || std::isnan(m) ? std::nan("") : std::fmax(m, v);
  return m;
}
double sum_of(const std::vector<double>& s) {
  double sum = 0;
  for (double v : s) sum += v;
  return sum;
}

// 4 x 5 values, as one image of one channel.
Tensor image() {
  std::vector<double> v;
  for (int i = 0; i < 20; ++i) v.push_back(i * 37 % 23 - 11 + 0.25 * i);
  return values(v, {1, 4, 5, 1});
}
template <class Run>
Sample pytorch(const std::string& label, Run run, const std::vector<double>& expected, const Shape& shape) {
  Sample s{"PyTorch 2.x: " + label,
           {image()},
           [=](const Tensors& t) { return Tensors{run(t[0])}; },
           [=](const Tensors&) { return Tensors{values(expected, shape)}; }};
  s.tol = s.tol_f32 = 1e-6;
  s.second_order = true;
  return s;
}

OpCase max_pool_case() {
  const auto one = [](const std::string& label, const Tensor& x, Dims k, Dims s, Dims p) {
    Sample sample{label,
                  {x},
                  [=](const Tensors& t) { return Tensors{max_pool(t[0], k, s, p)}; },
                  [=](const Tensors& t) { return Tensors{windows(t[0], k, s, p, max_of)}; }};
    sample.second_order = true;
    return sample;
  };
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  OpCase c{"max_pool", {}, {}};
  c.samples = {
      one("ResNet stem", normal({2, 9, 8, 5}, "a"), {3, 3}, {2, 2}, {1, 1}),
      one("2 x 2, a rest", normal({1, 5, 7, 67}, "a"), {2, 2}, {2, 2}, {0, 0}),
      one("one axis", normal({2, 11, 3}, "a"), {4}, {3}, {2}),
      one("three axes", normal({1, 4, 5, 3, 2}, "a"), {2, 3, 1}, {2, 1, 1}, {1, 0, 0}),
      one("stride over kernel", normal({1, 7, 7, 1}, "a"), {2, 2}, {3, 3}, {0, 0}),
      one("size 1", normal({2, 1, 1, 3}, "a"), {1, 1}, {1, 1}, {0, 0}),
      one("empty", normal({0, 4, 4, 3}, "a"), {2, 2}, {2, 2}, {0, 0}),
      one("NaN and infinities", values({1, nan, 3, -inf, -inf, -inf, inf, 2}, {1, 8, 1}), {2}, {2}, {0}),
      pytorch("3, 2, 1", [](const Tensor& x) { return max_pool2d(x, 3, 2, 1); }, {5.5, 11, 11, 10, 15.5, 15.5},
              {1, 2, 3, 1}),
      pytorch("2", [](const Tensor& x) { return max_pool2d(x, 2); }, {5.5, 11, 10, 15.5}, {1, 2, 2, 1}),
  };
  c.samples[7].gradient = false;
  c.errors = {
      {"does not fit",
       [] {
         max_pool2d(normal({1, 3, 3, 2}, "a"), 4);
       },
       "does not fit"},
      {"padding",
       [] {
         max_pool2d(normal({1, 6, 6, 2}, "a"), 2, 2, 2);
       },
       "padding"},
      {"axes",
       [] {
         max_pool(normal({1, 6, 6, 2}, "a"), {2});
       },
       "spatial axes"},
      {"rank",
       [] {
         max_pool(normal({6, 2}, "a"), {2});
       },
       "[B, spatial.., C]"},
  };
  return c;
}

OpCase avg_pool_case() {
  const auto one = [](const std::string& label, const Tensor& x, Dims k, Dims s, Dims p, bool count) {
    Sample sample{label,
                  {x},
                  [=](const Tensors& t) { return Tensors{avg_pool(t[0], k, s, p, count)}; },
                  [=](const Tensors& t) {
                    return Tensors{windows(t[0], k, s, p, [=](const std::vector<double>& in, double all) {
                      return sum_of(in) / (count ? all : static_cast<double>(in.size()));
                    })};
                  }};
    sample.second_order = true;
    return sample;
  };
  OpCase c{"avg_pool", {}, {}};
  c.samples = {
      one("overlapping", normal({2, 9, 8, 5}, "a"), {3, 3}, {2, 2}, {1, 1}, true),
      one("inside only", normal({2, 9, 8, 5}, "a"), {3, 3}, {2, 2}, {1, 1}, false),
      one("one axis", normal({2, 11, 3}, "a", 7), {4}, {3}, {2}, false),
      one("three axes", normal({1, 4, 5, 3, 2}, "a"), {2, 3, 1}, {2, 1, 1}, {1, 0, 0}, true),
      one("size 1", normal({2, 1, 1, 3}, "a"), {1, 1}, {1, 1}, {0, 0}, true),
      one("empty", normal({0, 4, 4, 3}, "a"), {2, 2}, {2, 2}, {0, 0}, true),
      pytorch("3, 2, 1", [](const Tensor& x) { return avg_pool2d(x, 3, 2, 1); },
              {-1.222222, 2.194444, 2.444444, 0.416667, 6.666667, 5.916667}, {1, 2, 3, 1}),
      pytorch("count_include_pad=False", [](const Tensor& x) { return avg_pool2d(x, 3, 2, 1, false); },
              {-2.75, 3.291667, 5.5, 0.625, 6.666667, 8.875}, {1, 2, 3, 1}),
  };
  c.errors = {
      {"does not fit",
       [] {
         avg_pool2d(normal({1, 3, 3, 2}, "a"), 4);
       },
       "does not fit"},
      {"stride",
       [] {
         avg_pool(normal({1, 6, 6, 2}, "a"), {2, 2}, {0, 1});
       },
       "stride >= 1"},
      {"dtype",
       [] {
         avg_pool2d(integers({1, 4, 4, 1}, "a", 0, 3), 2);
       },
       "floating"},
  };
  return c;
}

OpCase adaptive_avg_pool_case() {
  const auto one = [](const std::string& label, const Tensor& x, Dims size) {
    Sample sample{
        label,
        {x},
        [=](const Tensors& t) { return Tensors{adaptive_avg_pool(t[0], size)}; },
        [=](const Tensors& t) {
          return Tensors{by_window(
              t[0], size,
              [&](int axis, std::int64_t o, std::int64_t n, std::int64_t& from, std::int64_t& to) {
                from = o * n / size[axis];
                to = ((o + 1) * n + size[axis] - 1) / size[axis];
              },
              [](const std::vector<double>& in, double) { return sum_of(in) / static_cast<double>(in.size()); })};
        }};
    sample.second_order = true;
    return sample;
  };
  OpCase c{"adaptive_avg_pool", {}, {}};
  c.samples = {one("uneven bins", normal({2, 7, 10, 3}, "a"), {3, 4}),
               one("global", normal({2, 7, 5, 66}, "a", 5), {1, 1}),
               one("up", normal({1, 3, 2, 2}, "a"), {5, 3}),
               one("same", normal({1, 3, 2, 2}, "a"), {3, 2}),
               one("one axis", normal({2, 9, 2}, "a"), {4}),
               one("empty", normal({0, 4, 4, 3}, "a"), {2, 2}),
               pytorch("3 x 2", [](const Tensor& x) { return adaptive_avg_pool2d(x, 3, 2); },
                       {-3.291667, 2.208333, -1.041667, 4.458333, 1.208333, 6.708333}, {1, 3, 2, 1})};
  c.errors = {{"size",
               [] {
                 adaptive_avg_pool2d(normal({1, 4, 4, 2}, "a"), 0, 2);
               },
               "positive"},
              {"axes",
               [] {
                 adaptive_avg_pool(normal({1, 4, 4, 2}, "a"), {2});
               },
               "spatial axes"}};
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() { return {max_pool_case(), avg_pool_case(), adaptive_avg_pool_case()}; }

// PyTorch 2.x: the first of equals takes the gradient.
TEST_CASE("max_pool: ties") {
  const Tensor x = ones({1, 2, 4, 1}, f64);
  set_requires_grad(x, true);
  const Tensor y = max_pool2d(x, 2, 1);
  CHECK(to_vector<double>(grad({y}, {x}, {ones(y.shape(), f64)})[0]) == std::vector<double>{1, 1, 1, 0, 0, 0, 0, 0});
}

}  // namespace capo::test
