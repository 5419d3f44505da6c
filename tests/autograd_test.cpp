// autograd/: passes, graphs, scopes, hooks, checkpoints, accounting.
#include <capo/autograd/autograd.h>
#include <capo/engine/caching_allocator.h>
#include <capo/engine/rng.h>
#include <capo/engine/threads.h>
#include <capo/ops/batch_norm.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/group_norm.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/matmul.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>
#include <capo/tests/support.h>

#include <doctest/doctest.h>

#include <atomic>
#include <functional>
#include <thread>

using namespace capo;
using namespace capo::test;
using namespace capo::testing;

namespace {

Tensor leaf(const Tensor& t) {
  set_requires_grad(t, true);
  return t;
}
std::vector<double> list(const Tensor& t) { return to_vector<double>(t); }
using V = std::vector<double>;

const Node* node_of(const Tensor& t) {
  return t.grad_slot() ? static_cast<const GradSlot*>(t.grad_slot().get())->node.get() : nullptr;
}

}  // namespace

// ---------------------------------------------------------------- grad and backward

TEST_CASE("grad: values, order of inputs, missing dependence") {
  const Tensor a = leaf(values({1, 2}, {2})), b = leaf(values({3, 4}, {2})), c = leaf(values({5, 6}, {2}));
  const Tensor y = a * b;
  const auto g = grad({y}, {b, c, a}, {values({1, 10}, {2})});
  CHECK(list(g[0]) == V{1, 20});
  CHECK_FALSE(g[1].defined());
  CHECK(list(g[2]) == V{3, 40});
  CHECK_FALSE(grad_of(a).defined());  // leaves' own slots are not touched
}

TEST_CASE("backward stores and adds up") {
  const Tensor a = leaf(values({1, 2}, {2}));
  backward(sum(square(a)));
  CHECK(list(grad_of(a)) == V{2, 4});
  backward(sum(a));
  CHECK(list(grad_of(a)) == V{3, 5});
  clear_grad(a);
  CHECK_FALSE(grad_of(a).defined());
  set_grad(a, values({7, 7}, {2}));
  backward(a * 2.0, values({1, -1}, {2}));
  CHECK(list(grad_of(a)) == V{9, 5});
}

TEST_CASE("gradients of several outputs add up; a leaf may be an output, an input may be asked twice or be interior") {
  const Tensor a = leaf(values({1, 2}, {2}));
  const Tensor h = a * 3.0, y = square(h), z = h + a;
  const Tensor one = values({1, 1}, {2});
  const auto g = grad({y, z, a}, {a, h, a}, {one, one, values({100, 100}, {2})});
  CHECK(list(g[0]) == V{3 * (6 + 1) + 1 + 100, 3 * (12 + 1) + 1 + 100});
  CHECK(list(g[1]) == V{6 + 1, 12 + 1});
  CHECK(list(g[2]) == list(g[0]));
  const auto only = grad({a}, {a}, {one});  // nothing but the leaf
  CHECK(list(only[0]) == V{1, 1});
  const auto same = grad({y * 1.0}, {y}, {one}, {.keep_graph = true});  // of an interior tensor right below the output
  CHECK(list(same[0]) == V{1, 1});
}

TEST_CASE("grad: an interior input stops the pass where nothing below is asked") {
  const Tensor a = leaf(values({2}, {1}));
  const Tensor h = square(a), y = square(h);
  CHECK(list(grad({y}, {h}, {})[0]) == V{8});
  // Only y's node was passed; h's saved tensors are still there.
  CHECK(list(grad({h}, {a}, {})[0]) == V{4});
}

TEST_CASE("grad: what it refuses") {
  const Tensor a = leaf(values({1, 2}, {2})), frozen = values({1, 2}, {2});
  CHECK(contains(error_of([&] { grad({square(a)}, {a}); }),
                 "grad: output [2] has more than one element and needs a cotangent"));
  CHECK(contains(error_of([&] { grad({square(a)}, {a}, {values({1}, {1})}); }),
                 "grad: cotangent must be [2] like its output, got [1]"));
  CHECK(contains(error_of([&] { grad({square(a)}, {a}, {ones({2})}); }),
                 "grad: cotangent must be f64 on cpu like its output, got f32 [2] cpu"));
  CHECK(contains(error_of([&] { grad({slice(a, 0, 0, 0)}, {a}); }), "grad: output [0] is empty and needs a cotangent"));
  CHECK(contains(error_of([&] { grad({square(a)}, {a}, {a, a}); }), "1 outputs need as many cotangents, got 2"));
  CHECK(contains(error_of([&] { grad({square(frozen)}, {a}, {frozen}); }),
                 "does not depend on anything that needs a gradient"));
  CHECK(contains(error_of([&] { grad({square(a)}, {frozen}, {frozen}); }), "does not require a gradient"));
  CHECK(contains(error_of([&] { set_requires_grad(square(a), true); }),
                 "set_requires_grad: needs a leaf, got a tensor [2] that square made"));
  CHECK(contains(error_of([&] { set_requires_grad(arange(3), true); }),
                 "set_requires_grad: needs a floating tensor, got i64"));
  CHECK(contains(error_of([&] { set_grad(a, values({1}, {1})); }), "set_grad: gradient must be [2], got [1]"));
  CHECK(contains(error_of([&] { set_grad(a, ones({2})); }),
                 "set_grad: gradient must be f64 on cpu like its leaf, got f32"));
}

