#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/group_norm.h>
#include <capo/ops/kernel.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

#include <algorithm>

namespace capo {

namespace {
// Tensors are [outer, rows, columns], sums of chunks [outer, chunks, columns], moments [outer, groups].
struct NormBytes {
  std::int64_t tensor, sums, moments;
};
template <class Args>
NormBytes norm_bytes(const Args& p) {
  const std::int64_t chunks = (p.rows + p.chunk - 1) / p.chunk;
  const DType acc = accumulator(p.dtype);
  return {bytes_of(p.dtype, p.outer * p.rows * p.columns), bytes_of(acc, p.outer * chunks * p.columns),
          bytes_of(acc, p.outer * p.groups)};
}
Work partial_work(const ChannelNormArgs& p, std::int64_t) {
  return Work::moved(norm_bytes(p).tensor + 2 * norm_bytes(p).sums);
}
Work moments_work(const ChannelNormArgs& p, std::int64_t) {
  return Work::moved(2 * norm_bytes(p).sums + 3 * norm_bytes(p).moments);
}
Work apply_work(const ChannelNormArgs& p, std::int64_t) {
  const std::int64_t channels = p.columns * ((p.weight != nullptr) + (p.bias != nullptr));
  return Work::moved(norm_bytes(p).tensor * (p.residual ? 3 : 2) + 2 * norm_bytes(p).moments +
                     bytes_of(p.weight_dtype, channels));
}
// What the activation's slope is made of, and where dz goes.
std::int64_t slope_tensors(const ChannelNormBackwardArgs& p) {
  return (p.residual != nullptr) + (p.y != nullptr) + (p.dz != nullptr);
}
Work dots_work(const ChannelNormBackwardArgs& p, std::int64_t) {
  return Work::moved(norm_bytes(p).tensor * (1 + (p.x != nullptr) + slope_tensors(p)) +
                     norm_bytes(p).sums * (p.part_dyx ? 2 : 1));
}
Work sums_work(const ChannelNormBackwardArgs& p, std::int64_t) {
  const std::int64_t channels = p.outer * p.columns * ((p.dweight != nullptr) + (p.dbias != nullptr));
  return Work::moved(norm_bytes(p).sums * (p.part_dyx ? 2 : 1) + norm_bytes(p).moments * (p.shift ? 4 : 2) +
                     bytes_of(accumulator(p.dtype), channels));
}
Work dx_work(const ChannelNormBackwardArgs& p, std::int64_t) {
  return Work::moved(norm_bytes(p).tensor * (1 + (p.x != nullptr) + (p.dx != nullptr) + slope_tensors(p)) +
                     norm_bytes(p).moments * (p.shift ? 4 : 2));
}
}  // namespace

CAPO_KERNEL_CUDA(group_norm_partial, ChannelNormArgs, partial_work)
CAPO_KERNEL_CUDA(group_norm_moments, ChannelNormArgs, moments_work)
CAPO_KERNEL_CUDA(group_norm_apply, ChannelNormArgs, apply_work)
CAPO_KERNEL_CUDA(group_norm_dots, ChannelNormBackwardArgs, dots_work)
CAPO_KERNEL_CUDA(group_norm_sums, ChannelNormBackwardArgs, sums_work)
CAPO_KERNEL_CUDA(group_norm_dx, ChannelNormBackwardArgs, dx_work)
CAPO_KERNEL(group_norm_sample, ChannelNormArgs, apply_work)
CAPO_KERNEL(group_norm_sample_backward, ChannelNormBackwardArgs, dx_work)

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

// Rows per chunk on CUDA, where a block of 256 threads, each of 16 bytes of columns, takes a chunk of up to 32 threads'
// columns: enough blocks to fill a device if there is work for them, 4 to 64 elements down a column for each thread.
std::int64_t device_chunk(std::int64_t outer, std::int64_t rows, std::int64_t columns, DType dtype) {
  const std::int64_t pack = is_half(dtype) ? 8 : 4;
  std::int64_t across = pack;
  while (across < columns && across < 32 * pack) across *= 2;
  const std::int64_t at_once = 256 * pack / across, tiles = (columns + across - 1) / across, blocks = 1024;
  return at_once * std::clamp<std::int64_t>(outer * rows * tiles / (blocks * at_once), 4, 64);
}

Extent extent_of(const Tensor& x, std::int64_t outer, std::int64_t groups) {
  const std::int64_t columns = x.size(-1), across = outer * columns;
  const std::int64_t rows = across ? x.numel() / across : 0;
  return {outer, rows, columns, groups,
          x.device().is_cuda() ? device_chunk(outer, rows, columns, x.dtype()) : kChannelChunk};
}

// Whether each sample's steps follow one another on the CPU: what the first reads of it is then still in the second
// cache for the last, and a tensor beyond the caches is read once. The bits are the same either way.
bool by_samples(const Tensor& x, const Extent& e) {
  constexpr std::int64_t kInL2 = std::int64_t{1} << 20;
  return x.device().is_cpu() && e.outer >= 4 * num_threads() && bytes_of(x.dtype(), e.rows * e.columns) <= kInL2;
}

DType dtype_of_weights(const Tensor& w, const Tensor& b, DType otherwise) {
  return w.defined() ? w.dtype() : b.defined() ? b.dtype() : otherwise;
}

// What a gradient needs to know besides tensors.
struct Form {
  std::int64_t outer, groups;
  DType weight_dtype;
  double eps;
  bool fixed;  // the statistics are constants
  Activation activation;
  double below_zero, ceiling;
};
Form form_of(std::int64_t outer, std::int64_t groups, DType weight_dtype, double eps, bool fixed,
             const detail::NormEpilogue& e) {
  return {outer, groups, weight_dtype, eps, fixed, e.activation, e.slope, e.ceiling};
}
// What the gradient keeps, each undefined when no needed gradient reads it: the inputs, the statistics, and y where
// relu's slope is read from it.
enum Kept : int { kX, kWeight, kBias, kResidual, kMean, kRstd, kY };

bool activates(const Form& f) { return f.activation != Activation::none; }

void launch_apply(const Tensor& x, const Tensor& w, const Tensor& b, const Tensor& residual, const Tensor& y,
                  const Tensor& mean, const Tensor& rstd, const Extent& e, const Form& f) {
  const ChannelNormArgs args{x.dtype(), f.weight_dtype, data_or_null(x), data_or_null(w), data_or_null(b),
                             data_or_null(residual), data_or_null(y), nullptr, nullptr, data_or_null(mean), nullptr,
                             data_or_null(rstd), e.outer, e.rows, e.columns, e.groups, 0, e.chunk, f.activation,
                             f.below_zero, f.ceiling};
  launch(kernels::group_norm_apply, x.device(), args, e.outer * e.chunks(), e.chunk_grain());
}

// Whether a gradient may be written over dy: the pass alone holds it (or, not contiguous, is about to copy it).
bool may_replace(const Tensor& dy) {
  return !dy.device().is_cuda() && !requires_grad(dy) && (!dy.is_contiguous() || dy.unique());
}

// Two passes over the activations. When the residual's gradient dz is wanted the first writes it, and the second reads
// it in place of dy and what the slope came from. dz, or else dx, goes where dy lies if nobody else reads that.
Grads fused_backward(const Saved& saved, const Tensor& dy0, const Form& f, Needs need) {
  const bool replaces = may_replace(dy0);
  const Tensor dy = contiguous(dy0), w = contiguous_or_undefined(saved[kWeight]),
               b = contiguous_or_undefined(saved[kBias]);
  const Tensor residual = contiguous_or_undefined(saved[kResidual]), y = saved[kY];
  const Device device = dy.device();
  const DType acc = accumulator(dy.dtype());
  const Extent e = extent_of(dy, f.outer, f.groups);
  const bool through_moments = need[0] && !f.fixed, products = through_moments || need[1];
  const bool from_z = activates(f) && !y.defined();
  const Tensor x = products || from_z ? contiguous(saved[kX]) : Tensor();
  const auto table = [&](bool wanted, std::int64_t n) { return wanted ? empty({f.outer, n}, acc, device) : Tensor(); };
  const Tensor shift = table(through_moments, f.groups), slope = table(through_moments, f.groups);
  const Tensor dweight = table(need[1], e.columns), dbias = table(need[2], e.columns);
  Grads out(4);
  bool writes_dz = need[3] && activates(f);
  if (need[3]) out[3] = writes_dz && !replaces ? empty_like(dy) : dy;
  if (need[0]) out[0] = !need[3] && replaces ? dy : empty_like(dy);
  ChannelNormBackwardArgs args{dy.dtype(), f.weight_dtype, data_or_null(x), data_or_null(dy), data_or_null(w),
                               data_or_null(saved[kMean]), data_or_null(saved[kRstd]), nullptr, nullptr,
                               data_or_null(shift), data_or_null(slope), data_or_null(dweight), data_or_null(dbias),
                               data_or_null(out[0]), e.outer, e.rows, e.columns, e.groups, e.chunk, f.activation,
                               f.below_zero, f.ceiling, data_or_null(b), data_or_null(residual), data_or_null(y),
                               writes_dz ? data_or_null(out[3]) : nullptr};
  bool done = false;
  if (products || need[2]) {
    const Shape parts{f.outer, e.chunks(), e.columns};
    const Tensor part_dy = empty(parts, acc, device), part_dyx = products ? empty(parts, acc, device) : Tensor();
    args.part_dy = data_or_null(part_dy);
    args.part_dyx = data_or_null(part_dyx);
    done = need[0] && !writes_dz && by_samples(dy, e);
    if (done) {
      launch(kernels::group_norm_sample_backward, device, args, e.outer, 1);
    } else {
      launch(kernels::group_norm_dots, device, args, e.outer * e.chunks(), e.chunk_grain());
      launch(kernels::group_norm_sums, device, args, e.outer * e.groups, e.group_grain());
    }
    if (writes_dz) {
      args.dy = args.dz;
      args.residual = args.y = args.dz = nullptr;
      args.activation = Activation::none;
      writes_dz = false;
    }
  }
  if (!done && (need[0] || writes_dz))
    launch(kernels::group_norm_dx, device, args, e.outer * e.chunks(), e.chunk_grain());
  const auto over_outer = [&](const Tensor& t) {
    return cast(f.outer == 1 ? reshape(t, {e.columns}) : sum(t, {0}), f.weight_dtype);
  };
  if (need[1]) out[1] = over_outer(dweight);
  if (need[2]) out[2] = over_outer(dbias);
  return out;
}

// The same gradient from recorded primitives, for second derivatives.
Grads composite_backward(const Saved& saved, const Tensor& dy0, const Form& f, Needs need) {
  const DType t = dy0.dtype(), acc = accumulator(t);
  const Shape shape = dy0.shape(), channels{dy0.size(-1)};
  const Extent e = extent_of(dy0, f.outer, f.groups);
  const Shape grouped{f.outer, e.rows, f.groups, e.columns / f.groups}, per_column{f.groups, e.columns / f.groups};
  const Dims axes{1, 3};
  const auto kept = [&](int i, const Shape& as) {
    return saved[i].defined() ? reshape(cast(saved[i], acc), as) : Tensor();
  };
  const Tensor x = kept(kX, grouped), w = kept(kWeight, per_column), b = kept(kBias, per_column), y = kept(kY, grouped);
  Tensor centred, rstd;
  if (f.fixed) {
    const Shape constants{f.outer, 1, f.groups, 1};
    rstd = kept(kRstd, constants);
    if (x.defined()) centred = x - kept(kMean, constants);
  } else if (x.defined()) {
    centred = x - mean(x, axes, true);
    rstd = rsqrt(mean(square(centred), axes, true) + f.eps);
  }
  Tensor dz = reshape(cast(dy0, acc), grouped);
  if (y.defined()) {
    dz = unary_gradient(UnaryKind::relu, dz, y);
  } else if (activates(f)) {
    const Tensor residual = kept(kResidual, grouped);
    Tensor z = centred * rstd;
    if (w.defined()) z = z * w;
    if (b.defined()) z = z + b;
    if (residual.defined()) z = z + residual;
    const UnaryKind relu = f.ceiling > 0       ? UnaryKind::clamp
                           : f.below_zero == 0 ? UnaryKind::relu
                                               : UnaryKind::leaky_relu;
    dz = unary_gradient(f.activation == Activation::silu ? UnaryKind::silu : relu, dz, z, f.below_zero, f.ceiling);
  }
  Grads out(4);
  if (need[3]) out[3] = cast(reshape(dz, shape), t);
  if (need[2]) out[2] = cast(reshape(sum_to(dz, per_column), channels), f.weight_dtype);
  if (need[1]) out[1] = cast(reshape(sum_to(dz * (centred * rstd), per_column), channels), f.weight_dtype);
  if (need[0]) {
    const Tensor g = w.defined() ? dz * w : dz;
    Tensor dx = g;
    if (!f.fixed) {
      const Tensor h = centred * rstd;
      dx = g - mean(g, axes, true) - h * mean(g * h, axes, true);
    }
    out[0] = cast(reshape(rstd * dx, shape), t);
  }
  return out;
}

// y once more, of what the gradient keeps.
struct RemakesNormal {
  Form form;
  bool possible;
  bool operator()(int) const { return possible; }
  Tensor operator()(const Saved& s, int) const {
    const Tensor x = contiguous(s[kX]), y = empty(x.shape(), x.dtype(), x.device());
    launch_apply(x, s[kWeight], s[kBias], contiguous_or_undefined(s[kResidual]), y, s[kMean], s[kRstd],
                 extent_of(x, form.outer, form.groups), form);
    return y;
  }
};

Tensor recorded(const char* op, const Tensor& y, const Tensor& x, const Tensor& w, const Tensor& b,
                const Tensor& residual, const Tensor& mean, const Tensor& rstd, const Form& f) {
  const Needs need = needs_of({x, w, b, residual});
  const bool by_norm = need[1] || (need[0] && !f.fixed);  // the norm's own gradient reads x
  // relu's slope is the sign of z or of y: z costs nothing where x is kept and nothing was added to it; else y costs
  // the least, for the next op mostly keeps it anyway.
  const bool slope = activates(f) && need.any();
  const bool plain_relu = f.activation == Activation::relu && f.below_zero == 0 && f.ceiling == 0;
  // A residual takes the place of y where it is kept itself, not made again: y is then made of it in one pass. In a
  // row of residual blocks that is every other sum.
  const bool by_residual = recompute() && !remade_when_saved(residual);
  const bool by_y = slope && plain_relu && (!by_norm || (residual.defined() && !by_residual)), by_z = slope && !by_y;
  const bool keeps_x = by_norm || by_z, remakes = keeps_x && (!residual.defined() || by_z);
  return record(op, y, {x, w, b, residual},
                Saved({keep_if(keeps_x, x), keep_if(need[0] || by_z || remakes, w), keep_if(by_z || remakes, b),
                       keep_if(by_z, residual)},
                      {keep_if(keeps_x, mean), keep_if(keeps_x || need[0] || need[1], rstd), keep_if(by_y, y)}),
                [f](const Saved& s, const Tensor& dy, Needs n) -> Grads {
                  return grad_enabled() ? composite_backward(s, dy, f, n) : fused_backward(s, dy, f, n);
                },
                RemakesNormal{f, remakes});
}

}  // namespace

