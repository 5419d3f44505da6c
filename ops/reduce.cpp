#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/reduce.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

#include <algorithm>
#include <cstdlib>

namespace capo {

namespace {
// items: on the CPU [parts, outputs], on CUDA outputs.
Work reduce_work(const ReduceArgs& p, std::int64_t items) {
  const std::int64_t read =
      places(p.kept, p.kept_shape, p.kept_strides) * places(p.reduced, p.reduced_shape, p.reduced_strides);
  return Work::moved(bytes_of(p.dtype, read + items));
}
}  // namespace

CAPO_KERNEL_CUDA(reduce, ReduceArgs, reduce_work)

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

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Whether every run of `pack` neighbours (elements of 16 bytes) of the innermost axis can be read at once.
bool reads_packs(const ReduceArgs& p, std::int64_t pack) {
  const int rank = p.columns ? p.kept : p.reduced;
  const std::int64_t* shape = p.columns ? p.kept_shape : p.reduced_shape;
  const std::int64_t* strides = p.columns ? p.kept_strides : p.reduced_strides;
  if (strides[rank - 1] != 1 || shape[rank - 1] % pack || reinterpret_cast<std::uintptr_t>(p.x) % 16) return false;
  const auto whole = [&](const std::int64_t* s, int n) {
    return std::all_of(s, s + n, [&](std::int64_t v) { return v % pack == 0; });
  };
  return whole(strides, rank - 1) && (p.columns ? whole(p.reduced_strides, p.reduced) : whole(p.kept_strides, p.kept));
}

// How CUDA reduces: a warp or block per output runs along the reduced axes (rows), or threads side by side take
// neighbouring outputs and groups of them share the reduced elements (columns). Few outputs are split into parts, which
// fill the device and keep every chain of additions short; a second launch joins the parts.
void plan_on_device(ReduceArgs& p, std::int64_t outputs) {
  constexpr std::int64_t kBlocks = 1024, kThreads = 256, kShortRow = 1024;
  const std::int64_t pack = 16 / size_of(p.dtype);
  const std::int64_t across = std::abs(p.kept_strides[p.kept - 1]), along = std::abs(p.reduced_strides[p.reduced - 1]);
  p.columns = outputs > 1 && (p.count < 16 || across < along);
  p.packed = reads_packs(p, pack);
  const std::int64_t width = ceil_div(outputs, p.packed ? pack : 1);  // columns: threads over the outputs
  p.across = p.count < 8 ? 256 : p.count < 16 ? 128 : p.count < 32 ? 64 : 32;
  while (p.across / 2 >= width) p.across /= 2;
  const std::int64_t groups = kThreads / p.across;
  const std::int64_t row_tiles = p.count <= kShortRow ? ceil_div(outputs, 8) : outputs;
  const std::int64_t tiles = p.columns ? ceil_div(width, p.across) : row_tiles;
  const std::int64_t shortest = p.columns ? 8 * groups : 2048, longest = p.columns ? 512 * groups : 65536;
  const std::int64_t wanted = std::min(ceil_div(kBlocks, tiles), ceil_div(p.count, shortest));
  const std::int64_t parts = std::max<std::int64_t>({wanted, ceil_div(p.count, longest), 1});
  p.length = std::max<std::int64_t>(ceil_div(ceil_div(p.count, parts), 64) * 64, 64);
  p.parts = std::max<std::int64_t>(ceil_div(p.count, p.length), 1);
}

void run_on_device(ReduceArgs& p, const Tensor& y, double scale) {
  if (y.numel() == 0) return;
  plan_on_device(p, y.numel());
  p.scale = scale;
  Tensor work;
  if (p.parts > 1) {
    work = empty({y.numel() * p.parts}, is_half(p.dtype) ? f32 : p.dtype, y.device());
    p.work = work.data();
  }
  launch(kernels::reduce, y.device(), p, y.numel(), 0);
}

// One output per item; where that makes a single chunk of long sums, fixed parts of 4,096 elements first, then the
// parts.
void run_on_cpu(ReduceArgs& p, const Tensor& y) {
  constexpr std::int64_t kPart = 4096, kWork = 16384;
  const std::int64_t outputs = y.numel();
  p.parts = 1, p.length = p.count;
  if (outputs == 0 || outputs > 64 || p.count < 8 * kPart) {
    const std::int64_t grain = p.count >= kWork ? 64 : (kWork / (p.count + 1) / 64 + 1) * 64;
    launch(kernels::reduce, y.device(), p, outputs, grain);
    return;
  }
  p.parts = ceil_div(p.count, kPart), p.length = kPart;
  const Tensor parts = empty({p.parts, outputs}, y.dtype(), y.device());
  p.y = parts.data();
  launch(kernels::reduce, y.device(), p, outputs * p.parts, ceil_div(kWork, outputs * kPart) * outputs);

  ReduceArgs join{};
  join.kind = p.kind, join.dtype = y.dtype();
  join.x = parts.data(), join.y = y.data();
  join.kept = join.reduced = 1;
  join.kept_shape[0] = outputs, join.kept_strides[0] = 1;
  join.reduced_shape[0] = join.count = join.length = p.parts, join.reduced_strides[0] = outputs;
  join.parts = 1;
  launch(kernels::reduce, y.device(), join, outputs, 64);
}

// scale: of the result, on CUDA alone.
void run(ReduceKind kind, const Tensor& x, const Tensor& y, const Axes& axes, double scale = 1) {
  if (x.device().is_meta()) return;
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
  if (x.device().is_cuda()) return run_on_device(p, y, scale);
  run_on_cpu(p, y);
}

// The sum, not recorded: of halves on the CPU it is f32.
Tensor sum_of(const Tensor& x, const Shape& shape, const Axes& axes) {
  const Tensor y = empty(shape, through_f32(x) ? f32 : x.dtype(), x.device());
  run(ReduceKind::sum, x, y, axes);
  return y;
}

}  // namespace

