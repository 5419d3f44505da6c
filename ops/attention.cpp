#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/attention.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/matmul.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace capo {

namespace {
// Pairs of a query and a key that it sees, of one head.
std::int64_t seen_pairs(const AttentionArgs& p) {
  if (!p.causal) return p.nq * p.nk;
  const std::int64_t last = p.nq < p.nk ? p.nq : p.nk;  // queries that see any key; the very last sees all
  return last * p.nk - last * (last - 1) / 2;
}
Work attention_work(const AttentionArgs& p, std::int64_t items) {  // q k^T and p v
  return Work::computed(2 * (items / p.chunks) * seen_pairs(p) * (p.d + p.dv));
}
Work attention_backward_work(const AttentionGradArgs& p, std::int64_t items) {  // q k^T again, dp, dv, dq, dk
  return Work::computed(2 * items * seen_pairs(p.forward) * (3 * p.forward.d + 2 * p.forward.dv));
}
Work lse_merge_work(const LseMergeArgs& p, std::int64_t items) {
  const std::int64_t o = bytes_of(p.dtype, items * p.d), lse = bytes_of(accumulator(p.dtype), items);
  return Work::moved(p.d_o ? 5 * o + (p.dlse ? 5 : 4) * lse : 3 * o + 3 * lse);
}
}  // namespace

CAPO_KERNEL_CUDA(attention, AttentionArgs, attention_work)
CAPO_KERNEL_CUDA(attention_backward, AttentionGradArgs, attention_backward_work)
CAPO_KERNEL_CUDA(lse_merge, LseMergeArgs, lse_merge_work)

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t kGradHeads = 32;

// What the kernels read in place: unit stride on the last axis.
Tensor readable(const Tensor& x) { return x.size(-1) <= 1 || x.strides()[x.rank() - 1] == 1 ? x : contiguous(x); }

void set_strides(const Tensor& x, std::int64_t* out) {
  for (int i = 0; i < 3; ++i) out[i] = x.strides()[i];
}

// The argument struct without o and lse. data() throws on meta tensors: not to be called there.
AttentionArgs args_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, double scale,
                      bool causal) {
  AttentionArgs p{};
  p.dtype = q.dtype();
  p.q = q.data(), p.k = k.data(), p.v = v.data();
  p.heads = q.size(2), p.nq = q.size(1), p.nk = k.size(1), p.d = q.size(3), p.dv = v.size(3);
  set_strides(q, p.qs);
  set_strides(k, p.ks);
  set_strides(v, p.vs);
  if (bias.defined()) {
    p.bias = bias.data();
    const int lead = 4 - bias.rank();
    for (int i = 0; i < bias.rank(); ++i) p.bs[lead + i] = bias.shape()[i] == 1 ? 0 : bias.strides()[i];
  }
  p.scale = scale;
  p.causal = causal;
  return p;
}

Tensor heads_first(const Tensor& x) { return permute(x, {0, 2, 1, 3}); }  // [B, N, H, D] <-> [B, H, N, D]
Tensor rows_first(const Tensor& x) { return unsqueeze(permute(x, {0, 2, 1}), 3); }  // [B, H, N] -> [B, N, H, 1]

// [Nq, Nk]: 0 where visible, else -inf.
Tensor causal_bias(std::int64_t nq, std::int64_t nk, DType dtype, Device device) {
  const Tensor row = unsqueeze(arange(nq, dtype, device), 1) + static_cast<double>(nk - nq);
  const Tensor hidden = greater(unsqueeze(arange(nk, dtype, device), 0), row);
  return where(hidden, full({}, -kInfinity, dtype, device), full({}, 0, dtype, device));
}

