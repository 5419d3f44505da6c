#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

namespace capo {

namespace {
Work layer_norm_work(const LayerNormArgs& p, std::int64_t) {
  const std::int64_t n = p.rows * p.columns * (p.residual ? 2 : 1);
  const std::int64_t channels = p.samples * p.columns * ((p.weight != nullptr) + (p.bias != nullptr));
  return Work::moved(bytes_of(p.dtype, n) + bytes_of(p.y_dtype, n) + bytes_of(p.weight_dtype, channels) +
                     bytes_of(accumulator(p.dtype), p.rows * ((p.mean != nullptr) + (p.rstd != nullptr))));
}
// items: chunks, each of which leaves a row of every sum.
Work layer_norm_backward_work(const LayerNormBackwardArgs& p, std::int64_t items) {
  const std::int64_t n = p.rows * p.columns, wide = (p.x != nullptr) + (p.dx != nullptr) + (p.dsum != nullptr);
  const std::int64_t moments = (p.mean != nullptr) + (p.rstd != nullptr);
  const std::int64_t sums = (p.dweight_part != nullptr) + (p.dbias_part != nullptr);
  return Work::moved(bytes_of(p.dtype, n * wide) + bytes_of(p.y_dtype, n * (p.dr ? 2 : 1)) +
                     bytes_of(p.weight_dtype, p.weight ? p.samples * p.columns : 0) +
                     bytes_of(accumulator(p.dtype), p.rows * moments + items * p.columns * sums));
}
}  // namespace

CAPO_KERNEL_CUDA(layer_norm, LayerNormArgs, layer_norm_work)
CAPO_KERNEL_CUDA(layer_norm_backward, LayerNormBackwardArgs, layer_norm_backward_work)

namespace {

// What a gradient takes besides tensors.
struct Norm {
  double eps;
  bool rms;
  DType dtype, y_dtype;  // of x, and of y and r: they differ with an f32 stream
  DType weight_dtype;    // of weight and bias
  Shape channels;        // theirs: [C] or [B, C]

  bool streams() const { return dtype != y_dtype; }

