// attention, lse_merge and attention_map against scalar loops.
#include <capo/ops/attention.h>
#include <capo/ops/binary.h>
#include <capo/ops/join.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>

#include <cmath>
#include <limits>

namespace capo::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Reference {
  Tensor o, lse, map;
};

// One score row at a time, in f64.
Reference loops(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, double scale, bool causal) {
  const std::int64_t B = q.size(0), nq = q.size(1), H = q.size(2), D = q.size(3), nk = k.size(1), dv = v.size(3);
  if (scale == 0) scale = 1 / std::sqrt(static_cast<double>(D));
  const auto vq = to_vector<double>(q), vk = to_vector<double>(k), vv = to_vector<double>(v);
  const auto vb = bias.defined() ? to_vector<double>(expand(bias, {B, H, nq, nk})) : std::vector<double>();
  std::vector<double> o(static_cast<std::size_t>(B * nq * H * dv)), lse(static_cast<std::size_t>(B * H * nq)),
      map(static_cast<std::size_t>(B * H * nq * nk));
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t h = 0; h < H; ++h)
      for (std::int64_t i = 0; i < nq; ++i) {
        std::vector<double> s(static_cast<std::size_t>(nk), -kInf);
        double top = -kInf, total = 0;
        const std::int64_t row = (b * H + h) * nq + i;
        for (std::int64_t j = 0; j < nk; ++j) {
          if (causal && j > i + nk - nq) continue;
          double x = 0;
          for (std::int64_t d = 0; d < D; ++d)
            x += vq[static_cast<std::size_t>(((b * nq + i) * H + h) * D + d)] *
                 vk[static_cast<std::size_t>(((b * nk + j) * H + h) * D + d)];
          x = x * scale + (vb.empty() ? 0 : vb[static_cast<std::size_t>(row * nk + j)]);
          s[static_cast<std::size_t>(j)] = x;
          top = std::max(top, x);
        }
        for (auto& x : s) total += x = top == -kInf ? 0 : std::exp(x - top);
        lse[static_cast<std::size_t>(row)] = total > 0 ? top + std::log(total) : -kInf;
        for (std::int64_t j = 0; j < nk && total > 0; ++j) {
          const double p = s[static_cast<std::size_t>(j)] / total;
          map[static_cast<std::size_t>(row * nk + j)] = p;
          for (std::int64_t d = 0; d < dv; ++d)
            o[static_cast<std::size_t>(((b * nq + i) * H + h) * dv + d)] +=
                p * vv[static_cast<std::size_t>(((b * nk + j) * H + h) * dv + d)];
        }
      }
  return {values(o, {B, nq, H, dv}), values(lse, {B, H, nq}), values(map, {B, H, nq, nk})};
}

// lse is f32 beside bf16 and f16; the checks hand in and expect one dtype.
Tensor narrow(const Tensor& lse, const Tensor& like) { return cast(lse, like.dtype()); }
Tensor wide(const Tensor& lse) { return is_half(lse.dtype()) ? cast(lse, f32) : lse; }

// -inf replaced by 0, so that cotangents of rows without keys make no NaN.
Tensor finite(const Tensor& lse) {
  const Tensor none = equal(lse, full({}, -kInf, lse.dtype(), lse.device()));
  return where(none, full({}, 0, lse.dtype(), lse.device()), lse);
}

Sample sample(const std::string& label, const Shape& q, std::int64_t nk, std::int64_t dv, const Tensor& bias = {},
              bool causal = false, double scale = 0) {
  Tensors inputs = {normal(q, "q"), normal({q[0], nk, q[2], q[3]}, "k"), normal({q[0], nk, q[2], dv}, "v", 0.5)};
  if (bias.defined()) inputs.push_back(bias);
  Sample s{label, inputs,
           [=](const Tensors& in) -> Tensors {
             const AttentionOut y = attention(in[0], in[1], in[2], {scale, causal, in.size() > 3 ? in[3] : Tensor()});
             return {y.o, narrow(finite(y.lse), in[0])};
           },
           [=](const Tensors& in) -> Tensors {
             const Reference y = loops(in[0], in[1], in[2], in.size() > 3 ? in[3] : Tensor(), scale, causal);
             return {y.o, finite(y.lse)};
           }, {}, true, true};
  s.tol_f32 = 4e-6;
  return s;
}