// exp(scale q k^T + bias - lse) in recorded ops, [B, H, Nq, Nk]; zero in rows with lse = -inf.
Tensor probabilities(const Tensor& q, const Tensor& k, const Tensor& bias, const Tensor& lse, double scale,
                     bool causal) {
  Tensor s = matmul(heads_first(q), transpose(heads_first(k), -2, -1)) * scale;
  if (bias.defined()) s = s + bias;
  if (causal) s = s + causal_bias(q.size(1), k.size(1), s.dtype(), s.device());
  const Tensor none = equal(lse, full({}, -kInfinity, lse.dtype(), lse.device()));
  return exp(s - unsqueeze(where(none, full({}, kInfinity, lse.dtype(), lse.device()), lse), 3));
}

// Inputs q, k, v, bias; saved {q, k, v, bias, o, lse}.
Grads composite_gradient(const Saved& s, const Tensor& d_o0, const Tensor& dlse, Needs need, double scale,
                         bool causal) {
  const DType t = s[0].dtype();
  const auto wide = [&](const Tensor& x) { return x.defined() && is_half(t) ? cast(x, f32) : x; };  // as lse is
  const auto narrow = [&](const Tensor& x) { return x.defined() && is_half(t) ? cast(x, t) : x; };
  const Tensor q = wide(s[0]), k = wide(s[1]), v = wide(s[2]), bias = wide(s[3]), o = wide(s[4]), lse = s[5],
               d_o = wide(d_o0);
  const Tensor p = probabilities(q, k, bias, lse, scale, causal);
  const bool scores = need[0] || need[1] || need[3];
  Tensor ds, dq, dk, dv, dbias;
  if (scores) {
    if (d_o.defined()) {
      const Tensor delta = heads_first(sum(d_o * o, {3}, true));
      ds = matmul(heads_first(d_o), transpose(heads_first(v), -2, -1)) - delta;
    }
    if (dlse.defined()) ds = ds.defined() ? ds + unsqueeze(dlse, 3) : unsqueeze(dlse, 3);
    ds = p * ds;
  }
  if (need[0]) dq = heads_first(matmul(ds, heads_first(k)) * scale);
  if (need[1]) dk = heads_first(matmul(transpose(ds, -2, -1), heads_first(q)) * scale);
  if (need[2]) dv = d_o.defined() ? heads_first(matmul(transpose(p, -2, -1), heads_first(d_o))) : Tensor();
  if (need[3]) dbias = sum_to(ds, bias.shape());
  return {narrow(dq), narrow(dk), narrow(dv), narrow(dbias)};
}

Grads fused_gradient(const Saved& s, const Tensor& d_o0, const Tensor& dlse0, Needs need, double scale, bool causal) {
  const Tensor q = s[0], k = s[1], v = s[2], bias = s[3], o = s[4], lse = s[5];
  const Tensor d_o = d_o0.defined() ? contiguous(d_o0) : zeros_like(o);
  const Tensor dlse = dlse0.defined() ? contiguous(dlse0) : dlse0;
  const auto like = [&](bool wanted, const Tensor& x) {
    return wanted ? empty(x.shape(), x.dtype(), x.device()) : Tensor();
  };
  const Tensor dq = like(need[0], q), dk = like(need[1], k), dv = like(need[2], v), delta = empty_like(lse);
  Tensor dbias;
  if (need[3]) dbias = empty({q.size(0), q.size(2), q.size(1), k.size(1)}, lse.dtype(), q.device());
  // The CPU sums dq over blocks of keys: beside a 16-bit dq, for so many heads at a time.
  const std::int64_t heads = q.size(0) * q.size(2), widest = std::max(q.size(3), v.size(3));
  const bool blocks = k.size(1) > kAttentionGradKeys || widest > kAttentionGradKeys;
  const bool beside = need[0] && blocks && through_f32(q);
  const std::int64_t at_once = beside ? kGradHeads : std::max<std::int64_t>(heads, 1);
  const Tensor sums = beside ? empty({std::min(heads, at_once), q.size(1), q.size(3)}, f32, q.device()) : Tensor();
  if (!q.device().is_meta()) {
    AttentionGradArgs g{};
    g.forward = args_of(q, k, v, bias, scale, causal);
    g.forward.o = o.data(), g.forward.lse = lse.data();
    g.d_o = d_o.data();
    g.delta = delta.data();
    if (dlse.defined()) g.dlse = dlse.data();
    if (need[0]) g.dq = dq.data();
    if (need[1]) g.dk = dk.data();
    if (need[2]) g.dv = dv.data();
    if (need[3]) g.dbias = dbias.data();
    g.dq_sums = data_or_null(sums);
    for (; g.first < heads; g.first += at_once)
      launch(kernels::attention_backward, q.device(), g, std::min(at_once, heads - g.first), 1);
  }
  return {dq, dk, dv, need[3] ? cast(sum_to(dbias, bias.shape()), q.dtype()) : Tensor()};
}