  std::int64_t samples() const { return channels.size() == 2 ? channels[0] : 1; }
};

// What a gradient reads: the normalised rows, weight and the rows' statistics; each undefined when no needed gradient
// reads it.
struct Kept {
  Tensor x, weight, mean, rstd;
};

// The gradients of x (plus dsum, where defined), weight and bias, and of a stream's residual (need[3], on its own),
// from recorded primitives, for second derivatives.
Grads composite_backward(const Kept& kept, const Tensor& dy0, const Tensor& dsum, const Norm& norm, Needs need) {
  const DType t = norm.dtype, acc = accumulator(t);
  const Tensor dy = cast(dy0, acc);
  const Shape spread = beside(dy, norm.channels);
  const auto down = [&](const Tensor& g) { return cast(reshape(sum_to(g, spread), norm.channels), norm.weight_dtype); };
  Grads out(need[3] ? 4 : 3);
  if (need[2]) out[2] = down(dy);
  if (!need[0] && !need[1] && !need[3]) return out;
  const Tensor x = cast(kept.x, acc), centred = norm.rms ? x : x - mean(x, {-1}, true);
  const Tensor rstd = rsqrt(mean(square(centred), {-1}, true) + norm.eps), h = centred * rstd;
  if (need[1]) out[1] = down(dy * h);
  if (need[0] || need[3]) {
    const Tensor g = kept.weight.defined() ? dy * reshape(cast(kept.weight, acc), spread) : dy;
    const Tensor along = h * mean(g * h, {-1}, true);
    const Tensor dx = cast(rstd * (norm.rms ? g - along : g - mean(g, {-1}, true) - along), t);
    out[0] = dsum.defined() ? dx + dsum : dx;
    if (need[3]) out[3] = cast(out[0], norm.y_dtype);
  }
  return out;
}

// The same by one kernel.
Grads fused_backward(const Kept& kept, const Tensor& dy0, const Tensor& dsum0, const Norm& norm, Needs need) {
  const Tensor dy = contiguous(dy0), dsum = contiguous_or_undefined(dsum0), x = contiguous_or_undefined(kept.x),
               w = contiguous_or_undefined(kept.weight);
  const Device device = dy.device();
  const DType acc = accumulator(dy.dtype());
  const std::int64_t columns = dy.size(-1), rows = columns ? dy.numel() / columns : 0;
  const std::int64_t samples = norm.samples(), per_sample = samples ? rows / samples : 0;
  const std::int64_t chunks = samples * ((per_sample + kLayerNormChunk - 1) / kLayerNormChunk);
  Grads out(need[3] ? 4 : 3);
  const bool joined = device.is_cuda() && chunks > 0;  // the kernel adds up the parts itself
  Tensor part[2];
  if (need[0]) out[0] = empty(dy.shape(), norm.dtype, device);
  if (need[3]) out[3] = empty_like(dy);
  for (int i = 0; i < 2; ++i)
    if (need[i + 1]) {
      part[i] = empty({chunks, columns}, acc, device);
      if (joined) out[static_cast<std::size_t>(i + 1)] = empty(norm.channels, norm.weight_dtype, device);
    }
  const bool reads_x = need[0] || need[1] || need[3];
  const LayerNormBackwardArgs args{norm.dtype, norm.weight_dtype, norm.rms,
                                   reads_x ? data_or_null(x) : nullptr, data_or_null(dy), data_or_null(w),
                                   data_or_null(kept.mean), data_or_null(kept.rstd),
                                   data_or_null(out[0]), data_or_null(part[0]), data_or_null(part[1]), rows, columns,
                                   data_or_null(out[1]), data_or_null(out[2]), data_or_null(dsum), samples,
                                   norm.y_dtype, need[3] ? data_or_null(out[3]) : nullptr};
  launch(kernels::layer_norm_backward, device, args, chunks, 1);
  for (int i = 0; i < 2; ++i)
    if (need[i + 1] && !joined) {
      const Tensor whole = norm.channels.size() == 1
                               ? sum(part[i], {0})
                               : sum(reshape(part[i], {samples, samples ? chunks / samples : 0, columns}), {1});
      out[static_cast<std::size_t>(i + 1)] = cast(whole, norm.weight_dtype);
    }
  return out;
}

Grads backward(const Kept& kept, const Tensor& dy, const Tensor& dsum, const Norm& norm, Needs need) {
  return grad_enabled() ? composite_backward(kept, dy, dsum, norm, need) : fused_backward(kept, dy, dsum, norm, need);
}

// What y will be: of x's shape and dtype, or beside an f32 stream of the dtype of 16-bit weights (a view of one
// element).
Tensor like_y(const Tensor& x, const Tensor& w, const Tensor& b) {
  const Tensor& given = w.defined() ? w : b;
  if (x.dtype() != f32 || !given.defined() || !is_half(given.dtype())) return x;
  return strided_view(empty({1}, given.dtype(), x.device()), x.shape(), Dims::filled(x.rank(), 0), 0);
}

// x: like y.
void check(const char* op, const Tensor& x, const Tensor& w, const Tensor& b, double eps) {
  CAPO_CHECK(is_floating(x.dtype()), op, ": x must be floating, got ", describe(x));
  CAPO_CHECK(x.rank() >= 1, op, ": x must have a last axis to normalise, got a scalar");
  CAPO_CHECK(eps > 0, op, ": eps must be > 0, got ", eps);
  check_channels(op, "weight", w, x, true, true);
  check_channels(op, "bias", b, x, true, true);
  if (!w.defined() || !b.defined()) return;
  CAPO_CHECK(w.dtype() == b.dtype(), op, ": weight is ", w.dtype(), ", bias is ", b.dtype(),
             ": mixed dtypes, cast one");
  CAPO_CHECK(w.shape() == b.shape(), op, ": weight and bias must have one shape, got ", w.shape(), " and ", b.shape());
}

Norm norm_of(const Tensor& x, DType y_dtype, const Tensor& w, const Tensor& b, double eps, bool rms) {
  const Tensor& given = w.defined() ? w : b;
  if (!given.defined()) return {eps, rms, x.dtype(), y_dtype, accumulator(x.dtype()), Shape{x.size(-1)}};
  return {eps, rms, x.dtype(), y_dtype, given.dtype(), given.shape()};
}

struct Rows {
  Tensor sum, y;       // sum: undefined without r
  Tensor mean, rstd;   // of rows, where `keep` asks for them
};

// Normalises x, or x + r where r is defined. All contiguous.
Rows forward(const Tensor& x, const Tensor& r, const Tensor& w, const Tensor& b, const Norm& norm, bool keep) {
  const DType t = x.dtype(), acc = accumulator(t);
  const Device device = x.device();
  const std::int64_t columns = x.size(-1), rows = columns ? x.numel() / columns : 0;
  const Tensor sum = r.defined() ? empty(x.shape(), t, device) : Tensor();
  const Tensor y = empty(x.shape(), norm.y_dtype, device);
  const Tensor row_mean = keep && !norm.rms ? empty({rows}, acc, device) : Tensor();
  const Tensor row_rstd = keep ? empty({rows}, acc, device) : Tensor();
  const LayerNormArgs args{t, norm.weight_dtype, norm.rms, data_or_null(x), data_or_null(w), data_or_null(b),
                           data_or_null(y), data_or_null(row_mean), data_or_null(row_rstd), rows, columns, norm.eps,
                           data_or_null(r), data_or_null(sum), norm.samples(), norm.y_dtype};
  launch(kernels::layer_norm, device, args, rows, row_grain(columns));
  return {sum, y, row_mean, row_rstd};
}

// Output `y` once more, from the tensor that was normalised, weight and bias: Saved holds them in this order, or those
// two first where the node normalised a sum of its own.
struct RemakesNormal {
  Norm norm;
  int y;
  bool possible;
  bool operator()(int output) const { return possible && output == y; }
  Tensor operator()(const Saved& s, int) const {
    return y == 0 ? forward(s[0], {}, s[1], s[2], norm, false).y : forward(s[2], {}, s[0], s[1], norm, false).y;
  }
};

Tensor normalize(const char* op, const Tensor& x0, const Tensor& w0, const Tensor& b0, double eps, bool rms) {
  const Tensor like = like_y(x0, w0, b0);
  check(op, like, w0, b0, eps);
  const DType y_dtype = like.dtype();
  const bool streams = y_dtype != x0.dtype();
  if (long_row_through_f32(x0) || (streams && !x0.device().is_cuda())) {
    const Tensor w = cast_or_undefined(w0, f32), b = cast_or_undefined(b0, f32);
    return cast(normalize(op, cast(x0, f32), w, b, eps, rms), y_dtype);
  }
  const Tensor x = contiguous(x0), w = channels_for_kernel(w0), b = channels_for_kernel(b0);
  const Norm norm = norm_of(x, y_dtype, w, b, eps, rms);
  const Needs need = needs_of({x, w, b});
  const bool keep = need[0] || need[1];
  const Rows rows = forward(x, {}, w, b, norm, keep);
  return record(op, rows.y, {x, w, b},
                Saved({keep_if(keep, x), keep_if(keep, w), keep_if(keep, b)}, {rows.mean, rows.rstd}),
                [norm](const Saved& s, const Tensor& dy, Needs n) -> Grads {
                  return backward({s[0], n[0] ? s[1] : Tensor(), s[3], s[4]}, dy, {}, norm, n);
                },
                RemakesNormal{norm, 0, keep});
}

AddNorm add_normalize(const char* op, const Tensor& x0, const Tensor& r0, const Tensor& w0, const Tensor& b0,
                      double eps, bool rms) {
  const bool streams = x0.dtype() == f32 && is_half(r0.dtype());
  CAPO_CHECK(x0.shape() == r0.shape() && (streams || x0.dtype() == r0.dtype()) && x0.device() == r0.device(), op,
             ": x and r must be alike (or x f32 and r bf16 or f16), got ", describe(x0), " and ", describe(r0));
  check(op, r0, w0, b0, eps);
  if (long_row_through_f32(r0) || (streams && !x0.device().is_cuda())) {
    const Tensor sum = x0 + cast(r0, x0.dtype());
    const Tensor y = normalize(op, cast(sum, f32), cast_or_undefined(w0, f32), cast_or_undefined(b0, f32), eps, rms);
    return {sum, cast(y, r0.dtype())};
  }
  const Tensor x = contiguous(x0), r = contiguous(r0), w = channels_for_kernel(w0), b = channels_for_kernel(b0);
  const Norm norm = norm_of(x, r.dtype(), w, b, eps, rms);
  const Needs need = needs_of({x, r, w, b});
  const bool through = need[0] || need[1], keep = through || need[2];
  const Rows rows = forward(x, r, w, b, norm, keep);
  record_many(op, {rows.sum, rows.y}, {x, r, w, b},
              Saved({keep_if(keep, w), keep_if(keep, b)}, {keep_if(keep, rows.sum), rows.mean, rows.rstd}),
              [norm](const Saved& s, const Grads& d, Needs n) -> Grads {
                const bool apart = n[1] && norm.streams(), joined = n[0] || (n[1] && !apart);
                const Needs inner((joined ? 1u : 0u) | (n[2] ? 2u : 0u) | (n[3] ? 4u : 0u) | (apart ? 8u : 0u));
                // When nothing came through y.
                Grads g{d[0], {}, {}, apart && d[0].defined() ? cast(d[0], norm.y_dtype) : Tensor()};
                const Tensor scale = n[0] || n[1] ? s[0] : Tensor();
                if (d[1].defined()) g = backward({s[2], scale, s[3], s[4]}, d[1], d[0], norm, inner);
                return {keep_if(n[0], g[0]), apart ? g[3] : keep_if(n[1], g[0]), g[1], g[2]};
              },
              RemakesNormal{norm, 1, keep});
  return {rows.sum, rows.y};
}

}  // namespace

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  return normalize("layer_norm", x, weight, bias, eps, false);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return normalize("rms_norm", x, weight, {}, eps, true);
}

AddNorm add_layer_norm(const Tensor& x, const Tensor& r, const Tensor& weight, const Tensor& bias, double eps) {
  return add_normalize("add_layer_norm", x, r, weight, bias, eps, false);
}

AddNorm add_rms_norm(const Tensor& x, const Tensor& r, const Tensor& weight, double eps) {
  return add_normalize("add_rms_norm", x, r, weight, {}, eps, true);
}

}  // namespace capo
