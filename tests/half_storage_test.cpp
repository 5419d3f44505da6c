// bf16 and f16 on the CPU are storage: a kernel widens what it reads and rounds what it writes. The bits are those of
// the f32 op between two casts, on every instruction set, and no f32 copy of the tensor is made.
#include <capo/autograd/autograd.h>
#include <capo/engine/allocator.h>
#include <capo/engine/cpu.h>
#include <capo/ops/attention.h>
#include <capo/ops/binary.h>
#include <capo/ops/conv.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>
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

#include <algorithm>
#include <cmath>
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

namespace {

struct AttentionShape {
  std::string name;
  std::int64_t nq, nk, d, dv;
  bool causal = false;
  Shape bias = {};
};
const AttentionShape kAttentions[] = {
    {"one block", 50, 50, 64, 64},
    {"odd sizes", 37, 41, 33, 35},
    {"blocks of keys", 75, 600, 40, 24},
    {"strips of queries and of the block of q", 200, 30, 300, 400},
    {"causal", 100, 300, 16, 20, true},
    {"causal, queries without keys", 90, 40, 16, 16, true},
    {"bias", 40, 70, 16, 16, false, {2, 3, 40, 70}},
    {"bias per query", 40, 70, 16, 16, true, {40, 1}},
    {"bias per key", 40, 530, 16, 16, false, {3, 1, 530}},
};
Tensors attention_inputs(const AttentionShape& s) {
  Tensors in = {normal({2, s.nq, 3, s.d}, "q"), normal({2, s.nk, 3, s.d}, "k"), normal({2, s.nk, 3, s.dv}, "v", 0.5)};
  if (!s.bias.empty()) in.push_back(normal(s.bias, "bias"));
  return in;
}
AttentionOut attend(const AttentionShape& s, const Tensors& in) {
  return attention(in[0], in[1], in[2], {0, s.causal, in.size() > 3 ? in[3] : Tensor()});
}
double largest(const Tensor& x) {
  double most = 0;
  for (const double v : to_vector<double>(cast(x, f64))) most = !(std::abs(v) <= most) ? std::abs(v) : most;
  return most;
}

}  // namespace

TEST_CASE("attention in 16 bits: the bits of the f32 op between two casts; its gradient reads the rounded o") {
  const IsaScope restore;
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    for (const DType t : {bf16, f16})
      for (const AttentionShape& s : kAttentions) {
        INFO(cat(s.name, " in ", to_string(t), ", ", to_string(level)));
        const Tensors half = cast_all(attention_inputs(s), t), wide = cast_all(half, f32);
        for (const Tensors* list : {&half, &wide})
          for (const Tensor& x : *list) set_requires_grad(x, true);
        const AttentionOut got = attend(s, half), wanted = attend(s, wide);
        CHECK(same_bits(got.o, cast(wanted.o, t)));
        CHECK(same_bits(got.lse, wanted.lse));

        const Tensor dy = cast(normal(got.o.shape(), "dy"), t);
        const Grads g = grad({got.o}, half, {dy}), w = grad({wanted.o}, wide, {cast(dy, f32)});
        double scale = 0;  // of all: that of a bias per query is zero but for the rounding of o
        for (const Tensor& x : w) scale = std::max(scale, largest(x));
        for (std::size_t i = 0; i < half.size(); ++i) {
          CAPTURE(i);
          if (i == 2)
            CHECK(same_bits(g[i], cast(w[i], t)));
          else
            CHECK(largest(cast(g[i], f32) - w[i]) <= (t == bf16 ? 0x1p-6 : 0x1p-9) * scale);
        }
      }
  }
}