// ---------------------------------------------------------------- life of the graph

TEST_CASE("a freed graph throws in the name of the op; keep_graph keeps it") {
  const Tensor a = leaf(values({1, 2}, {2}));
  const Tensor y = sum(square(a));
  const auto first = grad({y}, {a}, {}, {.keep_graph = true});
  CHECK(same_bits(grad({y}, {a}, {})[0], first[0]));
  const std::string text = error_of([&] { grad({y}, {a}, {}); });
  CHECK(contains(text, "sum: its saved tensors were freed by an earlier backward pass; ask that pass to keep_graph"));
  const Tensor z = exp(square(a));
  grad({z}, {a}, {a.detach()});
  CHECK(contains(error_of([&] { grad({z}, {a}, {a.detach()}); }), "exp: its saved tensors were freed"));
}

TEST_CASE("a saved tensor changed in place names both ops") {
  const Tensor a = leaf(values({1, 2}, {2})), x = values({3, 4}, {2});
  const Tensor y = a * x;
  mul_(x, 2.0);
  const std::string text = error_of([&] { grad({y}, {a}, {x}); });
  CHECK(text == "mul: a tensor [2] saved for its gradient was changed in place by mul_");
  const Tensor z = a * x;
  copy_into(slice(x, 0, 0, 1), values({1}, {1}));  // through a view of the same storage
  CHECK(contains(error_of([&] { grad({z}, {a}, {x}); }), "changed in place by copy_into"));
  Tensor p = values({5, 6}, {2}), q = values({7, 8}, {2});
  const Tensor u = a * p, one = values({1, 1}, {2});
  p.swap_storage(q);  // both have version 0
  CHECK(contains(error_of([&] { grad({u}, {a}, {one}); }),
                 "mul: a tensor [2] saved for its gradient was exchanged by swap_storage"));
  p.swap_storage(q);
  CHECK(list(grad({u}, {a}, {one})[0]) == V{5, 6});
  const Tensor w = a + x;  // keeps nothing: nothing to be stale
  fill_(x, 0);
  CHECK(list(grad({w}, {a}, {values({1, 1}, {2})})[0]) == V{1, 1});
}

TEST_CASE("in-place writes: graph tensors never, trainable leaves under NoGrad") {
  const Tensor a = leaf(values({1, 2}, {2}));
  CHECK(
      contains(error_of([&] { add_(a, a.detach()); }), "add_: writing into a trainable leaf [2] needs a NoGrad scope"));
  const Tensor y = square(a);
  const NoGrad off;
  CHECK(contains(error_of([&] { mul_(y, 2.0); }), "mul_: must not write into a tensor of the graph [2]"));
  CHECK_NOTHROW(mul_(a, 2.0));
  CHECK(list(a) == V{2, 4});
}

TEST_CASE("the graph keeps only what gradients read, and frees it with the pass") {
  auto& memory = allocator(kCpu);
  const std::int64_t start = memory.stats().live_bytes;
  const Tensor a = leaf(zeros({1024}, f64));
  const std::int64_t one = memory.stats().live_bytes - start;
  Tensor y = square(a + 1.0) * 2.0;  // square keeps its input; affine keeps nothing
  CHECK(memory.stats().live_bytes - start == 3 * one);
  Tensor s = sum(y);
  y = Tensor();
  CHECK(memory.stats().live_bytes - start < 3 * one);  // y's value is gone although the graph lives
  grad({s}, {a}, {});
  CHECK(memory.stats().live_bytes - start < 2 * one);  // and what square kept went with the pass
}

TEST_CASE("a chain of 100,000 nodes: no recursion anywhere") {
  const Tensor a = leaf(values({1}, {1}));
  {
    Tensor y = a;
    for (int i = 0; i < 100000; ++i) y = y + 1.0;
    CHECK(list(grad({y}, {a}, {})[0]) == V{1});
  }
  {
    Tensor y = a;
    for (int i = 0; i < 100000; ++i) y = abs(y);  // keeps a tensor per node
    CHECK(requires_grad(y));
  }  // destroyed without a pass
}

// ---------------------------------------------------------------- scopes

TEST_CASE("NoGrad and frozen inputs leave no nodes") {
  const Tensor a = leaf(values({1, 2}, {2})), frozen = values({1, 2}, {2});
  {
    const NoGrad off;
    CHECK_FALSE(grad_enabled());
    CHECK_FALSE(requires_grad(square(a)));
    {
      const WithGrad on;
      CHECK(requires_grad(square(a)));
    }
    CHECK_FALSE(grad_enabled());
  }
  CHECK(grad_enabled());
  CHECK_FALSE(requires_grad(square(frozen)));
  CHECK(requires_grad(square(frozen) * a));
  CHECK_FALSE(requires_grad(stop_gradient(square(a))));
  CHECK_FALSE(requires_grad(square(a).detach()));
  set_requires_grad(a, false);
  CHECK_FALSE(requires_grad(square(a)));
}

