#include <capo/autograd/autograd.h>
#include <capo/engine/backend.h>
#include <capo/ops/args.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/work_internal.h>

namespace capo {

namespace {
Work fill_work(const FillArgs& p, std::int64_t items) { return Work::moved(bytes_of(p.dtype, items)); }
Work random_work(const RandomArgs& p, std::int64_t items) { return Work::moved(bytes_of(p.dtype, items * 4)); }
}  // namespace

CAPO_KERNEL_CUDA(copy, CopyArgs, copy_work)
CAPO_KERNEL_CUDA(fill, FillArgs, fill_work)
CAPO_KERNEL_CUDA(random, RandomArgs, random_work)

namespace {

constexpr std::int64_t kGrain = 16384;

void run_copy(const Tensor& dst, const Tensor& src, const Tensor& mask) {
  if (dst.device().is_meta() || dst.numel() == 0) return;
  CopyArgs p{src.dtype(), dst.dtype(), src.data(), dst.data(), mask.defined() ? mask.data<bool>() : nullptr, 0,
             {}, {}, {}, {}};
  int r = 0;
  const Shape& shape = dst.shape();
  for (int i = 0; i < shape.size(); ++i) {
    if (shape[i] == 1) continue;
    const std::int64_t ss = src.strides()[i], sd = dst.strides()[i], sm = mask.defined() ? mask.strides()[i] : 0;
    const bool merge =
        r > 0 && p.ss[r - 1] == ss * shape[i] && p.sd[r - 1] == sd * shape[i] && p.sm[r - 1] == sm * shape[i];
    if (merge) {
      p.shape[r - 1] *= shape[i];
    } else {
      p.shape[r++] = shape[i];
    }
    p.ss[r - 1] = ss;
    p.sd[r - 1] = sd;
    p.sm[r - 1] = sm;
  }
  if (r == 0) p.shape[r++] = 1;
  p.rank = r;
  launch(kernels::copy, dst.device(), p, dst.numel(), kGrain);
}

void run_fill(const Tensor& dst, double value, bool iota) {
  if (dst.device().is_meta()) return;
  const FillArgs p{dst.dtype(), dst.data(), value, iota};
  launch(kernels::fill, dst.device(), p, dst.numel(), kGrain);
}

Tensor random(const char* op, const Shape& shape, Generator& rng, double a, double b, bool normal, DType dtype,
              Device device) {
  CAPO_CHECK(dtype == f32 || dtype == f64, op, ": dtype must be f32 or f64, got ", dtype);
  const Tensor t = empty(shape, dtype, device);
  const RngRange range = rng.reserve(t.numel());
  CAPO_CHECK(!range.place || !device.is_cpu(), op, ": draws on the CPU cannot be part of a captured graph");
  if (device.is_meta() || t.numel() == 0) return t;
  const std::int64_t blocks = (t.numel() + 3) / 4;
  if (t.numel() % 4 == 0) {
    const RandomArgs p{dtype, t.data(), range, a, b, normal};
    launch(kernels::random, device, p, blocks, kGrain / 4);
    detail::observe(op, {});
    return t;
  }
  const Tensor padded = empty({blocks * 4}, dtype, device);  // whole blocks, then the part that was asked for
  const RandomArgs p{dtype, padded.data(), range, a, b, normal};
  launch(kernels::random, device, p, blocks, kGrain / 4);
  run_copy(t, strided_view(padded, shape, contiguous_strides(shape), 0), {});
  detail::observe(op, {});
  return t;
}

}  // namespace

Tensor full(const Shape& shape, double value, DType dtype, Device device) {
  const Tensor t = empty(shape, dtype, device);
  run_fill(t, value, false);
  detail::observe("full", {});
  return t;
}

Tensor arange(std::int64_t n, DType dtype, Device device) {
  const Tensor t = empty({n}, dtype, device);
  run_fill(t, 0, true);
  detail::observe("arange", {});
  return t;
}

Tensor rand_uniform(const Shape& shape, Generator& rng, double low, double high, DType dtype, Device device) {
  CAPO_CHECK(low <= high, "rand_uniform: low must be at most high, got ", low, " and ", high);
  return random("rand_uniform", shape, rng, low, high, false, dtype, device);
}
Tensor rand_normal(const Shape& shape, Generator& rng, double mean, double std, DType dtype, Device device) {
  return random("rand_normal", shape, rng, mean, std, true, dtype, device);
}

Tensor clone(const Tensor& x) {
  const Tensor y = empty(x.shape(), x.dtype(), x.device());
  run_copy(y, x, {});
  return record("clone", y, {x}, Saved(), [](const Saved&, const Tensor& dy, Needs) -> Grads { return {dy}; });
}

Tensor contiguous(const Tensor& x) { return x.is_contiguous() ? x : clone(x); }

Tensor cast(const Tensor& x, DType dtype) {
  if (x.dtype() == dtype) return x;
  const Tensor y = empty(x.shape(), dtype, x.device());
  run_copy(y, x, {});
  if (!is_floating(dtype)) return record_no_gradient("cast", y, {x});
  const DType from = x.dtype();
  return record("cast", y, {x}, Saved(),
                [from](const Saved&, const Tensor& dy, Needs) -> Grads { return {cast(dy, from)}; });
}

Tensor to(const Tensor& x, Device device) {
  if (x.device() == device) return x;
  CAPO_CHECK(!x.device().is_meta(), "to: a meta tensor ", x.shape(), " has no values to bring to ", device);
  const Tensor y = empty(x.shape(), x.dtype(), device);
  if (!device.is_meta() && x.numel() > 0) {
    if (x.device().is_cpu() || device.is_cpu()) refuse_capture("to");
    const Tensor packed = contiguous(x.detach());
    copy_bytes(y.data(), device, packed.data(), x.device(), y.nbytes());
  }
  const Device from = x.device();
  return record("to", y, {x}, Saved(),
                [from](const Saved&, const Tensor& dy, Needs) -> Grads { return {to(dy, from)}; });
}

void copy_into(const Tensor& dst, const Tensor& src, const Tensor& mask) {
  CAPO_CHECK(dst.shape() == src.shape(), "copy_into: shapes must be equal, got ", describe(dst), " and ",
             describe(src));
  CAPO_CHECK(
      !mask.defined() || (mask.shape() == dst.shape() && mask.dtype() == boolean && mask.device() == dst.device()),
      "copy_into: mask must be bool ", dst.shape(), ", got ", describe(mask));
  CAPO_CHECK(dst.device() == src.device(), "copy_into: devices must be equal, got ", dst.device(), " and ",
             src.device());
  for (int i = 0; i < dst.rank() && dst.numel() > 0; ++i)
    CAPO_CHECK(dst.strides()[i] > 0 || dst.shape()[i] <= 1, "copy_into: dst must not repeat memory, got ", dst.shape(),
               " with strides ", dst.strides());
  check_overlap("copy_into", dst, src);
  if (mask.defined()) check_overlap("copy_into", dst, mask);
  write_in_place("copy_into", dst);
  run_copy(dst, src, mask);
  detail::observe("copy_into", {});
}

void fill_(const Tensor& dst, double value) {
  CAPO_CHECK(dst.is_contiguous(), "fill_: needs a contiguous tensor, got ", describe(dst));
  write_in_place("fill_", dst);
  run_fill(dst, value, false);
  detail::observe("fill_", {});
}

}  // namespace capo
