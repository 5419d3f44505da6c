#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/reduce.h>
#include <capo/ops/softmax.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

namespace capo {

namespace {
Work softmax_work(const SoftmaxArgs& p, std::int64_t) {
  return Work::moved(bytes_of(p.dtype, p.rows * p.columns * (p.dy ? 3 : 2)));
}
}  // namespace

CAPO_KERNEL_CUDA(softmax, SoftmaxArgs, softmax_work)

namespace {

// x, dy contiguous; dy undefined in the forward pass.
Tensor apply(const Tensor& x, const Tensor& dy, bool log) {
  const Tensor y = empty_like(x);
  const std::int64_t columns = x.size(-1), rows = columns ? x.numel() / columns : 0;
  const SoftmaxArgs args{x.dtype(), log, data_or_null(x), data_or_null(dy), data_or_null(y), rows, columns};
  launch(kernels::softmax, x.device(), args, rows, row_grain(columns));
  return y;
}

Tensor softmax_along(const char* op, const Tensor& x0, std::int64_t axis0, bool log) {
  CAPO_CHECK(is_floating(x0.dtype()), op, ": x must be floating, got ", describe(x0));
  CAPO_CHECK(x0.rank() >= 1, op, ": x must have an axis, got a scalar");
  const int axis = normalize_axis(op, axis0, x0.rank());
  if (axis != x0.rank() - 1) return transpose(softmax_along(op, transpose(x0, axis, -1), -1, log), axis, -1);
  if (long_row_through_f32(x0)) return cast(softmax_along(op, cast(x0, f32), axis, log), x0.dtype());
  const Tensor x = contiguous(x0), y = apply(x, {}, log);
  return record(op, y, {x}, Saved({}, {y}), [log](const Saved& s, const Tensor& dy, Needs) -> Grads {
    if (!grad_enabled()) return {apply(s[0], contiguous(dy), log)};
    if (log) return {dy - exp(s[0]) * sum(dy, {-1}, true)};
    return {s[0] * (dy - sum(dy * s[0], {-1}, true))};
  });
}

}  // namespace

Tensor softmax(const Tensor& x, std::int64_t axis) { return softmax_along("softmax", x, axis, false); }
Tensor log_softmax(const Tensor& x, std::int64_t axis) { return softmax_along("log_softmax", x, axis, true); }

}  // namespace capo
