#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>

namespace capo {

CAPO_KERNEL_CUDA(layer_norm, LayerNormArgs)
CAPO_KERNEL_CUDA(layer_norm_backward, LayerNormBackwardArgs)

namespace {

// The gradient from recorded primitives, for second derivatives.
Grads composite_backward(const Tensor& x0, const Tensor& w0, const Tensor& dy0, DType weight_dtype, double eps, bool rms,
                         Needs need) {
  const DType t = dy0.dtype(), acc = accumulator(t);
  const Tensor dy = cast(dy0, acc);
  const Shape channels{dy.size(-1)};
  Grads out(3);
  if (need[2]) out[2] = cast(sum_to(dy, channels), weight_dtype);
  if (!need[0] && !need[1]) return out;
  const Tensor x = cast(x0, acc), centred = rms ? x : x - mean(x, {-1}, true);
  const Tensor rstd = rsqrt(mean(square(centred), {-1}, true) + eps), h = centred * rstd;
  if (need[1]) out[1] = cast(sum_to(dy * h, channels), weight_dtype);
  if (need[0]) {
    const Tensor g = w0.defined() ? dy * cast(w0, acc) : dy;
    const Tensor along = h * mean(g * h, {-1}, true);
    out[0] = cast(rstd * (rms ? g - along : g - mean(g, {-1}, true) - along), t);
  }
  return out;
}

// saved: x, weight, mean, rstd; each undefined when no needed gradient reads it.
Grads fused_backward(const Saved& saved, const Tensor& dy0, DType weight_dtype, bool rms, Needs need) {
  const Tensor dy = contiguous(dy0), x = contiguous_or_undefined(saved[0]), w = contiguous_or_undefined(saved[1]);
  const Device device = dy.device();
  const DType acc = accumulator(dy.dtype());
  const std::int64_t columns = dy.size(-1), rows = columns ? dy.numel() / columns : 0;
  const std::int64_t chunks = (rows + kLayerNormChunk - 1) / kLayerNormChunk;
  Grads out(3);
  const bool joined = device.is_cuda() && chunks > 0;  // the kernel adds up the parts itself
  Tensor part[2];
  if (need[0]) out[0] = empty_like(dy);
  for (int i = 0; i < 2; ++i)
    if (need[i + 1]) {
      part[i] = empty({chunks, columns}, acc, device);
      if (joined) out[static_cast<std::size_t>(i + 1)] = empty({columns}, weight_dtype, device);
    }
  const bool reads_x = need[0] || need[1];
  const LayerNormBackwardArgs args{dy.dtype(), weight_dtype, rms,
                                   reads_x ? data_or_null(x) : nullptr, data_or_null(dy), data_or_null(w),
                                   data_or_null(saved[2]), data_or_null(saved[3]),
                                   data_or_null(out[0]), data_or_null(part[0]), data_or_null(part[1]), rows, columns,
                                   data_or_null(out[1]), data_or_null(out[2])};
  launch(kernels::layer_norm_backward, device, args, chunks, 1);
  for (int i = 0; i < 2; ++i)
    if (need[i + 1] && !joined) out[static_cast<std::size_t>(i + 1)] = cast(sum(part[i], {0}), weight_dtype);
  return out;
}

Tensor normalize_rows(const char* op, const Tensor& x0, const Tensor& w0, const Tensor& b0, double eps, bool rms) {
  CAPO_CHECK(is_floating(x0.dtype()), op, ": x must be floating, got ", describe(x0));
  CAPO_CHECK(x0.rank() >= 1, op, ": x must have a last axis to normalise, got a scalar");
  CAPO_CHECK(eps > 0, op, ": eps must be > 0, got ", eps);
  check_channels(op, "weight", w0, x0);
  check_channels(op, "bias", b0, x0);
  CAPO_CHECK(!w0.defined() || !b0.defined() || w0.dtype() == b0.dtype(), op, ": weight is ", w0.dtype(), ", bias is ",
             b0.dtype(), ": mixed dtypes, cast one");
  const DType t = x0.dtype(), acc = accumulator(t);
  const Device device = x0.device();
  if (is_half(t) && !device.is_cuda())
    return cast(normalize_rows(op, cast(x0, f32), cast_or_undefined(w0, f32), cast_or_undefined(b0, f32), eps, rms), t);

  const Tensor x = contiguous(x0), w = contiguous_or_undefined(w0), b = contiguous_or_undefined(b0);
  const DType weight_dtype = w.defined() ? w.dtype() : b.defined() ? b.dtype() : acc;
  const Needs need = needs_of({x, w, b});
  const bool keep = need[0] || need[1];
  const std::int64_t columns = x.size(-1), rows = columns ? x.numel() / columns : 0;
  const Tensor y = empty(x.shape(), t, device);
  const Tensor row_mean = keep && !rms ? empty({rows}, acc, device) : Tensor();
  const Tensor row_rstd = keep ? empty({rows}, acc, device) : Tensor();
  const LayerNormArgs args{t, weight_dtype, rms, data_or_null(x), data_or_null(w), data_or_null(b), data_or_null(y),
                           data_or_null(row_mean), data_or_null(row_rstd), rows, columns, eps};
  launch(kernels::layer_norm, device, args, rows, row_grain(columns));
  return record(op, y, {x, w, b}, Saved({keep_if(keep, x), keep_if(need[0], w)}, {row_mean, row_rstd}),
                [weight_dtype, eps, rms](const Saved& s, const Tensor& dy, Needs n) -> Grads {
                  if (grad_enabled()) return composite_backward(s[0], s[1], dy, weight_dtype, eps, rms, n);
                  return fused_backward(s, dy, weight_dtype, rms, n);
                });
}

}  // namespace

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  return normalize_rows("layer_norm", x, weight, bias, eps, false);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return normalize_rows("rms_norm", x, weight, {}, eps, true);
}

}  // namespace capo
