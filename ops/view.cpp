#include <capo/autograd/autograd.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/view.h>

#include <algorithm>

namespace capo {
namespace {

// Strides of x seen as `shape`, if some exist: each run of x's axes that is contiguous among itself may be cut anew.
bool view_strides(const Tensor& x, const Shape& shape, Dims& out) {
  out = Dims::filled(shape.size(), 1);
  if (x.numel() == 0 || x.is_contiguous()) {
    out = contiguous_strides(shape);
    return true;
  }
  int j = shape.size() - 1;
  for (int i = x.rank() - 1; i >= 0;) {
    std::int64_t run = x.shape()[i], stride = x.strides()[i], at = stride;
    int k = i - 1;
    while (k >= 0 && (x.shape()[k] == 1 || run == 1 || x.strides()[k] == stride * run)) {
      if (run == 1) at = stride = x.strides()[k];
      run *= x.shape()[k--];
    }
    std::int64_t left = run;
    while (j >= 0 && (left > 1 || shape[j] == 1)) {
      if (left % shape[j]) return false;
      out[j] = at;
      at *= shape[j];
      left /= shape[j];
      --j;
    }
    if (left != 1) return false;
    i = k;
  }
  return true;
}

Shape infer(const Tensor& x, Shape shape) {
  int hole = -1;
  std::int64_t known = 1;
  for (int i = 0; i < shape.size(); ++i) {
    if (shape[i] == -1) {
      CAPO_CHECK(hole < 0, "reshape: only one size may be -1, got ", shape);
      hole = i;
    } else {
      CAPO_CHECK(shape[i] >= 0, "reshape: sizes must be at least 0 (one may be -1), got ", shape);
      CAPO_CHECK(!__builtin_mul_overflow(known, shape[i], &known), "reshape: ", x.shape(), " has ", x.numel(),
                 " elements, asked for ", shape);
    }
  }
  if (hole >= 0) {
    CAPO_CHECK(known > 0 && x.numel() % known == 0, "reshape: ", x.shape(), " does not divide into ", shape);
    shape[hole] = x.numel() / known;
  }
  CAPO_CHECK(numel(shape) == x.numel(), "reshape: ", x.shape(), " has ", x.numel(), " elements, asked for ", shape);
  return shape;
}

}  // namespace

Tensor reshape(const Tensor& x, const Shape& wanted) {
  const Shape shape = infer(x, wanted);
  if (shape == x.shape()) return x;
  Dims strides;
  if (!view_strides(x, shape, strides)) return reshape(clone(x), shape);
  const Shape before = x.shape();
  return record("reshape", strided_view(x, shape, strides, x.offset()), {x}, Saved(),
                [before](const Saved&, const Tensor& dy, Needs) -> Grads { return {reshape(dy, before)}; });
}

Tensor permute(const Tensor& x, const Dims& axes) {
  CAPO_CHECK(axes.size() == x.rank(), "permute: ", axes, " must name every axis of ", x.shape());
  Dims shape, strides, inverse = Dims::filled(x.rank(), -1);
  for (int i = 0; i < axes.size(); ++i) {
    const int a = normalize_axis("permute", axes[i], x.rank());
    CAPO_CHECK(inverse[a] < 0, "permute: ", axes, " names an axis twice");
    inverse[a] = i;
    shape.push_back(x.shape()[a]);
    strides.push_back(x.strides()[a]);
  }
  return record("permute", strided_view(x, shape, strides, x.offset()), {x}, Saved(),
                [inverse](const Saved&, const Tensor& dy, Needs) -> Grads { return {permute(dy, inverse)}; });
}

Tensor transpose(const Tensor& x, std::int64_t a, std::int64_t b) {
  Dims axes;
  for (int i = 0; i < x.rank(); ++i) axes.push_back(i);
  std::swap(axes[normalize_axis("transpose", a, x.rank())], axes[normalize_axis("transpose", b, x.rank())]);
  return permute(x, axes);
}

Tensor expand(const Tensor& x, const Shape& shape) {
  if (shape == x.shape()) return x;
  const int lead = shape.size() - x.rank();
  CAPO_CHECK(lead >= 0, "expand: ", x.shape(), " cannot become ", shape);
  Dims strides = Dims::filled(shape.size(), 0);
  for (int i = 0; i < x.rank(); ++i) {
    CAPO_CHECK(x.shape()[i] == shape[lead + i] || x.shape()[i] == 1, "expand: ", x.shape(), " cannot become ", shape);
    strides[lead + i] = x.shape()[i] == 1 ? 0 : x.strides()[i];
  }
  const Shape before = x.shape();
  return record("expand", strided_view(x, shape, strides, x.offset()), {x}, Saved(),
                [before](const Saved&, const Tensor& dy, Needs) -> Grads { return {sum_to(dy, before)}; });
}

namespace {
// The adjoint of slice: zeros of `shape` with dy in place.
Tensor slice_backward(const Tensor& dy, const Shape& shape, int axis, std::int64_t begin, std::int64_t end,
                      std::int64_t step) {
  const Tensor dx = zeros(shape, dy.dtype(), dy.device());
  {
    const NoGrad off;
    copy_into(slice(dx, axis, begin, end, step), dy);
  }
  return record("slice_backward", dx, {dy}, Saved(),
                [axis, begin, end, step](const Saved&, const Tensor& g, Needs) -> Grads {
                  return {slice(g, axis, begin, end, step)};
                });
}
}  // namespace

Tensor slice(const Tensor& x, std::int64_t axis0, std::int64_t begin, std::int64_t end, std::int64_t step) {
  const int axis = normalize_axis("slice", axis0, x.rank());
  CAPO_CHECK(0 <= begin && begin <= end && end <= x.shape()[axis] && step >= 1, "slice: [", begin, ", ", end, ") step ",
             step, " must lie in axis ", axis, " of ", x.shape());
  Shape shape = x.shape();
  Dims strides = x.strides();
  shape[axis] = end > begin ? (end - begin - 1) / step + 1 : 0;
  if (shape[axis] > 1) strides[axis] *= step;  // else step may be anything
  const Tensor y = strided_view(x, shape, strides, x.offset() + begin * x.strides()[axis]);
  const Shape before = x.shape();
  return record("slice", y, {x}, Saved(),
                [before, axis, begin, end, step](const Saved&, const Tensor& dy, Needs) -> Grads {
                  return {slice_backward(dy, before, axis, begin, end, step)};
                });
}

Tensor select(const Tensor& x, std::int64_t axis, std::int64_t index) {
  return squeeze(slice(x, axis, index, index + 1), axis);
}

namespace {
// The adjoint of unbind: parts stacked along `axis`; an undefined part is zero.
Tensor unbind_backward(const Grads& parts, const Shape& shape, int axis) {
  const auto first = std::find_if(parts.begin(), parts.end(), [](const Tensor& t) { return t.defined(); });
  bool whole = true;
  for (const auto& t : parts) whole = whole && t.defined();
  const Tensor dx =
      whole ? empty(shape, first->dtype(), first->device()) : zeros(shape, first->dtype(), first->device());
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (!parts[i].defined()) continue;
    const NoGrad off;
    copy_into(select(dx, axis, static_cast<std::int64_t>(i)), parts[i]);
  }
  return record("unbind_backward", dx, parts, Saved(), [axis](const Saved&, const Tensor& g, Needs) -> Grads {
    return unbind(g, axis);
  });
}
}  // namespace

