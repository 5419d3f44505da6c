#include <capo/models/nn/layers.h>
#include <capo/models/train/optim.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>
#include <capo/ops/matmul.h>
#include <capo/ops/optim.h>
#include <capo/ops/stats.h>
#include <capo/ops/view.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace capo::train {
namespace {

// Elements of one stack of matrices: small ones share calls; large ones fill the cores alone, and memory stays low.
constexpr std::int64_t kStack = 1 << 21;

}  // namespace

bool muon_takes(const nn::Parameter& p) {
  if (p.kind() == nn::Kind::tuner && !dynamic_cast<const nn::Linear*>(&p.owner())) return false;
  return p.value().rank() == 2 && p.value().numel() > 0 && p.kind() != nn::Kind::head && decays_by_default(p) &&
         !dynamic_cast<const nn::Embedding*>(&p.owner());
}

Tensor newton_schulz(Tensor x, int steps) {
  CAPO_CHECK(x.rank() >= 2 && (x.dtype() == f32 || x.dtype() == f64),
             "newton_schulz: needs f32 or f64 of rank 2 or more, got ", describe(x));
  constexpr double a = 3.4445, b = -4.7750, c = 2.0315;
  const NoGrad off;
  x = x / maximum(norm(x, 2, {-2, -1}, true), full({1}, 1e-7, x.dtype(), x.device()));
  // A tall X stays as it lies: the step on its transpose, transposed back, is A = X^T X, X = a X + X (b A + c A A).
  const bool tall = x.size(-2) > x.size(-1);
  for (int i = 0; i < steps; ++i) {
    Tensor b_a;  // b A + c A A
    {
      const Tensor xt = transpose(x, -2, -1), gram = tall ? matmul(xt, x) : matmul(x, xt);
      b_a = matmul(gram, gram);
      mul_(b_a, c);
      add_(b_a, gram, b);
    }
    const Tensor next = tall ? matmul(x, b_a) : matmul(b_a, x);
    add_(next, x, a);
    x = next;
  }
  return x;
}

Muon::Muon(nn::Module& module, const MuonOptions& options)
    : Optimizer(module, options.weight_decay, options.rules, true, true, muon_takes), options_(options) {
  CAPO_CHECK(options.momentum >= 0 && options.momentum < 1, "muon: momentum must be in [0, 1), got ", options.momentum);
  CAPO_CHECK(options.ns_steps >= 1 && options.ns_steps < 100, "muon: ns_steps must be in [1, 99], got ",
             options.ns_steps);
  CAPO_CHECK(options.weight_decay >= 0, "muon: weight_decay must not be negative, got ", options.weight_decay);
  CAPO_CHECK(options.beta1 >= 0 && options.beta1 < 1 && options.beta2 >= 0 && options.beta2 < 1,
             "muon: betas must be in [0, 1), got ", options.beta1, " and ", options.beta2);
  CAPO_CHECK(options.eps > 0, "muon: eps must be positive, got ", options.eps);
}

std::string Muon::settings() const {
  const MuonOptions& o = options_;
  return cat("muon ", o.momentum, o.nesterov ? " nesterov " : " ", o.ns_steps, " adamw ", o.beta1, " ", o.beta2, " ",
             o.eps, " decay ", o.weight_decay, text_of(o.rules));
}

void Muon::update(const Group& group) {
  if (!group.matrix) return update_adamw(group, options_.beta1, options_.beta2, options_.eps);
  std::vector<bool> done(group.targets.size());
  for (std::size_t i = 0; i < done.size(); ++i) {
    if (done[i]) continue;
    const Tensor& first = group.targets[i];
    const auto most = static_cast<std::size_t>(std::max<std::int64_t>(1, kStack / first.numel()));
    std::vector<std::size_t> at;
    for (std::size_t k = i; k < done.size() && at.size() < most; ++k) {
      const Tensor& t = group.targets[k];
      const bool alike = t.shape() == first.shape() && t.dtype() == first.dtype() && t.device() == first.device();
      if (done[k] || !alike) continue;
      at.push_back(k);
      done[k] = true;
    }
    update_alike(group, at);
  }
}

// The members `at` of the group, of one shape, dtype and device, in one stack [n, r, c].
void Muon::update_alike(const Group& group, const std::vector<std::size_t>& at) {
  TensorList targets, grads, momenta, weights;
  for (const std::size_t i : at) {
    if (!group.weights.empty()) weights.push_back(group.weights[i]);
    targets.push_back(group.targets[i]);
    grads.push_back(group.grads[i]);
    momenta.push_back(group.first[i]);
  }
  // p -= scale lr (O + wd / scale p): the decay of a momentum-free SGD step is decoupled decay.
  const double scale = 0.2 * std::sqrt(static_cast<double>(std::max(targets[0].size(0), targets[0].size(1))));
  Tensor stacked = cast(stack(grads, 0), targets[0].dtype());
  TensorList slices = unbind(stacked, 0);
  AtRun at_run = sgd_at_run(group, scale);
  if (capturing() || group.grad_scale != 1) scale_({stacked}, group.grad_scale, {{}, at_run.scale, {}});
  at_run.scale = {};
  ema_(momenta, slices, options_.momentum, only_skip());  // torch's buf.lerp_(g, 1 - momentum)
  if (options_.nesterov)
    ema_(slices, momenta, 1 - options_.momentum);  // g.lerp(buf, momentum)
  else
    for (std::size_t i = 0; i < at.size(); ++i) copy_into(slices[i], momenta[i]);
  slices.clear();  // so that the stack goes as soon as it is read
  const TensorList updates = unbind(newton_schulz(std::move(stacked), options_.ns_steps), 0);
  capo::SgdOptions o;
  o.lr = group.lr * scale;
  o.weight_decay = group.weight_decay / scale;
  sgd_(targets, updates, {}, o, at_run, weights);
}

}  // namespace capo::train