TEST_CASE("lse_merge in 16 bits: the bits of the f32 op between two casts") {
  for (const DType t : {bf16, f16}) {
    const Tensors o = cast_all({normal({2, 9, 3, 21}, "a"), normal({2, 9, 3, 21}, "b")}, t), wide = cast_all(o, f32);
    const Tensor la = cast(normal({2, 3, 9}, "la"), f32), lb = cast(normal({2, 3, 9}, "lb"), f32);
    for (const Tensors* list : {&o, &wide})
      for (const Tensor& x : *list) set_requires_grad(x, true);
    const AttentionOut got = lse_merge(o[0], la, o[1], lb), wanted = lse_merge(wide[0], la, wide[1], lb);
    CHECK(same_bits(got.o, cast(wanted.o, t)));
    CHECK(same_bits(got.lse, wanted.lse));
    const Tensor dy = cast(normal(got.o.shape(), "dy"), t);
    const Grads g = grad({got.o}, o, {dy}), w = grad({wanted.o}, wide, {cast(dy, f32)});
    for (std::size_t i = 0; i < 2; ++i) CHECK(same_bits(g[i], cast(w[i], t)));
  }
}

namespace {

// Bytes that a call held at once beyond what it returned.
std::int64_t extra_bytes(const std::function<Tensors()>& run) {
  Allocator& a = allocator(kCpu);
  a.reset_peak();
  const std::int64_t before = a.stats().live_bytes;
  std::int64_t kept = 0;
  for (const Tensor& y : run()) kept += static_cast<std::int64_t>(y.nbytes());
  return a.stats().peak_bytes - before - kept;
}

}  // namespace

TEST_CASE("attention in 16 bits: no f32 copy is made") {
  const Shape shape = {16, 197, 4, 64};  // 1.6 MB
  const Tensor q = cast(normal(shape, "q"), bf16), k = cast(normal(shape, "k"), bf16),
               v = cast(normal(shape, "v"), bf16), dy = cast(normal(shape, "dy"), bf16);
  const std::int64_t small = 128 * 1024;
  CHECK(extra_bytes([&]() -> Tensors {
          const AttentionOut y = attention(q, k, v);
          return {y.o, y.lse};
        }) < small);
  for (const Tensor& x : {q, k, v}) set_requires_grad(x, true);
  const Tensor o = attention(q, k, v).o;
  CHECK(extra_bytes([&] { return grad({o}, {q, k, v}, {dy}); }) < small);
}

TEST_CASE("cross_entropy in 16 bits: the bits of the f32 op between two casts, its gradient too") {
  const IsaScope restore;
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    for (const DType t : {bf16, f16})
      for (const std::int64_t classes : {1, 5, 8, 77, 1000, 4097})
        for (const Reduction reduction : {Reduction::none, Reduction::mean, Reduction::sum})
          for (const double smoothing : {0.0, 0.1})
            for (const bool soft : {false, true}) {
              const std::int64_t rows = 131;
              const Tensor x = cast(normal({rows, classes}, "x", 0, 3), t),
                           target = cast(softmax(normal({rows, classes}, "target")), t);
              std::vector<std::int64_t> label;
              for (std::int64_t r = 0; r < rows; ++r) label.push_back(r % 7 == 3 ? -100 : r * 31 % classes);
              const Tensor labels = from_vector<std::int64_t>(label, {rows});
              const CrossEntropyOptions o{smoothing, -100, reduction};
              const auto loss = [&](const Tensor& logits) {
                return soft ? cross_entropy_soft(logits, cast(target, logits.dtype()), o)
                            : cross_entropy(logits, labels, o);
              };
              set_requires_grad(x, true);
              INFO(cat(to_string(t), " ", to_string(level), ", ", classes, " classes, smoothing ", smoothing,
                       soft ? ", soft" : ""));
              const Tensor got = loss(x), wanted = cast(loss(cast(x, f32)), t);
              CHECK(same_bits(got, wanted));
              const Tensor dy = cast(normal(got.shape(), "dy"), t);
              CHECK(same_bits(grad({got}, {x}, {dy})[0], grad({wanted}, {x}, {dy})[0]));
            }
  }
}