TEST_CASE("NoGrad belongs to its thread") {
  const NoGrad off;
  bool other = false;
  std::thread([&] { other = grad_enabled(); }).join();
  CHECK(other);
}

TEST_CASE("forwards without gradients run on several threads at once") {
  const Tensor w = leaf(normal({64, 64}, "w")), x = normal({32, 64}, "x");
  const auto model = [&] { return tanh(sum(reshape(x, {32, 64, 1}) * reshape(w, {1, 64, 64}), {1})); };
  Tensor expected;
  {
    const NoGrad off;
    expected = model();
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      const NoGrad off;
      for (int i = 0; i < 5; ++i)
        if (!same_bits(model(), expected)) ++wrong;
    });
  for (auto& t : threads) t.join();
  CHECK(wrong == 0);
}

TEST_CASE("whole passes on several threads share a leaf") {
  const Tensor w = leaf(normal({1000}, "w"));
  const Tensor expected = grad({sum(square(tanh(w)))}, {w}, {})[0];
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 20; ++i)
        if (!same_bits(grad({sum(square(tanh(w)))}, {w}, {})[0], expected)) ++wrong;
    });
  for (auto& t : threads) t.join();
  CHECK(wrong == 0);
}

// ---------------------------------------------------------------- higher order

TEST_CASE("create_graph: derivatives of derivatives") {
  const Tensor x = leaf(values({0.5, -1.5}, {2}));
  const Tensor one = values({1, 1}, {2});
  const Tensor y = x * x * x * x;
  const Tensor d1 = grad({y}, {x}, {one}, {.create_graph = true})[0];
  const Tensor d2 = grad({d1}, {x}, {one}, {.create_graph = true})[0];
  const Tensor d3 = grad({d2}, {x}, {one})[0];
  CHECK(close(d1, values({0.5, -13.5}, {2}), 1e-14));
  CHECK(close(d2, values({3, 27}, {2}), 1e-14));
  CHECK(close(d3, values({12, -36}, {2}), 1e-14));
}

TEST_CASE("create_graph: sums of cotangents are recorded under NoGrad too") {
  const Tensor x = leaf(values({3}, {1}));
  const Tensor y = square(x) + square(x) * x;
  Tensor d1;
  {
    const NoGrad off;
    d1 = grad({y}, {x}, {}, {.create_graph = true})[0];
  }
  CHECK(list(d1) == V{6 + 27});
  CHECK(list(grad({d1}, {x}, {})[0]) == V{2 + 18});
}

TEST_CASE("a gradient that is on the tape takes later ones") {
  const Tensor x = leaf(values({3}, {1}));
  backward(square(x), {}, {.create_graph = true});
  backward(square(x));
  CHECK(list(grad_of(x)) == V{12});
  clear_grad(x);  // it refers to x: a circle
}

TEST_CASE("create_graph: through an op that saves its output") {
  const Tensor x = leaf(values({0.3, -0.7}, {2}));
  const Tensor one = values({1, 1}, {2});
  const Tensor y = tanh(x);
  const Tensor d1 = grad({y}, {x}, {one}, {.create_graph = true})[0];
  const Tensor d2 = grad({d1}, {x}, {one})[0];
  const Tensor t = tanh(x.detach());
  CHECK(close(d2, t * (1.0 - square(t)) * -2.0, 1e-14));
}

TEST_CASE("a gradient penalty trains") {
  const Tensor w = leaf(values({2, -3}, {2})), x = leaf(values({0.5, 0.25}, {2}));
  const Tensor g = grad({sum(square(w * x))}, {x}, {}, {.create_graph = true})[0];  // 2 w^2 x
  backward(sum(square(g)));                                                        // d/dw 4 w^4 x^2 = 16 w^3 x^2
  CHECK(close(grad_of(w), values({16 * 8 * 0.25, 16 * -27 * 0.0625}, {2}), 1e-14));
}

TEST_CASE("a fused backward has no second derivative and says so") {
  const Tensor x = leaf(values({1, 2}, {2}));
  const Tensor y =
      record("fused", square(x.detach()), {x}, Saved({x}), [](const Saved& s, const Tensor& dy, Needs) -> Grads {
        const Tensor in = s[0];
        return {record_no_gradient("fused_backward", (in.detach() * dy.detach()) * 2.0, {dy, in})};
      });
  const Tensor g = grad({sum(y)}, {x}, {}, {.create_graph = true})[0];
  CHECK(list(g) == V{2, 4});
  CHECK(contains(error_of([&] { backward(sum(g)); }), "fused_backward: has no derivative"));
}

// ---------------------------------------------------------------- nodes

TEST_CASE("several outputs: one cotangent each, undefined where nothing came") {
  const Tensor x = leaf(values({1, 2, 3}, {3}));
  static int defined;
  const auto make = [&] {
    return record_many("pair", {x.detach() * 2.0, x.detach() * 5.0}, {x}, Saved(),
                       [](const Saved&, const Grads& dys, Needs) -> Grads {
                         defined = (dys[0].defined() ? 1 : 0) + (dys[1].defined() ? 2 : 0);
                         Tensor g;
                         if (dys[0].defined()) g = dys[0] * 2.0;
                         if (dys[1].defined()) g = g.defined() ? g + dys[1] * 5.0 : dys[1] * 5.0;
                         return {g};
                       });
  };
  CHECK(list(grad({sum(make()[1])}, {x}, {})[0]) == V{5, 5, 5});
  CHECK(defined == 2);
  CHECK(list(grad({sum(make()[0])}, {x}, {})[0]) == V{2, 2, 2});
  CHECK(defined == 1);
  const auto both = make();
  CHECK(list(grad({sum(both[0] + both[1])}, {x}, {})[0]) == V{7, 7, 7});
  CHECK(defined == 3);
}

