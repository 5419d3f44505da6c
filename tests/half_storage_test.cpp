// bf16 and f16 on the CPU are storage: a kernel widens what it reads and rounds what it writes. The bits are those of
// the f32 op between two casts, on every instruction set, and no f32 copy of the tensor is made.
#include <capo/engine/allocator.h>
#include <capo/engine/cpu.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/dropout.h>
#include <capo/ops/group_norm.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/modulate.h>
#include <capo/ops/pool.h>
#include <capo/ops/reduce.h>
#include <capo/ops/softmax.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>
#include <capo/tests/support.h>

#include <doctest/doctest.h>

#include <functional>

using namespace capo;
using namespace capo::test;
using namespace capo::testing;

namespace {

struct Case {
  std::string name;
  Tensors inputs;  // f32
  std::function<Tensor(const Tensors&)> run;
};

Tensors cast_all(const Tensors& in, DType t) {
  Tensors out;
  for (const Tensor& x : in) out.push_back(cast(x, t));
  return out;
}

// 1,000 and 1,531 are longer than a piece in no and in one axis; 5 and 77 leave tails.
const Shape kShapes[] = {{1531, 3}, {5, 77}, {3, 1000}, {1}, {0, 4}};

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const Shape& shape : kShapes) {
    const Tensor x = normal(shape, "x", 0.3, 2), y = normal(shape, "y", -0.2, 2), positive = square(x) + 0.1;
    for (int k = 0; k <= static_cast<int>(UnaryKind::affine); ++k) {
      const auto kind = static_cast<UnaryKind>(k);
      const bool above =
          kind == UnaryKind::log || kind == UnaryKind::sqrt || kind == UnaryKind::rsqrt || kind == UnaryKind::pow;
      const double p = kind == UnaryKind::clamp ? -0.7 : 1.3;
      out.push_back({cat(name_of(kind), shape), {above ? positive : x},
                     [=](const Tensors& in) { return unary(kind, in[0], p, 1.5); }});
      out.push_back({cat(name_of(kind), "'s gradient ", shape), {y, above ? positive : x},
                     [=](const Tensors& in) { return unary_backward(kind, in[0], in[1], p, 1.5); }});
    }
    for (int k = 0; k <= static_cast<int>(BinaryKind::ge); ++k) {
      const auto kind = static_cast<BinaryKind>(k);
      out.push_back({cat(name_of(kind), shape), {x, y}, [=](const Tensors& in) { return binary(kind, in[0], in[1]); }});
    }
    out.push_back({cat("dropout ", shape), {x}, [](const Tensors& in) {
                     Generator rng(3);
                     return dropout(in[0], 0.3, rng, true);
                   }});
    if (shape.size() < 2) continue;
    const std::int64_t n = shape[1];
    const Tensor row = normal({n}, "row"), other = normal({n}, "other");
    out.push_back({cat("a row beside ", shape), {x, row}, [](const Tensors& in) { return in[0] * in[1]; }});
    out.push_back({cat("a row before ", shape), {x, row}, [](const Tensors& in) { return in[1] - in[0]; }});
    out.push_back({cat("transposed ", shape), {x, y}, [](const Tensors& in) {
                     return transpose(in[0], 0, 1) + transpose(in[1], 0, 1);
                   }});
    out.push_back({cat("one transposed ", shape), {x}, [](const Tensors& in) {
                     return transpose(in[0], 0, 1) + contiguous(transpose(in[0], 0, 1));
                   }});
    for (const int axis : {0, 1}) {
      out.push_back({cat("sum ", axis, shape), {x}, [=](const Tensors& in) { return sum(in[0], {axis}); }});
      out.push_back({cat("mean ", axis, shape), {x}, [=](const Tensors& in) { return mean(in[0], {axis}, true); }});
      out.push_back({cat("softmax ", axis, shape), {x}, [=](const Tensors& in) { return softmax(in[0], axis); }});
      out.push_back(
          {cat("log_softmax ", axis, shape), {x}, [=](const Tensors& in) { return log_softmax(in[0], axis); }});
    }
    out.push_back({cat("layer_norm ", shape), {x, row, other}, [](const Tensors& in) {
                     return layer_norm(in[0], in[1], in[2]);
                   }});
    out.push_back({cat("rms_norm ", shape), {x, row}, [](const Tensors& in) { return rms_norm(in[0], in[1]); }});
    out.push_back(
        {cat("modulate ", shape), {x, row, other}, [](const Tensors& in) { return modulate(in[0], in[1], in[2]); }});
    out.push_back({cat("gate ", shape), {x, row, y}, [](const Tensors& in) { return gate(in[0], in[1], in[2]); }});
  }
  const Tensor image = normal({2, 9, 7, 70}, "image", 0.3, 2), weight = normal({70}, "weight"),
               bias = normal({70}, "bias");
  for (const Activation a : {Activation::none, Activation::silu})
    out.push_back({"group_norm", {image, weight, bias},
                   [=](const Tensors& in) { return group_norm(in[0], 7, in[1], in[2], 1e-5, a); }});
  out.push_back({"max_pool", {image}, [](const Tensors& in) { return max_pool2d(in[0], 3, 2, 1); }});
  return out;
}

}  // namespace