TEST_CASE("cross_entropy in 16 bits: no f32 copy is made, and the logits alone are kept") {
  for (const std::int64_t classes : {5, 1000}) {
    const std::int64_t rows = 512 * 1000 / classes;
    const Tensor x = cast(normal({rows, classes}, "x"), bf16), labels = zeros({rows}, i64);
    const std::int64_t per_row = 8 * rows + 64 * 1024;  // f32 losses and whether rows count
    CHECK(extra_bytes([&] { return Tensors{cross_entropy(x, labels)}; }) < per_row);
    set_requires_grad(x, true);
    Tensor loss;
    CHECK(extra_bytes([&] { return Tensors{loss = cross_entropy(x, labels)}; }) < per_row);
    CHECK(extra_bytes([&] { return grad({loss}, {x}, {ones({}, bf16)}); }) < per_row);
  }
}

namespace {

struct ConvShape {
  std::string name;
  Shape x, w;
  ConvOptions options = {};
};
// Every kernel, its pieces and its tails: see ops/cpu/conv.cpp and ops/cpu/conv.
const ConvShape kConvs[] = {
    {"1x1", {2, 9, 7, 80}, {70, 1, 1, 80}},
    {"1x1, several blocks of channels", {2, 9, 7, 1200}, {70, 1, 1, 1200}},
    {"3x3", {2, 13, 11, 64}, {96, 3, 3, 64}, {.pad_before = {1}}},
    {"3x3, more than 512 results", {1, 5, 5, 64}, {600, 3, 3, 64}, {.pad_before = {1}}},
    {"3x3, stride 2", {2, 13, 11, 64}, {40, 3, 3, 64}, {.stride = {2}, .pad_before = {1}}},
    {"3x3, dilated", {2, 13, 11, 48}, {40, 3, 3, 48}, {.pad_before = {2}, .dilation = {2}}},
    {"few channels", {2, 19, 17, 3}, {32, 3, 3, 3}, {.stride = {2}, .pad_before = {1}}},
    {"few channels, odd results", {2, 19, 17, 3}, {35, 3, 3, 3}, {.pad_before = {1}}},
    {"sixteen channels, long lines", {1, 3, 300, 16}, {112, 3, 3, 16}, {.pad_before = {1}}},
    {"lines beyond the buffer", {1, 1, 1100, 16}, {24, 1, 3, 16}, {.pad_before = {0, 1}}},
    {"groups", {2, 9, 7, 96}, {64, 3, 3, 48}, {.pad_before = {1}, .groups = 2}},
    {"groups side by side", {2, 9, 7, 24}, {48, 3, 3, 3}, {.pad_before = {1}, .groups = 8}},
    {"depthwise", {3, 9, 7, 37}, {37, 3, 3, 1}, {.pad_before = {1}, .groups = 37}},
    {"depthwise, many taps", {2, 9, 7, 21}, {21, 5, 7, 1}, {.stride = {2}, .pad_before = {2}, .groups = 21}},
    {"depthwise, more taps than the buffer", {1, 4, 40, 3}, {3, 33, 33, 1}, {.pad_before = {16}, .groups = 3}},
    {"volume", {2, 5, 6, 7, 20}, {24, 3, 3, 3, 20}, {.pad_before = {1}}},
};

}  // namespace

TEST_CASE("convolutions in 16 bits: the bits of the f32 op between two casts, gradients too") {
  const IsaScope restore;
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    for (const DType t : {bf16, f16})
      for (const ConvShape& s : kConvs)
        for (const bool turned : {false, true}) {
          INFO(cat(s.name, turned ? ", transposed" : "", " in ", to_string(t), ", ", to_string(level)));
          Shape from = s.x;
          if (turned) from.back() = s.w[0];
          const std::int64_t results = turned ? s.w.back() * s.options.groups : s.w[0];
          const Tensors half = cast_all({normal(from, "x"), normal(s.w, "w"), normal({results}, "bias")}, t),
                        wide = cast_all(half, f32);
          const auto run = [&](const Tensors& in) {
            return turned ? conv_transpose(in[0], in[1], in[2], s.options) : conv(in[0], in[1], in[2], s.options);
          };
          for (const Tensors* list : {&half, &wide})
            for (const Tensor& x : *list) set_requires_grad(x, true);
          const Tensor got = run(half), wanted = run(wide);
          CHECK(same_bits(got, cast(wanted, t)));
          const Tensor dy = cast(normal(got.shape(), "dy"), t);
          const Grads g = grad({got}, half, {dy}), e = grad({wanted}, wide, {cast(dy, f32)});
          for (std::size_t i = 0; i < half.size(); ++i) {
            CAPTURE(i);
            CHECK(same_bits(g[i], cast(e[i], t)));
          }
          if (turned) continue;
          const NoGrad off;
          const Tensor residual = cast(normal(got.shape(), "residual"), t);
          CHECK(same_bits(conv(half[0], half[1], half[2], s.options, Activation::relu, residual, 1.5),
                          cast(conv(wide[0], wide[1], wide[2], s.options, Activation::relu, cast(residual, f32), 1.5),
                               t)));
        }
  }
}