LseMergeArgs merge_args(const Tensor& o1, const Tensor& lse1, const Tensor& o2, const Tensor& lse2) {
  LseMergeArgs p{};
  p.dtype = o1.dtype();
  p.n = o1.size(1), p.heads = o1.size(2), p.d = o1.size(3);
  p.o1 = o1.data(), p.lse1 = lse1.data(), p.o2 = o2.data(), p.lse2 = lse2.data();
  return p;
}
constexpr std::int64_t kMergeGrain = 256;  // rows

// Inputs o1, lse1, o2, lse2; saved likewise.
Grads composite_merge_gradient(const Saved& s, const Tensor& d_o0, const Tensor& dlse, Needs need) {
  const DType t = s[0].dtype(), acc = accumulator(t);
  const Tensor o1 = cast(s[0], acc), lse1 = s[1], o2 = cast(s[2], acc), lse2 = s[3], d_o = cast_or_undefined(d_o0, acc);
  const Tensor minus = full({}, -kInfinity, lse1.dtype(), lse1.device()),
               zero = full({}, 0, lse1.dtype(), lse1.device());
  const Tensor none = logical_and(equal(lse1, minus), equal(lse2, minus));
  const Tensor live = where(none, zero, full({}, 1, lse1.dtype(), lse1.device()));
  // Infinities are replaced before the subtraction: +-1e30 saturates the sigmoid as they would, with slope 0, not NaN.
  const auto finite = [&](const Tensor& l) {
    return where(equal(l, minus), full({}, -1e30, l.dtype(), l.device()), l);
  };
  const Tensor w2 = sigmoid(finite(lse2) - finite(lse1)) * live, w1 = live - w2;
  Tensor do1, do2, dlse1, dlse2;
  if (d_o.defined()) {
    do1 = cast(d_o * rows_first(w1), t);
    do2 = cast(d_o * rows_first(w2), t);
    const Tensor gain = w1 * w2 * permute(sum(d_o * (o2 - o1), {3}), {0, 2, 1});
    dlse1 = neg(gain);
    dlse2 = gain;
  }
  if (dlse.defined()) {
    dlse1 = dlse1.defined() ? dlse1 + w1 * dlse : w1 * dlse;
    dlse2 = dlse2.defined() ? dlse2 + w2 * dlse : w2 * dlse;
  }
  return {keep_if(need[0], do1), keep_if(need[1], dlse1), keep_if(need[2], do2), keep_if(need[3], dlse2)};
}

}  // namespace