OpCase attention_case() {
  OpCase c{"attention", {}, {}};
  auto& s = c.samples;
  s.push_back(sample("small", {2, 3, 2, 4}, 3, 4));
  s.push_back(sample("one token", {1, 1, 1, 5}, 1, 5));
  s.push_back(sample("17 tokens of 64", {2, 17, 1, 64}, 17, 64));
  s.push_back(sample("cross, D 40", {1, 5, 2, 40}, 9, 40));
  s.push_back(sample("cross, D 72, Dv 24", {1, 9, 1, 72}, 4, 24));
  s.push_back(sample("D 80, causal, bias", {1, 7, 1, 80}, 9, 80, normal({7, 9}, "bias"), true));
  s.push_back(sample("D 160, Dv 128", {1, 3, 1, 160}, 5, 128));
  s.push_back(sample("D 200", {1, 3, 1, 200}, 2, 200));
  s.push_back(sample("D 33, Dv 35", {1, 5, 2, 33}, 4, 35));
  // Several tiles of queries and keys, with remainders, in each bucket of head sizes that CUDA has.
  s.push_back(sample("D 64, bias, tiles", {1, 66, 1, 64}, 130, 24, normal({66, 130}, "bias")));
  s.back().second_order = false;
  s.push_back(sample("D 96, Dv 72, causal, tiles", {1, 130, 1, 96}, 70, 72, {}, true));
  s.back().second_order = false;
  s.push_back(sample("D 100, Dv 128, tiles", {1, 70, 1, 100}, 140, 128));
  s.back().second_order = false;
  s.push_back(sample("D 160, causal, tiles", {1, 70, 1, 160}, 100, 160, {}, true));
  s.back().second_order = false;
  s.push_back(sample("D 256, tiles", {1, 70, 1, 256}, 72, 250));
  s.back().second_order = false;
  s.push_back(sample("D 20, Dv 300", {1, 2, 1, 20}, 3, 300));
  s.push_back(sample("two query blocks", {1, 75, 1, 3}, 6, 7));
  s.push_back(sample("several chunks of queries, blocks of keys", {1, 150, 1, 2}, 530, 3));
  s.back().second_order = false;
  s.push_back(sample("given scale", {1, 4, 2, 6}, 5, 6, {}, false, 0.7));
  s.push_back(sample("causal", {2, 7, 1, 4}, 7, 4, {}, true));
  s.push_back(sample("causal, more keys", {1, 3, 2, 4}, 6, 4, {}, true));
  s.push_back(sample("causal, more queries: rows without keys", {1, 6, 2, 4}, 3, 4, {}, true));
  s.push_back(sample("causal over blocks", {1, 100, 1, 2}, 300, 2, {}, true));
  s.back().second_order = false;
  s.push_back(sample("bias of all scores", {2, 3, 2, 4}, 5, 4, normal({2, 2, 3, 5}, "bias")));
  s.push_back(sample("bias per head", {2, 5, 3, 4}, 5, 4, normal({3, 5, 5}, "bias")));
  s.push_back(sample("bias per key", {2, 3, 2, 4}, 17, 4, normal({2, 1, 1, 17}, "bias")));
  s.push_back(sample("bias per query", {1, 4, 2, 3}, 3, 4, normal({4, 1}, "bias"), true));
  s.push_back(sample("huge scores", {1, 3, 1, 4}, 5, 4, normal({5}, "bias", 0, 1e4)));
  s.back().gradient = false;
  {
    std::vector<double> mask(2 * 3 * 4);
    for (std::size_t i : {1u, 4u, 5u, 6u, 7u, 12u, 22u}) mask[i] = -kInf;  // row 1 of the first matrix sees nothing
    Sample masked = sample("masked rows", {2, 3, 2, 4}, 4, 4, values(mask, {2, 1, 3, 4}));
    masked.wanted = {true, true, true, false};
    s.push_back(masked);
  }
  s.push_back(sample("no keys", {2, 3, 1, 4}, 0, 4));
  s.push_back(sample("no queries", {2, 0, 1, 4}, 3, 4));
  s.push_back(sample("no batch", {0, 3, 1, 4}, 3, 4));
  Sample fused = sample("views of one qkv", {2, 5, 3, 8}, 5, 8);
  fused.inputs = {normal({2, 5, 3, 3, 8}, "qkv")};
  fused.run = [](const Tensors& in) -> Tensors {
    const AttentionOut y = attention(select(in[0], 2, 0), select(in[0], 2, 1), select(in[0], 2, 2));
    return {y.o, narrow(y.lse, in[0])};
  };
  fused.reference = [](const Tensors& in) -> Tensors {
    const Reference y = loops(select(in[0], 2, 0), select(in[0], 2, 1), select(in[0], 2, 2), {}, 0, false);
    return {y.o, y.lse};
  };
  s.push_back(fused);
  Sample repeated = sample("keys repeated by stride 0", {2, 3, 2, 16}, 4, 16);
  repeated.inputs = {normal({2, 3, 2, 16}, "q"), normal({2, 1, 2, 16}, "k")};
  repeated.run = [](const Tensors& in) -> Tensors {
    const Tensor k = expand(in[1], {2, 4, 2, 16});
    const AttentionOut y = attention(in[0], k, k);
    return {y.o, narrow(y.lse, in[0])};
  };
  repeated.reference = [](const Tensors& in) -> Tensors {
    const Tensor k = expand(in[1], {2, 4, 2, 16});
    const Reference y = loops(in[0], k, k, {}, 0, false);
    return {y.o, y.lse};
  };
  s.push_back(repeated);
  c.errors = {
      {"rank", [] { attention(normal({2, 3, 4}, "q"), normal({2, 3, 4}, "k"), normal({2, 3, 4}, "v")); }, "rank 4"},
      {"heads", [] { attention(normal({1, 2, 3, 4}, "q"), normal({1, 2, 1, 4}, "k"), normal({1, 2, 1, 4}, "v")); },
       "k must be"},
      {"keys", [] { attention(normal({1, 2, 3, 4}, "q"), normal({1, 2, 3, 4}, "k"), normal({1, 5, 3, 4}, "v")); },
       "v must be"},
      {"bias", [] { attention(normal({1, 2, 3, 4}, "q"), normal({1, 2, 3, 4}, "k"), normal({1, 2, 3, 4}, "v"),
                              {0, false, normal({3}, "b")}); }, "must broadcast to [1, 3, 2, 2]"},
      {"dtypes",
       [] { attention(normal({1, 2, 3, 4}, "q"), cast(normal({1, 2, 3, 4}, "k"), f32), normal({1, 2, 3, 4}, "v")); },
       "one floating dtype"},
  };
  return c;
}