Tensor sum(const Tensor& x, const Dims& axes, bool keepdim) {
  check_summable("sum", x);
  const Axes a = resolve("sum", x, axes);
  const Tensor y = cast(sum_of(x, keepdim ? a.with_one : a.kept, a), x.dtype());
  const Shape before = x.shape(), ones = a.with_one;
  return record("sum", y, {x}, Saved(), [before, ones](const Saved&, const Tensor& dy, Needs) -> Grads {
    return {expand(reshape(dy, ones), before)};
  });
}

namespace {
// The mean as one op. The sum is scaled before it is rounded: a 16-bit sum may overflow where the mean does not.
Tensor rounded_once(const Tensor& x, const Shape& shape, const Axes& axes) {
  const std::int64_t outputs = numel(shape);
  const double n = outputs ? static_cast<double>(x.numel()) / static_cast<double>(outputs) : 0, scale = 1.0 / n;
  Tensor y;
  if (x.device().is_cuda()) {
    y = empty(shape, x.dtype(), x.device());
    run(ReduceKind::sum, x, y, axes, scale);
  } else {
    y = cast(sum_of(x, shape, axes) * scale, x.dtype());
  }
  const Shape before = x.shape(), ones = axes.with_one;
  return record("mean", y, {x}, Saved(), [before, ones, scale](const Saved&, const Tensor& dy, Needs) -> Grads {
    return {expand(reshape(dy * scale, ones), before)};
  });
}
}  // namespace

Tensor mean(const Tensor& x, const Dims& axes, bool keepdim) {
  CAPO_CHECK(is_floating(x.dtype()), "mean: needs a floating tensor, got ", describe(x));
  const Axes a = resolve("mean", x, axes);  // errors in its own name
  if (x.device().is_cuda() || is_half(x.dtype())) return rounded_once(x, keepdim ? a.with_one : a.kept, a);
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
