// Samples of the views. References copy element by element through an index rule.
#include <capo/autograd/autograd.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>

#include <doctest/doctest.h>

namespace capo::test {
namespace {

// y[index] = x[f(index)] on the host, in x's dtype.
template <class F>
Tensor rearranged(const Tensor& x, const Shape& shape, const F& f) {
  const auto v = to_vector<double>(x);
  const Dims strides = contiguous_strides(x.shape());
  std::vector<double> out;
  Dims index = Dims::filled(shape.size(), 0);
  for (std::int64_t k = 0; k < numel(shape); ++k) {
    const Dims from = f(index);
    std::int64_t at = 0;
    for (int i = 0; i < from.size(); ++i) at += from[i] * strides[i];
    out.push_back(v[static_cast<std::size_t>(at)]);
    for (int i = shape.size() - 1; i >= 0 && ++index[i] == shape[i]; --i) index[i] = 0;
  }
  return from_vector<double>(out, shape);
}

Tensor same_order(const Tensor& x, const Shape& shape) { return from_vector<double>(to_vector<double>(x), shape); }

using One = std::function<Tensor(const Tensor&)>;

Sample sample(const std::string& label, const Tensor& x, One run, One reference) {
  Sample s{label, {x}, [run](const Tensors& in) { return Tensors{run(in[0])}; },
           [reference](const Tensors& in) { return Tensors{reference(in[0])}; }};
  s.tol = s.tol_f32 = 0;  // no arithmetic: the same values
  s.grad_tol = 1e-7;
  s.second_order = true;
  return s;
}

OpCase reshape_case() {
  OpCase c{"reshape", {}, {}};
  const auto add = [&](const Shape& from, const Shape& asked, const Shape& to) {
    c.samples.push_back(sample(
        cat(from, " to ", asked), normal(from, "reshape"), [=](const Tensor& x) { return reshape(x, asked); },
        [=](const Tensor& x) { return same_order(x, to); }));
  };
  add({2, 3, 4}, {6, 4}, {6, 4});
  add({2, 3, 4}, {3, -1, 2}, {3, 4, 2});
  add({4, 3}, {2, 2, 1, 3}, {2, 2, 1, 3});
  add({}, {1, 1}, {1, 1});
  add({1, 1, 1}, {}, {});
  add({5}, {5}, {5});
  add({0, 3}, {3, 0, 2}, {3, 0, 2});
  add({2, 3, 4, 5}, {24, 5}, {24, 5});
  c.samples.push_back(sample("of a permuted tensor", normal({4, 3, 2}, "reshape"),  // cannot be a view: copies
                             [](const Tensor& x) { return reshape(permute(x, {2, 1, 0}), {6, 4}); },
                             [](const Tensor& x) {
                               return rearranged(x, {6, 4},
                                                 [](const Dims& i) { return Dims{i[1], i[0] % 3, i[0] / 3}; });
                             }));
  c.errors = {{"count", [] { reshape(zeros({2, 3}), {4}); }, "has 6 elements, asked for [4]"},
              {"two holes", [] { reshape(zeros({2, 3}), {-1, -1}); }, "only one size may be -1"},
              {"no division", [] { reshape(zeros({2, 3}), {4, -1}); }, "does not divide"},
              {"hole beside zero", [] { reshape(zeros({0, 3}), {0, -1}); }, "does not divide"},
              {"negative", [] { reshape(zeros({2, 3}), {-2, -3}); }, "sizes must be at least"},
              {"overflow", [] { reshape(zeros({2, 3}), {std::int64_t{1} << 40, std::int64_t{1} << 40, -1}); },
               "has 6 elements"}};
  return c;
}

OpCase permute_case() {
  OpCase c{"permute", {}, {}};
  const auto add = [&](const Shape& from, const Dims& axes, const Dims& clean) {
    c.samples.push_back(sample(cat(from, " by ", axes), normal(from, "permute"),
                               [=](const Tensor& x) { return permute(x, axes); },
                               [=](const Tensor& x) {
                                 Shape shape;
                                 for (const auto a : clean) shape.push_back(x.size(a));
                                 return rearranged(x, shape, [&](const Dims& i) {
                                   Dims from_index = Dims::filled(clean.size(), 0);
                                   for (int k = 0; k < clean.size(); ++k) from_index[static_cast<int>(clean[k])] = i[k];
                                   return from_index;
                                 });
                               }));
  };
  add({2, 3, 4}, {2, 0, 1}, {2, 0, 1});
  add({2, 3, 4, 5}, {0, -1, 1, 2}, {0, 3, 1, 2});
  add({1, 3, 1}, {2, 1, 0}, {2, 1, 0});
  add({0, 3}, {1, 0}, {1, 0});
  add({}, {}, {});
  add({2, 2, 2, 2, 2, 2, 2, 2}, {7, 5, 3, 1, 0, 2, 4, 6}, {7, 5, 3, 1, 0, 2, 4, 6});
  c.errors = {{"too few", [] { permute(zeros({2, 3}), {0}); }, "must name every axis"},
              {"twice", [] { permute(zeros({2, 3}), {0, 0}); }, "names an axis twice"},
              {"outside", [] { permute(zeros({2, 3}), {0, 2}); }, "axis must be in [-2, 2), got 2"}};
  return c;
}

OpCase transpose_case() {
  OpCase c{"transpose", {}, {}};
  for (const Shape& shape : {Shape{3, 4, 2}, Shape{3, 1, 2}, Shape{3, 0, 2}, Shape{33, 20, 11}})
    c.samples.push_back(sample(to_string(shape), normal(shape, "transpose"),
                               [](const Tensor& x) { return transpose(x, 0, -1); },
                               [](const Tensor& x) {
                                 return rearranged(x, {x.size(2), x.size(1), x.size(0)},
                                                   [](const Dims& i) { return Dims{i[2], i[1], i[0]}; });
                               }));
  c.samples.push_back(sample("axis with itself", normal({3, 4}, "transpose"),
                             [](const Tensor& x) { return transpose(x, 1, 1); },
                             [](const Tensor& x) { return same_order(x, x.shape()); }));
  c.errors = {{"outside", [] { transpose(zeros({2, 3}), 0, 2); }, "axis must be in"},
              {"rank 0", [] { transpose(zeros({}), 0, 0); }, "axis must be in"}};
  return c;
}

OpCase expand_case() {
  OpCase c{"expand", {}, {}};
  const auto add = [&](const Shape& from, const Shape& to) {
    c.samples.push_back(sample(cat(from, " to ", to), normal(from, "expand"),
                               [=](const Tensor& x) { return expand(x, to); },
                               [=](const Tensor& x) {
                                 const int lead = to.size() - x.rank();
                                 return rearranged(x, to, [&](const Dims& i) {
                                   Dims at;
                                   for (int k = 0; k < x.rank(); ++k) at.push_back(x.size(k) == 1 ? 0 : i[lead + k]);
                                   return at;
                                 });
                               }));
    c.samples.back().tol_f32 = 1e-6;  // the gradient is a sum
  };
  add({3, 1, 2}, {3, 4, 2});
  add({1}, {5});
  add({}, {2, 3});
  add({2, 1}, {3, 2, 4});
  add({1, 3}, {0, 3});
  add({2, 3}, {2, 3});
  add({1, 7, 1}, {601, 7, 5});
  c.errors = {{"not one", [] { expand(zeros({2, 3}), {4, 3}); }, "[2, 3] cannot become [4, 3]"},
              {"fewer axes", [] { expand(zeros({2, 3}), {3}); }, "cannot become [3]"}};
  return c;
}

OpCase slice_case() {
  OpCase c{"slice", {}, {}};
  const auto add = [&](const Shape& from, std::int64_t axis, std::int64_t begin, std::int64_t end, std::int64_t step) {
    c.samples.push_back(sample(cat(from, " axis ", axis, " [", begin, ", ", end, ") by ", step), normal(from, "slice"),
                               [=](const Tensor& x) { return slice(x, axis, begin, end, step); },
                               [=](const Tensor& x) {
                                 const int a = static_cast<int>(axis < 0 ? axis + x.rank() : axis);
                                 Shape shape = x.shape();
                                 shape[a] = 0;
                                 for (auto i = begin; i < end; i += step) ++shape[a];
                                 return rearranged(x, shape, [&](Dims i) {
                                   i[a] = begin + i[a] * step;
                                   return i;
                                 });
                               }));
  };
  add({4, 5, 3}, 1, 1, 4, 1);
  add({4, 5, 3}, -1, 0, 3, 2);
  add({7}, 0, 1, 7, 3);
  add({4, 5}, 0, 2, 2, 1);
  add({4, 5}, 0, 4, 4, 1);
  add({4, 1}, 1, 0, 1, 1);
  add({0, 5}, 1, 1, 5, 2);
  add({4, 5}, 1, 0, 5, 100);
  add({3, 211, 31}, 1, 5, 200, 2);
  c.errors = {{"past the end", [] { slice(zeros({2, 3}), 1, 0, 4); }, "must lie in axis 1 of [2, 3]"},
              {"negative begin", [] { slice(zeros({2, 3}), 1, -1, 2); }, "must lie in axis"},
              {"backwards", [] { slice(zeros({2, 3}), 1, 2, 1); }, "must lie in axis"},
              {"step 0", [] { slice(zeros({2, 3}), 1, 0, 1, 0); }, "must lie in axis"},
              {"axis", [] { slice(zeros({2, 3}), 2, 0, 1); }, "axis must be in"}};
  return c;
}

OpCase select_case() {
  OpCase c{"select", {}, {}};
  const auto add = [&](const Shape& from, std::int64_t axis, std::int64_t at, const Shape& to) {
    c.samples.push_back(sample(cat(from, " axis ", axis, " at ", at), normal(from, "select"),
                               [=](const Tensor& x) { return select(x, axis, at); },
                               [=](const Tensor& x) {
                                 const int a = static_cast<int>(axis < 0 ? axis + x.rank() : axis);
                                 return rearranged(x, to, [&](Dims i) {
                                   i.insert(a, at);
                                   return i;
                                 });
                               }));
  };
  add({4, 5, 3}, 1, 2, {4, 3});
  add({4, 5, 3}, -1, 0, {4, 5});
  add({7}, 0, 6, {});
  add({4, 0}, 0, 3, {0});
  c.errors = {{"outside", [] { select(zeros({2, 3}), 1, 3); }, "slice: [3, 4) step 1 must lie"},
              {"axis", [] { select(zeros({2, 3}), 2, 0); }, "slice: axis must be in"}};
  return c;
}

OpCase unbind_case() {
  OpCase c{"unbind", {}, {}};
  for (const auto& [shape, axis] :
       {std::pair<Shape, int>{{4, 3, 2}, 1}, {{3, 5}, -1}, {{1, 4}, 0}, {{2, 0}, 0}, {{3, 17, 13}, 0}}) {
    const int a = axis;
    Sample s{cat(shape, " axis ", a), {normal(shape, "unbind")}, [a](const Tensors& in) { return unbind(in[0], a); },
             [a](const Tensors& in) {
               const Tensor& x = in[0];
               const int at = a < 0 ? a + x.rank() : a;
               Shape part = x.shape();
               part.erase(at);
               Tensors out;
               for (std::int64_t k = 0; k < x.size(a); ++k)
                 out.push_back(rearranged(x, part, [&](Dims i) {
                   i.insert(at, k);
                   return i;
                 }));
               return out;
             }};
    s.tol = s.tol_f32 = 0;
    s.second_order = true;
    c.samples.push_back(s);
  }
  c.samples.push_back({"some parts unused", {normal({3, 4}, "unbind")},
                       [](const Tensors& in) { return Tensors{unbind(in[0], 0)[1]}; },
                       [](const Tensors& in) {
                         return Tensors{rearranged(in[0], {4}, [](const Dims& i) { return Dims{1, i[0]}; })};
                       }});
  c.errors = {{"axis", [] { unbind(zeros({2, 3}), 2); }, "axis must be in"},
              {"rank 0", [] { unbind(zeros({}), 0); }, "axis must be in"}};
  return c;
}

OpCase squeeze_case() {
  OpCase c{"squeeze", {}, {}};
  const auto add = [&](const Shape& from, std::int64_t axis, const Shape& to) {
    c.samples.push_back(sample(
        cat(from, " axis ", axis), normal(from, "squeeze"), [=](const Tensor& x) { return squeeze(x, axis); },
        [=](const Tensor& x) { return same_order(x, to); }));
  };
  add({3, 1, 2}, 1, {3, 2});
  add({3, 2, 1}, -1, {3, 2});
  add({1}, 0, {});
  add({0, 1}, 1, {0});
  c.errors = {{"size 2", [] { squeeze(zeros({2, 1}), 0); }, "must have size 1"},
              {"axis", [] { squeeze(zeros({1}), 1); }, "axis must be in"}};
  return c;
}

OpCase unsqueeze_case() {
  OpCase c{"unsqueeze", {}, {}};
  const auto add = [&](const Shape& from, std::int64_t axis, const Shape& to) {
    c.samples.push_back(sample(
        cat(from, " axis ", axis), normal(from, "unsqueeze"), [=](const Tensor& x) { return unsqueeze(x, axis); },
        [=](const Tensor& x) { return same_order(x, to); }));
  };
  add({3, 2}, 1, {3, 1, 2});
  add({3, 2}, -1, {3, 2, 1});
  add({}, 0, {1});
  add({0, 3}, 0, {1, 0, 3});
  c.errors = {{"axis", [] { unsqueeze(zeros({2}), 2); }, "axis must be in [-2, 2), got 2"},
              {"rank 9", [] { unsqueeze(zeros({1, 1, 1, 1, 1, 1, 1, 1}), 0); }, "Dims: at most 8 dimensions"}};
  return c;
}

OpCase flatten_case() {
  OpCase c{"flatten", {}, {}};
  const auto add = [&](const Shape& from, std::int64_t first, std::int64_t last, const Shape& to) {
    c.samples.push_back(sample(cat(from, " axes ", first, "..", last), normal(from, "flatten"),
                               [=](const Tensor& x) { return flatten(x, first, last); },
                               [=](const Tensor& x) { return same_order(x, to); }));
  };
  add({2, 3, 4, 5}, 1, 2, {2, 12, 5});
  add({2, 3, 4}, 0, -1, {24});
  add({2, 3}, 1, 1, {2, 3});
  add({2, 0, 3}, 1, 2, {2, 0});
  add({1, 1, 7}, 0, 1, {1, 7});
  c.errors = {{"order", [] { flatten(zeros({2, 3}), 1, 0); }, "must not come after"},
              {"axis", [] { flatten(zeros({2, 3}), 0, 2); }, "axis must be in"}};
  return c;
}

OpCase stop_gradient_case() {
  OpCase c{"stop_gradient", {}, {}};
  for (const Shape& shape : {Shape{2, 3}, Shape{}, Shape{0, 2}}) {
    c.samples.push_back(sample(to_string(shape), normal(shape, "stop"), stop_gradient,
                               [](const Tensor& x) { return same_order(x, x.shape()); }));
    c.samples.back().gradient = false;
  }
  c.errors = {{"undefined", [] { stop_gradient(Tensor()); }, "tensor: used while undefined"},
              {"no way back",
               [] {
                 const Tensor x = ones({2});
                 set_requires_grad(x, true);
                 grad({stop_gradient(x)}, {x}, {x});
               },
               "grad: an output f32 [2] cpu does not depend"}};
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() {
  return {reshape_case(), permute_case(), transpose_case(), expand_case(), slice_case(), select_case(), unbind_case(),
          squeeze_case(), unsqueeze_case(), flatten_case(), stop_gradient_case()};
}

// Every layout of a small tensor against every shape of its size: a view where strides allow it, a copy elsewhere, the
// same elements in both.
TEST_CASE("reshape of strided tensors") {
  const Shape shapes[] = {{24}, {2, 12}, {12, 2}, {4, 6}, {6, 4}, {3, 8}, {8, 3},
                          {2, 3, 4}, {4, 3, 2}, {2, 2, 6}, {1, 24, 1}, {2, 2, 2, 3}, {3, 2, 2, 2}, {2, 1, 3, 1, 4}};
  const Tensor base = arange(48, f64);
  Tensors layouts = {reshape(slice(base, 0, 0, 24), {2, 3, 4}),
                     permute(reshape(slice(base, 0, 24, 48), {4, 3, 2}), {2, 1, 0}),
                     slice(reshape(base, {2, 6, 4}), 1, 0, 6, 2),
                     slice(reshape(base, {2, 3, 8}), 2, 1, 8, 2),
                     slice(reshape(base, {4, 3, 4}), 0, 1, 3),
                     expand(reshape(slice(base, 0, 3, 7), {1, 1, 4}), {2, 3, 4}),
                     expand(reshape(slice(base, 0, 3, 9), {2, 3, 1}), {2, 3, 4}),
                     permute(reshape(slice(base, 0, 0, 24), {3, 2, 4}), {1, 0, 2})};
  for (const auto& x : layouts) {
    REQUIRE(x.shape() == Shape{2, 3, 4});
    for (const auto& shape : shapes) {
      INFO(to_string(x.strides()), " to ", to_string(shape));
      CHECK(to_vector<double>(reshape(x, shape)) == to_vector<double>(x));
    }
  }
  CHECK(reshape(layouts[0], {6, 4}).storage() == base.storage());
  CHECK(reshape(layouts[2], {2, 3, 2, 2}).storage() == base.storage());       // cuts an axis
  CHECK(reshape(layouts[3], {6, 4}).storage() == base.storage());             // rows of a longer row
  CHECK_FALSE(reshape(layouts[1], {6, 4}).storage() == base.storage());       // must copy
  CHECK(reshape(layouts[5], {6, 4}).storage() == base.storage());             // stride 0 twice is one axis
}

TEST_CASE("views share memory and nothing else") {
  const Tensor x = zeros({4, 6});
  fill_(slice(x, 0, 1, 2), 5);
  CHECK(to_vector<float>(select(x, 0, 1)) == std::vector<float>(6, 5.0f));
  // One row, any step.
  CHECK(to_vector<float>(slice(x, 0, 1, 4, std::int64_t{1} << 62)) == std::vector<float>(6, 5.0f));
  CHECK(transpose(x, 0, 1).storage() == x.storage());
  CHECK(expand(select(x, 0, 0), {3, 6}).strides() == Dims{0, 1});
}

}  // namespace capo::test
