#include <capo/models/nn/batch_norms.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>

namespace capo::nn {

std::vector<BatchNorm*> batch_norms(Module& model) {
  std::vector<BatchNorm*> found;
  for (Module* m : model.modules())
    if (auto* norm = dynamic_cast<BatchNorm*>(m)) found.push_back(norm);
  return found;
}

void fold_batch_norm(BatchNorm& norm) {
  Conv& conv = *norm.source();
  const auto wide = [](const Parameter& p) { return cast(p.value().detach(), f64); };
  const DType dtype = conv.weight.value().dtype();
  const Tensor factor = wide(norm.weight) * rsqrt(wide(norm.running_var) + norm.eps);  // [out]
  Shape column(Dims::filled(conv.weight.value().rank(), 1));
  column[0] = factor.size(0);
  const Tensor mean = conv.bias ? wide(norm.running_mean) - wide(*conv.bias) : wide(norm.running_mean);
  if (!conv.bias) {
    conv.bias = std::make_unique<Parameter>(&conv, "bias", factor.shape(), Init::zero());
    conv.bias->set_trainable(conv.weight.trainable());
  }
  conv.bias->set(cast(wide(norm.bias) - mean * factor, dtype));
  conv.weight.set(cast(wide(conv.weight) * reshape(factor, column), dtype));
  norm.folded_ = true;
}

int fold_batch_norms(Module& model) {
  const NoGrad off;
  std::vector<BatchNorm*> found;
  for (BatchNorm* norm : batch_norms(model)) {
    if (!norm->source() || norm->folded()) continue;
    CAPO_CHECK(!norm->training(), "fold_batch_norms: ", norm->path(), " must be in eval mode: call train(false)");
    CAPO_CHECK(!norm->tapped() && !norm->source()->tapped(), "fold_batch_norms: ", norm->path(), " and ",
               norm->source()->path(), " must carry no tap");
    found.push_back(norm);
  }
  for (BatchNorm* norm : found) fold_batch_norm(*norm);
  return static_cast<int>(found.size());
}

}  // namespace capo::nn
