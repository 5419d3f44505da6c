#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

#include <cmath>

namespace capo {

namespace {
bool is_comparison(BinaryKind k) { return k >= BinaryKind::eq; }

Work binary_work(const BinaryArgs& p, std::int64_t items) {
  return Work::moved(bytes_of(p.dtype, places(p.rank, p.shape, p.sa) + places(p.rank, p.shape, p.sb)) +
                     bytes_of(is_comparison(p.kind) ? boolean : p.dtype, items));
}
Work where_work(const WhereArgs& p, std::int64_t items) {
  return Work::moved(places(p.rank, p.shape, p.sc) +
                     p.element_bytes * (places(p.rank, p.shape, p.sa) + places(p.rank, p.shape, p.sb) + items));
}
Work axpy_work(const AxpyArgs& p, std::int64_t items) { return Work::moved(bytes_of(p.dtype, items * (p.b ? 3 : 2))); }
}  // namespace

CAPO_KERNEL_CUDA(binary, BinaryArgs, binary_work)
CAPO_KERNEL_CUDA(where, WhereArgs, where_work)
CAPO_KERNEL_CUDA(axpy, AxpyArgs, axpy_work)

const char* name_of(BinaryKind kind) {
  constexpr const char* names[] = {"add", "sub", "mul", "div", "maximum", "minimum", "equal", "not_equal", "less",
                                   "less_equal", "greater", "greater_equal", "logical_and", "logical_or"};
  return names[static_cast<int>(kind)];
}

namespace {

constexpr std::int64_t kGrain = 16384;

bool is_logic(BinaryKind k) { return k >= BinaryKind::logical_and; }

// Drops size-1 axes and merges axes that are contiguous in all N operands; returns the rank, >= 1.
template <int N>
int collapse(const Shape& shape, const Dims (&in)[N], std::int64_t* sizes, std::int64_t* const (&strides)[N]) {
  int r = 0;
  for (int i = 0; i < shape.size(); ++i) {
    if (shape[i] == 1) continue;
    bool merge = r > 0;
    for (int j = 0; j < N; ++j) merge = merge && strides[j][r - 1] == in[j][i] * shape[i];
    if (merge)
      sizes[r - 1] *= shape[i];
    else
      sizes[r++] = shape[i];
    for (int j = 0; j < N; ++j) strides[j][r - 1] = in[j][i];
  }
  if (r > 0) return r;
  sizes[0] = 1;
  for (int j = 0; j < N; ++j) strides[j][0] = 0;
  return 1;
}

Dims broadcast_strides(const Tensor& t, const Shape& shape) {
  Dims out = Dims::filled(shape.size(), 0);
  const int lead = shape.size() - t.rank();
  for (int i = 0; i < t.rank(); ++i) out[lead + i] = t.shape()[i] == 1 ? 0 : t.strides()[i];
  return out;
}

}  // namespace

Tensor binary(BinaryKind kind, const Tensor& a, const Tensor& b) {
  const char* name = name_of(kind);
  CAPO_CHECK(a.dtype() == b.dtype(), name, ": dtypes must be equal, got ", describe(a), " and ", describe(b));
  CAPO_CHECK(a.device() == b.device(), name, ": devices must be equal, got ", a.device(), " and ", b.device());
  const DType t = a.dtype();
  if (is_logic(kind))
    CAPO_CHECK(t == boolean, name, ": needs bool tensors, got ", t);
  else if (kind == BinaryKind::div)
    CAPO_CHECK(is_floating(t), name, ": needs floating tensors, got ", t);
  else
    CAPO_CHECK(is_floating(t) || t == i32 || t == i64, name, ": needs floating, i32 or i64 tensors, got ", t);
  const Shape shape = broadcast_shapes(name, a.shape(), b.shape());
  const Tensor y = empty(shape, is_comparison(kind) ? boolean : t, a.device());
  if (!a.device().is_meta()) {
    BinaryArgs p{kind, t, a.data(), b.data(), y.data(), 0, {}, {}, {}};
    p.rank = collapse(shape, {broadcast_strides(a, shape), broadcast_strides(b, shape)}, p.shape, {p.sa, p.sb});
    launch(kernels::binary, a.device(), p, y.numel(), kGrain);
  }
  if (is_comparison(kind)) {  // bool results have no gradient by nature
    detail::observe(name, y);
    return y;
  }
  const Needs need = needs_of({a, b});
  const Shape ashape = a.shape(), bshape = b.shape();
  switch (kind) {
    case BinaryKind::add:
    case BinaryKind::sub: {
      const bool minus = kind == BinaryKind::sub;
      return record(name, y, {a, b}, Saved(),
                    [ashape, bshape, minus](const Saved&, const Tensor& dy, Needs n) -> Grads {
                      return {n[0] ? sum_to(dy, ashape) : Tensor(),
                              !n[1] ? Tensor() : minus ? neg(sum_to(dy, bshape)) : sum_to(dy, bshape)};
                    });
    }
    case BinaryKind::mul:
      return record(name, y, {a, b}, Saved({keep_if(need[1], a), keep_if(need[0], b)}),
                    [ashape, bshape](const Saved& s, const Tensor& dy, Needs n) -> Grads {
                      return {n[0] ? sum_to(dy * s[1], ashape) : Tensor(), n[1] ? sum_to(dy * s[0], bshape) : Tensor()};
                    });
    case BinaryKind::div:
      return record(name, y, {a, b}, Saved({keep_if(need[1], a), b}),
                    [ashape, bshape](const Saved& s, const Tensor& dy, Needs n) -> Grads {
                      return {n[0] ? sum_to(dy / s[1], ashape) : Tensor(),
                              n[1] ? neg(sum_to(dy * s[0] / square(s[1]), bshape)) : Tensor()};
                    });
    default: {  // maximum, minimum
      const bool max = kind == BinaryKind::maximum;
      return record(name, y, {a, b}, Saved({a, b}),
                    [ashape, bshape, max](const Saved& s, const Tensor& dy, Needs n) -> Grads {
                      const Tensor wins = max ? greater_equal(s[0], s[1]) : less_equal(s[0], s[1]);
                      const Tensor first =  // a NaN in a is the value
                          cast(logical_or(wins, not_equal(s[0], s[0])), dy.dtype());
                      return {n[0] ? sum_to(dy * first, ashape) : Tensor(),
                              n[1] ? sum_to(dy * (1.0 - first), bshape) : Tensor()};
                    });
    }
  }
}

namespace {
Tensor scalar_like(const Tensor& t, double v) {
  CAPO_CHECK(is_floating(t.dtype()) || v == std::trunc(v), "scalar: beside a tensor of ", t.dtype(),
             " it must be whole, got ", v);
  CAPO_CHECK(t.dtype() != i32 || std::abs(v) <= 0x7fffffff, "scalar: beside a tensor of i32 it must be in i32, got ",
             v);
  CAPO_CHECK(t.dtype() != i64 || std::abs(v) < 0x1p63, "scalar: beside a tensor of i64 it must be in i64, got ", v);
  return full({}, v, t.dtype(), t.device());
}
bool fits_affine(const Tensor& t) { return is_floating(t.dtype()); }
}  // namespace

Tensor greater(const Tensor& a, double b) { return greater(a, scalar_like(a, b)); }
Tensor greater_equal(const Tensor& a, double b) { return greater_equal(a, scalar_like(a, b)); }
Tensor less_equal(const Tensor& a, double b) { return less_equal(a, scalar_like(a, b)); }
Tensor less(const Tensor& a, double b) { return less(a, scalar_like(a, b)); }

Tensor operator+(const Tensor& a, double b) { return fits_affine(a) ? affine(a, 1, b) : add(a, scalar_like(a, b)); }
Tensor operator-(const Tensor& a, double b) { return fits_affine(a) ? affine(a, 1, -b) : sub(a, scalar_like(a, b)); }
Tensor operator*(const Tensor& a, double b) { return fits_affine(a) ? affine(a, b, 0) : mul(a, scalar_like(a, b)); }
Tensor operator/(const Tensor& a, double b) { return div(a, scalar_like(a, b)); }
Tensor operator-(double a, const Tensor& b) { return fits_affine(b) ? affine(b, -1, a) : sub(scalar_like(b, a), b); }
Tensor operator-(const Tensor& a) { return neg(a); }

Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b) {
  CAPO_CHECK(condition.dtype() == boolean, "where: condition must be bool, got ", describe(condition));
  CAPO_CHECK(a.dtype() == b.dtype(), "where: a and b must have one dtype, got ", a.dtype(), " and ", b.dtype());
  CAPO_CHECK(condition.device() == a.device() && a.device() == b.device(), "where: devices must be equal, got ",
             condition.device(), ", ", a.device(), " and ", b.device());
  const Shape shape = broadcast_shapes("where", broadcast_shapes("where", condition.shape(), a.shape()), b.shape());
  const Tensor y = empty(shape, a.dtype(), a.device());
  if (!y.device().is_meta()) {
    WhereArgs p{static_cast<int>(size_of(a.dtype())), condition.data<bool>(), a.data(), b.data(), y.data(), 0,
                {}, {}, {}, {}};
    p.rank = collapse(shape,
                      {broadcast_strides(condition, shape), broadcast_strides(a, shape), broadcast_strides(b, shape)},
                      p.shape, {p.sc, p.sa, p.sb});
    launch(kernels::where, y.device(), p, y.numel(), kGrain);
  }
  const Shape ashape = a.shape(), bshape = b.shape();
  return record("where", y, {a, b}, Saved({condition}),
                [ashape, bshape](const Saved& s, const Tensor& dy, Needs n) -> Grads {
                  const Tensor zero = full({}, 0, dy.dtype(), dy.device());
                  return {n[0] ? sum_to(where(s[0], dy, zero), ashape) : Tensor(),
                          n[1] ? sum_to(where(s[0], zero, dy), bshape) : Tensor()};
                });
}