TEST_CASE("16-bit tensors: the bits of the f32 op between two casts, on every instruction set") {
  const IsaScope restore;
  const std::vector<Case> all = cases();
  int compared = 0;
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    for (const DType t : {bf16, f16})
      for (const Case& c : all) {
        const Tensors half = cast_all(c.inputs, t);
        const Tensor got = c.run(half), wide = c.run(cast_all(half, f32));
        const Tensor wanted = wide.dtype() == boolean ? wide : cast(wide, t);
        CHECK_MESSAGE((got.dtype() == wanted.dtype() && same_bits(got, wanted)),
                      c.name << " in " << to_string(t) << ", " << to_string(level));
        ++compared;
      }
  }
  CHECK(compared >= 2 * static_cast<int>(all.size()));
}

TEST_CASE("add_layer_norm in 16 bits: the rounded sum and the norm of it") {
  for (const DType t : {bf16, f16}) {
    const Tensor x = cast(normal({5, 300}, "x"), t), r = cast(normal({5, 300}, "r"), t),
                 w = cast(normal({300}, "w"), t);
    const AddNorm got = add_layer_norm(x, r, w);
    CHECK(same_bits(got.sum, x + r));
    CHECK(same_bits(got.y, layer_norm(x + r, w)));
  }
}

TEST_CASE("rows longer than the kernels' buffer go through f32") {
  const Tensor x = cast(normal({3, 4097}, "x", 0.5, 2), bf16), w = cast(normal({4097}, "w"), bf16);
  CHECK(same_bits(softmax(x), cast(softmax(cast(x, f32)), bf16)));
  CHECK(same_bits(layer_norm(x, w), cast(layer_norm(cast(x, f32), cast(w, f32)), bf16)));
  CHECK(same_bits(modulate(x, w, w), cast(modulate(cast(x, f32), cast(w, f32), cast(w, f32)), bf16)));
}

TEST_CASE("16-bit tensors: no f32 copy is made") {
  const Tensor x = cast(normal({512, 512}, "x"), bf16), w = cast(normal({512}, "w"), bf16);
  const auto extra = [&](const std::function<Tensor()>& run) {  // beyond the result
    Allocator& a = allocator(kCpu);
    a.reset_peak();
    const std::int64_t before = a.stats().live_bytes;
    const Tensor y = run();
    return a.stats().peak_bytes - before - static_cast<std::int64_t>(y.nbytes());
  };
  const std::int64_t small = 64 * 1024;
  CHECK(extra([&] { return gelu(x); }) < small);
  CHECK(extra([&] { return unary_backward(UnaryKind::gelu, x, x, 0, 0); }) < small);
  CHECK(extra([&] { return x + x; }) < small);
  CHECK(extra([&] { return x * w; }) < small);
  CHECK(extra([&] { return sum(x, {0}); }) < small);
  CHECK(extra([&] { return softmax(x); }) < small);
  CHECK(extra([&] { return layer_norm(x, w, w); }) < small);
  CHECK(extra([&] { return group_norm(reshape(x, {2, 16, 16, 512}), 32, w, w); }) < small);
  CHECK(extra([&] { return cast(cast(x, f32), bf16); }) > small);  // the check can fail
}
