#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/modulate.h>
#include <capo/ops/reduce.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

namespace capo {

namespace {
Work modulate_work(const ModulateArgs& p, std::int64_t) {
  const std::int64_t n = p.samples * p.rows * p.columns;
  return Work::moved(bytes_of(p.dtype, n * (p.residual ? 3 : 2) + p.samples * p.columns * (p.shift ? 2 : 1)));
}
Work modulate_backward_work(const ModulateBackwardArgs& p, std::int64_t items) {
  const std::int64_t n = p.samples * p.rows * p.columns, sums = (p.dscale_part != nullptr) + (p.dshift_part != nullptr);
  return Work::moved(
      bytes_of(p.dtype, n * (1 + (p.x != nullptr) + (p.dx != nullptr)) + (p.scale ? p.samples * p.columns : 0)) +
      bytes_of(accumulator(p.dtype), items * p.columns * sums));
}
}  // namespace

CAPO_KERNEL_CUDA(modulate, ModulateArgs, modulate_work)
CAPO_KERNEL_CUDA(modulate_backward, ModulateBackwardArgs, modulate_backward_work)

namespace {

// x as the kernels see it, [samples, rows, columns], beside factors of this shape.
struct Extent {
  std::int64_t samples, rows, columns;
};
Extent extent_of(const Tensor& x, const Shape& factor) {
  const std::int64_t columns = x.size(-1), samples = factor.size() == 2 ? factor[0] : 1, each = samples * columns;
  return {samples, each ? x.numel() / each : 0, columns};
}

// The gradients of x, scale and shift from recorded primitives, for second derivatives.
Grads composite_backward(const Tensor& x, const Tensor& scale, const Tensor& dy, double base, const Shape& factor,
                         Needs need) {
  const DType t = dy.dtype(), acc = accumulator(t);
  const Shape spread = beside(dy, factor);
  const auto down = [&](const Tensor& g) { return cast(reshape(sum_to(g, spread), factor), t); };
  Grads out(3);
  if (need[0]) out[0] = dy * reshape(scale + base, spread);
  if (need[1]) out[1] = down(cast(dy, acc) * cast(x, acc));
  if (need[2]) out[2] = down(cast(dy, acc));
  return out;
}

// The same by one kernel, and a sum over the chunks.
Grads fused_backward(const Tensor& x0, const Tensor& scale, const Tensor& dy0, double base, const Shape& factor,
                     Needs need) {
  const Tensor dy = contiguous(dy0), x = contiguous_or_undefined(x0);
  const DType t = dy.dtype(), acc = accumulator(t);
  const Device device = dy.device();
  const auto [samples, rows, columns] = extent_of(dy, factor);
  const std::int64_t chunks = (rows + kModulateChunk - 1) / kModulateChunk;
  Grads out(3);
  Tensor part[2];
  if (need[0]) out[0] = empty_like(dy);
  for (int i = 0; i < 2; ++i)
    if (need[i + 1]) part[i] = empty({samples, chunks, columns}, acc, device);
  const ModulateBackwardArgs args{t, base, need[1] ? data_or_null(x) : nullptr, data_or_null(dy),
                                  need[0] ? data_or_null(scale) : nullptr, data_or_null(out[0]), data_or_null(part[0]),
                                  data_or_null(part[1]), samples, rows, columns};
  launch(kernels::modulate_backward, device, args, samples * chunks, 1);
  for (int i = 0; i < 2; ++i)
    if (need[i + 1]) {
      const Tensor whole = chunks == 1 ? part[i] : sum(part[i], {1});
      out[static_cast<std::size_t>(i + 1)] = reshape(cast(whole, t), factor);
    }
  return out;
}

// The gradients of x, scale and shift. saved: x, scale; each undefined when no needed gradient reads it.
Grads backward(const Saved& saved, const Tensor& dy, double base, const Shape& factor, Needs need) {
  return grad_enabled() ? composite_backward(saved[0], saved[1], dy, base, factor, need)
                        : fused_backward(saved[0], saved[1], dy, base, factor, need);
}

void check(const char* op, const Tensor& x) {
  CAPO_CHECK(is_floating(x.dtype()), op, ": x must be floating, got ", describe(x));
  CAPO_CHECK(x.rank() >= 1, op, ": x must have a last axis, got a scalar");
}
// All contiguous; shift or residual is undefined.
Tensor forward(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& residual, double base) {
  const auto [samples, rows, columns] = extent_of(x, scale.shape());
  const Tensor y = empty_like(x);
  const ModulateArgs args{x.dtype(), base, data_or_null(x), data_or_null(scale), data_or_null(shift),
                          data_or_null(residual), data_or_null(y), samples, rows, columns};
  launch(kernels::modulate, x.device(), args, samples * rows, row_grain(columns));
  return y;
}

}  // namespace

Tensor modulate(const Tensor& x0, const Tensor& shift0, const Tensor& scale0) {
  check("modulate", x0);
  check_channels("modulate", "shift", shift0, x0, false, true);
  check_channels("modulate", "scale", scale0, x0, false, true);
  CAPO_CHECK(shift0.shape() == scale0.shape(), "modulate: shift and scale must have one shape, got ", shift0.shape(),
             " and ", scale0.shape());
  if (long_row_through_f32(x0)) return cast(modulate(cast(x0, f32), cast(shift0, f32), cast(scale0, f32)), x0.dtype());
  const Tensor x = contiguous(x0), shift = contiguous(shift0), scale = contiguous(scale0);
  const Needs need = needs_of({x, shift, scale});
  const Shape factor = scale.shape();
  return record("modulate", forward(x, scale, shift, {}, 1), {x, shift, scale},
                Saved({keep_if(need[2], x), keep_if(need[0], scale)}),
                [factor](const Saved& s, const Tensor& dy, Needs n) -> Grads {
                  const Needs inner((n[0] ? 1u : 0u) | (n[2] ? 2u : 0u) | (n[1] ? 4u : 0u));
                  Grads g = backward(s, dy, 1, factor, inner);
                  return {g[0], g[2], g[1]};
                });
}

Tensor gate(const Tensor& x0, const Tensor& g0, const Tensor& residual0) {
  check("gate", x0);
  check_channels("gate", "g", g0, x0, false, true);
  CAPO_CHECK(residual0.shape() == x0.shape() && residual0.dtype() == x0.dtype() && residual0.device() == x0.device(),
             "gate: residual and x must be alike, got ", describe(residual0), " and ", describe(x0));
  if (long_row_through_f32(x0)) return cast(gate(cast(x0, f32), cast(g0, f32), cast(residual0, f32)), x0.dtype());
  const Tensor x = contiguous(x0), g = contiguous(g0), residual = contiguous(residual0);
  const Needs need = needs_of({x, g, residual});
  const Shape factor = g.shape();
  return record("gate", forward(x, g, {}, residual, 0), {x, g, residual},
                Saved({keep_if(need[1], x), keep_if(need[0], g)}),
                [factor](const Saved& s, const Tensor& dy, Needs n) -> Grads {
                  Grads out(3);
                  if (n[0] || n[1]) out = backward(s, dy, 0, factor, Needs(n.mask() & 3));
                  out[2] = keep_if(n[2], dy);
                  return out;
                });
}

}  // namespace capo
