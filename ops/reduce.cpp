#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/reduce.h>
#include <capo/ops/view.h>

#include <algorithm>

namespace capo {

CAPO_KERNEL(reduce, ReduceArgs)

namespace {

struct Axes {
  bool reduced[kMaxDims] = {};
  Shape kept;      // without the reduced axes
  Shape with_one;  // reduced axes as size 1
};

Axes resolve(const char* op, const Tensor& x, const Dims& axes) {
  Axes a;
  for (auto axis : axes) {
    const int i = normalize_axis(op, axis, x.rank());
    CAPO_CHECK(!a.reduced[i], op, ": axes ", axes, " name one twice");
    a.reduced[i] = true;
  }
  for (int i = 0; i < x.rank(); ++i) {
    if (axes.empty()) a.reduced[i] = true;
    if (!a.reduced[i]) a.kept.push_back(x.shape()[i]);
    a.with_one.push_back(a.reduced[i] ? 1 : x.shape()[i]);
  }
  return a;
}

void run(ReduceKind kind, const Tensor& x, const Tensor& y, const Axes& axes);

// A big sum into few outputs has no parallel work: first reduce fixed parts of 4,096 elements, then the parts.
bool split_in_two(ReduceKind kind, const Tensor& x, const Tensor& y, const Axes& axes) {
  constexpr std::int64_t kPart = 4096;
  const int last = x.rank() - 1;
  if (y.numel() > 8 || !x.is_contiguous() || last < 0 || !axes.reduced[last]) return false;
  std::int64_t run_length = 1;
  int first = last;
  while (first >= 0 && axes.reduced[first]) run_length *= x.shape()[first--];
  if (run_length < 8 * kPart || run_length % kPart) return false;
  const Tensor parts = empty({x.numel() / kPart}, x.dtype(), x.device());
  const Tensor flat = strided_view(x, {x.numel() / kPart, kPart}, {kPart, 1}, x.offset());
  Axes inner;
  inner.reduced[1] = true;
  run(kind, flat, parts, inner);
  Shape shape;
  Axes outer;
  for (int i = 0; i <= first; ++i) {
    outer.reduced[i] = axes.reduced[i];
    shape.push_back(x.shape()[i]);
  }
  outer.reduced[shape.size()] = true;
  shape.push_back(run_length / kPart);
  run(kind, strided_view(parts, shape, contiguous_strides(shape), 0), y, outer);
  return true;
}

void run(ReduceKind kind, const Tensor& x, const Tensor& y, const Axes& axes) {
  if (split_in_two(kind, x, y, axes) || x.device().is_meta()) return;
  ReduceArgs p{};
  p.kind = kind;
  p.dtype = x.dtype();
  p.x = x.data();
  p.y = y.data();
  p.count = 1;
  // Kept axes stay in order; reduced ones are walked with the smallest stride innermost.
  int order[kMaxDims], next = 0;
  for (int i = 0; i < x.rank(); ++i)
    if (!axes.reduced[i]) order[next++] = i;
  const int first_reduced = next;
  for (int i = 0; i < x.rank(); ++i)
    if (axes.reduced[i]) order[next++] = i;
  std::stable_sort(order + first_reduced, order + next, [&](int a, int b) { return x.strides()[a] > x.strides()[b]; });
  for (int o = 0; o < x.rank(); ++o) {
    const int i = order[o];
    const std::int64_t n = x.shape()[i], s = x.strides()[i];
    if (axes.reduced[i]) p.count *= n;
    if (n == 1) continue;
    int& rank = axes.reduced[i] ? p.reduced : p.kept;
    std::int64_t* shape = axes.reduced[i] ? p.reduced_shape : p.kept_shape;
    std::int64_t* strides = axes.reduced[i] ? p.reduced_strides : p.kept_strides;
    if (rank > 0 && strides[rank - 1] == s * n) {  // contiguous with the axis before: one axis
      shape[rank - 1] *= n;
      strides[rank - 1] = s;
    } else {
      shape[rank] = n;
      strides[rank] = s;
      ++rank;
    }
  }
  if (p.kept == 0) p.kept_shape[p.kept++] = 1;
  if (p.reduced == 0) p.reduced_shape[p.reduced] = 1, p.reduced_strides[p.reduced++] = 1;
  const std::int64_t grain = p.count >= 16384 ? 64 : (16384 / (p.count + 1) / 64 + 1) * 64;
  launch(kernels::reduce, x.device(), p, y.numel(), grain);
}

}  // namespace

Tensor sum(const Tensor& x, const Dims& axes, bool keepdim) {
  check_summable("sum", x);
  if (is_half(x.dtype()) && !x.device().is_cuda()) return cast(sum(cast(x, f32), axes, keepdim), x.dtype());
  const Axes a = resolve("sum", x, axes);
  const Tensor y = empty(keepdim ? a.with_one : a.kept, x.dtype(), x.device());
  run(ReduceKind::sum, x, y, a);
  const Shape before = x.shape(), ones = a.with_one;
  return record("sum", y, {x}, Saved(), [before, ones](const Saved&, const Tensor& dy, Needs) -> Grads {
    return {expand(reshape(dy, ones), before)};
  });
}

Tensor mean(const Tensor& x, const Dims& axes, bool keepdim) {
  CAPO_CHECK(is_floating(x.dtype()), "mean: needs a floating tensor, got ", describe(x));
  if (is_half(x.dtype()) && !x.device().is_cuda()) return cast(mean(cast(x, f32), axes, keepdim), x.dtype());
  resolve("mean", x, axes);  // errors in its own name
  const Tensor s = sum(x, axes, keepdim);
  const double n = s.numel() ? static_cast<double>(x.numel()) / static_cast<double>(s.numel()) : 0;
  return s * (1.0 / n);
}

Tensor reduce_values(const char* op, ReduceKind kind, const Tensor& x, const Dims& axes, bool keepdim) {
  const Axes a = resolve(op, x, axes);
  const Tensor y = empty(keepdim ? a.with_one : a.kept, x.dtype(), x.device());
  run(kind, x, y, a);
  return y;
}

}  // namespace capo
