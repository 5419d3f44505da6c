// References: scalar loops over coordinates in f64.
#include <capo/tests/op_test.h>

#include <capo/ops/join.h>

namespace capo::test {
namespace {

// y[c] = f(c) for every coordinate c of shape.
template <class F>
Tensor fill_by(const Shape& shape, F f) {
  std::vector<double> out;
  const std::int64_t n = numel(shape);
  for (std::int64_t k = 0; k < n; ++k) {
    Dims at = Dims::filled(shape.size(), 0);
    std::int64_t rest = k;
    for (int i = shape.size() - 1; i >= 0; --i) {
      at[i] = rest % shape[i];
      rest /= shape[i];
    }
    out.push_back(f(at));
  }
  return values(out, shape);
}

double get(const Tensor& x, const Dims& at) {
  std::int64_t k = 0;
  for (int i = 0; i < x.rank(); ++i) k = k * x.shape()[i] + at[i];
  return to_vector<double>(x)[static_cast<std::size_t>(k)];
}

Tensor concat_reference(const Tensors& xs, int axis) {
  Shape shape = xs[0].shape();
  shape[axis] = 0;
  for (const auto& x : xs) shape[axis] += x.shape()[axis];
  return fill_by(shape, [&](Dims at) {
    std::size_t k = 0;
    while (at[axis] >= xs[k].shape()[axis]) at[axis] -= xs[k++].shape()[axis];
    return get(xs[k], at);
  });
}

Sample sample(const std::string& label, const Tensors& in, Fn run, Fn reference) {
  Sample s{label, in, std::move(run), std::move(reference)};
  s.second_order = true;
  s.tol = 0;
  s.tol_f32 = 1e-7;
  return s;
}

OpCase concat_case() {
  const auto one = [](const std::string& label, const Tensors& in, int axis, std::int64_t given) {
    return sample(
        label, in, [given](const Tensors& t) { return Tensors{concat(t, given)}; },
        [axis](const Tensors& t) { return Tensors{concat_reference(t, axis)}; });
  };
  Tensors many;
  for (int i = 0; i < 11; ++i) many.push_back(normal({2, i % 3}, "many" + std::to_string(i)));
  OpCase c{"concat", {}, {}};
  c.samples = {
      one("two, middle axis", {normal({2, 3, 5}, "a"), normal({2, 4, 5}, "b")}, 1, 1),
      one("three, last axis", {normal({3, 1}, "a"), normal({3, 7}, "b"), normal({3, 2}, "c")}, 1, -1),
      one("an empty one among them", {normal({0, 3}, "a"), normal({2, 3}, "b")}, 0, 0),
      one("all empty", {normal({2, 0}, "a"), normal({3, 0}, "b")}, 0, 0),
      one("one alone", {normal({5}, "a")}, 0, 0),
      one("eleven: more than the closure holds", many, 1, 1),
  };
  c.errors = {
      {"none", [] { concat({}, 0); }, "at least one"},
      {"shapes",
       [] {
         concat({normal({2, 3}, "a"), normal({3, 2}, "b")}, 0);
       },
       "[3, 2]"},
      {"ranks",
       [] {
         concat({normal({2, 3}, "a"), normal({2}, "b")}, 0);
       },
       "[2]"},
      {"dtypes",
       [] {
         concat({normal({2}, "a"), zeros({2})}, 0);
       },
       "one dtype"},
      {"axis", [] { concat({normal({2}, "a")}, 1); }, "axis"},
  };
  return c;
}

OpCase stack_case() {
  const auto one = [](const std::string& label, const Tensors& in, int axis, std::int64_t given) {
    return sample(
        label, in, [given](const Tensors& t) { return Tensors{stack(t, given)}; },
        [axis](const Tensors& t) {
          Shape shape = t[0].shape();
          shape.insert(axis, static_cast<std::int64_t>(t.size()));
          return Tensors{fill_by(shape, [&](Dims at) {
            const auto k = static_cast<std::size_t>(at[axis]);
            at.erase(axis);
            return get(t[k], at);
          })};
        });
  };
  OpCase c{"stack", {}, {}};
  c.samples = {
      one("front", {normal({2, 3}, "a"), normal({2, 3}, "b"), normal({2, 3}, "c")}, 0, 0),
      one("behind", {normal({2, 3}, "a"), normal({2, 3}, "b")}, 2, -1),
      one("scalars", {normal({}, "a"), normal({}, "b")}, 0, 0),
      one("empty", {normal({0, 3}, "a"), normal({0, 3}, "b")}, 1, 1),
  };
  c.errors = {
      {"none", [] { stack({}, 0); }, "at least one"},
      {"shapes",
       [] {
         stack({normal({2}, "a"), normal({3}, "b")}, 0);
       },
       "alike"},
      {"axis", [] { stack({normal({2}, "a")}, 2); }, "axis"},
  };
  return c;
}

Tensors split_reference(const Tensor& x, const std::vector<std::int64_t>& sizes, int axis) {
  Tensors out;
  std::int64_t begin = 0;
  for (auto n : sizes) {
    Shape shape = x.shape();
    shape[axis] = n;
    out.push_back(fill_by(shape, [&](Dims at) {
      at[axis] += begin;
      return get(x, at);
    }));
    begin += n;
  }
  return out;
}

OpCase split_case() {
  const auto one = [](const std::string& label, const Tensor& x, std::vector<std::int64_t> sizes, int axis,
                      std::int64_t given) {
    return sample(
        label, {x}, [sizes, given](const Tensors& t) { return split(t[0], sizes, given); },
        [sizes, axis](const Tensors& t) { return split_reference(t[0], sizes, axis); });
  };
  OpCase c{"split", {}, {}};
  c.samples = {
      one("uneven", normal({2, 7, 3}, "a"), {1, 4, 2}, 1, 1),
      one("a part of size 0", normal({5}, "a"), {0, 5, 0}, 0, 0),
      one("nine parts", normal({2, 12}, "a"), {1, 2, 1, 1, 1, 1, 2, 2, 1}, 1, -1),
      one("empty", normal({3, 0}, "a"), {1, 2}, 0, 0),
      // Only one part is used: the other cotangents are missing and mean zero.
      sample(
          "one part used", {normal({2, 5}, "a")},
          [](const Tensors& t) {
            return Tensors{split(t[0], {2, 3}, 1)[1]};
          },
          [](const Tensors& t) {
            return Tensors{split_reference(t[0], {2, 3}, 1)[1]};
          }),
  };
  c.errors = {
      {"sum",
       [] {
         split(normal({5}, "a"), {2, 2}, 0);
       },
       "add up"},
      {"negative",
       [] {
         split(normal({5}, "a"), {6, -1}, 0);
       },
       "negative"},
      {"axis", [] { split(normal({5}, "a"), {5}, 3); }, "axis"},
  };
  return c;
}

OpCase chunk_case() {
  const auto one = [](const std::string& label, const Tensor& x, std::int64_t n, int axis, std::int64_t given) {
    return sample(
        label, {x}, [n, given](const Tensors& t) { return chunk(t[0], n, given); },
        [n, axis](const Tensors& t) {
          const std::vector<std::int64_t> sizes(static_cast<std::size_t>(n), t[0].shape()[axis] / n);
          return split_reference(t[0], sizes, axis);
        });
  };
  OpCase c{"chunk", {}, {}};
  c.samples = {one("qkv", normal({2, 3, 12}, "a"), 3, 2, -1), one("first axis", normal({4, 3}, "a"), 2, 0, 0),
               one("one", normal({4, 1}, "a"), 1, 1, 1), one("empty", normal({0, 4}, "a"), 2, 1, 1)};
  c.errors = {
      {"does not divide",
       [] {
         chunk(normal({2, 5}, "a"), 2, 1);
       },
       "divide"},
      {"zero parts",
       [] {
         chunk(normal({2, 5}, "a"), 0, 1);
       },
       "divide"},
  };
  return c;
}

OpCase pad_case() {
  const auto one = [](const std::string& label, const Tensor& x, Dims before, Dims after, double value) {
    return sample(
        label, {x}, [=](const Tensors& t) { return Tensors{pad(t[0], before, after, value)}; },
        [=](const Tensors& t) {
          Shape shape = t[0].shape();
          for (int i = 0; i < shape.size(); ++i) shape[i] += before[i] + after[i];
          return Tensors{fill_by(shape, [&](Dims at) {
            for (int i = 0; i < at.size(); ++i) {
              at[i] -= before[i];
              if (at[i] < 0 || at[i] >= t[0].shape()[i]) return value;
            }
            return get(t[0], at);
          })};
        });
  };
  OpCase c{"pad", {}, {}};
  c.samples = {
      one("image", normal({2, 3, 4, 2}, "a"), {0, 1, 2, 0}, {0, 2, 0, 0}, 0),
      one("value", normal({3, 1}, "a"), {1, 1}, {0, 3}, -2.5),
      one("nothing", normal({3, 2}, "a"), {0, 0}, {0, 0}, 1),
      one("around an empty one", normal({0, 2}, "a"), {2, 0}, {1, 1}, 3),
      one("scalar", normal({}, "a"), {}, {}, 1),
  };
  c.errors = {
      {"too few",
       [] {
         pad(normal({3, 2}, "a"), {1}, {1, 1});
       },
       "every axis"},
      {"negative",
       [] {
         pad(normal({3, 2}, "a"), {1, 0}, {-1, 0});
       },
       "negative"},
  };
  return c;
}

OpCase flip_case() {
  const auto one = [](const std::string& label, const Tensor& x, Dims given, Dims axes) {
    return sample(
        label, {x}, [=](const Tensors& t) { return Tensors{flip(t[0], given)}; },
        [=](const Tensors& t) {
          return Tensors{fill_by(t[0].shape(), [&](Dims at) {
            for (auto a : axes)
              at[static_cast<int>(a)] = t[0].shape()[static_cast<int>(a)] - 1 - at[static_cast<int>(a)];
            return get(t[0], at);
          })};
        });
  };
  OpCase c{"flip", {}, {}};
  c.samples = {one("width", normal({2, 3, 5, 3}, "a"), {2}, {2}),
               one("two axes", normal({3, 4, 2}, "a"), {0, -1}, {0, 2}), one("size 1", normal({1, 3}, "a"), {0}, {0}),
               one("none", normal({3}, "a"), {}, {}), one("empty", normal({2, 0}, "a"), {0, 1}, {0, 1})};
  c.errors = {{"axis", [] { flip(normal({3}, "a"), {1}); }, "axis"},
              {"twice",
               [] {
                 flip(normal({3, 2}, "a"), {0, -2});
               },
               "twice"}};
  return c;
}

OpCase roll_case() {
  const auto one = [](const std::string& label, const Tensor& x, Dims shifts, Dims given, Dims axes) {
    return sample(
        label, {x}, [=](const Tensors& t) { return Tensors{roll(t[0], shifts, given)}; },
        [=](const Tensors& t) {
          return Tensors{fill_by(t[0].shape(), [&](Dims at) {
            for (int k = 0; k < axes.size(); ++k) {
              const int a = static_cast<int>(axes[k]);
              const std::int64_t n = t[0].shape()[a];
              at[a] = ((at[a] - shifts[k]) % n + n) % n;
            }
            return get(t[0], at);
          })};
        });
  };
  OpCase c{"roll", {}, {}};
  c.samples = {one("shifted windows", normal({2, 5, 4, 3}, "a"), {-2, 3}, {1, 2}, {1, 2}),
               one("more than a turn", normal({3, 7}, "a"), {-16}, {-1}, {1}),
               one("one axis twice", normal({5}, "a"), {1, 1}, {0, 0}, {0, 0}),
               one("none", normal({5, 1}, "a"), {0, 4}, {0, 1}, {0, 1}),
               one("empty", normal({0, 3}, "a"), {1, 1}, {0, 1}, {1, 1})};
  c.errors = {{"counts",
               [] {
                 roll(normal({3}, "a"), {1, 2}, {0});
               },
               "one shift per axis"},
              {"axis", [] { roll(normal({3}, "a"), {1}, {1}); }, "axis"}};
  return c;
}

OpCase repeat_case() {
  const auto one = [](const std::string& label, const Tensor& x, Dims counts) {
    return sample(
        label, {x}, [=](const Tensors& t) { return Tensors{repeat(t[0], counts)}; },
        [=](const Tensors& t) {
          const int lead = counts.size() - t[0].rank();
          Shape shape = counts;
          for (int i = 0; i < t[0].rank(); ++i) shape[lead + i] *= t[0].shape()[i];
          return Tensors{fill_by(shape, [&](const Dims& at) {
            Dims from;
            for (int i = 0; i < t[0].rank(); ++i) from.push_back(at[lead + i] % t[0].shape()[i]);
            return get(t[0], from);
          })};
        });
  };
  OpCase c{"repeat", {}, {}};
  c.samples = {one("both axes", normal({2, 3}, "a"), {3, 2}),  one("new leading axes", normal({3}, "a"), {2, 1, 2}),
               one("size 1", normal({1, 2}, "a"), {4, 1}),     one("once", normal({3, 2}, "a"), {1, 1}),
               one("zero times", normal({2, 2}, "a"), {1, 0}), one("scalar", normal({}, "a"), {3})};
  c.errors = {{"too few",
               [] {
                 repeat(normal({2, 3}, "a"), {2});
               },
               "every axis"},
              {"negative", [] { repeat(normal({2}, "a"), {-1}); }, "negative"}};
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() {
  return {concat_case(), stack_case(), split_case(), chunk_case(), pad_case(), flip_case(), roll_case(), repeat_case()};
}

}  // namespace capo::test