Tensors merged(const AttentionOut& y) { return {y.o, narrow(finite(y.lse), y.o)}; }

OpCase merge_case() {
  OpCase c{"lse_merge", {}, {}};
  auto& s = c.samples;
  const auto rows = [](const Tensors& in) -> Tensors {
    const std::int64_t B = in[0].size(0), N = in[0].size(1), H = in[0].size(2), D = in[0].size(3);
    const auto a = to_vector<double>(in[0]), la = to_vector<double>(in[1]), b = to_vector<double>(in[2]),
               lb = to_vector<double>(in[3]);
    std::vector<double> o(a.size()), lse(la.size());
    for (std::size_t r = 0; r < lse.size(); ++r) {
      const auto row = static_cast<std::int64_t>(r);
      const std::int64_t n = row % N, h = row / N % H, i = row / N / H;
      const double top = std::max(la[r], lb[r]), ea = top == -kInf ? 0 : std::exp(la[r] - top),
                   eb = top == -kInf ? 0 : std::exp(lb[r] - top);
      lse[r] = top == -kInf ? 0 : top + std::log(ea + eb);
      for (std::int64_t d = 0; d < D && top != -kInf; ++d) {
        const auto at = static_cast<std::size_t>(((i * N + n) * H + h) * D + d);
        o[at] = (ea * a[at] + eb * b[at]) / (ea + eb);
      }
    }
    return {values(o, {B, N, H, D}), values(lse, {B, H, N})};
  };
  const auto pair = [&](const std::string& label, const Shape& shape, const Tensor& l1, const Tensor& l2) {
    s.push_back({label, {normal(shape, "o1"), l1, normal(shape, "o2", 1), l2},
                 [](const Tensors& in) { return merged(lse_merge(in[0], wide(in[1]), in[2], wide(in[3]))); },
                 rows, {}, true, true});
    s.back().tol_f32 = 4e-6;
  };
  pair("small", {2, 3, 2, 5}, normal({2, 2, 3}, "l1"), normal({2, 2, 3}, "l2"));
  pair("one row of one", {1, 1, 1, 1}, normal({1, 1, 1}, "l1", 2), normal({1, 1, 1}, "l2"));
  pair("odd sizes", {1, 17, 3, 40}, normal({1, 3, 17}, "l1", 0, 3), normal({1, 3, 17}, "l2", 1));
  pair("far apart", {1, 2, 1, 3}, values({900, -900}, {1, 1, 2}), values({-900, 900}, {1, 1, 2}));
  pair("empty", {2, 0, 2, 5}, normal({2, 2, 0}, "l1"), normal({2, 2, 0}, "l2"));
  pair("sides without keys", {1, 4, 1, 3}, values({-kInf, 1, -kInf, 0.5}, {1, 1, 4}),
       values({2, -kInf, -kInf, 1}, {1, 1, 4}));
  s.back().wanted = {true, false, true, false};

  // Three sets of keys merged in three orders are attention over all of them.
  for (int order = 0; order < 3; ++order) {
    Sample three{cat("three sets, order ", order),
                 {normal({2, 5, 2, 4}, "q"), normal({2, 3, 2, 4}, "k1"), normal({2, 3, 2, 6}, "v1"),
                  normal({2, 4, 2, 4}, "k2"),
                  normal({2, 4, 2, 6}, "v2"), normal({2, 1, 2, 4}, "k3"), normal({2, 1, 2, 6}, "v3")},
                 [order](const Tensors& in) -> Tensors {
                   AttentionOut part[3];
                   for (std::size_t i = 0; i < 3; ++i)
                     part[(i + static_cast<std::size_t>(order)) % 3] = attention(in[0], in[2 * i + 1], in[2 * i + 2]);
                   const AttentionOut two = lse_merge(part[0].o, part[0].lse, part[1].o, part[1].lse);
                   const AttentionOut y = lse_merge(part[2].o, part[2].lse, two.o, two.lse);
                   return merged(y);
                 },
                 [](const Tensors& in) -> Tensors {
                   const Reference y = loops(in[0], concat({in[1], in[3], in[5]}, 1),
                                            concat({in[2], in[4], in[6]}, 1), {}, 0, false);
                   return {y.o, y.lse};
                 }, {}, true, true};
    three.tol_f32 = 4e-6;
    s.push_back(three);
  }
  const auto call = [](const Shape& o1, const Shape& l1, const Shape& o2, const Shape& l2) {
    lse_merge(normal(o1, "a"), normal(l1, "b"), normal(o2, "c"), normal(l2, "d"));
  };
  c.errors = {
      {"o shapes", [=] { call({1, 2, 3, 4}, {1, 3, 2}, {1, 2, 3, 5}, {1, 3, 2}); }, "one shape"},
      {"lse shape", [=] { call({1, 2, 3, 4}, {1, 2, 3}, {1, 2, 3, 4}, {1, 3, 2}); }, "must be [1, 3, 2]"},
      {"dtypes", [] { lse_merge(normal({1, 1, 1, 1}, "a"), cast(normal({1, 1, 1}, "b"), f32), normal({1, 1, 1, 1}, "c"),
                                normal({1, 1, 1}, "d")); }, "lse1 and lse2"},
  };
  return c;
}