std::vector<Tensor> unbind(const Tensor& x, std::int64_t axis0) {
  const int axis = normalize_axis("unbind", axis0, x.rank());
  Shape shape = x.shape();
  Dims strides = x.strides();
  shape.erase(axis);
  strides.erase(axis);
  std::vector<Tensor> parts;
  for (std::int64_t i = 0; i < x.shape()[axis]; ++i)
    parts.push_back(strided_view(x, shape, strides, x.offset() + i * x.strides()[axis]));
  const Shape before = x.shape();
  return record_many(
      "unbind", std::move(parts), {x}, Saved(),
      [before, axis](const Saved&, const Grads& dys, Needs) -> Grads { return {unbind_backward(dys, before, axis)}; });
}

Tensor squeeze(const Tensor& x, std::int64_t axis0) {
  const int axis = normalize_axis("squeeze", axis0, x.rank());
  CAPO_CHECK(x.shape()[axis] == 1, "squeeze: axis ", axis, " of ", x.shape(), " must have size 1");
  Shape shape = x.shape();
  shape.erase(axis);
  return reshape(x, shape);
}

Tensor unsqueeze(const Tensor& x, std::int64_t axis) {
  Shape shape = x.shape();
  shape.insert(normalize_axis("unsqueeze", axis, x.rank() + 1), 1);
  return reshape(x, shape);
}

Tensor flatten(const Tensor& x, std::int64_t first, std::int64_t last) {
  const int a = normalize_axis("flatten", first, x.rank()), b = normalize_axis("flatten", last, x.rank());
  CAPO_CHECK(a <= b, "flatten: first axis ", first, " must not come after ", last);
  Shape shape;
  for (int i = 0; i < x.rank(); ++i) {
    if (i > a && i <= b)
      shape.back() *= x.shape()[i];
    else
      shape.push_back(x.shape()[i]);
  }
  return reshape(x, shape);
}

Tensor stop_gradient(const Tensor& x) { return x.detach(); }

}  // namespace capo