AttentionOut attention(const Tensor& q0, const Tensor& k0, const Tensor& v0, const AttentionOptions& options) {
  const DType t = q0.dtype();
  CAPO_CHECK(q0.rank() == 4 && k0.rank() == 4 && v0.rank() == 4,
             "attention: needs q, k, v of rank 4 [B, N, H, D], got ", q0.shape(), ", ", k0.shape(), " and ",
             v0.shape());
  CAPO_CHECK(is_floating(t) && k0.dtype() == t && v0.dtype() == t,
             "attention: q, k, v must have one floating dtype, got ", t, ", ", k0.dtype(), " and ", v0.dtype());
  CAPO_CHECK(k0.device() == q0.device() && v0.device() == q0.device(), "attention: devices must be equal, got ",
             q0.device(), ", ", k0.device(), " and ", v0.device());
  const std::int64_t B = q0.size(0), H = q0.size(2), nq = q0.size(1), nk = k0.size(1), d = q0.size(3), dv = v0.size(3);
  CAPO_CHECK(k0.shape() == (Shape{B, nk, H, d}), "attention: k must be [", B, ", Nk, ", H, ", ", d, "] to match q ",
             q0.shape(), ", got ", k0.shape());
  CAPO_CHECK(v0.shape() == (Shape{B, nk, H, dv}), "attention: v must be [", B, ", ", nk, ", ", H, ", Dv] to match k ",
             k0.shape(), ", got ", v0.shape());
  CAPO_CHECK(d >= 1 && d <= 1024 && dv <= 1024, "attention: head sizes must be 1..1024, got ", d, " and ", dv);
  const Tensor& bias0 = options.bias;
  if (bias0.defined()) {
    CAPO_CHECK(bias0.dtype() == t && bias0.device() == q0.device(), "attention: bias must be like q, got ",
               describe(bias0));
    bool fits = bias0.rank() <= 4;
    const std::int64_t scores[] = {B, H, nq, nk};
    for (int i = 1; fits && i <= bias0.rank(); ++i) fits = bias0.size(-i) == 1 || bias0.size(-i) == scores[4 - i];
    CAPO_CHECK(fits, "attention: bias must broadcast to ", (Shape{B, H, nq, nk}), ", got ", bias0.shape());
  }
  const Tensor q = readable(q0), k = readable(k0), v = readable(v0), bias = bias0;
  const double scale = options.scale != 0 ? options.scale : 1 / std::sqrt(static_cast<double>(d));
  const bool causal = options.causal;
  const Tensor o = empty({B, nq, H, dv}, t, q.device()), lse = empty({B, H, nq}, is_half(t) ? f32 : t, q.device());
  if (!q.device().is_meta()) {
    AttentionArgs p = args_of(q, k, v, bias, scale, causal);
    p.o = o.data(), p.lse = lse.data();
    // CPU, few heads: the queries are cut as well, into blocks fixed by the shape. CUDA cuts them itself.
    const std::int64_t wanted = B * H < 16 && B * H > 0 ? (16 + B * H - 1) / (B * H) : 1;
    p.chunk = (nq + wanted - 1) / wanted;
    p.chunk = p.chunk > 512 ? 512 : p.chunk < 48 ? 48 : p.chunk;
    p.chunks = q.device().is_cuda() ? 1 : (nq + p.chunk - 1) / p.chunk;
    launch(kernels::attention, q.device(), p, B * H * p.chunks, 1);
  }
  const std::vector<Tensor> y = record_many(
      "attention", {o, lse}, {q, k, v, bias}, Saved({q, k, v, bias}, {o, lse}),
      [scale, causal](const Saved& s, const Grads& dy, Needs need) -> Grads {
        return grad_enabled() ? composite_gradient(s, dy[0], dy[1], need, scale, causal)
                              : fused_gradient(s, dy[0], dy[1], need, scale, causal);
      });
  return {y[0], y[1]};
}

