#include <capo/autograd/autograd.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>
#include <capo/ops/kernel.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

namespace capo {

CAPO_KERNEL_CUDA(copy, CopyArgs, copy_work)  // flip is a copy with negative source strides

namespace {

// x[begin : begin + size] along one axis, off the tape.
Tensor window(const Tensor& x, int axis, std::int64_t begin, std::int64_t size) {
  Shape shape = x.shape();
  shape[axis] = size;
  return strided_view(x, shape, x.strides(), size > 0 ? x.offset() + begin * x.strides()[axis] : x.offset());
}
Tensor window(const Tensor& x, const Dims& begin, const Shape& shape) {
  if (numel(shape) == 0) return strided_view(x, shape, x.strides(), x.offset());
  std::int64_t offset = x.offset();
  for (int i = 0; i < x.rank(); ++i) offset += begin[i] * x.strides()[i];
  return strided_view(x, shape, x.strides(), offset);
}

// The sizes of n parts: inline in the closure up to eight, else in a saved i64 tensor.
Dims inline_sizes(const std::vector<std::int64_t>& sizes) {
  Dims d;
  if (sizes.size() <= kMaxDims)
    for (auto s : sizes) d.push_back(s);
  return d;
}
Saved saved_sizes(const std::vector<std::int64_t>& sizes) {
  if (sizes.size() <= kMaxDims) return {};
  return Saved({}, {from_vector<std::int64_t>(sizes, {static_cast<std::int64_t>(sizes.size())})});
}
std::vector<std::int64_t> sizes_of(const Dims& d, const Saved& s) {
  if (s.size() == 0) return {d.begin(), d.end()};
  return to_vector<std::int64_t>(s[0]);
}

}  // namespace

Tensor concat(const std::vector<Tensor>& xs, std::int64_t axis0) {
  CAPO_CHECK(!xs.empty(), "concat: needs at least one tensor");
  const Tensor& first = xs[0];
  const int axis = normalize_axis("concat", axis0, first.rank());
  Shape shape = first.shape();
  std::vector<std::int64_t> sizes;
  shape[axis] = 0;
  for (std::size_t k = 0; k < xs.size(); ++k) {
    const Tensor& x = xs[k];
    CAPO_CHECK(x.dtype() == first.dtype() && x.device() == first.device(),
               "concat: tensors must have one dtype and device, got ", describe(first), " and, at ", k, ", ",
               describe(x));
    Shape rest = x.shape();
    if (rest.size() == shape.size()) rest[axis] = shape[axis];
    CAPO_CHECK(rest == shape, "concat: shapes must be equal except on axis ", axis, ", got ", first.shape(),
               " and, at ", k, ", ", x.shape());
    sizes.push_back(x.shape()[axis]);
  }
  for (auto s : sizes) shape[axis] += s;
  const Tensor y = empty(shape, first.dtype(), first.device());
  {
    const NoGrad off;
    std::int64_t at = 0;
    for (const auto& x : xs) {
      copy_into(window(y, axis, at, x.shape()[axis]), x);
      at += x.shape()[axis];
    }
  }
  const Dims few = inline_sizes(sizes);
  return record("concat", y, xs, saved_sizes(sizes),
                [axis, few](const Saved& s, const Tensor& dy, Needs need) -> Grads {
                  Grads grads;
                  std::int64_t at = 0;
                  for (auto n : sizes_of(few, s)) {
                    grads.push_back(need[static_cast<int>(grads.size())] ? slice(dy, axis, at, at + n) : Tensor());
                    at += n;
                  }
                  return grads;
                });
}

Tensor stack(const std::vector<Tensor>& xs, std::int64_t axis0) {
  CAPO_CHECK(!xs.empty(), "stack: needs at least one tensor");
  const int axis = normalize_axis("stack", axis0, xs[0].rank() + 1);
  std::vector<Tensor> parts;
  parts.reserve(xs.size());
  for (const auto& x : xs) {
    CAPO_CHECK(x.shape() == xs[0].shape() && x.dtype() == xs[0].dtype(), "stack: tensors must be alike, got ",
               describe(xs[0]), " and ", describe(x));
    parts.push_back(unsqueeze(x, axis));
  }
  return concat(parts, axis);
}

std::vector<Tensor> split(const Tensor& x, const std::vector<std::int64_t>& sizes, std::int64_t axis0) {
  const int axis = normalize_axis("split", axis0, x.rank());
  std::int64_t total = 0;
  for (auto s : sizes) {
    CAPO_CHECK(s >= 0, "split: sizes must not be negative, got ", s);
    total += s;
  }
  CAPO_CHECK(!sizes.empty() && total == x.shape()[axis], "split: sizes must add up to axis ", axis, " of ", x.shape(),
             ", got ", total);
  std::vector<Tensor> parts;
  parts.reserve(sizes.size());
  std::int64_t at = 0;
  for (auto s : sizes) {
    parts.push_back(window(x, axis, at, s));
    at += s;
  }
  const Dims few = inline_sizes(sizes);
  const Shape before = x.shape();
  return record_many(
      "split", std::move(parts), {x}, saved_sizes(sizes),
      [axis, few, before](const Saved& s, const Grads& dys, Needs) -> Grads {
        const auto parts_sizes = sizes_of(few, s);
        const Tensor* some = &dys[0];
        while (!some->defined()) ++some;  // a node runs only when a cotangent reached it
        Grads all;
        for (std::size_t k = 0; k < dys.size(); ++k) {
          Shape shape = before;
          shape[axis] = parts_sizes[k];
          all.push_back(dys[k].defined() ? dys[k] : expand(full({}, 0, some->dtype(), some->device()), shape));
        }
        return {concat(all, axis)};
      });
}

std::vector<Tensor> chunk(const Tensor& x, std::int64_t chunks, std::int64_t axis0) {
  const int axis = normalize_axis("chunk", axis0, x.rank());
  const std::int64_t n = x.shape()[axis];
  CAPO_CHECK(chunks >= 1 && n % chunks == 0, "chunk: axis ", axis, " of ", x.shape(), " must divide into ", chunks,
             " parts");
  return split(x, std::vector<std::int64_t>(static_cast<std::size_t>(chunks), n / chunks), axis);
}

Tensor pad(const Tensor& x, const Dims& before, const Dims& after, double value) {
  CAPO_CHECK(before.size() == x.rank() && after.size() == x.rank(), "pad: before and after must name every axis of ",
             x.shape(), ", got ", before, " and ", after);
  const Shape inner = x.shape();
  Shape shape = inner;
  for (int i = 0; i < x.rank(); ++i) {
    CAPO_CHECK(before[i] >= 0 && after[i] >= 0, "pad: must not be negative, got ", before, " and ", after);
    shape[i] += before[i] + after[i];
  }
  const Tensor y = full(shape, value, x.dtype(), x.device());
  {
    const NoGrad off;
    copy_into(window(y, before, inner), x);
  }
  return record("pad", y, {x}, Saved(), [before, inner](const Saved&, const Tensor& dy, Needs) -> Grads {
    Tensor dx = dy;
    for (int i = 0; i < inner.size(); ++i)
      if (dx.shape()[i] != inner[i]) dx = slice(dx, i, before[i], before[i] + inner[i]);
    return {dx};
  });
}

Tensor flip(const Tensor& x, const Dims& axes) {
  bool flipped[kMaxDims] = {};
  for (auto a : axes) {
    const int i = normalize_axis("flip", a, x.rank());
    CAPO_CHECK(!flipped[i], "flip: axes ", axes, " name one twice");
    flipped[i] = true;
  }
  const Tensor y = empty(x.shape(), x.dtype(), x.device());
  if (!x.device().is_meta() && x.numel() > 0) {
    CopyArgs p{x.dtype(), y.dtype(), nullptr, y.data(), nullptr, 0, {}, {}, {}, {}};
    std::int64_t start = 0;  // of the element that lands first, from x's first
    for (int i = 0; i < x.rank(); ++i) {
      p.shape[i] = x.shape()[i];
      p.sd[i] = y.strides()[i];
      p.ss[i] = flipped[i] ? -x.strides()[i] : x.strides()[i];
      if (flipped[i]) start += (x.shape()[i] - 1) * x.strides()[i];
    }
    p.rank = x.rank();
    if (p.rank == 0) p.shape[p.rank++] = 1;
    p.src = static_cast<const char*>(x.data()) + start * static_cast<std::int64_t>(size_of(x.dtype()));
    launch(kernels::copy, x.device(), p, y.numel(), 16384);
  }
  return record("flip", y, {x}, Saved(),
                [axes](const Saved&, const Tensor& dy, Needs) -> Grads { return {flip(dy, axes)}; });
}

Tensor roll(const Tensor& x, const Dims& shifts, const Dims& axes) {
  CAPO_CHECK(shifts.size() == axes.size(), "roll: needs one shift per axis, got ", shifts, " and ", axes);
  Dims shift = Dims::filled(x.rank(), 0);
  for (int k = 0; k < axes.size(); ++k) {
    const int i = normalize_axis("roll", axes[k], x.rank());
    if (x.shape()[i] == 0) continue;
    shift[i] += shifts[k] % x.shape()[i];
    shift[i] = (shift[i] % x.shape()[i] + x.shape()[i]) % x.shape()[i];
  }
  const Tensor y = empty(x.shape(), x.dtype(), x.device());
  {
    const NoGrad off;
    // Each rolled axis falls into a head [0, n - s) that moves to s and a tail that moves to 0: 2^k boxes.
    for (int box = 0; box < 1 << x.rank(); ++box) {
      Dims from = Dims::filled(x.rank(), 0), to = from;
      Shape shape = x.shape();
      bool skip = false;
      for (int i = 0; i < x.rank(); ++i) {
        const bool tail = box >> i & 1;
        if (shift[i] == 0) {
          skip |= tail;
          continue;
        }
        const std::int64_t head = x.shape()[i] - shift[i];
        shape[i] = tail ? shift[i] : head;
        from[i] = tail ? head : 0;
        to[i] = tail ? 0 : shift[i];
      }
      if (!skip) copy_into(window(y, to, shape), window(x, from, shape));
    }
  }
  Dims back = shifts;
  for (auto& s : back) s = -s;
  return record("roll", y, {x}, Saved(),
                [back, axes](const Saved&, const Tensor& dy, Needs) -> Grads { return {roll(dy, back, axes)}; });
}

Tensor repeat(const Tensor& x, const Dims& counts) {
  CAPO_CHECK(counts.size() >= x.rank() && counts.size() < kMaxDims, "repeat: counts must name every axis of ",
             x.shape(), " and at most 7, got ", counts);
  Shape shape = x.shape();
  while (shape.size() < counts.size()) shape.insert(0, 1);
  Tensor y = reshape(x, shape);
  for (int i = 0; i < counts.size(); ++i) {
    CAPO_CHECK(counts[i] >= 0, "repeat: counts must not be negative, got ", counts);
    if (counts[i] == 1) continue;
    Shape wide = y.shape();
    wide.insert(i, counts[i]);
    shape[i] *= counts[i];
    y = reshape(expand(unsqueeze(y, i), wide), shape);
  }
  return contiguous(y);
}

}  // namespace capo
