#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/reduce.h>
#include <capo/ops/stats.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

#include <limits>

namespace capo {

namespace {
Work cumsum_work(const CumsumArgs& p, std::int64_t items) {
  return Work::moved(2 * bytes_of(p.dtype, items / ((p.inner + 63) / 64) * p.inner * p.size));
}
}  // namespace

CAPO_KERNEL_CUDA(cumsum, CumsumArgs, cumsum_work)

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check_floating(const char* op, const Tensor& x) {
  CAPO_CHECK(is_floating(x.dtype()), op, ": needs a floating tensor, got ", describe(x));
}
// Steps between which 16 bits would lose digits, or overflow: through f32 on every device.
bool needs_f32(const Tensor& x) { return is_half(x.dtype()); }

// x's shape with the reduced axes as 1, and how many elements fall into one.
struct Reduced {
  Shape ones;
  std::int64_t count = 1;
};
Reduced reduced(const char* op, const Tensor& x, const Dims& axes) {
  Reduced r{x.shape(), 1};
  if (axes.empty()) r.ones = Dims::filled(x.rank(), 1);
  for (auto axis : axes) r.ones[normalize_axis(op, axis, x.rank())] = 1;
  for (int i = 0; i < x.rank(); ++i)
    if (r.ones[i] != x.shape()[i]) r.count *= x.shape()[i];
  return r;
}
Shape without(const Tensor& x, const Dims& axes) {
  bool gone[kMaxDims] = {};
  for (auto axis : axes) gone[normalize_axis("stats", axis, x.rank())] = true;
  Shape shape;
  for (int i = 0; i < x.rank(); ++i)
    if (!axes.empty() && !gone[i]) shape.push_back(x.shape()[i]);
  return shape;
}
void check_once(const char* op, const Tensor& x, const Dims& axes) {
  bool seen[kMaxDims] = {};
  for (auto axis : axes) {
    const int i = normalize_axis(op, axis, x.rank());
    CAPO_CHECK(!seen[i], op, ": axes ", axes, " name one twice");
    seen[i] = true;
  }
}

Tensor extreme(const char* op, ReduceKind kind, const Tensor& x, const Dims& axes, bool keepdim) {
  check_summable(op, x);
  if (through_f32(x)) return cast(extreme(op, kind, cast(x, f32), axes, keepdim), x.dtype());
  const Shape ones = reduced(op, x, axes).ones;
  CAPO_CHECK(x.numel() > 0 || numel(ones) == 0, op, ": the reduced axes must not be empty, got ", x.shape());
  const Tensor y = reduce_values(op, kind, x, axes, keepdim);
  return record(op, y, {x}, Saved({x}, {y}), [axes, ones](const Saved& s, const Tensor& dy, Needs) -> Grads {
    const Tensor hit = cast(equal(s[0].detach(), reshape(s[1].detach(), ones)), dy.dtype());
    return {hit * (reshape(dy, ones) / sum(hit, axes, true))};
  });
}

}  // namespace

Tensor max(const Tensor& x, const Dims& axes, bool keepdim) {
  return extreme("max", ReduceKind::max, x, axes, keepdim);
}
Tensor min(const Tensor& x, const Dims& axes, bool keepdim) {
  return extreme("min", ReduceKind::min, x, axes, keepdim);
}

Tensor var(const Tensor& x, const Dims& axes, bool keepdim, double correction) {
  check_floating("var", x);
  if (needs_f32(x)) return cast(var(cast(x, f32), axes, keepdim, correction), x.dtype());
  check_once("var", x, axes);
  const Reduced r = reduced("var", x, axes);
  const double scale =
      1.0 / (static_cast<double>(r.count) > correction ? static_cast<double>(r.count) - correction : 0.0);
  Tensor y;
  {
    const NoGrad off;
    y = sum(square(x - mean(x, axes, true)), axes, keepdim) * scale;
  }
  const Shape ones = r.ones;
  return record("var", y, {x}, Saved({x}), [axes, ones, scale](const Saved& s, const Tensor& dy, Needs) -> Grads {
    return {(s[0] - mean(s[0], axes, true)) * (reshape(dy, ones) * (2 * scale))};
  });
}

