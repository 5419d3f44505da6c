#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/dropout.h>
#include <capo/ops/kernel.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

#include <algorithm>
#include <cmath>

namespace capo {

namespace {
Work dropout_work(const DropoutArgs& p, std::int64_t) { return Work::moved(bytes_of(p.dtype, 2 * p.elements)); }
}  // namespace

CAPO_KERNEL_CUDA(dropout, DropoutArgs, dropout_work)

namespace {

// x times the mask that `range` describes, one draw for `run` neighbours; its own gradient.
Tensor masked(const Tensor& x0, double p, RngRange range, std::int64_t run = 1) {
  const Tensor x = contiguous(x0), y = empty_like(x);
  const auto threshold = static_cast<std::uint32_t>(std::min(std::ceil(p * 0x1p32), 0x1p32 - 1));
  CAPO_CHECK(!range.place || !x.device().is_cpu(), "dropout: a CPU tensor cannot be part of a captured graph");
  const DropoutArgs args{x.dtype(), data_or_null(x), data_or_null(y), x.numel(), range, threshold,
                         1.0 / (1.0 - p), run};
  const bool pieces = run > 1 && !x.device().is_cuda();
  if (pieces)
    launch(kernels::dropout, x.device(), args, x.numel() / run * ((run + kDropPiece - 1) / kDropPiece), 1);
  else
    launch(kernels::dropout, x.device(), args, (x.numel() / run + 3) / 4, 4096);
  return record("dropout", y, {x}, Saved(), [p, range, run](const Saved&, const Tensor& dy, Needs) -> Grads {
    return {masked(dy, p, range, run)};
  });
}

void check(const char* op, const Tensor& x, double p) {
  CAPO_CHECK(is_floating(x.dtype()), op, ": x must be floating, got ", describe(x));
  CAPO_CHECK(p >= 0 && p < 1, op, ": p must be in [0, 1), got ", p);
}

}  // namespace

Tensor dropout(const Tensor& x, double p, Generator& rng, bool training) {
  check("dropout", x, p);
  if (!training || p == 0) return x;
  return masked(x, p, rng.reserve(x.numel()));
}

Tensor drop_path(const Tensor& x, double p, Generator& rng, bool training) {
  check("drop_path", x, p);
  CAPO_CHECK(x.rank() >= 1, "drop_path: x must be [B, ...], got a scalar");
  if (!training || p == 0) return x;
  if (x.device().is_cuda() || is_half(x.dtype())) {
    const std::int64_t samples = x.size(0), run = samples ? std::max<std::int64_t>(x.numel() / samples, 1) : 1;
    return masked(x, p, rng.reserve(samples), run);
  }
  Shape per_sample = Shape::filled(x.rank(), 1);
  per_sample[0] = x.size(0);
  return x * masked(ones(per_sample, x.dtype(), x.device()), p, rng.reserve(x.size(0)));
}

}  // namespace capo
