#include <capo/autograd/autograd.h>
#include <capo/models/segment/losses.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>
#include <capo/ops/index.h>
#include <capo/ops/reduce.h>
#include <capo/ops/softmax.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>

#include <algorithm>
#include <cmath>

namespace capo::segment {
namespace {

Tensor widened(const Tensor& logits) { return is_half(logits.dtype()) ? cast(logits, f32) : logits; }

void check_labels(const char* loss, const Tensor& logits, const Tensor& labels) {
  CAPO_CHECK(logits.rank() >= 2 && is_floating(logits.dtype()), loss,
             ": logits must be floating [B, spatial.., C], got ", logits.dtype(), " ", logits.shape());
  Shape want = logits.shape();
  want.pop_back();
  CAPO_CHECK(labels.dtype() == i64 && labels.shape() == want, loss, ": labels must be i64 ", want, " beside logits ",
             logits.shape(), ", got ", labels.dtype(), " ", labels.shape());
}

struct Target {
  Tensor one_hot;  // [B, spatial.., C]; zeros where the label is ignored
  Tensor mask;     // [B, spatial.., 1]: 0 there, else 1; undefined when nothing is ignored
};
Target target_of(const Tensor& labels, std::int64_t classes, DType dtype, const std::optional<std::int64_t>& ignore) {
  const NoGrad off;
  if (!ignore) return {one_hot(labels, classes, dtype), {}};
  const Tensor counts = not_equal(labels, full({1}, static_cast<double>(*ignore), i64, labels.device()));
  const Tensor mask = unsqueeze(cast(counts, dtype), -1);
  return {one_hot(where(counts, labels, zeros({1}, i64, labels.device())), classes, dtype) * mask, mask};
}

// alpha[label] of each pixel.
Tensor per_pixel(const std::vector<double>& alpha, const Tensor& labels, DType dtype) {
  const NoGrad off;
  const Tensor table = to(cast(from_vector(alpha, {static_cast<std::int64_t>(alpha.size())}), dtype), labels.device());
  return reshape(index_select(table, 0, flatten(labels)), labels.shape());
}

Tensor cross_entropy_of(const Tensor& z, const Tensor& labels, const std::optional<std::int64_t>& ignore) {
  return ignore ? cross_entropy(z, labels, {.ignore_index = *ignore}) : cross_entropy(z, labels);
}

}  // namespace

Tensor soft_dice(const Tensor& logits, const Tensor& labels, const DiceOptions& o) {
  check_labels("soft_dice", logits, labels);
  CAPO_CHECK(o.smooth >= 0, "soft_dice: smooth must not be negative, got ", o.smooth);
  CAPO_CHECK(o.background || logits.size(-1) > 1, "soft_dice: one class and no background leaves nothing");
  const Tensor z = widened(logits);
  const Target t = target_of(labels, z.size(-1), z.dtype(), o.ignore);
  const Tensor p = t.mask.defined() ? softmax(z) * t.mask : softmax(z);
  Dims axes;
  for (int a = o.batch ? 0 : 1; a + 1 < z.rank(); ++a) axes.push_back(a);
  const Tensor overlap = sum(p * t.one_hot, axes) * 2.0 + o.smooth;
  const Tensor sizes = clamp(sum(p, axes) + sum(t.one_hot, axes) + o.smooth, 1e-8, HUGE_VAL);
  const Tensor dice = overlap / sizes;
  return o.background ? dice : slice(dice, -1, 1, dice.size(-1));
}

Tensor dice_loss(const Tensor& logits, const Tensor& labels, const DiceOptions& o) {
  return 1.0 - mean(soft_dice(logits, labels, o));
}

Tensor dice_ce_loss(const Tensor& logits, const Tensor& labels, const DiceCeOptions& o) {
  check_labels("dice_ce_loss", logits, labels);
  const Tensor z = widened(logits);
  return dice_loss(z, labels, o.dice) * o.dice_weight + cross_entropy_of(z, labels, o.dice.ignore) * o.ce_weight;
}

Tensor focal_loss(const Tensor& logits, const Tensor& labels, const FocalOptions& o) {
  check_labels("focal_loss", logits, labels);
  CAPO_CHECK(o.gamma == 0 || o.gamma >= 1, "focal_loss: gamma must be 0 or at least 1, got ", o.gamma);
  CAPO_CHECK(o.alpha.empty() || static_cast<std::int64_t>(o.alpha.size()) == logits.size(-1),
             "focal_loss: alpha must have an entry for each of ", logits.size(-1), " classes, got ", o.alpha.size());
  const Tensor z = widened(logits);
  const Tensor log_p = squeeze(gather(log_softmax(z), -1, unsqueeze(labels, -1)), -1);
  Tensor loss = -log_p;
  if (o.gamma > 0) loss = loss * pow(1.0 - exp(log_p), o.gamma);
  if (!o.alpha.empty()) loss = loss * per_pixel(o.alpha, labels, z.dtype());
  return mean(loss);
}

Tensor weighted_cross_entropy(const Tensor& logits, const Tensor& labels, const Tensor& weights) {
  check_labels("weighted_cross_entropy", logits, labels);
  const Tensor z = widened(logits);
  CAPO_CHECK(weights.shape() == labels.shape() && weights.dtype() == z.dtype(),
             "weighted_cross_entropy: weights must be ", z.dtype(), " ", labels.shape(), ", got ", weights.dtype(), " ",
             weights.shape());
  return sum(cross_entropy(z, labels, {.reduction = Reduction::none}) * weights) / sum(weights);
}

std::vector<double> deep_supervision_weights(int n) {
  CAPO_CHECK(n > 0, "deep_supervision_weights: needs one output or more, got ", n);
  std::vector<double> w(static_cast<std::size_t>(n), 0);
  double total = 0;
  for (int i = 0; i < std::max(1, n - 1); ++i) total += w[static_cast<std::size_t>(i)] = std::ldexp(1.0, -i);
  for (double& x : w) x /= total;
  return w;
}

Tensor resize_labels(const Tensor& labels, const Dims& size) {
  CAPO_CHECK(labels.rank() == size.size() + 1, "resize_labels: labels must be [B, spatial..] with ", size.size(),
             " spatial axes, got ", labels.shape());
  const NoGrad off;
  Tensor y = labels;
  for (int a = 0; a < size.size(); ++a) {
    const std::int64_t in = labels.size(a + 1), out = size[a];
    CAPO_CHECK(out > 0 && in > 0, "resize_labels: sizes must be positive, got ", in, " to ", out);
    if (in == out) continue;
    if (in % out == 0) {
      y = slice(y, a + 1, in / out / 2, in, in / out);
      continue;
    }
    std::vector<std::int64_t> from(static_cast<std::size_t>(out));
    for (std::int64_t i = 0; i < out; ++i) from[static_cast<std::size_t>(i)] = (2 * i + 1) * in / (2 * out);
    y = index_select(y, a + 1, to(from_vector(from, {out}), y.device()));
  }
  return y;
}

namespace detail {

Dims spatial_sizes(const Tensor& logits) {
  Dims d;
  for (int a = 1; a + 1 < logits.rank(); ++a) d.push_back(logits.size(a));
  return d;
}

Tensor add_scaled(const Tensor& sum, const Tensor& term, double weight) {
  return sum.defined() ? sum + term * weight : term * weight;
}

}  // namespace detail

}  // namespace capo::segment
