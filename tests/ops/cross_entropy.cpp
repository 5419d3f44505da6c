#include <capo/autograd/autograd.h>
#include <capo/ops/cross_entropy.h>
#include <capo/ops/softmax.h>
#include <capo/ops/unary.h>
#include <capo/tests/op_test.h>

#include <doctest/doctest.h>

#include <cmath>

namespace capo::test {
namespace {

// Scalar loops; target has one row of probabilities per row of logits, before smoothing; skip marks ignored rows.
Tensor by_loops(const Tensor& logits, const std::vector<double>& target, const std::vector<bool>& skip,
                Reduction reduction, double smoothing) {
  const auto x = to_vector<double>(logits);
  const auto classes = static_cast<std::size_t>(logits.size(-1));
  std::vector<double> rows;
  double total = 0, count = 0;
  for (std::size_t r = 0; r * classes < x.size(); ++r) {
    double top = -INFINITY, sum = 0, loss = 0;
    for (std::size_t i = 0; i < classes; ++i) top = std::fmax(top, x[r * classes + i]);
    for (std::size_t i = 0; i < classes; ++i) sum += std::exp(x[r * classes + i] - top);
    for (std::size_t i = 0; i < classes && !skip[r]; ++i) {
      const double q = (1 - smoothing) * target[r * classes + i] + smoothing / static_cast<double>(classes);
      if (q != 0) loss += q * (top + std::log(sum) - x[r * classes + i]);
    }
    rows.push_back(loss);
    total += loss;
    count += skip[r] ? 0 : 1;
  }
  Shape shape = logits.shape();
  shape.pop_back();
  if (reduction == Reduction::none) return values(rows, shape);
  return values({reduction == Reduction::sum ? total : total / count}, {});
}

Sample hard_sample(const std::string& label, const Tensor& logits, const Tensor& labels, CrossEntropyOptions o = {}) {
  Sample s;
  s.label = label;
  s.inputs = {logits, labels};
  s.run = [o](const Tensors& in) -> Tensors { return {cross_entropy(in[0], in[1], o)}; };
  s.reference = [o](const Tensors& in) -> Tensors {
    const auto index = to_vector<std::int64_t>(in[1]);
    const auto classes = static_cast<std::size_t>(in[0].size(-1));
    std::vector<double> target(index.size() * classes, 0.0);
    std::vector<bool> skip;
    for (std::size_t r = 0; r < index.size(); ++r) {
      skip.push_back(index[r] == o.ignore_index);
      if (!skip[r]) target[r * classes + static_cast<std::size_t>(index[r])] = 1;
    }
    return {by_loops(in[0], target, skip, o.reduction, o.label_smoothing)};
  };
  return s;
}

Sample soft_sample(const std::string& label, const Tensor& logits, const Tensor& target, CrossEntropyOptions o = {}) {
  Sample s;
  s.label = label;
  s.inputs = {logits, target};
  s.run = [o](const Tensors& in) -> Tensors { return {cross_entropy_soft(in[0], in[1], o)}; };
  s.reference = [o](const Tensors& in) -> Tensors {
    const auto t = to_vector<double>(in[1]);
    return {by_loops(in[0], t, std::vector<bool>(t.size(), false), o.reduction, o.label_smoothing)};
  };
  return s;
}

Tensor labels_of(const std::vector<std::int64_t>& v, const Shape& shape) { return from_vector<std::int64_t>(v, shape); }

OpCase hard_case() {
  using R = Reduction;
  OpCase c{"cross_entropy", {}, {}};
  c.samples = {
      hard_sample("mean", normal({5, 7}, "a", 0, 2), integers({5}, "la", 0, 7)),
      hard_sample("sum, smoothing", normal({6, 10}, "b", 0, 2), integers({6}, "lb", 0, 10), {0.1, -100, R::sum}),
      hard_sample("none, smoothing, segmentation", normal({2, 3, 4, 5}, "c", 0, 2), integers({2, 3, 4}, "lc", 0, 5),
                  {0.2, -100, R::none}),
      hard_sample("ignored rows", normal({5, 3}, "d"), labels_of({0, -100, 2, -100, 1}, {5}), {0.1}),
      hard_sample("ignore_index 255", normal({4, 3}, "e"), labels_of({255, 1, 2, 255}, {4}), {0, 255, R::none}),
      hard_sample("few classes, many rows, some ignored", normal({2, 70, 3}, "o", 0, 2), integers({2, 70}, "lo", 0, 3),
                  {0, 1, R::none}),
      hard_sample("wide rows", normal({9, 33}, "p", 0, 2), integers({9}, "lp", 0, 33)),
      hard_sample("one class", normal({3, 1}, "f"), labels_of({0, 0, 0}, {3}), {0.1}),
      hard_sample("rank 1", normal({6}, "g"), labels_of({4}, {})),
      hard_sample("1,000 classes", normal({40, 1000}, "h", 0, 3), integers({40}, "lh", 0, 1000), {0.1}),
      hard_sample("more than 1,024 classes in whole packs", normal({3, 1032}, "n", 0, 3), integers({3}, "ln", 0, 1032),
                  {0.1}),
      hard_sample("no rows, sum", normal({0, 4}, "i"), integers({0}, "li", 0, 4), {0, -100, R::sum}),
      hard_sample("one huge row", normal({1, 50021}, "j"), labels_of({50020}, {1})),
  };
  Sample shifted = hard_sample("mean 10,000", normal({3, 33}, "k", 1e4, 2), integers({3}, "lk", 0, 33), {0.1});
  shifted.half = false;
  shifted.grad_tol = 1e-5;
  shifted.tol = 1e-10;
  Sample ignored = hard_sample("all ignored: NaN", normal({2, 3}, "l"), labels_of({-100, -100}, {2}));
  ignored.gradient = false;
  Sample none = hard_sample("no rows: NaN", normal({0, 3}, "m"), labels_of({}, {0}));
  none.gradient = false;
  for (const auto& s : {shifted, ignored, none}) c.samples.push_back(s);
  const Tensor x = normal({2, 3}, "x");
  const Tensor y = labels_of({0, 1}, {2});
  c.errors = {
      {"label too big", [=] { cross_entropy(x, labels_of({0, 3}, {2})); }, "row 1 has 3"},
      {"label negative", [=] { cross_entropy(x, labels_of({-1, 0}, {2})); }, "row 0 has -1"},
      {"number of labels", [=] { cross_entropy(x, labels_of({0, 1, 2}, {3})); }, "labels must be [2]"},
      {"dtype of labels", [=] { cross_entropy(x, normal({2}, "y")); }, "labels must be i64"},
      {"smoothing", [=] { cross_entropy(x, y, {1.5}); }, "label_smoothing must be in [0, 1]"},
      {"reduction", [=] { cross_entropy(x, y, {0, -100, Reduction::batchmean}); }, "batchmean"},
      {"no classes", [] { cross_entropy(normal({2, 0}, "x"), labels_of({0, 0}, {2})); }, "at least one class"},
      {"mixed devices", [=] { cross_entropy(empty({2, 3}, f64, kMeta), y); }, "labels are on"},
  };
  return c;
}

OpCase soft_case() {
  using R = Reduction;
  const auto probabilities = [](const Shape& shape, const std::string& seed) { return softmax(normal(shape, seed)); };
  OpCase c{"cross_entropy_soft", {}, {}};
  c.samples = {
      soft_sample("mean, target differentiated", normal({5, 7}, "a", 0, 2), probabilities({5, 7}, "ta")),
      soft_sample("sum, smoothing", normal({4, 10}, "b", 0, 2), probabilities({4, 10}, "tb"), {0.1, -100, R::sum}),
      soft_sample("none", normal({2, 3, 5}, "c", 0, 2), probabilities({2, 3, 5}, "tc"), {0.3, -100, R::none}),
      soft_sample("no rows", normal({0, 4}, "d"), normal({0, 4}, "d"), {0, -100, R::sum}),
  };
  for (auto& s : c.samples) s.second_order = true;  // made of ops, because the target needs a gradient
  Sample fused = soft_sample("mean, target frozen", normal({60, 37}, "f", 0, 2), probabilities({60, 37}, "tf"), {0.1});
  Sample packs =
      soft_sample("whole packs, target frozen", normal({5, 40}, "h", 0, 2), probabilities({5, 40}, "th"), {0.1});
  Sample mass = soft_sample("rows that do not sum to one", normal({3, 6}, "g"), uniform({3, 6}, "tg", 0, 2),
                            {0.2, -100, R::none});
  Sample one = soft_sample("one class", normal({3, 1}, "e"), probabilities({3, 1}, "te"));
  for (auto* s : {&fused, &packs, &mass, &one}) {
    s->wanted = {true, false};
    c.samples.push_back(*s);
  }
  const Tensor x = normal({2, 3}, "x");
  c.errors = {
      {"shape", [=] { cross_entropy_soft(x, normal({2, 4}, "t")); }, "target must be [2, 3]"},
      {"mixed dtypes", [=] { cross_entropy_soft(x, cast(x, f32)); }, "mixed dtypes"},
      {"smoothing", [=] { cross_entropy_soft(x, x, {-0.1}); }, "label_smoothing must be in [0, 1]"},
  };
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() { return {hard_case(), soft_case()}; }

TEST_CASE("a small f32 loss and its gradient keep their digits") {
  for (const double smoothing : {0.0, 0.1})
    for (const double gap : {1.0, 6.0, 12.0, 20.0, 40.0}) {
      const int n = 37, label = 5;
      std::vector<float> x(n);
      for (int i = 0; i < n; ++i) x[i] = static_cast<float>(std::sin(1.7 * i));
      x[label] = static_cast<float>(1 + gap);
      double rest = 0, gaps = 0;
      for (int i = 0; i < n; ++i) {
        const double below = static_cast<double>(x[i]) - static_cast<double>(x[label]);
        gaps -= below;
        if (i != label) rest += std::exp(below);
      }
      const double even = smoothing / n;
      const double loss = std::log1p(rest) + even * gaps, slope = -rest / (1 + rest) + smoothing - even;
      const Tensor labels = from_vector(std::vector<std::int64_t>{label}, {1});
      CrossEntropyOptions o;
      o.label_smoothing = smoothing;
      const Tensor logits = from_vector(x, {1, n});
      const double frozen = cross_entropy(logits, labels, o).item();
      set_requires_grad(logits, true);
      const Tensor y = cross_entropy(logits, labels, o);
      backward(y);
      CAPTURE(smoothing);
      CAPTURE(gap);
      CHECK(y.item() == frozen);
      const auto error = [](double got, double want) { return std::abs(got / want - 1); };  // Approx has a floor of 1
      CHECK(error(y.item(), loss) <= 1e-6);
      CHECK(error(to_vector<double>(grad_of(logits))[label], slope) <= 1e-6);
    }
}

TEST_CASE("an infinite logit gives NaN, also where the label leads") {
  const double inf = INFINITY;
  const Tensor x = from_vector(std::vector<double>{inf, 1, 2}, {1, 3});
  set_requires_grad(x, true);
  const Tensor y = cross_entropy(x, from_vector(std::vector<std::int64_t>{0}, {1}));
  backward(y);
  CHECK(std::isnan(y.item()));
  CHECK(std::isnan(to_vector<double>(grad_of(x))[0]));
}

}  // namespace capo::test
