// References: scalar f64 loops over host copies. Order and NaN rules of topk and argmax as in PyTorch 2.x.
#include <capo/tests/op_test.h>

#include <capo/engine/backend.h>
#include <capo/ops/binary.h>
#include <capo/ops/index.h>
#include <capo/ops/reduce.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace capo::test {
namespace {

using Index = std::vector<std::int64_t>;

std::size_t at(const Shape& shape, const Dims& c) {
  std::int64_t k = 0;
  for (int i = 0; i < shape.size(); ++i) k = k * shape[i] + c[i];
  return static_cast<std::size_t>(k);
}
template <class F>
void each(const Shape& shape, F f) {
  const std::int64_t n = numel(shape);
  for (std::int64_t k = 0; k < n; ++k) {
    Dims c = Dims::filled(shape.size(), 0);
    std::int64_t rest = k;
    for (int i = shape.size() - 1; i >= 0; --i) {
      c[i] = rest % shape[i];
      rest /= shape[i];
    }
    f(c);
  }
}
Tensor ids(const Index& v) { return from_vector<std::int64_t>(v, {static_cast<std::int64_t>(v.size())}); }

Tensor gather_reference(const Tensor& x, int axis, const Tensor& index) {
  const auto v = to_vector<double>(x);
  const auto k = to_vector<std::int64_t>(index);
  std::vector<double> out;
  each(index.shape(), [&](Dims c) {
    c[axis] = k[at(index.shape(), c)];
    out.push_back(v[at(x.shape(), c)]);
  });
  return values(out, index.shape());
}
Tensor scatter_reference(const Tensor& base, int axis, const Tensor& index, const Tensor& src) {
  auto out = to_vector<double>(base);
  const auto v = to_vector<double>(src);
  const auto k = to_vector<std::int64_t>(index);
  each(index.shape(), [&](Dims c) {
    const auto from = at(index.shape(), c);
    c[axis] = k[from];
    out[at(base.shape(), c)] += v[from];
  });
  return values(out, base.shape());
}
// index [K] as the index of gather: repeated over the other axes.
Tensor spread(const Tensor& index, Shape shape, int axis) {
  shape[axis] = index.numel();
  const auto k = to_vector<std::int64_t>(index);
  Index out;
  each(shape, [&](const Dims& c) { out.push_back(k[static_cast<std::size_t>(c[axis])]); });
  return from_vector<std::int64_t>(out, shape);
}

Sample exact(const std::string& label, const Tensors& in, Fn run, Fn reference) {
  Sample s{label, in, std::move(run), std::move(reference)};
  s.second_order = true;
  return s;
}

OpCase index_select_case() {
  const auto one = [](const std::string& label, const Tensor& x, const Tensor& index, int axis, std::int64_t given) {
    return exact(
        label, {x, index}, [given](const Tensors& t) { return Tensors{index_select(t[0], given, t[1])}; },
        [axis](const Tensors& t) { return Tensors{gather_reference(t[0], axis, spread(t[1], t[0].shape(), axis))}; });
  };
  OpCase c{"index_select", {}, {}};
  c.samples = {
      one("rows, with duplicates", normal({5, 67}, "a"), ids({4, 0, 0, 3, 4, 4}), 0, 0),
      one("middle axis", normal({3, 4, 5}, "a"), ids({2, 2, 1}), 1, 1),
      one("last axis", normal({3, 7}, "a"), ids({6, 0}), 1, -1),
      one("size 1", normal({1, 3}, "a"), ids({0, 0, 0}), 0, 0),
      one("no index", normal({3, 2}, "a"), ids({}), 0, 0),
      one("empty rows", normal({3, 0}, "a"), ids({1, 2}), 0, 0),
  };
  c.errors = {
      {"too large",
       [] {
         index_select(normal({5, 2}, "a"), 0, ids({0, 1, 2, 7}));
       },
       "[0, 5), got 7 at [3]"},
      {"negative",
       [] {
         index_select(normal({5, 2}, "a"), 1, ids({-1}));
       },
       "[0, 2), got -1 at [0]"},
      {"rank",
       [] {
         index_select(normal({5, 2}, "a"), 0, integers({1, 2}, "i", 0, 5));
       },
       "one axis"},
      {"dtype", [] { index_select(normal({5}, "a"), 0, normal({2}, "i")); }, "i64"},
      {"axis", [] { index_select(normal({5}, "a"), 1, ids({0})); }, "axis"},
  };
  if (device_count() > 0) {
    const Device there{DeviceType::cuda, 0};
    std::vector<std::int64_t> wrong(5000, 4);
    wrong[3001] = 5, wrong[4999] = -1;
    c.errors.push_back({"on the device",
                        [=] { index_select(to(cast(normal({5, 2}, "a"), f32), there), 0, to(ids(wrong), there)); },
                        "[0, 5), got 5 at [3001]"});
  }
  return c;
}

OpCase index_add_case() {
  const auto one = [](const std::string& label, const Tensor& base, const Tensor& index, const Tensor& src, int axis) {
    return exact(
        label, {base, index, src}, [axis](const Tensors& t) { return Tensors{index_add(t[0], axis, t[1], t[2])}; },
        [axis](const Tensors& t) {
          return Tensors{scatter_reference(t[0], axis, spread(t[1], t[0].shape(), axis), t[2])};
        });
  };
  OpCase c{"index_add", {}, {}};
  c.samples = {
      one("rows, with duplicates", normal({4, 70}, "a"), ids({3, 1, 3, 3}), normal({4, 70}, "b", 10), 0),
      one("middle axis", normal({2, 3, 5}, "a"), ids({0, 2, 0, 1, 0}), normal({2, 5, 5}, "b"), 1),
      one("last axis", normal({3, 4}, "a"), ids({2}), normal({3, 1}, "b"), 1),
      one("none", normal({3, 2}, "a"), ids({}), normal({0, 2}, "b"), 0),
  };
  Sample many = one("many", normal({40, 3}, "a"), integers({1100}, "i", 0, 40), normal({1100, 3}, "b"), 0);
  many.second_order = false;
  c.samples.push_back(many);
  c.errors = {
      {"range",
       [] {
         index_add(normal({3, 2}, "a"), 0, ids({3}), normal({1, 2}, "b"));
       },
       "[0, 3), got 3 at [0]"},
      {"src",
       [] {
         index_add(normal({3, 2}, "a"), 0, ids({1}), normal({2, 2}, "b"));
       },
       "[1, 2]"},
      {"dtype",
       [] {
         index_add(normal({3, 2}, "a"), 0, ids({1}), zeros({1, 2}));
       },
       "src must be"},
  };
  return c;
}

OpCase gather_case() {
  const auto one = [](const std::string& label, const Tensor& x, const Tensor& index, int axis, std::int64_t given) {
    return exact(
        label, {x, index}, [given](const Tensors& t) { return Tensors{gather(t[0], given, t[1])}; },
        [axis](const Tensors& t) { return Tensors{gather_reference(t[0], axis, t[1])}; });
  };
  OpCase c{"gather", {}, {}};
  c.samples = {
      one("labels", normal({5, 7}, "a"), integers({5, 1}, "i", 0, 7), 1, -1),
      one("middle axis, smaller index", normal({3, 4, 5}, "a"), integers({2, 6, 3}, "i", 0, 4), 1, 1),
      one("first axis", normal({3, 2}, "a"), integers({7, 2}, "i", 0, 3), 0, 0),
      one("size 1", normal({1, 1}, "a"), integers({1, 3}, "i", 0, 1), 1, 1),
      one("empty", normal({3, 2}, "a"), integers({0, 2}, "i", 0, 3), 0, 0),
  };
  c.errors = {
      {"range",
       [] {
         gather(normal({2, 2}, "a"), 1, from_vector<std::int64_t>({0, 1, 1, 2}, {2, 2}));
       },
       "[0, 2), got 2 at [1, 1]"},
      {"does not fit",
       [] {
         gather(normal({2, 2}, "a"), 1, integers({3, 1}, "i", 0, 2));
       },
       "[3, 1]"},
      {"rank",
       [] {
         gather(normal({2, 2}, "a"), 1, ids({0}));
       },
       "rank"},
  };
  return c;
}

OpCase scatter_add_case() {
  const auto one = [](const std::string& label, const Tensor& base, const Tensor& index, const Tensor& src, int axis) {
    return exact(
        label, {base, index, src}, [axis](const Tensors& t) { return Tensors{scatter_add(t[0], axis, t[1], t[2])}; },
        [axis](const Tensors& t) { return Tensors{scatter_reference(t[0], axis, t[1], t[2])}; });
  };
  OpCase c{"scatter_add", {}, {}};
  c.samples = {
      one("duplicates", normal({3, 5}, "a"), integers({3, 9}, "i", 0, 5), normal({3, 9}, "b"), 1),
      one("first axis, smaller index", normal({4, 3, 70}, "a"), integers({6, 2, 67}, "i", 0, 4),
          normal({6, 2, 67}, "b"), 0),
      one("one axis", normal({4}, "a"), ids({1, 1, 1}), normal({3}, "b", 5), 0),
      one("none", normal({3, 2}, "a"), integers({3, 0}, "i", 0, 2), normal({3, 0}, "b"), 1),
  };
  c.errors = {
      {"range",
       [] {
         scatter_add(normal({3}, "a"), 0, ids({0, -2}), normal({2}, "b"));
       },
       "[0, 3), got -2 at [1]"},
      {"src",
       [] {
         scatter_add(normal({3}, "a"), 0, ids({0, 1}), normal({3}, "b"));
       },
       "shape of index"},
      {"does not fit",
       [] {
         scatter_add(normal({2, 2}, "a"), 1, integers({3, 1}, "i", 0, 2), normal({3, 1}, "b"));
       },
       "fit"},
  };
  return c;
}

OpCase embedding_case() {
  const auto one = [](const std::string& label, const Tensor& w, const Tensor& index) {
    return exact(
        label, {w, index}, [](const Tensors& t) { return Tensors{embedding(t[0], t[1])}; },
        [](const Tensors& t) {
          Shape shape = t[1].shape();
          shape.push_back(t[0].shape()[1]);
          const auto v = to_vector<double>(t[0]);
          std::vector<double> out;
          for (auto k : to_vector<std::int64_t>(t[1]))
            for (std::int64_t i = 0; i < t[0].shape()[1]; ++i)
              out.push_back(v[static_cast<std::size_t>(k * t[0].shape()[1] + i)]);
          return Tensors{values(out, shape)};
        });
  };
  OpCase c{"embedding", {}, {}};
  c.samples = {one("tokens", normal({11, 7}, "w"), integers({2, 5}, "i", 0, 11)),
               one("one id", normal({3, 65}, "w"), integers({}, "i", 0, 3)),
               one("one channel", normal({4, 1}, "w"), ids({3, 3, 0})), one("none", normal({4, 2}, "w"), ids({}))};
  c.errors = {{"range",
               [] {
                 embedding(normal({4, 2}, "w"), integers({1, 2}, "i", 4, 5));
               },
               "[0, 4), got 4 at [0, 0]"},
              {"rank", [] { embedding(normal({4}, "w"), ids({0})); }, "[vocabulary, channels]"}};
  return c;
}

OpCase one_hot_case() {
  const auto one = [](const std::string& label, const Tensor& index, std::int64_t classes) {
    Sample s{label,
             {index},
             [classes](const Tensors& t) { return Tensors{one_hot(t[0], classes, f32)}; },
             [classes](const Tensors& t) {
               Shape shape = t[0].shape();
               shape.push_back(classes);
               std::vector<double> out;
               for (auto k : to_vector<std::int64_t>(t[0]))
                 for (std::int64_t i = 0; i < classes; ++i) out.push_back(i == k);
               return Tensors{values(out, shape)};
             }};
    s.gradient = false;
    s.f32 = false;  // no floating input
    s.as_is = true;
    return s;
  };
  OpCase c{"one_hot", {}, {}};
  c.samples = {one("labels", integers({7}, "i", 0, 10), 10), one("map", integers({2, 3}, "i", 0, 4), 4),
               one("one class", ids({0, 0}), 1), one("none", ids({}), 3)};
  c.errors = {{"range",
               [] {
                 one_hot(ids({1, 3}), 3);
               },
               "[0, 3), got 3 at [1]"},
              {"dtype", [] { one_hot(zeros({2}), 3); }, "i64"}};
  return c;
}

// Positions along the axis, best first, by a stable sort.
Tensors topk_reference(const Tensor& x, std::int64_t k, int axis, bool largest) {
  const auto v = to_vector<double>(x);
  Shape shape = x.shape(), rows = shape;
  shape[axis] = k;
  rows[axis] = 1;
  std::vector<double> best(static_cast<std::size_t>(numel(shape)));
  Index where(best.size());
  each(rows, [&](Dims c) {
    std::vector<std::pair<double, std::int64_t>> row;
    for (c[axis] = 0; c[axis] < x.shape()[axis]; ++c[axis]) {
      const double a = v[at(x.shape(), c)];
      row.push_back(
          {std::isnan(a) ? std::numeric_limits<double>::infinity() : a, c[axis]});  // samples hold no infinity
    }
    std::stable_sort(row.begin(), row.end(),
                     [&](auto& a, auto& b) { return largest ? a.first > b.first : a.first < b.first; });
    for (c[axis] = 0; c[axis] < k; ++c[axis]) {
      const auto position = row[static_cast<std::size_t>(c[axis])].second;
      Dims from = c;
      from[axis] = position;
      best[at(shape, c)] = v[at(x.shape(), from)];
      where[at(shape, c)] = position;
    }
  });
  return {values(best, shape), from_vector<std::int64_t>(where, shape)};
}

OpCase topk_case() {
  const auto one = [](const std::string& label, const Tensor& x, std::int64_t k, int axis, std::int64_t given,
                      bool largest) {
    return exact(
        label, {x},
        [=](const Tensors& t) {
          const TopK r = topk(t[0], k, given, largest);
          return Tensors{r.values, r.indices};
        },
        [=](const Tensors& t) { return topk_reference(t[0], k, axis, largest); });
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> mixed;  // distinct values far enough apart for finite differences
  for (int i = 0; i < 300; ++i) mixed.push_back(0.01 * (i * 137 % 300));
  const Tensor spaced = values(mixed, {300});
  OpCase c{"topk", {}, {}};
  c.samples = {
      one("top 5", normal({7, 131}, "a"), 5, 1, -1, true),
      one("smallest, middle axis", normal({2, 9, 3}, "a"), 4, 1, 1, false),
      one("full sort", spaced, 300, 0, 0, true),
      one("few of many", normal({3, 1300}, "a"), 5, 1, 1, true),
      one("size 1", normal({4, 1}, "a"), 1, 1, 1, true),
      one("k = 0", normal({4, 3}, "a"), 0, 1, 1, true),
      one("empty", normal({0, 3}, "a"), 2, 1, 1, true),
      one("ties: lower position first", values({2, 5, 2, 5, 1, 5, 2}, {7}), 6, 0, 0, true),
      one("NaN first", values({3, nan, 1, 3, nan, -2}, {6}), 6, 0, 0, true),
      one("NaN last", values({3, nan, 1, 3, nan, -2}, {6}), 6, 0, 0, false),
  };
  for (std::size_t i = 7; i < 10; ++i) c.samples[i].gradient = false;
  c.errors = {{"k",
               [] {
                 topk(normal({2, 3}, "a"), 4);
               },
               "[0, 3]"},
              {"axis",
               [] {
                 topk(normal({2, 3}, "a"), 1, 2);
               },
               "axis"}};
  return c;
}

OpCase arg_case(bool largest) {
  const auto one = [largest](const std::string& label, const Tensor& x, int axis, bool keepdim) {
    Sample s{
        label,
        {x},
        [=](const Tensors& t) { return Tensors{largest ? argmax(t[0], axis, keepdim) : argmin(t[0], axis, keepdim)}; },
        [=](const Tensors& t) {
          const auto v = to_vector<double>(t[0]);
          Shape rows = t[0].shape();
          rows[axis] = 1;
          Index out;
          each(rows, [&](Dims c) {
            std::int64_t best = 0;
            double top = v[at(t[0].shape(), c)];
            for (c[axis] = 1; c[axis] < t[0].shape()[axis]; ++c[axis]) {
              const double a = v[at(t[0].shape(), c)];
              if (std::isnan(top)) break;
              if (std::isnan(a) || (largest ? a > top : a < top)) top = a, best = c[axis];
            }
            out.push_back(best);
          });
          if (!keepdim) rows.erase(axis);
          return Tensors{from_vector<std::int64_t>(out, rows)};
        }};
    s.gradient = false;
    return s;
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  OpCase c{largest ? "argmax" : "argmin", {}, {}};
  c.samples = {
      one("classes", normal({9, 1000}, "a"), 1, false),
      one("middle axis, wide", normal({2, 5, 130}, "a"), 1, true),
      one("first axis", normal({6, 3}, "a"), 0, false),
      one("size 1", normal({3, 1}, "a"), 1, false),
      one("empty", normal({0, 3}, "a"), 1, false),
      one("first of ties", values({1, 4, 4, 1}, {4}), 0, false),
      one("first NaN", values({7, 1, nan, 9, nan, 0}, {6}), 0, true),
  };
  if (largest)
    c.errors = {{"empty axis",
                 [] {
                   argmax(normal({3, 0}, "a"), 1);
                 },
                 "not be empty"},
                {"axis", [] { argmax(normal({3}, "a"), 1); }, "axis"}};
  else
    c.errors = {{"empty axis",
                 [] {
                   argmin(normal({3, 0}, "a"), 1);
                 },
                 "not be empty"},
                {"axis", [] { argmin(normal({3}, "a"), 1); }, "axis"}};
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() {
  return {index_select_case(), index_add_case(), gather_case(),  scatter_add_case(), embedding_case(),
          one_hot_case(),      topk_case(),      arg_case(true), arg_case(false)};
}

TEST_CASE("integer sums at one position wrap around") {
  for (int d = 0; d <= (device_count() > 0); ++d) {
    const Device device = d ? Device{DeviceType::cuda, 0} : kCpu;
    const Tensor at = to(from_vector<std::int64_t>({1, 1, 0}, {3}), device);
    for (const DType t : {i32, i64}) {
      const std::int64_t low = t == i32 ? INT32_MIN : INT64_MIN, high = t == i32 ? INT32_MAX : INT64_MAX;
      const Tensor base = to(cast(from_vector<std::int64_t>({high, 1}, {2}), t), device);
      const Tensor src = to(cast(from_vector<std::int64_t>({high, 1, 1}, {3}), t), device);
      const Index expected = {low, low + 1};
      CHECK(to_vector<std::int64_t>(index_add(base, 0, at, src)) == expected);
      CHECK(to_vector<std::int64_t>(scatter_add(base, 0, at, src)) == expected);
    }
  }
}

TEST_CASE("an OpObserver sees argmax") {
  struct Seen {
    std::string text;
    static void hook(const char* op, const Tensor&, void* user) { static_cast<Seen*>(user)->text += cat(op, " "); }
  } seen;
  const OpObserver observer(Seen::hook, &seen);
  argmax(values({1, 2}, {2}), 0);
  argmin(zeros({2}, f32, kMeta), 0);
  CHECK(seen.text == "argmax argmin ");
}

}  // namespace capo::test