namespace detail {

void check_epilogue(const char* op, const Tensor& x, const NormEpilogue& epilogue) {
  const Activation a = epilogue.activation;
  CAPO_CHECK(a == Activation::none || a == Activation::relu || a == Activation::silu, op,
             ": activation must be none, relu or silu, got ", name_of(a));
  CAPO_CHECK(epilogue.slope == 0 || a == Activation::relu, op, ": slope belongs to relu, got ", epilogue.slope,
             " with ", name_of(a));
  CAPO_CHECK(epilogue.ceiling == 0 || (epilogue.ceiling > 0 && a == Activation::relu && epilogue.slope == 0), op,
             ": ceiling must be >= 0 and belongs to relu without a slope, got ", epilogue.ceiling, " with ", name_of(a),
             " and slope ", epilogue.slope);
  const Tensor& r = epilogue.residual;
  CAPO_CHECK(!r.defined() || (r.shape() == x.shape() && r.dtype() == x.dtype() && r.device() == x.device()), op,
             ": residual must be ", describe(x), " as x, got ", describe(r));
}

Tensor channel_norm(const char* op, const Tensor& x0, const Tensor& w0, const Tensor& b0, std::int64_t outer,
                    std::int64_t groups, double eps, const NormEpilogue& epilogue, ChannelMoments* moments) {
  const Tensor x = contiguous(x0), w = channels_for_kernel(w0), b = channels_for_kernel(b0);
  const Tensor residual = contiguous_or_undefined(epilogue.residual);
  const Device device = x.device();
  const DType acc = accumulator(x.dtype());
  const Extent e = extent_of(x, outer, groups);
  const Form f = form_of(outer, groups, dtype_of_weights(w, b, acc), eps, false, epilogue);
  const bool whole_samples = by_samples(x, e);
  const Tensor y = empty(x.shape(), x.dtype(), device);
  const Tensor mean = empty({outer, groups}, acc, device), var = empty_like(mean), rstd = empty_like(mean);
  {
    const Shape parts{outer, e.chunks(), e.columns};
    const Tensor part_mean = empty(parts, device.is_cuda() ? f64 : acc, device), part_m2 = empty(parts, acc, device);
    ChannelNormArgs args{x.dtype(), f.weight_dtype, data_or_null(x), nullptr, nullptr, nullptr, nullptr,
                         data_or_null(part_mean), data_or_null(part_m2), data_or_null(mean), data_or_null(var),
                         data_or_null(rstd), e.outer, e.rows, e.columns, e.groups, eps, e.chunk, Activation::none, 0,
                         0};
    if (whole_samples) {
      args.weight = data_or_null(w), args.bias = data_or_null(b), args.residual = data_or_null(residual);
      args.y = data_or_null(y), args.activation = f.activation, args.below_zero = f.below_zero,
      args.ceiling = f.ceiling;
      launch(kernels::group_norm_sample, device, args, e.outer, 1);
    } else {
      launch(kernels::group_norm_partial, device, args, e.outer * e.chunks(), e.chunk_grain());
      launch(kernels::group_norm_moments, device, args, e.outer * e.groups, e.group_grain());
    }
  }
  if (!whole_samples) launch_apply(x, w, b, residual, y, mean, rstd, e, f);
  if (moments) *moments = {mean, var, rstd};
  return recorded(op, y, x, w, b, residual, mean, rstd, f);
}

Tensor channel_affine(const char* op, const Tensor& x0, const Tensor& w0, const Tensor& b0, const Tensor& mean,
                      const Tensor& rstd, const NormEpilogue& epilogue) {
  const Tensor x = contiguous(x0), w = channels_for_kernel(w0), b = channels_for_kernel(b0);
  const Tensor residual = contiguous_or_undefined(epilogue.residual);
  const Tensor y = empty(x.shape(), x.dtype(), x.device());
  const std::int64_t columns = x.size(-1);
  const Form f = form_of(1, columns, dtype_of_weights(w, b, accumulator(x.dtype())), 0, true, epilogue);
  launch_apply(x, w, b, residual, y, mean, rstd, extent_of(x, 1, columns), f);
  return recorded(op, y, x, w, b, residual, mean, rstd, f);
}

}  // namespace detail