TEST_CASE("needs: a gradient is told what is wanted in this pass") {
  static std::uint64_t mask;
  const Tensor a = leaf(values({1}, {1})), b = leaf(values({2}, {1})), frozen = values({3}, {1});
  const auto make = [&] {
    return record("three", values({0}, {1}), {a, frozen, b}, Saved(),
                  [](const Saved&, const Tensor& dy, Needs n) -> Grads {
                    mask = n.mask();
                    return {n[0] ? dy : Tensor(), n[1] ? dy : Tensor(), n[2] ? dy : Tensor()};
                  });
  };
  grad({make()}, {a}, {});
  CHECK(mask == 1);
  grad({make()}, {b}, {});
  CHECK(mask == 4);
  backward(make());
  CHECK(mask == 5);
}

TEST_CASE("wrong gradients are caught by shape and count") {
  const Tensor x = leaf(values({1, 2}, {2}));
  const Tensor y = record("bad", values({1, 2}, {2}), {x}, Saved(),
                          [](const Saved&, const Tensor&, Needs) -> Grads { return {ones({3}, f64)}; });
  CHECK(contains(error_of([&] { backward(sum(y)); }), "bad: its gradient must be [2], got [3]"));
  const Tensor t = record("bad", values({1, 2}, {2}), {x}, Saved(),
                          [](const Saved&, const Tensor&, Needs) -> Grads { return {ones({2})}; });
  CHECK(contains(error_of([&] { backward(sum(t)); }), "bad: its gradient must be f64 like its input, got f32"));
  const Tensor z = record("bad", values({1, 2}, {2}), {x}, Saved(), [](const Saved&, const Tensor& dy, Needs) -> Grads {
    return {dy, dy};
  });
  CHECK(contains(error_of([&] { backward(sum(z)); }), "bad: returned 2 gradients for 1 inputs"));
  CHECK(contains(error_of([&] {
                   record("again", z, {x}, Saved(),
                          [](const Saved&, const Tensor& dy, Needs) -> Grads { return {dy}; });
                 }),
                 "again: record needs fresh outputs, output 0 is already on the tape"));
}

TEST_CASE("fan-in is summed in a fixed order") {
  // In f32 the order of 1e8, 1 and -1e8 is visible.
  const auto run = [] {
    const Tensor x = leaf(full({1}, 1));
    const Tensor big = x * 1e8, small = x * 1.0, minus = x * -1e8;
    return grad({big + small + minus}, {x}, {ones({1})})[0];
  };
  const Tensor first = run();
  for (int i = 0; i < 20; ++i) CHECK(same_bits(run(), first));
}

TEST_CASE("an accumulated gradient never overwrites one that someone else holds") {
  const Tensor x = leaf(values({1, 2}, {2}));
  const Tensor seed = values({1, 1}, {2});
  const Tensor a = clone(x), b = clone(x);  // both hand their cotangent through
  const auto g = grad({a, b, x}, {x, a}, {seed, seed, seed});
  CHECK(list(g[0]) == V{3, 3});
  CHECK(list(g[1]) == V{1, 1});
  CHECK(list(seed) == V{1, 1});
  backward(clone(x), seed);
  backward(clone(x), seed);
  CHECK(list(grad_of(x)) == V{2, 2});
  CHECK(list(seed) == V{1, 1});
}

TEST_CASE("grad inside a gradient: passes nest") {
  const Tensor w = leaf(values({3}, {1}));
  const Tensor x = leaf(values({2}, {1}));
  const Tensor y = record("outer", square(x.detach()), {x}, Saved({x}),
                          [](const Saved& s, const Tensor& dy, Needs) -> Grads {
                            const Tensor in = s[0].detach();
                            const WithGrad on;
                            set_requires_grad(in, true);
                            return {grad({square(in)}, {in}, {dy})[0]};
                          });
  CHECK(list(grad({y * w}, {x, w}, {})[0]) == V{12});
}

// ---------------------------------------------------------------- hooks

namespace {
struct Seen {
  std::vector<std::vector<double>> gradients;
  std::vector<const char*> order;
};
}  // namespace

TEST_CASE("on_grad: once per pass, with the whole gradient, instead of storing it") {
  const Tensor w = leaf(values({2}, {1}));
  Seen seen;
  on_grad(
      w, [](const Tensor& g, void* user) { static_cast<Seen*>(user)->gradients.push_back(to_vector<double>(g)); },
      &seen);
  const Tensor y = square(w) + w * 3.0 + w;
  backward(y);
  REQUIRE(seen.gradients.size() == 1);
  CHECK(seen.gradients[0] == V{8});
  CHECK_FALSE(grad_of(w).defined());
  backward(square(w));
  CHECK(seen.gradients.size() == 2);
  grad({square(w)}, {w}, {});  // grad() stores nothing and calls no hook
  CHECK(seen.gradients.size() == 2);
  on_grad(w, nullptr, nullptr);
  backward(square(w));
  CHECK(list(grad_of(w)) == V{4});
}

