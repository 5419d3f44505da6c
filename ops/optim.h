// In-place kernels of the optimisers, and what a step asks of its gradients. One launch covers up to 32 tensors.
//
// Every list call takes lists of one length; entry i of each belongs together and has one shape, dtype and device.
// Entries whose gradient is undefined are skipped. Hyper-parameters are f64, and so are the bias corrections. Written
// tensors: f32 or f64, contiguous, not made by an op; a version bump each. Gradients of any strides, same dtype. No
// gradients, nothing is recorded, no NoGrad scope needed. Order of tensors and number of threads do not change any bit.
//
// 16-bit models: params are then f32 masters, and `weights` of adamw_ and sgd_ are the model's own parameters in bf16
// or f16, which the same pass sets to the rounded masters (nearest, ties to even). Beside a weight the gradient may
// have the weight's dtype. The bits are those of cast(gradient, f32), the step, and copy_into(weight, param).
#pragma once

#include <capo/engine/tensor.h>

#include <vector>

namespace capo {

using TensorList = std::vector<Tensor>;

// Numbers that a CUDA kernel reads when it runs, in place of those that the call was given: how they change between
// the replays of a captured graph (engine/graph.h), where arguments freeze. Undefined: the call's own. CPU tensors
// throw.
struct AtRun {
  Tensor numbers;  // f32: sgd_ {lr}; adamw_ the three of adamw_numbers(); ema_ {1 - decay}
  Tensor scale;    // f32 [1]: the gradient scale
  Tensor skip;     // f32 [1]: not 0 when nothing is to be written
};

// torch.optim.SGD: g = grad_scale * grad + weight_decay * param; buffer = first ? g : momentum * buffer + (1 -
// dampening) g; param -= lr * (nesterov ? g + momentum * buffer : buffer). Without momentum (0) the buffer is not used
// and may be undefined.
struct SgdOptions {
  double lr = 1e-3, momentum = 0, dampening = 0, weight_decay = 0, grad_scale = 1;
  bool nesterov = false;
  bool first = false;  // the buffer holds nothing yet
};
// weights: empty, or for each param a 16-bit weight or an undefined tensor.
void sgd_(const TensorList& params, const TensorList& grads, const TensorList& buffers, const SgdOptions& options,
          const AtRun& at_run = {}, const TensorList& weights = {});
void sgd_(const Tensor& param, const Tensor& grad, const Tensor& buffer, const SgdOptions& options);

// torch.optim.AdamW (Loshchilov and Hutter 2019), with g = grad_scale * grad:
//   param *= 1 - lr weight_decay;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;
//   param -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
struct AdamwOptions {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.01, grad_scale = 1;
  std::int64_t step = 1;  // 1 for the first
};
void adamw_(const TensorList& params, const TensorList& grads, const TensorList& m, const TensorList& v,
            const AdamwOptions& options, const AtRun& at_run = {}, const TensorList& weights = {});
void adamw_(const Tensor& param, const Tensor& grad, const Tensor& m, const Tensor& v, const AdamwOptions& options);

// AtRun::numbers of a step with these options: 1 - lr weight_decay, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step).
void adamw_numbers(const AdamwOptions& options, float* three);

// average += (1 - decay) (value - average); decay in [0, 1]. Values of another floating dtype are cast, bf16 and f16 to
// f32 in the same pass.
void ema_(const TensorList& averages, const TensorList& values, double decay, const AtRun& at_run = {});
void ema_(const Tensor& average, const Tensor& value, double decay);

// t *= scale
void scale_(const TensorList& tensors, double scale, const AtRun& at_run = {});
void scale_(const Tensor& t, double scale);

// The 2-norm of all elements of all tensors (undefined ones count nothing), summed in f64 over fixed chunks. Any
// floating dtype. 0 on the meta device.
double global_norm(const TensorList& tensors);
// No NaN, no infinity. True on the meta device.
bool all_finite(const TensorList& tensors);
bool all_finite(const Tensor& t);

// What a step makes of its gradients, on the device alone: tensors of one CUDA device, nothing is read by the host.
//   norm   f64 [1]: global_norm(gradients) / loss_scale, the same bits
//   scale  f32 [1]: min(1, max_norm / norm) / loss_scale
//   skip   f32 [1]: 1 when the norm or a value of `losses` is not finite, else 0
// max_norm 0: no clipping. loss_scale f32 [1], a power of two; undefined: 1.
struct GradVerdict {
  Tensor norm, scale, skip;
};
GradVerdict grad_verdict(const TensorList& gradients, const TensorList& losses, double max_norm,
                         const Tensor& loss_scale = {});

// Work item of all kernels: one chunk of one tensor.
inline constexpr std::int64_t kOptimChunk = 16384;
struct TensorTable {
  static constexpr int kMax = 32;
  DType dtype;
  DType gradient;                  // of data[1]
  DType weight;                    // of data[4]; dtype when the table has none
  int count;
  // sgd: param, grad, buffer; adamw: param, grad, m, v; both: [4] weight; ema: average, value
  void* data[5][kMax];
  std::int64_t size[kMax];
  std::int64_t first[kMax + 1];    // index of the tensor's first chunk
};
// AtRun as kernels see it.
struct AtRunArgs {
  const float *numbers, *scale, *skip;  // or null
};
struct SgdArgs {
  TensorTable table;
  SgdOptions options;
  AtRunArgs at_run;
};
struct AdamwArgs {
  TensorTable table;
  double decay;                    // 1 - lr weight_decay
  double beta1, beta2, eps, grad_scale;
  double step_size;                // lr / (1 - beta1^step)
  double root_correction;          // sqrt(1 - beta2^step)
  AtRunArgs at_run;
};
struct EmaArgs {
  TensorTable table;
  double weight;                   // of the value
  AtRunArgs at_run;
};
struct ScaleArgs {
  TensorTable table;
  double scale;
  AtRunArgs at_run;
};
struct GradStatArgs {
  TensorTable table;
  bool count_non_finite;           // else the sum of squares
  double* out;                     // one per chunk
};
// CUDA: the sum of what grad_stat left, and grad_verdict.
struct GradTotalArgs {
  const double* parts;
  std::int64_t count;
  double* total;                   // or null
  double* norm;                    // or null: then the rest is not used
  float *scale, *skip;
  const double* wrong;             // of the losses, how many are not finite: parts as above
  std::int64_t wrong_count;
  double max_norm;
  const float* loss_scale;         // or null
};

}  // namespace capo
