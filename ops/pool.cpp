#include <capo/autograd/autograd.h>
#include <capo/ops/axis_filter.h>
#include <capo/ops/copy.h>
#include <capo/ops/index.h>
#include <capo/ops/kernel.h>
#include <capo/ops/pool.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

namespace capo {

namespace {
// x and y are [B, in.., C] and [B, out.., C] forward, the other way round backward.
Work pooled(const MaxPoolArgs& p, std::int64_t images) {
  const std::int64_t in = p.in[0] * p.in[1] * p.in[2], out = p.out[0] * p.out[1] * p.out[2];
  return Work::moved(images * p.channels * (bytes_of(p.dtype, in + out) + (p.index ? bytes_of(i32, out) : 0)));
}
Work max_pool_work(const MaxPoolArgs& p, std::int64_t items) {
  return pooled(p, items / (p.out[0] * p.out[1] * p.out[2]));
}
Work max_pool_backward_work(const MaxPoolArgs& p, std::int64_t items) {
  return pooled(p, items / (p.in[0] * p.in[1] * p.in[2]));
}
}  // namespace

CAPO_KERNEL_CUDA(max_pool_forward, MaxPoolArgs, max_pool_work)
CAPO_KERNEL_CUDA(max_pool_backward, MaxPoolArgs, max_pool_backward_work)

namespace {

struct Windows {
  Dims kernel, stride, padding, in, out;
  Shape shape;  // of the result
};

Windows windows_of(const char* op, const Tensor& x, const Dims& kernel, const Dims& stride, const Dims& padding) {
  const int space = x.rank() - 2;
  CAPO_CHECK(is_floating(x.dtype()), op, ": needs a floating tensor, got ", describe(x));
  CAPO_CHECK(space >= 1 && space <= 3, op, ": x must be [B, spatial.., C] with one to three spatial axes, got ",
             x.shape());
  Windows w{kernel,   stride.empty() ? kernel : stride, padding.empty() ? Dims::filled(space, 0) : padding, {}, {},
            x.shape()};
  CAPO_CHECK(w.kernel.size() == space && w.stride.size() == space && w.padding.size() == space, op,
             ": kernel, stride and padding must name the ", space, " spatial axes of ", x.shape(), ", got ", w.kernel,
             ", ", w.stride, ", ", w.padding);
  for (int i = 0; i < space; ++i) {
    const std::int64_t n = x.shape()[1 + i], k = w.kernel[i], s = w.stride[i], p = w.padding[i];
    CAPO_CHECK(k >= 1 && s >= 1 && p >= 0 && 2 * p <= k, op,
               ": needs kernel and stride >= 1 and padding in [0, kernel / 2], got ", w.kernel, ", ", w.stride, ", ",
               w.padding);
    CAPO_CHECK(n + 2 * p >= k && n >= 1, op, ": kernel ", w.kernel, " does not fit into ", x.shape(), " with padding ",
               w.padding);
    w.in.push_back(n);
    w.out.push_back((n + 2 * p - k) / s + 1);
    w.shape[1 + i] = w.out[i];
  }
  return w;
}

MaxPoolArgs arguments(const Windows& w, DType dtype, std::int64_t channels) {
  MaxPoolArgs p{};
  p.dtype = dtype;
  p.channels = channels;
  const int lead = 3 - w.kernel.size();
  for (int i = 0; i < 3; ++i) {
    const int k = i - lead;
    p.in[i] = k < 0 ? 1 : w.in[k];
    p.out[i] = k < 0 ? 1 : w.out[k];
    p.kernel[i] = k < 0 ? 1 : w.kernel[k];
    p.stride[i] = k < 0 ? 1 : w.stride[k];
    p.padding[i] = k < 0 ? 0 : w.padding[k];
  }
  return p;
}

std::int64_t volume(const std::int64_t* n) { return n[0] * n[1] * n[2]; }
std::int64_t grain(const MaxPoolArgs& p) { return 1 + 16384 / (p.channels * volume(p.kernel) + 1); }

// dx = dy put back at the winners. Linear in dy: its own gradient reads at the winners.
Tensor max_pool_backward(const Tensor& dy0, const Tensor& index, const Windows& w) {
  const Tensor dy = contiguous(dy0);
  Shape shape = dy.shape();
  for (int i = 0; i < w.in.size(); ++i) shape[1 + i] = w.in[i];
  const Tensor dx = empty(shape, dy.dtype(), dy.device());
  if (!dy.device().is_meta() && dx.numel() > 0) {
    MaxPoolArgs p = arguments(w, dy.dtype(), shape.back());
    p.x = dy.data();
    p.y = dx.data();
    p.index = index.data<std::int32_t>();
    launch(kernels::max_pool_backward, dy.device(), p, shape[0] * volume(p.in), grain(p));
  }
  return record("max_pool_backward", dx, {dy}, Saved({index}), [](const Saved& s, const Tensor& g, Needs) -> Grads {
    const Tensor flat = flatten(g, 1, -2), places = flatten(cast(s[0], i64), 1, -2);  // [B, pixels, C]
    return {reshape(gather(flat, 1, places), s[0].shape())};
  });
}

}  // namespace

Tensor max_pool(const Tensor& x0, const Dims& kernel, const Dims& stride, const Dims& padding) {
  const Windows w = windows_of("max_pool", x0, kernel, stride, padding);
  CAPO_CHECK(numel(w.in) < std::int64_t{1} << 31, "max_pool: an image must have fewer than 2^31 pixels, got ",
             x0.shape());
  const Tensor x = contiguous(x0);
  const bool need = needs_of({x}).any();
  const Tensor y = empty(w.shape, x.dtype(), x.device());
  const Tensor index = need ? empty(w.shape, i32, x.device()) : Tensor();
  if (!x.device().is_meta() && y.numel() > 0) {
    MaxPoolArgs p = arguments(w, x.dtype(), w.shape.back());
    p.x = x.data();
    p.y = y.data();
    p.index = need ? index.data<std::int32_t>() : nullptr;
    launch(kernels::max_pool_forward, x.device(), p, w.shape[0] * volume(p.out), grain(p));
  }
  if (!need) return y;
  return record("max_pool", y, {x}, Saved({}, {index}),
                [w](const Saved& s, const Tensor& dy, Needs) -> Grads { return {max_pool_backward(dy, s[0], w)}; });
}

Tensor avg_pool(const Tensor& x, const Dims& kernel, const Dims& stride, const Dims& padding, bool count_include_pad) {
  const Windows w = windows_of("avg_pool", x, kernel, stride, padding);
  if (is_half(x.dtype()) && !x.device().is_cuda())
    return cast(avg_pool(cast(x, f32), kernel, stride, padding, count_include_pad), x.dtype());
  Tensor y = x;  // a window's mean is the product of its axes' means
  for (int i = 0; i < w.in.size(); ++i) {
    if (w.kernel[i] == 1 && w.stride[i] == 1) continue;
    AxisFilter f;
    f.kind = FilterKind::window;
    f.in = w.in[i];
    f.out = w.out[i];
    f.kernel = w.kernel[i];
    f.stride = w.stride[i];
    f.padding = w.padding[i];
    f.count_padding = count_include_pad;
    y = axis_filter(y, 1 + i, f);
  }
  return y;
}

Tensor adaptive_avg_pool(const Tensor& x, const Dims& size) {
  const int space = x.rank() - 2;
  CAPO_CHECK(is_floating(x.dtype()), "adaptive_avg_pool: needs a floating tensor, got ", describe(x));
  CAPO_CHECK(space >= 1 && size.size() == space,
             "adaptive_avg_pool: size must name the spatial axes of x [B, spatial.., C], got ", size, " for ",
             x.shape());
  if (is_half(x.dtype()) && !x.device().is_cuda()) return cast(adaptive_avg_pool(cast(x, f32), size), x.dtype());
  Tensor y = x;
  for (int i = 0; i < space; ++i) {
    CAPO_CHECK(size[i] >= 1 && x.shape()[1 + i] >= 1, "adaptive_avg_pool: sizes must be positive, got ", size, " for ",
               x.shape());
    if (size[i] == x.shape()[1 + i]) continue;
    AxisFilter f;
    f.kind = FilterKind::bins;
    f.in = x.shape()[1 + i];
    f.out = size[i];
    y = axis_filter(y, 1 + i, f);
  }
  return y;
}

}  // namespace capo