TEST_CASE("on_grad fires at the leaf's last use, not at the end of the pass") {
  static std::vector<std::string>* order;
  std::vector<std::string> log;
  order = &log;
  const Tensor early = leaf(values({2}, {1})), late = leaf(values({3}, {1}));
  const auto watched = [](const char* name, const Tensor& x) {  // logs when its gradient runs
    const NoGrad off;
    const Tensor y = clone(x.detach());
    const WithGrad on;
    return record(name, y, {x}, Saved(), [name](const Saved&, const Tensor& dy, Needs) -> Grads {
      order->push_back(name);
      return {dy};
    });
  };
  on_grad(early, [](const Tensor&, void*) { order->push_back("early hook"); }, nullptr);
  on_grad(late, [](const Tensor&, void*) { order->push_back("late hook"); }, nullptr);
  const Tensor h = watched("below", late * 2.0);  // recorded first, so passed last
  backward(watched("above", h * early));
  CHECK(log == std::vector<std::string>{"above", "early hook", "below", "late hook"});
}

TEST_CASE("a leaf off the path of this output keeps quiet") {
  const Tensor a = leaf(values({2}, {1})), b = leaf(values({3}, {1}));
  int calls = 0;
  on_grad(b, [](const Tensor&, void* user) { ++*static_cast<int*>(user); }, &calls);
  const Tensor both = a * b;
  backward(square(a));
  CHECK(calls == 0);
  backward(both);
  CHECK(calls == 1);
}

// ---------------------------------------------------------------- checkpoints

namespace {

// A small nonlinear segment with two parameters.
Tensors segment(const Tensors& in, const Tensor& w, const Tensor& v) {
  return {tanh(in[0] * w) + sigmoid(in[0] + v), square(in[0]) * w};
}

struct Run {
  Tensors outputs;
  std::vector<Tensor> gradients;
};

Run run_segment(bool checkpointed, bool frozen_input, bool used_outside = false) {
  const Tensor w = leaf(normal({4, 5}, "w")), v = leaf(normal({4, 5}, "v")), x = normal({4, 5}, "x");
  if (!frozen_input) set_requires_grad(x, true);
  const auto f = [w, v](const Tensors& in) { return segment(in, w, v); };
  const Tensors h = checkpointed ? checkpoint(f, {x}, {w, v}) : f({x});
  Tensor y = sum(h[0] * h[1]);
  if (used_outside) y = y + sum(w);
  std::vector<Tensor> asked = {w, v};
  if (!frozen_input) asked.push_back(x);
  return {h, grad({y}, asked, {})};
}

}  // namespace

TEST_CASE("checkpoint: the same bits, also with a frozen input") {
  for (const bool frozen : {false, true}) {
    const Run plain = run_segment(false, frozen), again = run_segment(true, frozen);
    for (std::size_t i = 0; i < plain.outputs.size(); ++i) CHECK(same_bits(plain.outputs[i], again.outputs[i]));
    for (std::size_t i = 0; i < plain.gradients.size(); ++i) CHECK(same_bits(plain.gradients[i], again.gradients[i]));
    // A parameter that is also used outside gets the segment's share as one term: the same sum, bracketed otherwise.
    const Run p = run_segment(false, frozen, true), a = run_segment(true, frozen, true);
    for (std::size_t i = 0; i < p.gradients.size(); ++i) CHECK(close(p.gradients[i], a.gradients[i], 1e-15));
  }
}

TEST_CASE("checkpoint: keeps only its inputs") {
  const Tensor w = leaf(normal({1000}, "w")), x = leaf(normal({1000}, "x"));
  const auto f = [w](const Tensors& in) { return Tensors{tanh(sigmoid(tanh(in[0] * w)))}; };
  std::int64_t plain, kept;
  {
    const SavedBytes saved({w});
    f({x});
    plain = saved.total();
  }
  {
    const SavedBytes saved({w});
    checkpoint(f, {x}, {w});
    kept = saved.total();
    REQUIRE(saved.rows().size() == 1);
    CHECK(saved.rows()[0].op == "checkpoint");
  }
  CHECK(kept == static_cast<std::int64_t>(rounded_bytes(8000)));
  CHECK(plain == 4 * kept);
}

TEST_CASE("checkpoint: random draws repeat, and the stream goes on afterwards") {
  const Tensor w = leaf(ones({1000}, f64));
  const auto go = [&](bool checkpointed) {
    Generator rng(5);
    const auto f = [&rng, w](const Tensors& in) {
      const Tensor mask = cast(greater(rand_uniform(in[0].shape(), rng, 0, 1, f64), 0.5), f64);
      return Tensors{in[0] * w * mask};
    };
    const Tensor x = leaf(normal({1000}, "x"));
    const Tensor y = checkpointed ? checkpoint(f, {x}, {w})[0] : f({x})[0];
    const Tensor later = rand_uniform({8}, rng, 0, 1, f64);
    const Tensor g = grad({sum(y)}, {x}, {})[0];
    return Tensors{y, later, g, rand_uniform({8}, rng, 0, 1, f64)};
  };
  const Tensors plain = go(false), again = go(true);
  for (std::size_t i = 0; i < plain.size(); ++i) CHECK(same_bits(plain[i], again[i]));
}