Tensor logsumexp(const Tensor& x, const Dims& axes, bool keepdim) {
  check_floating("logsumexp", x);
  if (needs_f32(x)) return cast(logsumexp(cast(x, f32), axes, keepdim), x.dtype());
  check_once("logsumexp", x, axes);
  const Shape ones = reduced("logsumexp", x, axes).ones;
  if (x.numel() == 0) return log(sum(exp(x), axes, keepdim));
  const Tensor zero = full({}, 0, x.dtype(), x.device());
  Tensor y;
  {
    const NoGrad off;
    const Tensor top = max(x, axes, true);
    const Tensor shift = where(less(abs(top), full({}, kInfinity, x.dtype(), x.device())), top, zero);
    y = log(sum(exp(x - shift), axes, true)) + shift;
    if (!keepdim) y = reshape(y, without(x, axes));
  }
  return record("logsumexp", y, {x}, Saved({x}, {y}), [ones](const Saved& s, const Tensor& dy, Needs) -> Grads {
    const Tensor last = reshape(s[1], ones);
    const Tensor nothing = equal(last.detach(), full({}, -kInfinity, dy.dtype(), dy.device()));
    return {reshape(dy, ones) * exp(s[0] - where(nothing, full({}, 0, dy.dtype(), dy.device()), last))};
  });
}

Tensor norm(const Tensor& x, double p, const Dims& axes, bool keepdim) {
  check_floating("norm", x);
  CAPO_CHECK(p == 1 || p == 2 || p == kInfinity, "norm: p must be 1, 2 or infinity, got ", p);
  check_once("norm", x, axes);
  if (needs_f32(x)) return cast(norm(cast(x, f32), p, axes, keepdim), x.dtype());
  const Shape ones = reduced("norm", x, axes).ones;
  if (p == 1) return sum(abs(x), axes, keepdim);
  if (p == kInfinity) {
    CAPO_CHECK(x.numel() > 0 || numel(ones) == 0, "norm: the reduced axes must not be empty for p = infinity, got ",
               x.shape());
    return max(abs(x), axes, keepdim);
  }
  Tensor y;
  {
    const NoGrad off;
    y = sqrt(sum(square(x), axes, keepdim));
  }
  return record("norm", y, {x}, Saved({x}, {y}), [ones](const Saved& s, const Tensor& dy, Needs) -> Grads {
    const Tensor length = reshape(s[1], ones);  // where it is 0, x is 0 too: divide by 1
    const Tensor is_zero = equal(length.detach(), full({}, 0, dy.dtype(), dy.device()));
    return {s[0] * (reshape(dy, ones) / where(is_zero, full({}, 1, dy.dtype(), dy.device()), length))};
  });
}

Tensor cumsum(const Tensor& x0, std::int64_t axis0, bool reverse) {
  check_summable("cumsum", x0);
  const int axis = normalize_axis("cumsum", axis0, x0.rank());
  if (through_f32(x0)) return cast(cumsum(cast(x0, f32), axis, reverse), x0.dtype());
  const Tensor x = contiguous(x0);
  const Tensor y = empty(x.shape(), x.dtype(), x.device());
  if (!x.device().is_meta() && x.numel() > 0) {
    CumsumArgs p{x.dtype(), x.data(), y.data(), x.shape()[axis], 1, reverse};
    for (int i = axis + 1; i < x.rank(); ++i) p.inner *= x.shape()[i];
    const std::int64_t outer = x.numel() / (p.size * p.inner), width = p.inner < 64 ? p.inner : 64;
    launch(kernels::cumsum, x.device(), p, outer * ((p.inner + 63) / 64), 1 + 16384 / (p.size * width + 1));
  }
  return record("cumsum", y, {x}, Saved(), [axis, reverse](const Saved&, const Tensor& dy, Needs) -> Grads {
    return {cumsum(dy, axis, !reverse)};
  });
}

}  // namespace capo
