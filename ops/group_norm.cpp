#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/group_norm.h>
#include <capo/ops/kernel.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>

#include <algorithm>

namespace capo {

CAPO_KERNEL_CUDA(group_norm_partial, ChannelNormArgs)
CAPO_KERNEL_CUDA(group_norm_moments, ChannelNormArgs)
CAPO_KERNEL_CUDA(group_norm_apply, ChannelNormArgs)
CAPO_KERNEL_CUDA(group_norm_dots, ChannelNormBackwardArgs)
CAPO_KERNEL_CUDA(group_norm_sums, ChannelNormBackwardArgs)
CAPO_KERNEL_CUDA(group_norm_dx, ChannelNormBackwardArgs)

namespace {

struct Extent {
  std::int64_t outer, rows, columns, groups, chunk;  // chunk: rows
  std::int64_t chunks() const { return (rows + chunk - 1) / chunk; }
  std::int64_t chunk_grain() const { return 1 + 16384 / (kChannelChunk * columns + 1); }
  std::int64_t group_grain() const {
    const std::int64_t work = columns / groups * chunks();
    return 64 + 16384 / (work + 1);
  }
};

// Rows per chunk on CUDA, where a block of 256 threads takes a chunk of up to 128 columns: enough blocks to fill a device if
// there is work for them, 4 to 64 elements down a column for each thread.
std::int64_t device_chunk(std::int64_t outer, std::int64_t rows, std::int64_t columns) {
  std::int64_t across = 4;
  while (across < columns && across < 128) across *= 2;
  const std::int64_t at_once = 1024 / across, tiles = (columns + across - 1) / across, blocks = 1024;
  return at_once * std::clamp<std::int64_t>(outer * rows * tiles / (blocks * at_once), 4, 64);
}

Extent extent_of(const Tensor& x, std::int64_t outer, std::int64_t groups) {
  const std::int64_t columns = x.size(-1), across = outer * columns;
  const std::int64_t rows = across ? x.numel() / across : 0;
  return {outer, rows, columns, groups, x.device().is_cuda() ? device_chunk(outer, rows, columns) : kChannelChunk};
}

DType dtype_of_weights(const Tensor& w, const Tensor& b, DType otherwise) {
  return w.defined() ? w.dtype() : b.defined() ? b.dtype() : otherwise;
}

void launch_apply(const Tensor& x, const Tensor& w, const Tensor& b, const Tensor& y, const Tensor& mean, const Tensor& rstd,
                  const Extent& e, DType weight_dtype) {
  ChannelNormArgs args{x.dtype(), weight_dtype, data_or_null(x), data_or_null(w), data_or_null(b), data_or_null(y), nullptr,
                       nullptr, data_or_null(mean), nullptr, data_or_null(rstd), e.outer, e.rows, e.columns, e.groups, 0, e.chunk};
  launch(kernels::group_norm_apply, x.device(), args, e.outer * e.chunks(), e.chunk_grain());
}

// saved: x, weight, mean, rstd; each undefined when no needed gradient reads it. fixed: the statistics are constants.
Grads fused_backward(const Saved& saved, const Tensor& dy0, std::int64_t outer, std::int64_t groups, DType weight_dtype,
                     bool fixed, Needs need) {
  const Tensor dy = contiguous(dy0), w = contiguous_or_undefined(saved[1]);
  const Device device = dy.device();
  const DType acc = accumulator(dy.dtype());
  const Extent e = extent_of(dy, outer, groups);
  const bool through_moments = need[0] && !fixed, reads_x = through_moments || need[1];
  const Tensor x = reads_x ? contiguous(saved[0]) : Tensor();
  const auto table = [&](bool wanted, std::int64_t n) { return wanted ? empty({outer, n}, acc, device) : Tensor(); };
  const Tensor shift = table(through_moments, groups), slope = table(through_moments, groups);
  const Tensor dweight = table(need[1], e.columns), dbias = table(need[2], e.columns);
  Grads out(3);
  if (need[0]) out[0] = empty_like(dy);
  ChannelNormBackwardArgs args{dy.dtype(), weight_dtype, data_or_null(x), data_or_null(dy), data_or_null(w),
                               data_or_null(saved[2]), data_or_null(saved[3]), nullptr, nullptr, data_or_null(shift),
                               data_or_null(slope), data_or_null(dweight), data_or_null(dbias), data_or_null(out[0]),
                               e.outer, e.rows, e.columns, e.groups, e.chunk};
  if (through_moments || need[1] || need[2]) {
    const Shape parts{outer, e.chunks(), e.columns};
    const Tensor part_dy = empty(parts, acc, device), part_dyx = reads_x ? empty(parts, acc, device) : Tensor();
    args.part_dy = data_or_null(part_dy);
    args.part_dyx = data_or_null(part_dyx);
    launch(kernels::group_norm_dots, device, args, e.outer * e.chunks(), e.chunk_grain());
    launch(kernels::group_norm_sums, device, args, e.outer * e.groups, e.group_grain());
  }
  if (need[0]) launch(kernels::group_norm_dx, device, args, e.outer * e.chunks(), e.chunk_grain());
  const auto over_outer = [&](const Tensor& t) { return cast(outer == 1 ? reshape(t, {e.columns}) : sum(t, {0}), weight_dtype); };
  if (need[1]) out[1] = over_outer(dweight);
  if (need[2]) out[2] = over_outer(dbias);
  return out;
}

// The same gradient from recorded primitives, for second derivatives.
Grads composite_backward(const Saved& saved, const Tensor& dy0, std::int64_t outer, std::int64_t groups, DType weight_dtype,
                         double eps, bool fixed, Needs need) {
  const DType t = dy0.dtype(), acc = accumulator(t);
  const Shape shape = dy0.shape(), channels{dy0.size(-1)};
  const Extent e = extent_of(dy0, outer, groups);
  const Shape grouped{outer, e.rows, groups, e.columns / groups}, per_column{groups, e.columns / groups};
  const Tensor dy = reshape(cast(dy0, acc), grouped);
  Grads out(3);
  if (need[2]) out[2] = cast(reshape(sum_to(dy, per_column), channels), weight_dtype);
  if (!need[0] && !need[1]) return out;
  const Dims axes{1, 3};
  Tensor centred, rstd;
  if (fixed) {
    const Shape constants{outer, 1, groups, 1};
    rstd = reshape(saved[3], constants);
    if (need[1]) centred = reshape(cast(saved[0], acc), grouped) - reshape(saved[2], constants);
  } else {
    const Tensor x = reshape(cast(saved[0], acc), grouped);
    centred = x - mean(x, axes, true);
    rstd = rsqrt(mean(square(centred), axes, true) + eps);
  }
  if (need[1]) out[1] = cast(reshape(sum_to(dy * (centred * rstd), per_column), channels), weight_dtype);
  if (need[0]) {
    const Tensor g = saved[1].defined() ? dy * reshape(cast(saved[1], acc), per_column) : dy;
    Tensor dx = g;
    if (!fixed) {
      const Tensor h = centred * rstd;
      dx = g - mean(g, axes, true) - h * mean(g * h, axes, true);
    }
    out[0] = cast(reshape(rstd * dx, shape), t);
  }
  return out;
}

Tensor recorded(const char* op, const Tensor& y, const Tensor& x, const Tensor& w, const Tensor& b, const Tensor& mean,
                const Tensor& rstd, std::int64_t outer, std::int64_t groups, double eps, bool fixed) {
  const Needs need = needs_of({x, w, b});
  const bool reads_x = need[1] || (need[0] && !fixed), reads_rstd = need[0] || need[1];
  const DType weight_dtype = dtype_of_weights(w, b, accumulator(x.dtype()));
  return record(op, y, {x, w, b},
                Saved({keep_if(reads_x, x), keep_if(need[0], w)}, {keep_if(reads_x, mean), keep_if(reads_rstd, rstd)}),
                [outer, groups, weight_dtype, eps, fixed](const Saved& s, const Tensor& dy, Needs n) -> Grads {
                  if (grad_enabled()) return composite_backward(s, dy, outer, groups, weight_dtype, eps, fixed, n);
                  return fused_backward(s, dy, outer, groups, weight_dtype, fixed, n);
                });
}

}  // namespace

namespace detail {

Tensor channel_norm(const char* op, const Tensor& x0, const Tensor& w0, const Tensor& b0, std::int64_t outer,
                    std::int64_t groups, double eps, ChannelMoments* moments) {
  const Tensor x = contiguous(x0), w = contiguous_or_undefined(w0), b = contiguous_or_undefined(b0);
  const Device device = x.device();
  const DType acc = accumulator(x.dtype());
  const Extent e = extent_of(x, outer, groups);
  const Tensor y = empty(x.shape(), x.dtype(), device);
  const Tensor mean = empty({outer, groups}, acc, device), var = empty_like(mean), rstd = empty_like(mean);
  const DType weight_dtype = dtype_of_weights(w, b, acc);
  {
    const Shape parts{outer, e.chunks(), e.columns};
    const Tensor part_mean = empty(parts, device.is_cuda() ? f64 : acc, device), part_m2 = empty(parts, acc, device);
    const ChannelNormArgs args{x.dtype(), weight_dtype, data_or_null(x), nullptr, nullptr, nullptr, data_or_null(part_mean),
                               data_or_null(part_m2), data_or_null(mean), data_or_null(var), data_or_null(rstd), e.outer,
                               e.rows, e.columns, e.groups, eps, e.chunk};
    launch(kernels::group_norm_partial, device, args, e.outer * e.chunks(), e.chunk_grain());
    launch(kernels::group_norm_moments, device, args, e.outer * e.groups, e.group_grain());
  }
  launch_apply(x, w, b, y, mean, rstd, e, weight_dtype);
  if (moments) *moments = {mean, var, rstd};
  return recorded(op, y, x, w, b, mean, rstd, outer, groups, eps, false);
}

Tensor channel_affine(const char* op, const Tensor& x0, const Tensor& w0, const Tensor& b0, const Tensor& mean, const Tensor& rstd) {
  const Tensor x = contiguous(x0), w = contiguous_or_undefined(w0), b = contiguous_or_undefined(b0);
  const Tensor y = empty(x.shape(), x.dtype(), x.device());
  const std::int64_t columns = x.size(-1);
  launch_apply(x, w, b, y, mean, rstd, extent_of(x, 1, columns), dtype_of_weights(w, b, accumulator(x.dtype())));
  return recorded(op, y, x, w, b, mean, rstd, 1, columns, 0, true);
}

}  // namespace detail

namespace {

Tensor norm_per_sample(const char* op, const Tensor& x, std::int64_t groups, const Tensor& w, const Tensor& b, double eps) {
  CAPO_CHECK(eps > 0, op, ": eps must be > 0, got ", eps);
  check_channels(op, "weight", w, x);
  check_channels(op, "bias", b, x);
  CAPO_CHECK(!w.defined() || !b.defined() || w.dtype() == b.dtype(), op, ": weight is ", w.dtype(), ", bias is ", b.dtype(),
             ": mixed dtypes, cast one");
  if (is_half(x.dtype()) && !x.device().is_cuda())
    return cast(norm_per_sample(op, cast(x, f32), groups, cast_or_undefined(w, f32), cast_or_undefined(b, f32), eps), x.dtype());
  return detail::channel_norm(op, x, w, b, x.size(0), groups, eps);
}

void check_image(const char* op, const Tensor& x) {
  CAPO_CHECK(is_floating(x.dtype()), op, ": x must be floating, got ", describe(x));
  CAPO_CHECK(x.rank() >= 2 && x.size(-1) >= 1, op, ": x must be [B, spatial..., C] with C >= 1, got ", x.shape());
}

}  // namespace

Tensor group_norm(const Tensor& x, std::int64_t groups, const Tensor& weight, const Tensor& bias, double eps) {
  check_image("group_norm", x);
  CAPO_CHECK(groups >= 1 && x.size(-1) % groups == 0, "group_norm: groups must divide the ", x.size(-1), " channels of x ",
             x.shape(), ", got ", groups);
  return norm_per_sample("group_norm", x, groups, weight, bias, eps);
}

Tensor instance_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  check_image("instance_norm", x);
  std::int64_t positions = 1;
  for (int i = 1; i < x.rank() - 1; ++i) positions *= x.shape()[i];
  CAPO_CHECK(positions != 1, "instance_norm: needs more than one spatial position per channel, got x ", x.shape());
  return norm_per_sample("instance_norm", x, x.size(-1), weight, bias, eps);
}

}  // namespace capo