OpCase map_case() {
  OpCase c{"attention_map", {}, {}};
  const auto map = [&](const std::string& label, const Shape& q, std::int64_t nk, const Tensor& bias, double scale) {
    const Tensor a = normal(q, "q"), b = normal({q[0], nk, q[2], q[3]}, "k");
    Tensors inputs = {a, b, loops(a, b, b, bias, scale, false).lse};
    if (bias.defined()) inputs.push_back(bias);
    c.samples.push_back({label, inputs,
                         [scale](const Tensors& in) -> Tensors {
                           return {attention_map(in[0], in[1], wide(in[2]), scale, in.size() > 3 ? in[3] : Tensor())};
                         },
                         [scale](const Tensors& in) -> Tensors {
                           return {loops(in[0], in[1], in[1], in.size() > 3 ? in[3] : Tensor(), scale, false).map};
                         }, {}, false});
    c.samples.back().tol_f32 = 4e-6;
    c.samples.back().strided = false;  // the reference's lse is tied to q and k
  };
  map("small", {2, 3, 2, 4}, 5, {}, 0);
  map("bias and scale", {1, 17, 1, 8}, 17, normal({17, 17}, "bias"), 0.3);
  map("masked row", {1, 2, 1, 3}, 2, values({0, 0, -kInf, -kInf}, {2, 2}), 0);
  map("no keys", {1, 2, 1, 3}, 0, {}, 0);
  c.errors = {
      {"rank", [] { attention_map(normal({2, 3, 4}, "q"), normal({2, 3, 4}, "k"), normal({2, 3}, "l")); },
       "needs q and k"},
      {"lse", [] { attention_map(normal({1, 3, 2, 4}, "q"), normal({1, 3, 2, 4}, "k"), normal({1, 3, 2}, "l")); },
       "lse must be"},
  };
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() { return {attention_case(), merge_case(), map_case()}; }

}  // namespace capo::test