AttentionOut lse_merge(const Tensor& o1, const Tensor& lse1, const Tensor& o2, const Tensor& lse2) {
  CAPO_CHECK(o1.rank() == 4 && o1.shape() == o2.shape(), "lse_merge: o1 and o2 must have one shape [B, N, H, D], got ",
             o1.shape(), " and ", o2.shape());
  const Shape rows = {o1.size(0), o1.size(2), o1.size(1)};
  CAPO_CHECK(lse1.shape() == rows && lse2.shape() == rows, "lse_merge: lse1 and lse2 must be ", rows, " to match o1 ",
             o1.shape(), ", got ", lse1.shape(), " and ", lse2.shape());
  const DType t = o1.dtype(), wide = t == f64 ? f64 : f32;
  CAPO_CHECK(is_floating(t) && o2.dtype() == t && lse1.dtype() == wide && lse2.dtype() == wide,
             "lse_merge: o1 and o2 must have one floating dtype, lse1 and lse2 ", wide, ", got ", t, ", ", o2.dtype(),
             ", ", lse1.dtype(), " and ", lse2.dtype());
  CAPO_CHECK(o2.device() == o1.device() && lse1.device() == o1.device() && lse2.device() == o1.device(),
             "lse_merge: devices must be equal, got ", describe(o1), ", ", describe(lse1), ", ", describe(o2), " and ",
             describe(lse2));
  const Tensor a = contiguous(o1), la = contiguous(lse1), b = contiguous(o2), lb = contiguous(lse2);
  const Tensor o = empty_like(a), lse = empty_like(la);
  if (!o.device().is_meta()) {
    LseMergeArgs p = merge_args(a, la, b, lb);
    p.o = o.data(), p.lse = lse.data();
    launch(kernels::lse_merge, o.device(), p, lse.numel(), kMergeGrain);
  }
  const std::vector<Tensor> y = record_many(
      "lse_merge", {o, lse}, {a, la, b, lb}, Saved({a, la, b, lb}),
      [](const Saved& s, const Grads& dy, Needs need) -> Grads {
        if (grad_enabled()) return composite_merge_gradient(s, dy[0], dy[1], need);
        const Tensor d_o = dy[0].defined() ? contiguous(dy[0]) : zeros_like(s[0]);
        const Tensor dlse = dy[1].defined() ? contiguous(dy[1]) : dy[1];
        const Grads g = {empty_like(s[0]), empty_like(s[1]), empty_like(s[2]), empty_like(s[3])};
        if (!d_o.device().is_meta()) {
          LseMergeArgs p = merge_args(s[0], s[1], s[2], s[3]);
          p.d_o = d_o.data();
          if (dlse.defined()) p.dlse = dlse.data();
          p.do1 = g[0].data(), p.dlse1 = g[1].data(), p.do2 = g[2].data(), p.dlse2 = g[3].data();
          launch(kernels::lse_merge, d_o.device(), p, s[1].numel(), kMergeGrain);
        }
        return {keep_if(need[0], g[0]), keep_if(need[1], g[1]), keep_if(need[2], g[2]), keep_if(need[3], g[3])};
      });
  return {y[0], y[1]};
}

Tensor attention_map(const Tensor& q, const Tensor& k, const Tensor& lse, double scale, const Tensor& bias) {
  CAPO_CHECK(q.rank() == 4 && k.rank() == 4 && is_floating(q.dtype()) && q.dtype() == k.dtype(),
             "attention_map: needs q and k [B, N, H, D] of one floating dtype, got ", describe(q), " and ",
             describe(k));
  CAPO_CHECK(k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3), "attention_map: k must be [",
             q.size(0), ", Nk, ", q.size(2), ", ", q.size(3), "] to match q ", q.shape(), ", got ", k.shape());
  const DType t = q.dtype();
  CAPO_CHECK(lse.shape() == (Shape{q.size(0), q.size(2), q.size(1)}) && lse.dtype() == (t == f64 ? f64 : f32),
             "attention_map: lse must be ", t == f64 ? f64 : f32, " ", (Shape{q.size(0), q.size(2), q.size(1)}),
             ", got ", describe(lse));
  if (is_half(t))
    return cast(attention_map(cast(q, f32), cast(k, f32), lse, scale, bias.defined() ? cast(bias, f32) : bias), t);
  Tensor p;
  {
    const NoGrad off;
    p = probabilities(q, k, bias, lse, scale != 0 ? scale : 1 / std::sqrt(static_cast<double>(q.size(3))), false);
  }
  return record_no_gradient("attention_map", p, {q, k, lse, bias});
}

}  // namespace capo