Tensor sum_to(const Tensor& x, const Shape& shape) {
  if (x.shape() == shape) return x;
  const int lead = x.rank() - shape.size();
  CAPO_CHECK(lead >= 0, "sum_to: ", shape, " has more axes than ", x.shape());
  Dims axes;
  for (int i = 0; i < x.rank(); ++i) {
    CAPO_CHECK(i < lead || shape[i - lead] == x.shape()[i] || shape[i - lead] == 1, "sum_to: ", x.shape(),
               " does not come from broadcasting ", shape);
    if (i < lead || (shape[i - lead] == 1 && x.shape()[i] != 1)) axes.push_back(i);
  }
  return reshape(sum(x, axes, true), shape);
}

namespace {
void axpy(const char* name, const Tensor& a, const Tensor& b, double scale) {
  CAPO_CHECK(a.dtype() == f32 || a.dtype() == f64, name, ": needs f32 or f64, got ", describe(a));
  CAPO_CHECK(a.is_contiguous(), name, ": the written tensor must be contiguous, got ", describe(a));
  if (b.defined() && b.is_contiguous()) check_overlap(name, a, b);  // else b is copied first
  write_in_place(name, a);
  if (a.device().is_meta()) return;
  const Tensor bb = b.defined() ? contiguous(b.detach()) : b;
  const AxpyArgs p{a.dtype(), a.data(), bb.defined() ? bb.data() : nullptr, scale};
  launch(kernels::axpy, a.device(), p, a.numel(), kGrain);
  detail::observe(name, {});
}
}  // namespace

void add_(const Tensor& a, const Tensor& b, double scale) {
  CAPO_CHECK(a.shape() == b.shape() && a.dtype() == b.dtype() && a.device() == b.device(),
             "add_: tensors must be alike, got ", describe(a), " and ", describe(b));
  axpy("add_", a, b, scale);
}
void mul_(const Tensor& a, double scale) {
  axpy("mul_", a, Tensor(), scale);
}

const AutogradOps autograd_ops = {
    [](const Tensor& a, const Tensor& b) { return add(a, b); },
    [](const Tensor& a, const Tensor& b) { is_half(a.dtype()) ? copy_into(a, add(a, b)) : add_(a, b); },
    [](const Tensor& t) { return full(t.shape(), 1, t.dtype(), t.device()); },
};

}  // namespace capo
