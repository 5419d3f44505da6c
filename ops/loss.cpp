#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/loss.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>

#include <limits>

namespace capo {
namespace {

void check(const char* op, const Tensor& x, const Tensor& target, Reduction reduction, bool batchmean = false) {
  CAPO_CHECK(is_floating(x.dtype()), op, ": x must be floating, got ", describe(x));
  CAPO_CHECK(x.shape() == target.shape(), op, ": target must be ", x.shape(), " like x, got ", target.shape());
  CAPO_CHECK(x.dtype() == target.dtype(), op, ": target is ", target.dtype(), ", x is ", x.dtype(),
             ": mixed dtypes, cast one");
  CAPO_CHECK(x.device() == target.device(), op, ": target is on ", target.device(), ", x is on ", x.device());
  CAPO_CHECK(batchmean || reduction != Reduction::batchmean, op,
             ": reduction must be none, mean or sum, got batchmean");
}

Tensor reduced(const Tensor& loss, Reduction reduction) {
  if (reduction == Reduction::none) return loss;
  const Tensor total = sum(loss);
  if (reduction == Reduction::sum) return total;
  const std::int64_t n = reduction == Reduction::mean ? loss.numel() : loss.size(0);
  return total * (n > 0 ? 1.0 / static_cast<double>(n) : std::numeric_limits<double>::quiet_NaN());
}

}  // namespace

Tensor bce_with_logits(const Tensor& x, const Tensor& t, const BceOptions& o) {
  check("bce_with_logits", x, t, o.reduction);
  for (const Tensor& w : {o.weight, o.pos_weight}) {
    if (!w.defined()) continue;
    CAPO_CHECK(w.dtype() == x.dtype() && w.device() == x.device(), "bce_with_logits: weights must be ", x.dtype(),
               " on ", x.device(), " like x, got ", describe(w));
    CAPO_CHECK(broadcast_shapes("bce_with_logits", w.shape(), x.shape()) == x.shape(),
               "bce_with_logits: weights must broadcast to x ", x.shape(), ", got ", w.shape());
  }
  if (through_f32(x))
    return cast(bce_with_logits(cast(x, f32), cast(t, f32),
                                {cast_or_undefined(o.weight, f32), cast_or_undefined(o.pos_weight, f32), o.reduction}),
                x.dtype());
  Tensor positive = t * softplus(neg(x));
  if (o.pos_weight.defined()) positive = positive * o.pos_weight;
  Tensor loss = positive + (1.0 - t) * softplus(x);
  if (o.weight.defined()) loss = loss * o.weight;
  return reduced(loss, o.reduction);
}

Tensor mse(const Tensor& x, const Tensor& t, Reduction reduction) {
  check("mse", x, t, reduction);
  if (through_f32(x)) return cast(mse(cast(x, f32), cast(t, f32), reduction), x.dtype());
  return reduced(square(x - t), reduction);
}

Tensor smooth_l1(const Tensor& x, const Tensor& t, double beta, Reduction reduction) {
  check("smooth_l1", x, t, reduction);
  CAPO_CHECK(beta >= 0, "smooth_l1: beta must be >= 0, got ", beta);
  if (through_f32(x)) return cast(smooth_l1(cast(x, f32), cast(t, f32), beta, reduction), x.dtype());
  const Tensor d = abs(x - t);
  if (beta == 0) return reduced(d, reduction);
  const Tensor near = clamp(d, 0, beta);  // min(d, beta): the quadratic part
  return reduced(square(near) * (0.5 / beta) + (d - near), reduction);
}

Tensor huber(const Tensor& x, const Tensor& t, double delta, Reduction reduction) {
  check("huber", x, t, reduction);
  CAPO_CHECK(delta > 0, "huber: delta must be > 0, got ", delta);
  return smooth_l1(x, t, delta, reduction) * delta;
}

Tensor kl_div(const Tensor& x, const Tensor& t, Reduction reduction, bool log_target) {
  check("kl_div", x, t, reduction, true);
  CAPO_CHECK(reduction != Reduction::batchmean || x.rank() >= 1, "kl_div: batchmean needs a first axis, got a scalar");
  if (through_f32(x)) return cast(kl_div(cast(x, f32), cast(t, f32), reduction, log_target), x.dtype());
  // A probability of 0 gives 0, beside log x = -inf too: 0 times an infinity would be NaN.
  const Tensor zero = full({}, 0, t.dtype(), t.device());
  const Tensor minus = full({}, -std::numeric_limits<double>::infinity(), t.dtype(), t.device());
  if (log_target) {
    const Tensor none = equal(t, minus);
    return reduced(exp(t) * (where(none, zero, t) - where(none, zero, x)), reduction);
  }
  const Tensor safe = where(greater(t, 0.0), t, full({}, 1, t.dtype(), t.device()));
  const Tensor none = logical_and(equal(t, zero), equal(x, minus));
  return reduced(t * (log(safe) - where(none, zero, x)), reduction);
}

}  // namespace capo
