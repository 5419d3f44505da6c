#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/batch_norm.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/group_norm.h>
#include <capo/ops/kernel.h>
#include <capo/ops/unary.h>
#include <capo/ops/work_internal.h>

namespace capo {

namespace {
Work running_work(const RunningStatsArgs& p, std::int64_t items) {
  return Work::moved(bytes_of(accumulator(p.dtype), 2 * items) + bytes_of(p.dtype, 4 * items));
}
}  // namespace

CAPO_KERNEL_CUDA(batch_norm_running, RunningStatsArgs, running_work)

namespace {

constexpr const char* kOp = "batch_norm";
constexpr std::int64_t kRunningGrain = 4096;

// n: values of a channel. What the kernel does not take (strides, halves on the CPU, two dtypes) goes through copies.
void move_running(const Tensor& mean, const Tensor& var, const detail::ChannelMoments& batch, double momentum,
                    std::int64_t n) {
  const DType acc = batch.mean.dtype(), t = mean.dtype();
  const bool direct = mean.is_contiguous() && var.is_contiguous() && var.dtype() == t &&
                      (t == acc || mean.device().is_cuda());
  const Tensor m = direct ? mean : clone(cast(mean, acc)), v = direct ? var : clone(cast(var, acc));
  if (direct) {
    write_in_place(kOp, mean);
    write_in_place(kOp, var);
  }
  const RunningStatsArgs args{m.dtype(),         data_or_null(batch.mean), data_or_null(batch.var),
                              data_or_null(m),   data_or_null(v),          1 - momentum,
                              momentum,          static_cast<double>(n) / static_cast<double>(n - 1)};
  launch(kernels::batch_norm_running, mean.device(), args, mean.numel(), kRunningGrain);
  detail::observe("batch_norm_running", {});
  if (direct) return;
  copy_into(mean, cast(m, t));
  copy_into(var, cast(v, var.dtype()));
}

}  // namespace

Tensor batch_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& running_mean,
                  const Tensor& running_var, bool training, double momentum, double eps, bool update_running,
                  Activation activation, const Tensor& residual, double slope, double ceiling) {
  CAPO_CHECK(is_floating(x.dtype()), kOp, ": x must be floating, got ", describe(x));
  CAPO_CHECK(x.rank() >= 2 && x.size(-1) >= 1, kOp, ": x must be [..., C] of rank >= 2 with C >= 1, got ", x.shape());
  CAPO_CHECK(eps > 0, kOp, ": eps must be > 0, got ", eps);
  CAPO_CHECK(momentum >= 0 && momentum <= 1, kOp, ": momentum must be in [0, 1], got ", momentum);
  check_channels(kOp, "weight", weight, x);
  check_channels(kOp, "bias", bias, x);
  check_channels(kOp, "running_mean", running_mean, x);
  check_channels(kOp, "running_var", running_var, x);
  CAPO_CHECK(!weight.defined() || !bias.defined() || weight.dtype() == bias.dtype(), kOp, ": weight is ",
             weight.dtype(), ", bias is ", bias.dtype(), ": mixed dtypes, cast one");
  CAPO_CHECK(running_mean.defined() == running_var.defined(), kOp, ": running_mean and running_var must come together");
  CAPO_CHECK(training || running_mean.defined(), kOp, ": needs running_mean and running_var when not training");
  CAPO_CHECK(!needs_of({running_mean, running_var}).any(), kOp, ": running statistics must not require a gradient");
  const detail::NormEpilogue epilogue{activation, slope, ceiling, residual};
  detail::check_epilogue(kOp, x, epilogue);
  const std::int64_t columns = x.size(-1), rows = x.numel() / columns;
  CAPO_CHECK(!training || rows != 1, kOp, ": training needs more than one value per channel, got x ", x.shape());
  const DType acc = accumulator(x.dtype());
  if (!training) {
    // Copies, because a later training step may write into the buffers before this call's backward pass.
    const Tensor mean = clone(cast(running_mean, acc)), rstd = rsqrt(cast(running_var, acc) + eps);
    return detail::channel_affine(kOp, x, weight, bias, mean, rstd, epilogue);
  }
  detail::ChannelMoments batch;
  const Tensor y = detail::channel_norm(kOp, x, weight, bias, 1, columns, eps, epilogue, &batch);
  if (update_running && running_mean.defined() && rows > 0 && !replaying()) {
    const NoGrad off;
    move_running(running_mean, running_var, batch, momentum, rows);
  }
  return y;
}

}  // namespace capo