TEST_CASE("checkpoint: the draws repeat although the generator was given another seed meanwhile") {
  const Tensor x = leaf(normal({50}, "x"));
  Generator rng(5);
  const auto f = [&rng](const Tensors& in) { return Tensors{in[0] * rand_normal({50}, rng, 0, 1, f64)}; };
  const Tensor y = checkpoint(f, {x}, {})[0];
  rng.reseed(6);
  rng.reserve(8);
  CHECK(close(grad({sum(y)}, {x}, {})[0], y.detach() / x.detach(), 1e-14));
  CHECK(rng.seed() == 6);
  CHECK(rng.offset() == 2);
}

TEST_CASE("checkpoint: nested, with draws in both") {
  const Tensor w = leaf(normal({50}, "w"));
  const auto go = [&](bool checkpointed) {
    Generator rng(6);
    const auto inner = [&rng, w](const Tensors& in) {
      return Tensors{tanh(in[0] * w + rand_normal({50}, rng, 0, 1, f64))};
    };
    const auto outer = [&](const Tensors& in) {
      const Tensor h = in[0] + rand_normal({50}, rng, 0, 1, f64);
      return Tensors{sigmoid(checkpointed ? checkpoint(inner, {h}, {w})[0] : inner({h})[0]) * w};
    };
    const Tensor x = leaf(normal({50}, "x"));
    const Tensor y = checkpointed ? checkpoint(outer, {x}, {w})[0] : outer({x})[0];
    return grad({sum(square(y))}, {x, w}, {});
  };
  const auto plain = go(false), again = go(true);
  CHECK(same_bits(plain[0], again[0]));
  CHECK(same_bits(plain[1], again[1]));
}

TEST_CASE("checkpoint: replaying() tells the second run; leaves' slots and hooks see one gradient") {
  const Tensor w = leaf(values({2}, {1}));
  int updates = 0, calls = 0;
  const auto f = [&](const Tensors& in) {
    if (!replaying()) ++updates;
    return Tensors{in[0] * w};
  };
  on_grad(w, [](const Tensor&, void* user) { ++*static_cast<int*>(user); }, &calls);
  const Tensor y = checkpoint(f, {values({3}, {1})}, {w})[0];
  backward(y + w);
  CHECK(updates == 1);
  CHECK(calls == 1);
  CHECK_FALSE(replaying());
  on_grad(w, nullptr, nullptr);
  backward(checkpoint(f, {values({3}, {1})}, {w})[0]);
  CHECK(list(grad_of(w)) == V{3});
}

TEST_CASE("checkpoint: errors by name, plain run without gradients") {
  const Tensor w = leaf(values({2}, {1})), x = leaf(values({3}, {1}));
  const auto f = [&](const Tensors& in) { return Tensors{in[0] * w}; };
  const Tensor y = checkpoint(f, {x}, {w})[0];
  CHECK(
      contains(error_of([&] { grad({y}, {x}, {}, {.create_graph = true}); }), "checkpoint: has no second derivative"));
  grad({y}, {x}, {});
  CHECK(contains(error_of([&] { grad({y}, {x}, {}); }), "checkpoint: its saved tensors were freed"));
  const Tensor stale = clone(x.detach());
  const Tensor z = checkpoint(f, {stale}, {w})[0];
  fill_(stale, 0);
  CHECK(contains(error_of([&] { backward(z); }),
                 "checkpoint: a tensor [1] saved for its gradient was changed in place by fill_"));
  const Tensor outside = square(w);
  const Tensor lost = checkpoint([&](const Tensors& in) { return Tensors{in[0] * outside}; }, {x}, {})[0];
  CHECK(contains(error_of([&] { backward(lost); }),
                 "checkpoint: the segment reads a tensor that square made outside of it"));
  const Tensor unnamed = checkpoint(f, {x}, {})[0];
  CHECK(contains(error_of([&] { backward(unnamed); }),
                 "checkpoint: the segment reads a trainable leaf [1] that is not among"));
  CHECK(contains(error_of([&] { checkpoint(f, {x}, {outside}); }),
                 "checkpoint: parameters must be leaves, got a tensor [1] that square made"));
  int runs = 0;
  const auto unsteady = [&](const Tensors& in) { return Tensors(static_cast<std::size_t>(++runs), in[0] * w); };
  const Tensor once = checkpoint(unsteady, {x}, {w})[0];
  CHECK(contains(error_of([&] { backward(once); }), "checkpoint: the segment returned 1 tensors, run again 2"));
  const NoGrad off;
  CHECK_FALSE(requires_grad(checkpoint(f, {x}, {w})[0]));
}

TEST_CASE("checkpoint: keep_graph allows a second pass") {
  const Tensor w = leaf(values({2}, {1})), x = leaf(values({3}, {1}));
  const Tensor y = checkpoint([&](const Tensors& in) { return Tensors{square(in[0] * w)}; }, {x}, {w})[0];
  const auto first = grad({y}, {x}, {}, {.keep_graph = true});
  CHECK(same_bits(grad({y}, {x}, {})[0], first[0]));
}

