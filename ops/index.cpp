#include <capo/autograd/autograd.h>
#include <capo/engine/graph.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/index.h>
#include <capo/ops/kernel.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

#include <algorithm>

namespace capo {

namespace {
Work index_select_work(const IndexSelectArgs& p, std::int64_t items) {  // items: rows of y
  return Work::moved(2 * items * p.inner * p.element_bytes + bytes_of(i64, p.count));
}
Work gather_work(const GatherArgs& p, std::int64_t items) { return Work::moved(items * (2 * p.element_bytes + 8)); }
Work arg_extreme_work(const ArgExtremeArgs& p, std::int64_t items) {
  const std::int64_t columns = items / ((p.inner + 63) / 64) * p.inner;
  return Work::moved(bytes_of(p.dtype, columns * p.size) + bytes_of(i64, columns));
}
}  // namespace

CAPO_KERNEL_CUDA_ONLY(index_check, IndexCheckArgs)
CAPO_KERNEL_CUDA(index_select, IndexSelectArgs, index_select_work)
CAPO_KERNEL_CUDA(index_add, IndexAddArgs)
CAPO_KERNEL_CUDA(gather, GatherArgs, gather_work)
CAPO_KERNEL_CUDA(scatter_add, ScatterAddArgs)
CAPO_KERNEL_CUDA(topk, TopKArgs)
CAPO_KERNEL_CUDA(arg_extreme, ArgExtremeArgs, arg_extreme_work)

namespace {

constexpr std::int64_t kWork = 16384;  // elements per chunk

std::int64_t grain(std::int64_t elements_per_item) { return 1 + kWork / (elements_per_item + 1); }

Dims coordinates(std::int64_t k, const Shape& shape) {
  Dims at = Dims::filled(shape.size(), 0);
  for (int i = shape.size() - 1; i >= 0; --i) {
    at[i] = k % shape[i];
    k /= shape[i];
  }
  return at;
}

// The first place in v[0..n) that is outside [0, size), or n.
std::int64_t first_wrong(const std::int64_t* v, std::int64_t n, std::int64_t size) {
  std::uint64_t worst = 0;  // negatives become huge
  for (std::int64_t i = 0; i < n; ++i) {
    const auto u = static_cast<std::uint64_t>(v[i]);
    worst = worst < u ? u : worst;
  }
  if (worst < static_cast<std::uint64_t>(size)) return n;
  std::int64_t at = 0;
  while (at < n && v[at] >= 0 && v[at] < size) ++at;
  return at;
}

// The same on the device, read back: the host waits for all that the stream holds (tens of microseconds, and it can no
// longer run ahead of the device). The price of an error where the CPU has one, instead of a read out of bounds.
std::int64_t first_wrong_there(const Tensor& flat, std::int64_t size) {
  const std::int64_t n = flat.numel(), blocks = index_check_blocks(n);
  const Tensor found = empty({blocks}, i64, flat.device());
  launch(kernels::index_check, flat.device(),
         IndexCheckArgs{flat.data<std::int64_t>(), size, n, found.data<std::int64_t>(), 0, nullptr, nullptr}, blocks,
         1);
  const auto places = to_vector<std::int64_t>(found);
  return *std::min_element(places.begin(), places.end());
}

void fail_index(const Graph::Check& c, std::int64_t place, std::int64_t index) {
  detail::fail(c.op, ": ", c.what, " must be in [0, ", c.size, "), got ", index, " at ", coordinates(place, c.shape));
}

// What a captured op reads in place of `flat`: nobody can look before it runs, so the device does, says what it found
// and keeps the op within bounds.
Tensor captured_index(const Tensor& flat, const Graph::Check& check) {
  const std::int64_t n = flat.numel(), blocks = index_check_blocks(n);
  const Tensor safe = empty(flat.shape(), i64, flat.device()), parts = empty({blocks}, i64, flat.device());
  launch(kernels::index_check, flat.device(),
         IndexCheckArgs{flat.data<std::int64_t>(), check.size, n, parts.data<std::int64_t>(), check.ignore,
                        safe.data<std::int64_t>(), Graph::add_check(check)}, blocks, 1);
  return safe;
}

// dtype, device and range. Returns the index contiguous.
Tensor checked_index(const char* op, const char* what, const Tensor& index, std::int64_t size, Device device) {
  CAPO_CHECK(index.dtype() == i64, op, ": ", what, " must be i64, got ", describe(index));
  CAPO_CHECK(index.device() == device, op, ": ", what, " must be on ", device, ", got ", index.device());
  const Tensor flat = contiguous(index);
  const std::int64_t n = flat.numel();
  if (device.is_meta() || n == 0) return flat;
  const Graph::Check check{op, what, index.shape(), size, 0, fail_index, true};
  if (Graph::capturing(device)) {
    CAPO_CHECK(size > 0, op, ": ", what, " must be in [0, 0), got ", index.shape(), " of them");
    return captured_index(flat, check);
  }
  if (!device.is_cpu()) refuse_capture(op);
  const std::int64_t at =
      device.is_cpu() ? first_wrong(flat.data<std::int64_t>(), n, size) : first_wrong_there(flat, size);
  if (at != n) fail_index(check, at, to_vector<std::int64_t>(flat)[static_cast<std::size_t>(at)]);
  return flat;
}

struct Split {
  std::int64_t outer = 1, inner = 1;
};
Split around(const Shape& shape, int axis) {
  Split s;
  for (int i = 0; i < axis; ++i) s.outer *= shape[i];
  for (int i = axis + 1; i < shape.size(); ++i) s.inner *= shape[i];
  return s;
}

Tensor add_rows(const char* op, const Tensor& base, const Shape& shape, int axis, const Tensor& index,
                const Tensor& src);

// index: checked and contiguous.
Tensor take_rows(const char* op, const Tensor& x0, int axis, const Tensor& index) {
  const Tensor x = contiguous(x0);
  Shape shape = x.shape();
  shape[axis] = index.numel();
  const Tensor y = empty(shape, x.dtype(), x.device());
  if (!x.device().is_meta() && y.numel() > 0) {
    const Split s = around(shape, axis);
    const IndexSelectArgs p{static_cast<std::int64_t>(size_of(x.dtype())),
                            x.data(),
                            index.data<std::int64_t>(),
                            y.data(),
                            x.shape()[axis],
                            index.numel(),
                            s.inner};
    launch(kernels::index_select, x.device(), p, s.outer * p.count, grain(s.inner));
  }
  const Shape before = x.shape();
  return record(op, y, {x}, Saved({index}), [op, before, axis](const Saved& s, const Tensor& dy, Needs) -> Grads {
    return {add_rows(op, {}, before, axis, s[0], dy)};
  });
}

// base (undefined: zeros) with rows of src added.
Tensor add_rows(const char* op, const Tensor& base, const Shape& shape, int axis, const Tensor& index,
                const Tensor& src0) {
  if (through_f32(src0)) {
    const Tensor wide = base.defined() ? cast(base, f32) : base;
    return cast(add_rows(op, wide, shape, axis, index, cast(src0, f32)), src0.dtype());
  }
  const Tensor src = contiguous(src0);
  Tensor y;
  {
    const NoGrad off;
    y = base.defined() ? clone(base) : zeros(shape, src.dtype(), src.device());
  }
  if (!src.device().is_meta() && src.numel() > 0) {
    const Split s = around(shape, axis);
    const Tensor scratch = src.device().is_cuda() ? empty({3, index.numel()}, i64, src.device()) : Tensor();
    const IndexAddArgs p{src.dtype(),   src.data(), index.data<std::int64_t>(), y.data(), shape[axis],
                         index.numel(), s.inner,    scratch.defined() ? scratch.data<std::int64_t>() : nullptr};
    launch(kernels::index_add, src.device(), p, s.outer * ((s.inner + 63) / 64), grain(64 * p.count));
  }
  return record(op, y, {base, src}, Saved({index}), [op, axis](const Saved& s, const Tensor& dy, Needs need) -> Grads {
    return {need[0] ? dy : Tensor(), need[1] ? take_rows(op, dy, axis, s[0]) : Tensor()};
  });
}

Tensor scatter(const char* op, const Tensor& base, const Shape& shape, int axis, const Tensor& index,
               const Tensor& src);

Tensor take(const char* op, const Tensor& x, int axis, const Tensor& index) {
  const Tensor y = empty(index.shape(), x.dtype(), x.device());
  if (!x.device().is_meta() && y.numel() > 0) {
    GatherArgs p{static_cast<std::int64_t>(size_of(x.dtype())),
                 x.data(),
                 index.data<std::int64_t>(),
                 y.data(),
                 x.rank(),
                 axis,
                 {},
                 {}};
    for (int i = 0; i < x.rank(); ++i) {
      p.shape[i] = index.shape()[i];
      p.sx[i] = x.strides()[i];
    }
    launch(kernels::gather, x.device(), p, y.numel(), kWork);
  }
  const Shape before = x.shape();
  return record(op, y, {x}, Saved({index}), [op, before, axis](const Saved& s, const Tensor& dy, Needs) -> Grads {
    return {scatter(op, {}, before, axis, s[0], dy)};
  });
}

Tensor scatter(const char* op, const Tensor& base, const Shape& shape, int axis, const Tensor& index,
               const Tensor& src0) {
  if (is_half(src0.dtype())) {  // also on CUDA: the sums grow in memory, which should not round each step
    const Tensor wide = base.defined() ? cast(base, f32) : base;
    return cast(scatter(op, wide, shape, axis, index, cast(src0, f32)), src0.dtype());
  }
  const Tensor src = contiguous(src0);
  Tensor y;
  {
    const NoGrad off;
    y = base.defined() ? clone(base) : zeros(shape, src.dtype(), src.device());
  }
  if (!src.device().is_meta() && src.numel() > 0) {
    ScatterAddArgs p{};
    p.dtype = src.dtype();
    p.src = src.data();
    p.index = index.data<std::int64_t>();
    p.y = y.data();
    for (int i = 0; i < src.rank(); ++i) {
      if (i == axis) continue;
      p.shape[p.rank] = src.shape()[i];
      p.ss[p.rank] = src.strides()[i];
      p.sy[p.rank++] = y.strides()[i];
    }
    if (p.rank == 0) p.shape[p.rank++] = 1;
    p.count = src.shape()[axis];
    p.src_step = src.strides()[axis];
    p.y_step = y.strides()[axis];
    launch(kernels::scatter_add, src.device(), p, src.numel() / p.count, 64 * grain(64 * p.count));
  }
  return record(op, y, {base, src}, Saved({index}), [op, axis](const Saved& s, const Tensor& dy, Needs need) -> Grads {
    return {need[0] ? dy : Tensor(), need[1] ? take(op, dy, axis, s[0]) : Tensor()};
  });
}

// index's other axes must fit into `shape`, which is `what`'s.
void check_fits(const char* op, const char* what, const Tensor& index, const Shape& shape, int axis) {
  bool fits = index.rank() == shape.size();
  for (int i = 0; fits && i < shape.size(); ++i) fits = i == axis || index.shape()[i] <= shape[i];
  CAPO_CHECK(fits, op, ": index must have the rank of ", what, " ", shape, " and fit into it except on axis ", axis,
             ", got ", index.shape());
}

Tensor arg_extreme(const char* op, const Tensor& x0, std::int64_t axis0, bool keepdim, bool largest) {
  check_summable(op, x0);
  const int axis = normalize_axis(op, axis0, x0.rank());
  CAPO_CHECK(x0.shape()[axis] > 0, op, ": axis ", axis, " of ", x0.shape(), " must not be empty");
  const NoGrad off;  // positions have no gradient
  const Tensor x = contiguous(through_f32(x0) ? cast(x0, f32) : x0);
  Shape shape = x.shape();
  if (keepdim)
    shape[axis] = 1;
  else
    shape.erase(axis);
  const Tensor y = empty(shape, i64, x.device());
  if (!x.device().is_meta()) {
    const Split s = around(x.shape(), axis);
    const ArgExtremeArgs p{x.dtype(), x.data(), y.data<std::int64_t>(), x.shape()[axis], s.inner, largest};
    launch(kernels::arg_extreme, x.device(), p, s.outer * ((s.inner + 63) / 64),
           grain(p.size * (s.inner < 64 ? s.inner : 64)));
  }
  detail::observe(op, y);
  return y;
}

}  // namespace

Tensor index_select(const Tensor& x, std::int64_t axis0, const Tensor& index) {
  const int axis = normalize_axis("index_select", axis0, x.rank());
  CAPO_CHECK(index.rank() == 1, "index_select: index must have one axis, got ", index.shape());
  return take_rows("index_select", x, axis, checked_index("index_select", "index", index, x.shape()[axis], x.device()));
}

Tensor index_add(const Tensor& base, std::int64_t axis0, const Tensor& index, const Tensor& src) {
  const int axis = normalize_axis("index_add", axis0, base.rank());
  check_summable("index_add", base);
  CAPO_CHECK(index.rank() == 1, "index_add: index must have one axis, got ", index.shape());
  Shape shape = base.shape();
  shape[axis] = index.numel();
  CAPO_CHECK(src.shape() == shape && src.dtype() == base.dtype() && src.device() == base.device(),
             "index_add: src must be ", shape, " to match base ", describe(base), " and index ", index.shape(),
             ", got ", describe(src));
  const Tensor checked = checked_index("index_add", "index", index, base.shape()[axis], base.device());
  return add_rows("index_add", base, base.shape(), axis, checked, src);
}

Tensor gather(const Tensor& x, std::int64_t axis0, const Tensor& index) {
  const int axis = normalize_axis("gather", axis0, x.rank());
  check_fits("gather", "x", index, x.shape(), axis);
  return take("gather", x, axis, checked_index("gather", "index", index, x.shape()[axis], x.device()));
}

Tensor scatter_add(const Tensor& base, std::int64_t axis0, const Tensor& index, const Tensor& src) {
  const int axis = normalize_axis("scatter_add", axis0, base.rank());
  check_summable("scatter_add", base);
  check_fits("scatter_add", "base", index, base.shape(), axis);
  CAPO_CHECK(src.shape() == index.shape() && src.dtype() == base.dtype() && src.device() == base.device(),
             "scatter_add: src must have the shape of index ", index.shape(), " and base's dtype ", base.dtype(),
             ", got ", describe(src));
  const Tensor checked = checked_index("scatter_add", "index", index, base.shape()[axis], base.device());
  return scatter("scatter_add", base, base.shape(), axis, checked, src);
}

Tensor embedding(const Tensor& weight, const Tensor& ids) {
  CAPO_CHECK(weight.rank() == 2, "embedding: weight must be [vocabulary, channels], got ", weight.shape());
  const Tensor index = checked_index("embedding", "ids", ids, weight.shape()[0], weight.device());
  Shape shape = ids.shape();
  shape.push_back(weight.shape()[1]);
  return reshape(take_rows("embedding", weight, 0, reshape(index, {ids.numel()})), shape);
}

Tensor one_hot(const Tensor& ids, std::int64_t classes, DType dtype) {
  CAPO_CHECK(classes >= 0, "one_hot: classes must not be negative, got ", classes);
  const Tensor index = checked_index("one_hot", "ids", ids, classes, ids.device());
  return cast(equal(unsqueeze(index, -1), arange(classes, i64, ids.device())), dtype);
}

TopK topk(const Tensor& x, std::int64_t k, std::int64_t axis0, bool largest) {
  check_summable("topk", x);
  const int axis = normalize_axis("topk", axis0, x.rank());
  CAPO_CHECK(k >= 0 && k <= x.shape()[axis], "topk: k must be in [0, ", x.shape()[axis], "] for axis ", axis, " of ",
             x.shape(), ", got ", k);
  Tensor indices;
  {
    const NoGrad off;
    const Tensor wide = through_f32(x) ? cast(x, f32) : x;
    const Tensor rows = contiguous(transpose(wide, axis, -1));
    Shape shape = rows.shape();
    shape.back() = k;
    indices = empty(shape, i64, x.device());
    if (!x.device().is_meta() && indices.numel() > 0) {
      const Tensor scratch = x.device().is_cuda() ? empty({2, rows.numel()}, i64, x.device()) : Tensor();
      const TopKArgs p{rows.dtype(), rows.data(), indices.data<std::int64_t>(), rows.shape().back(), k, largest,
                       scratch.defined() ? scratch.data<std::int64_t>() : nullptr};
      launch(kernels::topk, x.device(), p, indices.numel() / k, grain(4 * p.size));
      detail::observe("topk", {});
    }
    indices = contiguous(transpose(indices, axis, -1));
  }
  return {take("topk", x, axis, indices), indices};
}

Tensor argmax(const Tensor& x, std::int64_t axis, bool keepdim) {
  return arg_extreme("argmax", x, axis, keepdim, true);
}
Tensor argmin(const Tensor& x, std::int64_t axis, bool keepdim) {
  return arg_extreme("argmin", x, axis, keepdim, false);
}

}  // namespace capo
