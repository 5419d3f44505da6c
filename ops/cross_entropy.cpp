#include <capo/autograd/autograd.h>
#include <capo/engine/graph.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>
#include <capo/ops/index.h>
#include <capo/ops/kernel.h>
#include <capo/ops/reduce.h>
#include <capo/ops/softmax.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

namespace capo {

namespace {
Work cross_entropy_work(const CrossEntropyArgs& p, std::int64_t) {
  const std::int64_t tensors = 1 + (p.target != nullptr) + (p.dlogits != nullptr);
  return Work::moved(bytes_of(p.dtype, p.rows * p.columns * tensors) + bytes_of(i64, p.labels ? p.rows : 0) +
                     bytes_of(accumulator(p.dtype), p.rows * (p.counted ? 2 : 1)));
}
}  // namespace

CAPO_KERNEL_CUDA(cross_entropy, CrossEntropyArgs, cross_entropy_work)
CAPO_KERNEL_CUDA_ONLY(index_check, IndexCheckArgs)

namespace {

void check(const char* op, const Tensor& logits, const CrossEntropyOptions& o) {
  CAPO_CHECK(is_floating(logits.dtype()), op, ": logits must be floating, got ", describe(logits));
  CAPO_CHECK(logits.rank() >= 1 && logits.size(-1) >= 1, op, ": logits must be [..., C] with at least one class, got ",
             logits.shape());
  CAPO_CHECK(o.label_smoothing >= 0 && o.label_smoothing <= 1, op, ": label_smoothing must be in [0, 1], got ",
             o.label_smoothing);
  CAPO_CHECK(o.reduction != Reduction::batchmean, op, ": reduction must be none, mean or sum, got batchmean");
}

void fail_label(const Graph::Check& c, std::int64_t row, std::int64_t label) {
  detail::fail(c.op, ": ", c.what, " must be in [0, ", c.size, ") or ", c.ignore, " (ignore_index), row ", row, " has ",
               label);
}

// On the device the kernel does not trust them: NaN comes of a wrong one. A graph keeps which it was.
void check_labels(const Tensor& labels, std::int64_t classes, std::int64_t ignore_index) {
  const std::int64_t n = labels.numel();
  const Graph::Check check{"cross_entropy", "labels", labels.shape(), classes, ignore_index, fail_label, false};
  if (n == 0 || labels.device().is_meta()) return;
  if (labels.device().is_cpu()) {
    const std::int64_t* v = labels.data<std::int64_t>();
    for (std::int64_t i = 0; i < n; ++i)
      if (v[i] != ignore_index && (v[i] < 0 || v[i] >= classes)) fail_label(check, i, v[i]);
  } else if (Graph::capturing(labels.device())) {
    const std::int64_t blocks = index_check_blocks(n);
    const Tensor parts = empty({blocks}, i64, labels.device());
    launch(kernels::index_check, labels.device(),
           IndexCheckArgs{labels.data<std::int64_t>(), classes, n, parts.data<std::int64_t>(), ignore_index, nullptr,
                          Graph::add_check(check)}, blocks, 1);
  }
}

// The gradient of 16-bit logits on the CPU: the kernel runs again, and each element is rounded once.
Tensor gradient_again(const Tensor& x, const Tensor& labels, const Tensor& target, const Tensor& share,
                      const Tensor& dy, std::int64_t ignore_index, double smoothing) {
  const NoGrad off;
  const Tensor dx = empty_like(x);
  Tensor upstream = contiguous(cast(dy, f32));
  if (share.defined()) upstream = upstream * share;
  const std::int64_t columns = x.size(-1), rows = x.numel() / columns;
  const CrossEntropyArgs args{x.dtype(), data_or_null(x), static_cast<const std::int64_t*>(data_or_null(labels)),
                              data_or_null(target), nullptr, data_or_null(dx), nullptr, rows, columns, ignore_index,
                              smoothing, data_or_null(upstream), dy.rank() == 0 ? 0 : 1};
  launch(kernels::cross_entropy, x.device(), args, rows, row_grain(columns));
  return dx;
}

// The loss as one kernel; labels or target is defined.
Tensor fused(const char* op, const Tensor& x0, const Tensor& labels0, const Tensor& target0,
             const CrossEntropyOptions& o) {
  const Tensor x = contiguous(x0), labels = contiguous_or_undefined(labels0), target = contiguous_or_undefined(target0);
  const Device device = x.device();
  const DType acc = accumulator(x.dtype());
  const std::int64_t columns = x.size(-1), rows = x.numel() / columns;
  if (labels.defined()) check_labels(labels, columns, o.ignore_index);
  Shape row_shape = x.shape();
  row_shape.pop_back();
  const bool mean = o.reduction == Reduction::mean, need = needs_of({x}).any(), again = through_f32(x);
  const Tensor row_loss = empty(row_shape, acc, device);
  const Tensor dlogits = need && !again ? empty_like(x) : Tensor();
  const Tensor counted = mean && labels.defined() ? empty({rows}, acc, device) : Tensor();
  const CrossEntropyArgs args{x.dtype(), data_or_null(x), static_cast<const std::int64_t*>(data_or_null(labels)),
                              data_or_null(target), data_or_null(row_loss), data_or_null(dlogits),
                              data_or_null(counted), rows, columns, o.ignore_index, o.label_smoothing, nullptr, 0};
  launch(kernels::cross_entropy, device, args, rows, row_grain(columns));
  detail::observe("cross_entropy", {});  // before the sums of its rows, which are ops of their own
  Tensor loss = row_loss, share;  // share: what mean multiplies every row with
  if (o.reduction != Reduction::none) loss = sum(row_loss);
  if (mean) {
    share = reciprocal(counted.defined() ? sum(counted) : full({}, static_cast<double>(rows), acc, device));
    loss = loss * share;
  }
  loss = cast(loss, x.dtype());
  if (!need) return loss;
  if (again)
    return record(op, loss, {x}, Saved({x, labels, target}, {share, loss}),
                  [ignore = o.ignore_index, smooth = o.label_smoothing](const Saved& s, const Tensor& dy,
                                                                        Needs) -> Grads {
                    const Tensor dx = gradient_again(s[0], s[1], s[2], s[3], dy, ignore, smooth);
                    return {record_no_gradient("cross_entropy_backward", dx, {dy, s[4]})};
                  });
  const bool per_row = o.reduction == Reduction::none;
  return record(op, loss, {x}, Saved({}, {dlogits, share, loss}),
                [per_row](const Saved& s, const Tensor& dy0, Needs) -> Grads {
                  const Tensor dlogits_kept = s[0], part = s[1], linked = s[2];
                  Tensor dx;
                  {
                    const NoGrad off;
                    Tensor dy = part.defined() ? cast(cast(dy0, part.dtype()) * part, dy0.dtype()) : dy0;
                    dx = dlogits_kept * (per_row ? unsqueeze(dy, -1) : dy);
                  }
                  return {record_no_gradient("cross_entropy_backward", dx, {dy0, linked})};
                });
}

}  // namespace

Tensor cross_entropy(const Tensor& logits, const Tensor& labels, const CrossEntropyOptions& o) {
  check("cross_entropy", logits, o);
  CAPO_CHECK(labels.dtype() == i64, "cross_entropy: labels must be i64, got ", describe(labels));
  Shape expected = logits.shape();
  expected.pop_back();
  CAPO_CHECK(labels.shape() == expected, "cross_entropy: labels must be ", expected, " for logits ", logits.shape(),
             ", got ", labels.shape());
  CAPO_CHECK(labels.device() == logits.device(), "cross_entropy: labels are on ", labels.device(), ", logits on ",
             logits.device());
  if (long_row_through_f32(logits))
    return cast(cross_entropy(cast(logits, f32), labels, o), logits.dtype());
  return fused("cross_entropy", logits, labels, {}, o);
}

Tensor cross_entropy_soft(const Tensor& logits, const Tensor& target, const CrossEntropyOptions& o) {
  const char* op = "cross_entropy_soft";
  check(op, logits, o);
  CAPO_CHECK(target.shape() == logits.shape(), op, ": target must be ", logits.shape(), " like the logits, got ",
             target.shape());
  CAPO_CHECK(target.dtype() == logits.dtype(), op, ": target is ", target.dtype(), ", logits are ", logits.dtype(),
             ": mixed dtypes, cast one");
  CAPO_CHECK(target.device() == logits.device(), op, ": target is on ", target.device(), ", logits on ",
             logits.device());
  if (long_row_through_f32(logits) || (through_f32(logits) && needs_of({target}).any()))
    return cast(cross_entropy_soft(cast(logits, f32), cast(target, f32), o), logits.dtype());
  if (!needs_of({target}).any()) return fused(op, logits, {}, target, o);
  const double classes = static_cast<double>(logits.size(-1)), smooth = o.label_smoothing;
  const Tensor q = affine(target, 1 - smooth, smooth / classes);
  const Tensor rows = neg(sum(q * log_softmax(logits), {-1}));
  if (o.reduction == Reduction::none) return rows;
  return o.reduction == Reduction::sum ? sum(rows) : mean(rows);
}

}  // namespace capo