// ---------------------------------------------------------------- observers

TEST_CASE("OpObserver: every result in order, on the tape or not; its own ops are hidden; scopes replace each other") {
  struct Seen {
    std::string text;
    static void hook(const char* op, const Tensor& y, void* user) {
      static_cast<Seen*>(user)->text += cat(op, " ", to_vector<double>(sum(y.detach()))[0], " ", current_module(), ";");
    }
  };
  const Tensor w = leaf(values({1, 2}, {2})), x = values({3, 4}, {2});
  const std::string path = "blocks.0";
  Seen seen, inner;
  const auto fails = [](const char*, const Tensor&, void*) { detail::fail("seen enough"); };
  {
    const OpObserver observer(Seen::hook, &seen);
    const Tensor y = x * w;
    {
      const NoGrad off;
      const ModuleScope scope(&path);
      neg(x + w);
    }
    {
      const OpObserver other(Seen::hook, &inner);
      reshape(y, {2, 1});
    }
    CHECK(error_of([&] { const OpObserver other(fails, nullptr); exp(x); }) == "seen enough");
    square(w);
  }
  square(w);
  CHECK(seen.text == "mul 11 ;add 10 blocks.0;neg -10 blocks.0;square 5 ;");
  CHECK(inner.text == "reshape 11 ;");
}

// ---------------------------------------------------------------- accounting

TEST_CASE("SavedBytes: per module and op, each storage once, weights never") {
  const Tensor x = leaf(zeros({100}, f32)), w = leaf(zeros({100}, f32));
  const auto bytes = static_cast<std::int64_t>(rounded_bytes(400));
  const std::string a = "blocks.0", b = "blocks.1";
  const SavedBytes saved({w});
  {
    const ModuleScope scope(&a);
    CHECK(current_module() == "blocks.0");
    const Tensor y = x * w;       // keeps x (w is ignored)
    const Tensor z = square(x);   // x again: already counted
    const ModuleScope inner(&b);
    CHECK(current_module() == "blocks.1");
    exp(y);                       // keeps its output
  }
  CHECK(current_module().empty());
  x + w;
  const auto rows = saved.rows();
  REQUIRE(rows.size() == 2);
  CHECK(rows[0].module == "blocks.0");
  CHECK(rows[0].op == "mul");
  CHECK(rows[0].bytes == bytes);
  CHECK(rows[0].tensors == 1);
  CHECK(rows[1].module == "blocks.1");
  CHECK(rows[1].op == "exp");
  CHECK(rows[1].bytes == bytes);
  CHECK(saved.total() == 2 * bytes);
}

TEST_CASE("SavedBytes: frozen inputs keep nothing, scopes nest, meta counts alike") {
  const Tensor x = zeros({100}), w = leaf(zeros({100}));
  const SavedBytes outer;
  {
    const SavedBytes inner;
    x * w;
    CHECK(inner.total() == static_cast<std::int64_t>(rounded_bytes(400)));  // x, for w's gradient
  }
  CHECK(outer.total() == 0);
  {
    const NoGrad off;
    x * w;
  }
  CHECK(outer.total() == 0);
  const Tensor m = empty({100}, f32, kMeta), n = leaf(empty({100}, f32, kMeta));
  m * n;
  CHECK(outer.total() == static_cast<std::int64_t>(rounded_bytes(400)));
}

// A norm, a Linear with GELU, a Linear: what a block's FFN is.
struct SmallMlp {
  Tensor x, gamma, beta, w1, b1, w2;
  SmallMlp() {
    Generator rng(3);
    const auto random = [&](const Shape& shape) { return leaf(cast(rand_normal(shape, rng), f64)); };
    x = random({6, 8}), gamma = random({8}), beta = random({8}), w1 = random({32, 8}), b1 = random({32}),
    w2 = random({4, 32});
  }
  std::vector<Tensor> leaves() const { return {x, gamma, beta, w1, b1, w2}; }
  Tensor loss() const { return sum(square(linear(linear(layer_norm(x, gamma, beta), w1, b1, Activation::gelu), w2))); }
};
struct Recompute {  // for a scope
  explicit Recompute(bool on) { set_recompute(on); }
  ~Recompute() { set_recompute(true); }
};

TEST_CASE("recompute: activations and norms' outputs are made again, to the same gradients") {
  const SmallMlp m;
  std::vector<std::vector<double>> gradients[2];
  std::int64_t kept[2];
  for (const bool on : {false, true}) {
    const Recompute scope(on);
    const SavedBytes saved(m.leaves());
    const Tensor loss = m.loss();
    kept[on] = saved.total();
    for (const Tensor& g : grad({loss}, m.leaves())) gradients[on].push_back(list(g));
  }
  CHECK(gradients[0] == gradients[1]);
  // Without: the norm's output [6, 8], gelu's [6, 32]. The argument z [6, 32] and the norm's statistics stay.
  CHECK(kept[0] - kept[1] == static_cast<std::int64_t>(rounded_bytes(6 * 8 * 8) + rounded_bytes(6 * 32 * 8)));
}

