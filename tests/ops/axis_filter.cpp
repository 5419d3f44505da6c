// Reference: the dense matrix A, entry by entry from the definitions, times x. PyTorch's own numbers: resize.cpp,
// pool.cpp.
#include <capo/tests/op_test.h>

#include <capo/ops/axis_filter.h>

#include <algorithm>
#include <cmath>

namespace capo::test {
namespace {

double keys(double x, double a) {
  x = std::fabs(x);
  return x < 1   ? (a + 2) * x * x * x - (a + 3) * x * x + 1
         : x < 2 ? a * x * x * x - 5 * a * x * x + 8 * a * x - 4 * a
                 : 0;
}

// A[i][j]: the weight of input j in output i.
double entry(const AxisFilter& f, std::int64_t i, std::int64_t j) {
  const double in = static_cast<double>(f.in), out = static_cast<double>(f.out), x = static_cast<double>(i),
               z = static_cast<double>(j);
  const double scale = f.align_corners ? (f.out > 1 ? (in - 1) / (out - 1) : 0) : in / out;
  switch (f.kind) {
    case FilterKind::nearest:
      return static_cast<std::int64_t>(static_cast<float>(i) *
                                       (static_cast<float>(f.in) / static_cast<float>(f.out))) == j;
    case FilterKind::linear:
    case FilterKind::cubic: {
      const bool cubic = f.kind == FilterKind::cubic;
      if (f.antialias) {
        const double s = std::max(scale, 1.0), centre = (x + 0.5) * scale, reach = (cubic ? 2 : 1) * s;
        double total = 0, mine = 0;
        for (std::int64_t k = 0; k < f.in; ++k) {
          const double place = static_cast<double>(k);
          if (std::trunc(place) < std::trunc(std::max(centre - reach + 0.5, 0.0)) ||
              place >= std::trunc(centre + reach + 0.5))
            continue;
          const double d = (place + 0.5 - centre) / s, w = cubic ? keys(d, -0.5) : std::max(0.0, 1 - std::fabs(d));
          total += w;
          if (k == j) mine = w;
        }
        return mine / total;
      }
      double source = f.align_corners ? x * scale : (x + 0.5) * scale - 0.5;
      if (!cubic) {
        source = std::clamp(source, 0.0, in - 1);
        return std::max(0.0, 1 - std::fabs(source - z));
      }
      double w = 0;
      const double base = std::floor(source);
      for (int k = -1; k <= 2; ++k)
        if (std::clamp(base + k, 0.0, in - 1) == z) w += keys(base + k - source, -0.75);
      return w;
    }
    case FilterKind::window: {
      const std::int64_t from = i * f.stride - f.padding;
      std::int64_t inside = 0;
      for (std::int64_t k = from; k < from + f.kernel; ++k) inside += k >= 0 && k < f.in;
      return j >= from && j < from + f.kernel ? 1.0 / static_cast<double>(f.count_padding ? f.kernel : inside) : 0;
    }
    case FilterKind::bins: {
      const double from = std::floor(x * in / out), to = std::ceil((x + 1) * in / out);
      return z >= from && z < to ? 1 / (to - from) : 0;
    }
  }
  return 0;
}

Tensor reference(const Tensor& x, int axis, const AxisFilter& f) {
  const std::int64_t rows = f.transposed ? f.in : f.out, columns = f.transposed ? f.out : f.in;
  Shape shape = x.shape();
  shape[axis] = rows;
  std::int64_t inner = 1;
  for (int i = axis + 1; i < x.rank(); ++i) inner *= shape[i];
  const auto v = to_vector<double>(x);
  std::vector<double> out(static_cast<std::size_t>(numel(shape)), 0);
  for (std::size_t k = 0; k < out.size(); ++k) {
    const auto at = static_cast<std::int64_t>(k), outer = at / inner / rows, row = at / inner % rows;
    for (std::int64_t c = 0; c < columns; ++c)
      out[k] += (f.transposed ? entry(f, c, row) : entry(f, row, c)) *
                v[static_cast<std::size_t>((outer * columns + c) * inner + at % inner)];
  }
  return values(out, shape);
}

AxisFilter filter(FilterKind kind, std::int64_t in, std::int64_t out, bool antialias = false, bool align = false) {
  AxisFilter f;
  f.kind = kind;
  f.in = in;
  f.out = out;
  f.antialias = antialias;
  f.align_corners = align;
  return f;
}
AxisFilter window(std::int64_t in, std::int64_t out, std::int64_t kernel, std::int64_t stride, std::int64_t padding,
                  bool count) {
  AxisFilter f = filter(FilterKind::window, in, out);
  f.kernel = kernel;
  f.stride = stride;
  f.padding = padding;
  f.count_padding = count;
  return f;
}

}  // namespace

std::vector<OpCase> op_cases() {
  const auto one = [](const std::string& label, const Tensor& x, int axis, std::int64_t given, const AxisFilter& f) {
    Sample s{label,
             {x},
             [=](const Tensors& t) { return Tensors{axis_filter(t[0], given, f)}; },
             [=](const Tensors& t) { return Tensors{reference(t[0], axis, f)}; }};
    s.second_order = true;
    return s;
  };
  using K = FilterKind;
  OpCase c{"axis_filter", {}, {}};
  AxisFilter back = filter(K::cubic, 5, 8);
  back.transposed = true;
  c.samples = {
      one("nearest up", normal({2, 5, 3}, "a"), 1, 1, filter(K::nearest, 5, 13)),
      one("nearest down, last axis", normal({3, 13}, "a"), 1, -1, filter(K::nearest, 13, 5)),
      one("linear up", normal({2, 5, 67}, "a", 3), 1, 1, filter(K::linear, 5, 8)),
      one("linear down", normal({7, 3}, "a"), 0, 0, filter(K::linear, 7, 3)),
      one("four channels", normal({2, 7, 4}, "a"), 1, 1, filter(K::linear, 7, 9)),
      one("linear, corners", normal({4, 3}, "a"), 0, 0, filter(K::linear, 4, 7, false, true)),
      one("linear, corners, to one", normal({4, 3}, "a"), 0, 0, filter(K::linear, 4, 1, false, true)),
      one("linear antialias", normal({2, 17, 2}, "a"), 1, 1, filter(K::linear, 17, 5, true)),
      one("cubic up", normal({2, 5, 64}, "a"), 1, 1, filter(K::cubic, 5, 9)),
      one("cubic down", normal({11, 2}, "a"), 0, 0, filter(K::cubic, 11, 4)),
      one("cubic, corners", normal({5, 2}, "a"), 0, 0, filter(K::cubic, 5, 8, false, true)),
      one("cubic antialias down", normal({19, 2}, "a"), 0, 0, filter(K::cubic, 19, 6, true)),
      one("cubic antialias up", normal({5, 2}, "a"), 0, 0, filter(K::cubic, 5, 7, true)),
      one("cubic transposed", normal({8, 3}, "a"), 0, 0, back),
      one("from one", normal({1, 3}, "a"), 0, 0, filter(K::cubic, 1, 4)),
      one("window", normal({2, 7, 3}, "a"), 1, 1, window(7, 4, 3, 2, 1, true)),
      one("window, inside only", normal({2, 7, 3}, "a"), 1, 1, window(7, 4, 3, 2, 1, false)),
      one("overlapping windows, a rest", normal({9}, "a"), 0, 0, window(9, 3, 4, 2, 0, true)),
      one("bins down", normal({2, 10, 3}, "a"), 1, 1, filter(K::bins, 10, 3)),
      one("bins up", normal({3, 5}, "a"), 1, 1, filter(K::bins, 5, 7)),
      one("empty", normal({0, 5, 3}, "a"), 1, 1, filter(K::linear, 5, 8)),
  };
  c.errors = {
      {"size",
       [] {
         axis_filter(normal({2, 5}, "a"), 1, filter(K::linear, 4, 8));
       },
       "must have size 4"},
      {"windows", [] { axis_filter(normal({5}, "a"), 0, window(5, 4, 3, 2, 1, true)); }, "do not fit"},
      {"empty row", [] { axis_filter(normal({0}, "a"), 0, filter(K::linear, 0, 3)); }, "positive"},
      {"dtype", [] { axis_filter(integers({5}, "a", 0, 3), 0, filter(K::linear, 5, 3)); }, "floating"},
  };
  return {c};
}

}  // namespace capo::test