namespace {

Tensor norm_per_sample(const char* op, const Tensor& x, std::int64_t groups, const Tensor& w, const Tensor& b,
                       double eps, const detail::NormEpilogue& epilogue) {
  CAPO_CHECK(eps > 0, op, ": eps must be > 0, got ", eps);
  check_channels(op, "weight", w, x);
  check_channels(op, "bias", b, x);
  CAPO_CHECK(!w.defined() || !b.defined() || w.dtype() == b.dtype(), op, ": weight is ", w.dtype(), ", bias is ",
             b.dtype(), ": mixed dtypes, cast one");
  check_epilogue(op, x, epilogue);
  return detail::channel_norm(op, x, w, b, x.size(0), groups, eps, epilogue);
}

void check_image(const char* op, const Tensor& x) {
  CAPO_CHECK(is_floating(x.dtype()), op, ": x must be floating, got ", describe(x));
  CAPO_CHECK(x.rank() >= 2 && x.size(-1) >= 1, op, ": x must be [B, spatial..., C] with C >= 1, got ", x.shape());
}

}  // namespace

Tensor group_norm(const Tensor& x, std::int64_t groups, const Tensor& weight, const Tensor& bias, double eps,
                  Activation activation, double slope) {
  check_image("group_norm", x);
  CAPO_CHECK(groups >= 1 && x.size(-1) % groups == 0, "group_norm: groups must divide the ", x.size(-1),
             " channels of x ", x.shape(), ", got ", groups);
  return norm_per_sample("group_norm", x, groups, weight, bias, eps, {activation, slope});
}

Tensor instance_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, Activation activation,
                     double slope) {
  check_image("instance_norm", x);
  std::int64_t positions = 1;
  for (int i = 1; i < x.rank() - 1; ++i) positions *= x.shape()[i];
  CAPO_CHECK(positions != 1, "instance_norm: needs more than one spatial position per channel, got x ", x.shape());
  return norm_per_sample("instance_norm", x, x.size(-1), weight, bias, eps, {activation, slope});
}

}  // namespace capo