TEST_CASE("recompute: outputs of norms over channels, with what follows them") {
  Generator rng(5);
  const auto random = [&](const Shape& shape) { return leaf(cast(rand_normal(shape, rng), f64)); };
  const Tensor x = random({3, 10, 8}), gamma = random({8}), beta = random({8}), w = random({4, 8}),
               residual = random({3, 10, 8});
  const std::vector<Tensor> leaves{x, gamma, beta, w};
  struct Form {
    std::function<Tensor()> y;
    std::int64_t not_kept;  // tensors of x's size
  };
  const auto batch = [&](Activation act, const Tensor& r = {}, double ceiling = 0) {
    return batch_norm(x, gamma, beta, {}, {}, true, 0.1, 1e-5, true, act, r, 0, ceiling);
  };
  const std::vector<Form> forms{
      {[&] { return batch(Activation::none); }, 1},
      {[&] { return batch(Activation::relu); }, 1},
      {[&] { return batch(Activation::relu, {}, 0.5); }, 1},
      {[&] { return clamp(batch(Activation::none), 0, 0.5); }, 2},
      {[&] { return batch(Activation::silu); }, 1},
      {[&] { return batch(Activation::relu, residual); }, 1},                 // which is kept anyway
      {[&] { return batch(Activation::relu, batch(Activation::none)); }, 0},  // the residual would be made again itself
      {[&] { return batch(Activation::relu, batch(Activation::relu, batch(Activation::relu, residual))); }, 2},
      {[&] { return group_norm(x, 2, gamma, beta, 1e-5, Activation::silu); }, 1},
      {[&] { return instance_norm(x, gamma, beta, 1e-5, Activation::relu, 0.01); }, 1}};
  for (std::size_t i = 0; i < forms.size(); ++i) {
    CAPTURE(i);
    std::vector<std::vector<double>> gradients[2];
    std::int64_t kept[2];
    for (const bool on : {false, true}) {
      const Recompute scope(on);
      const SavedBytes saved({x, gamma, beta, w, residual});
      const Tensor loss = sum(square(linear(forms[i].y(), w)));
      kept[on] = saved.total();
      for (const Tensor& g : grad({loss}, leaves)) gradients[on].push_back(list(g));
    }
    CHECK(gradients[0] == gradients[1]);
    CHECK(kept[0] - kept[1] == forms[i].not_kept * static_cast<std::int64_t>(rounded_bytes(3 * 10 * 8 * 8)));
  }
}

TEST_CASE("recompute: second derivatives pass through what was made again") {
  const SmallMlp m;
  std::vector<double> second[2];
  for (const bool on : {false, true}) {
    const Recompute scope(on);
    const Tensor first = grad({m.loss()}, {m.w2}, {}, {.create_graph = true})[0];
    second[on] = list(grad({sum(square(first))}, {m.w1})[0]);
  }
  CHECK(second[0] == second[1]);
  CHECK(second[0] != std::vector<double>(second[0].size(), 0.0));
}

TEST_CASE("recompute: a part of the graph that an earlier pass freed is named") {
  const SmallMlp m;
  const Tensor h = gelu(m.x), first = sum(h), second = sum(linear(h, m.w1));
  grad({first}, {m.x});
  CHECK_THROWS_WITH_AS(grad({second}, {m.w1}),
                       doctest::Contains("gelu: its saved tensors were freed by an earlier backward pass"), Error);
  const Recompute scope(false);
  const Tensor h2 = gelu(m.x), first2 = sum(h2), second2 = sum(linear(h2, m.w1));
  grad({first2}, {m.x});
  CHECK(grad({second2}, {m.w1})[0].numel() == 32 * 8);
}

TEST_CASE("a pass on the meta device gives shapes") {
  const Tensor x = leaf(empty({4, 6}, f32, kMeta)), w = leaf(empty({6}, f32, kMeta));
  const auto g = grad({sum(gelu(x * w))}, {x, w}, {});
  CHECK(g[0].shape() == Shape{4, 6});
  CHECK(g[1].shape() == Shape{6});
  CHECK(g[1].device().is_meta());
}

TEST_CASE("the bits of a pass do not depend on the thread count") {
  const auto run = [] {
    const Tensor x = leaf(cast(normal({300, 257}, "x"), f32)), w = leaf(cast(normal({257}, "w"), f32));
    return grad({mean(square(gelu(x * w)))}, {x, w}, {});
  };
  const ThreadsScope restore(1);
  const auto one = run();
  for (const int n : {2, 3, 5}) {
    set_num_threads(n);
    const auto many = run();
    CHECK(same_bits(one[0], many[0]));
    CHECK(same_bits(one[1], many[1]));
  }
}

TEST_CASE("edges hold nodes and slots, not tensors") {
  Tensor x = leaf(zeros({1000}));
  const auto storage_uses = [&] { return x.storage()->use_count(); };
  const auto before = storage_uses();
  const Tensor y = x + 1.0;
  CHECK(storage_uses() == before);
  REQUIRE(node_of(y));
  CHECK(std::string(node_of(y)->op()) == "affine");
  CHECK(node_of(y)->edges().size() == 1);
  CHECK(node_of(y)->needs().mask() == 1);
}
