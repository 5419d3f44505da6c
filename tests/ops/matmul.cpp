// matmul and linear against scalar loops; the activations against unary ops.
#include <capo/ops/binary.h>
#include <capo/ops/join.h>
#include <capo/ops/matmul.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <string>

namespace capo::test {
namespace {

Tensor loops(const Tensor& a, const Tensor& b) {
  Shape ab = a.shape(), bb = b.shape();
  for (int i = 0; i < 2; ++i) ab.pop_back(), bb.pop_back();
  const Shape batch = broadcast_shapes("reference", ab, bb);
  const std::int64_t m = a.size(-2), k = a.size(-1), n = b.size(-1), matrices = numel(batch);
  Shape as = batch, bs = batch, out = batch;
  as.push_back(m), as.push_back(k);
  bs.push_back(k), bs.push_back(n);
  out.push_back(m), out.push_back(n);
  const auto va = to_vector<double>(expand(a, as)), vb = to_vector<double>(expand(b, bs));
  std::vector<double> y(static_cast<std::size_t>(matrices * m * n));
  for (std::int64_t i = 0; i < matrices; ++i)
    for (std::int64_t r = 0; r < m; ++r)
      for (std::int64_t c = 0; c < n; ++c) {
        double sum = 0;
        for (std::int64_t p = 0; p < k; ++p)
          sum += va[static_cast<std::size_t>((i * m + r) * k + p)] * vb[static_cast<std::size_t>((i * k + p) * n + c)];
        y[static_cast<std::size_t>((i * m + r) * n + c)] = sum;
      }
  return values(y, out);
}

Tensor activate(const Tensor& z, Activation activation) {
  switch (activation) {
    case Activation::none: return z;
    case Activation::relu: return relu(z);
    case Activation::gelu: return gelu(z);
    case Activation::gelu_tanh: return gelu_tanh(z);
    case Activation::quick_gelu: return quick_gelu(z);
    case Activation::silu: return silu(z);
  }
  return z;
}

Sample product(const std::string& label, const Tensor& a, const Tensor& b) {
  return {label, {a, b}, [](const Tensors& in) -> Tensors { return {matmul(in[0], in[1])}; },
          [](const Tensors& in) -> Tensors { return {loops(in[0], in[1])}; }, {}, true, true};
}

Sample layer(const std::string& label, const Tensor& x, const Tensor& w, const Tensor& b, Activation activation) {
  Tensors inputs = {x, w};
  if (b.defined()) inputs.push_back(b);
  Sample s{label, inputs,
           [activation](const Tensors& in) -> Tensors {
             return {linear(in[0], in[1], in.size() > 2 ? in[2] : Tensor(), activation)};
           },
           [activation](const Tensors& in) -> Tensors {
             Shape rows = {1, in[0].size(-1)}, out = in[0].shape();
             for (int i = 0; i + 1 < in[0].rank(); ++i) rows[0] *= in[0].shape()[i];
             out.back() = in[1].size(0);
             Tensor z = loops(reshape(in[0], rows), transpose(in[1], 0, 1));
             if (in.size() > 2) z = z + in[2];
             return {activate(reshape(z, out), activation)};
           }, {}, true, true};
  s.tol_f32 = 4e-6;
  return s;
}

OpCase matmul_case() {
  OpCase c{"matmul", {}, {}};
  auto& s = c.samples;
  s.push_back(product("3 x 5 x 4", normal({3, 5}, "a"), normal({5, 4}, "b", 1)));
  s.push_back(product("one element", normal({1, 1}, "a"), normal({1, 1}, "b")));
  s.push_back(product("row times column", normal({1, 63}, "a"), normal({63, 1}, "b")));
  s.push_back(product("column times row", normal({17, 1}, "a"), normal({1, 65}, "b")));
  s.push_back(product("odd tails", normal({65, 17}, "a"), normal({17, 63}, "b", 0.5)));
  s.push_back(product("batch", normal({3, 65, 9}, "a"), normal({3, 9, 65}, "b")));
  s.push_back(product("many small ones", normal({6, 3, 17, 8}, "a"), normal({6, 3, 8, 17}, "b")));
  s.push_back(product("one b for all", normal({2, 3, 5, 7}, "a"), normal({7, 4}, "b")));
  s.push_back(product("one a for all", normal({5, 7}, "a"), normal({2, 3, 7, 4}, "b")));
  s.push_back(product("both broadcast", normal({2, 1, 5, 3}, "a"), normal({3, 3, 4}, "b")));
  s.push_back(product("several blocks of rows", normal({2, 130, 19}, "a"), normal({19, 33}, "b")));
  s.push_back(product("b in place", normal({130, 7}, "a"), normal({7, 32}, "b")));
  s.push_back(product("several blocks of k", normal({3, 1030}, "a"), normal({1030, 5}, "b")));
  s.push_back(product("split k", normal({100, 2100}, "a", 0.2), normal({2100, 40}, "b")));
  s.back().second_order = false;
  s.push_back(product("whole packs", normal({2, 72, 40}, "a"), normal({2, 40, 24}, "b")));
  s.back().second_order = false;
  s.push_back(
      product("more matrices than blocks that run at once", normal({128, 3, 16}, "a"), normal({128, 16, 8}, "b")));
  s.back().second_order = false;
  s.push_back(product("tiles of 128", normal({32, 130, 40}, "a"), normal({32, 40, 136}, "b")));
  s.back().second_order = false;
  s.push_back(product("few columns, along k", normal({50, 70}, "a"), transpose(normal({9, 70}, "b"), 0, 1)));
  s.back().second_order = false;
  s.push_back(product("few rows, along k", normal({2, 6, 77}, "a"), transpose(normal({2, 35, 77}, "b"), -2, -1)));
  s.back().second_order = false;
  s.push_back(product("whole rows, columns in blocks", normal({130, 40}, "a"), normal({40, 770}, "b")));
  s.back().second_order = false;
  s.push_back(product("K = 0", normal({3, 0}, "a"), normal({0, 4}, "b")));
  s.push_back(product("M = 0", normal({0, 3}, "a"), normal({3, 4}, "b")));
  s.push_back(product("N = 0", normal({2, 3, 4}, "a"), normal({4, 0}, "b")));
  s.push_back(product("no matrices", normal({0, 2, 3}, "a"), normal({3, 4}, "b")));
  Sample views = product("transposed and expanded views", normal({7, 5}, "a"), normal({7, 4}, "b"));
  views.run = [](const Tensors& in) -> Tensors {
    return {matmul(expand(transpose(in[0], 0, 1), {3, 5, 7}), expand(in[1], {3, 7, 4}))};
  };
  views.reference = [](const Tensors& in) -> Tensors {
    return {loops(expand(transpose(in[0], 0, 1), {3, 5, 7}), expand(in[1], {3, 7, 4}))};
  };
  s.push_back(views);
  Sample narrow = product("a narrow layer's weight gradient", normal({80, 40}, "a"), normal({80, 6}, "b"));
  narrow.run = [](const Tensors& in) -> Tensors { return {matmul(transpose(in[0], 0, 1), in[1])}; };
  narrow.reference = [](const Tensors& in) -> Tensors { return {loops(transpose(in[0], 0, 1), in[1])}; };
  narrow.second_order = false;
  s.push_back(narrow);
  // Weight gradients, whose first operand lies transposed and is read so: rows, columns and k with remainders, chunks
  // of k.
  const auto turned = [&](const std::string& label, const Shape& a, const Shape& b) {
    Sample t = product(label, normal(a, label + " a", 0.2), normal(b, label + " b"));
    t.run = [](const Tensors& in) -> Tensors { return {matmul(transpose(in[0], -2, -1), in[1])}; };
    t.reference = [](const Tensors& in) -> Tensors { return {loops(transpose(in[0], -2, -1), in[1])}; };
    t.second_order = false;
    s.push_back(t);
  };
  turned("a turned", {300, 29}, {300, 112});
  turned("a turned, long", {1900, 70}, {1900, 64});
  turned("a turned, odd columns", {390, 4}, {390, 75});
  turned("a turned, eight rows", {420, 8}, {420, 128});
  turned("a turned, more rows than columns", {910, 150}, {910, 48});
  turned("a turned, batch", {3, 130, 13}, {3, 130, 32});
  // A short k: C is written from end to end.
  for (const std::int64_t k : {1, 7, 8, 16, 70}) {
    s.push_back(product(cat("k = ", k, " across"), normal({131, k}, "a"), normal({k, 96}, "b")));
    s.push_back(
        product(cat("k = ", k, " across, odd columns"), normal({290, k}, "a"), transpose(normal({77, k}, "b"), 0, 1)));
    s[s.size() - 2].second_order = s.back().second_order = false;
  }
  s.push_back(product("few columns of b side by side", normal({70, 66}, "a"), normal({66, 9}, "b")));
  s.back().second_order = false;
  c.errors = {
      {"rank 1", [] { matmul(normal({3}, "a"), normal({3, 2}, "b")); }, "rank 2 or more"},
      {"inner sizes", [] { matmul(normal({2, 3}, "a"), normal({4, 2}, "b")); }, "columns of a must equal rows of b"},
      {"batch", [] { matmul(normal({2, 2, 3}, "a"), normal({3, 3, 2}, "b")); }, "[2]"},
      {"dtypes", [] { matmul(normal({2, 3}, "a"), cast(normal({3, 2}, "b"), f32)); }, "one floating dtype"},
      {"integers", [] { matmul(integers({2, 3}, "a", 0, 5), integers({3, 2}, "b", 0, 5)); }, "one floating dtype"},
  };
  return c;
}

OpCase linear_case() {
  OpCase c{"linear", {}, {}};
  auto& s = c.samples;
  using A = Activation;
  s.push_back(layer("plain", normal({4, 3}, "x"), normal({5, 3}, "w", 1), normal({5}, "b"), A::none));
  s.push_back(layer("no bias", normal({2, 3, 7}, "x", 2), normal({17, 7}, "w"), {}, A::none));
  s.push_back(layer("one row", normal({9}, "x"), normal({4, 9}, "w"), normal({4}, "b", 1), A::gelu));
  s.push_back(layer("gelu", normal({3, 17, 6}, "x"), normal({65, 6}, "w"), normal({65}, "b"), A::gelu));
  s.push_back(layer("gelu across", normal({140, 9}, "x"), normal({83, 9}, "w"), normal({83}, "b"), A::gelu));
  s.back().second_order = false;
  s.push_back(layer("bias across", normal({140, 8}, "x"), normal({83, 8}, "w"), normal({83}, "b"), A::none));
  s.back().second_order = false;
  s.push_back(layer("gelu_tanh", normal({5, 6}, "x"), normal({9, 6}, "w"), normal({9}, "b"), A::gelu_tanh));
  s.push_back(layer("quick_gelu", normal({5, 6}, "x"), normal({9, 6}, "w"), {}, A::quick_gelu));
  s.push_back(layer("silu", normal({2, 3, 6}, "x"), normal({63, 6}, "w"), normal({63}, "b"), A::silu));
  s.push_back(layer("relu", normal({2, 3, 6}, "x", 0.3), normal({7, 6}, "w"), normal({7}, "b"), A::relu));
  s.push_back(layer("many rows", normal({2, 65, 5}, "x"), normal({66, 5}, "w"), normal({66}, "b"), A::gelu));
  s.push_back(layer("long k in chunks", normal({3, 2051}, "x"), normal({130, 2051}, "w", 0, 0.03), normal({130}, "b"),
                    A::silu));
  s.back().second_order = false;
  s.push_back(layer("long k, many rows", normal({100, 2051}, "x"), normal({70, 2051}, "w", 0, 0.03), normal({70}, "b"),
                    A::gelu));
  s.back().second_order = false;
  s.push_back(layer("no rows", normal({0, 3}, "x"), normal({4, 3}, "w"), normal({4}, "b"), A::gelu));
  s.push_back(layer("no inputs: the bias", normal({3, 0}, "x"), normal({4, 0}, "w"), normal({4}, "b"), A::gelu));
  s.push_back(layer("no outputs", normal({3, 2}, "x"), normal({0, 2}, "w"), normal({0}, "b"), A::none));
  c.errors = {
      {"w rank", [] { linear(normal({2, 3}, "x"), normal({3}, "w")); }, "w [O, I]"},
      {"w columns", [] { linear(normal({2, 3}, "x"), normal({4, 5}, "w")); }, "w must be [O, 3]"},
      {"bias size", [] { linear(normal({2, 3}, "x"), normal({4, 3}, "w"), normal({3}, "b")); }, "b must be"},
      {"dtypes", [] { linear(normal({2, 3}, "x"), cast(normal({4, 3}, "w"), f32)); }, "one floating dtype"},
  };
  return c;
}

// inputs: r, then x, w and maybe b of each branch; the branches' first columns.
Sample added(const std::string& label, const Tensors& inputs, const std::vector<std::int64_t>& columns, bool bias) {
  const auto branches = [=](const Tensors& in) {
    std::vector<LinearBranch> out;
    for (std::size_t i = 0, at = 1; i < columns.size(); ++i, at += bias ? 3 : 2)
      out.push_back({in[at], in[at + 1], bias ? in[at + 2] : Tensor(), columns[i]});
    return out;
  };
  Sample s;
  s.label = label;
  s.inputs = inputs;
  s.run = [=](const Tensors& in) -> Tensors { return {add_linear(in[0], branches(in))}; };
  s.reference = [=](const Tensors& in) -> Tensors {
    Tensors parts;
    std::int64_t done = 0;
    for (const auto& [x, w, b, column] : branches(in)) {
      if (done < column) parts.push_back(slice(in[0], -1, done, column));
      done = column + w.size(0);
      const Tensor r = slice(in[0], -1, column, done);
      std::int64_t rows = 1;
      for (int i = 0; i + 1 < x.rank(); ++i) rows *= x.shape()[i];
      const Tensor d = matmul(reshape(x, {rows, x.size(-1)}), transpose(w, 0, 1));
      parts.push_back(r + reshape(b.defined() ? d + b : d, r.shape()));
    }
    if (done < in[0].size(-1)) parts.push_back(slice(in[0], -1, done, in[0].size(-1)));
    return {parts.size() == 1 ? parts[0] : concat(parts, -1)};
  };
  s.second_order = true;
  s.tol_f32 = 4e-6;
  return s;
}

OpCase add_linear_case() {
  OpCase c{"add_linear", {}, {}};
  auto& s = c.samples;
  const auto n = [](const Shape& shape, const char* name) { return normal(shape, cat(name, shape)); };
  s.push_back(added("plain", {n({4, 5}, "r"), n({4, 3}, "x"), n({5, 3}, "w"), n({5}, "b")}, {0}, true));
  s.push_back(added("no bias", {n({2, 3, 17}, "r"), n({2, 3, 7}, "x"), n({17, 7}, "w")}, {0}, false));
  s.push_back(added("one row", {n({4}, "r"), n({9}, "x"), n({4, 9}, "w"), n({4}, "b")}, {0}, true));
  s.push_back(added("columns in the middle", {n({3, 9}, "r"), n({3, 2}, "x"), n({4, 2}, "w"), n({4}, "b")}, {3}, true));
  s.push_back(added("first and last columns",
                    {n({2, 7, 30}, "r"), n({2, 7, 4}, "x"), n({10, 4}, "w"), n({2, 7, 3}, "x"), n({10, 3}, "w")},
                    {0, 20}, false));
  s.push_back(added("three that meet, whole packs",
                    {n({2, 35, 96}, "r"), n({2, 35, 8}, "x"), n({32, 8}, "w"), n({32}, "b"), n({2, 35, 16}, "x"),
                     n({32, 16}, "w"), n({32}, "c"), n({2, 35, 24}, "x"), n({32, 24}, "w"), n({32}, "d")},
                    {0, 32, 64}, true));
  s.push_back(
      added("many rows, packs", {n({130, 64}, "r"), n({130, 24}, "x"), n({64, 24}, "w"), n({64}, "b")}, {0}, true));
  s.push_back(added("a range of many rows", {n({130, 150}, "r"), n({130, 8}, "x"), n({65, 8}, "w")}, {50}, false));
  s.push_back(added("long k in chunks",
                    {n({3, 150}, "r"), n({3, 2051}, "x"), normal({130, 2051}, "w", 0, 0.03), n({130}, "b")}, {7},
                    true));
  s.back().second_order = false;
  s.push_back(added("long k, many rows",
                    {n({100, 80}, "r"), n({100, 2051}, "x"), normal({70, 2051}, "w", 0, 0.03), n({70}, "b")}, {10},
                    true));
  s.back().second_order = false;
  s.push_back(added("no rows", {n({0, 5}, "r"), n({0, 3}, "x"), n({4, 3}, "w"), n({4}, "b")}, {1}, true));
  s.push_back(added("no inputs: the bias", {n({3, 5}, "r"), n({3, 0}, "x"), n({4, 0}, "w"), n({4}, "b")}, {1}, true));
  s.push_back(added("no columns", {n({3, 5}, "r"), n({3, 2}, "x"), n({0, 2}, "w"), n({0}, "b")}, {2}, true));
  const Tensor r = n({2, 3}, "r"), x = n({2, 4}, "x"), w = n({3, 4}, "w");
  c.errors = {
      {"rows", [=] { add_linear(r, {{n({3, 4}, "x"), w}}); }, "leading axes of r [2, 3]"},
      {"rank", [=] { add_linear(r, {{n({1, 2, 4}, "x"), w}}); }, "of r's rank"},
      {"w columns", [=] { add_linear(r, {{x, n({3, 5}, "w")}}); }, "w must be [O, 4]"},
      {"beyond r", [=] { add_linear(r, {{x, w, {}, 1}}); }, "columns 1 .. 4"},
      {"before the one before", [=] { add_linear(r, {{x, w}, {x, n({1, 4}, "w"), {}, 0}}); }, "must follow each other"},
      {"bias", [=] { add_linear(r, {{x, w, n({2}, "b")}}); }, "b must be"},
      {"dtypes", [=] { add_linear(r, {{x, cast(w, f32)}}); }, "x and w must be"},
      {"none", [=] { add_linear(r, {}); }, "needs 1 to 8 branches"},
  };
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() { return {matmul_case(), linear_case(), add_linear_case()}; }

TEST_CASE("linear with an activation: what create_graph records grows with the depth, not faster") {
  struct Seen {
    int ops = 0, activations = 0;
    static void hook(const char* op, const Tensor&, void* user) {
      auto& seen = *static_cast<Seen*>(user);
      ++seen.ops;
      seen.activations += std::string(op) == "gelu" || std::string(op) == "relu" || std::string(op) == "silu";
    }
  };
  for (const Activation act : {Activation::relu, Activation::gelu, Activation::silu}) {
    const auto recorded = [&](int depth) {
      const Tensor x = normal({3, 4}, "x"), w = normal({4, 4}, "w");
      set_requires_grad(x, true);
      Tensor y = x;
      for (int i = 0; i < depth; ++i) y = linear(y, w, {}, act);
      Seen seen;
      const OpObserver observer(Seen::hook, &seen);
      grad({y}, {x}, {ones({3, 4}, f64)}, {.create_graph = true});
      CHECK(seen.activations == 0);  // the forward is not run again
      return seen.ops;
    };
    const int two = recorded(2), four = recorded(4), eight = recorded(8);
    CHECK(two > 2);
    CHECK(four - two > 0);
    CHECK(eight - four == 2 * (four - two));
  }
}

TEST_CASE("a linear's gradient is added to what reached its input before, without a pass of its own") {
  const Tensor x = cast(normal({65, 24}, "x"), f32), w = cast(normal({33, 24}, "w"), f32),
               a = cast(normal({8, 24}, "a"), f32);
  for (const bool leaf : {true, false}) {
    const Tensor start = x.detach();
    set_requires_grad(start, true);
    const Tensor in = leaf ? start : start * 1.0;
    const Tensor y = linear(in, w), h = linear(in, a), dy = cast(normal({65, 33}, "dy"), f32),
                 dh = cast(normal({65, 8}, "dh"), f32);
    std::vector<std::string> ops;
    const auto hook = [](const char* op, const Tensor&, void* user) {
      static_cast<std::vector<std::string>*>(user)->push_back(op);
    };
    Tensors g;
    {
      const OpObserver observer(hook, &ops);
      g = grad({y, h}, {start}, {dy, dh});
    }
    CHECK(std::count(ops.begin(), ops.end(), "add_linear") == 1);
    CHECK(std::count(ops.begin(), ops.end(), "add") == 0);
    CHECK(same_bits(g[0], matmul(dh, a) + matmul(dy, w)));  // on the CPU
  }
}

}  // namespace capo::test