TEST_CASE("convolutions in 16 bits: no f32 copy is made") {
  struct Size {
    Shape x, w;
    std::int64_t planes;  // of the weight gradient, at most
    int groups = 1;
  };
  // The images are far larger than the weights, whose panels and planes are f32.
  for (const Size& s : {Size{{16, 48, 48, 64}, {64, 1, 1, 64}, 16}, Size{{16, 48, 48, 64}, {64, 3, 3, 64}, 16},
                        Size{{64, 48, 48, 3}, {32, 3, 3, 3}, 32}, Size{{16, 48, 48, 24}, {24, 3, 3, 24}, 32},
                        Size{{16, 48, 48, 64}, {64, 3, 3, 1}, 32, 64}}) {
    INFO(cat(s.x, " by ", s.w));
    const ConvOptions o{.pad_before = {s.w[1] / 2}, .groups = s.groups};
    const Tensor x = cast(normal(s.x, "x"), bf16), w = cast(normal(s.w, "w"), bf16);
    const std::int64_t weights = 4 * (w.numel() + 32 * s.w[0] * s.w[1] * s.w[2]) + 64 * 1024;
    CHECK(extra_bytes([&] { return Tensors{conv(x, w, {}, o)}; }) < weights);
    set_requires_grad(x, true);
    set_requires_grad(w, true);
    const Tensor y = conv(x, w, {}, o), dy = cast(normal(y.shape(), "dy"), bf16);
    CHECK(static_cast<std::int64_t>(x.nbytes()) > 4 * weights);
    CHECK(extra_bytes([&] { return grad({y}, {x}, {dy}, {.keep_graph = true}); }) < weights);
    CHECK(extra_bytes([&] { return grad({y}, {w}, {dy}); }) < s.planes * 4 * w.numel() + 64 * 1024);
  }
}

TEST_CASE("drop_path in 16 bits: the bits of the f32 op between two casts, its gradient too") {
  for (const DType t : {bf16, f16})
    for (const Shape& shape : {Shape{9, 7, 5}, Shape{6, 40, 1000}, Shape{0, 4}, Shape{3, 0, 4}}) {
      INFO(cat(shape, " in ", to_string(t)));
      const Tensor x = cast(normal(shape, "x"), t), dy = cast(normal(shape, "dy"), t);
      set_requires_grad(x, true);
      Generator one(5), other(5);
      const Tensor got = drop_path(x, 0.4, one, true), wanted = cast(drop_path(cast(x, f32), 0.4, other, true), t);
      CHECK(same_bits(got, wanted));
      CHECK(same_bits(grad({got}, {x}, {dy})[0], grad({wanted}, {x}, {dy})[0]));
    }
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
  Generator rng(3);
  CHECK(extra([&] { return drop_path(x, 0.3, rng, true); }) < small);
  CHECK(extra([&] { return unary_backward(UnaryKind::gelu, x, x, 0, 0); }) < small);
  CHECK(extra([&] { return x + x; }) < small);
  CHECK(extra([&] { return x * w; }) < small);
  CHECK(extra([&] { return sum(x, {0}); }) < small);
  CHECK(extra([&] { return softmax(x); }) < small);
  CHECK(extra([&] { return layer_norm(x, w, w); }) < small);
  CHECK(extra([&] { return group_norm(reshape(x, {2, 16, 16, 512}), 32, w, w); }) < small);
  CHECK(extra([&] { return cast(cast(x, f32), bf16); }) > small);  // the check can fail
}
