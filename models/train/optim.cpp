#include <capo/models/train/optim.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/optim.h>

#include <algorithm>
#include <cmath>

namespace capo::train {
namespace {

// The pattern names the parameter, or a module above it.
bool rule_covers(const std::string& pattern, const std::string& path) {
  for (std::size_t end = path.size(); end != std::string::npos; end = path.rfind('.', end - 1))
    if (nn::matches(pattern, std::string_view(path).substr(0, end))) return true;
  return false;
}

}  // namespace

bool decays_by_default(const nn::Parameter& p) {
  if (p.value().rank() < 2) return false;
  for (const char* name : {"cls_token", "pos_embed", "reg_token", "dist_token"})
    if (p.name() == name) return false;
  return true;
}

std::string to_string(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::sgd: return "sgd";
    case OptimizerKind::muon: return "muon";
    default: return "adamw";
  }
}

OptimizerKind optimizer_kind(std::string_view text) {
  for (const auto kind : {OptimizerKind::adamw, OptimizerKind::sgd, OptimizerKind::muon})
    if (text == to_string(kind)) return kind;
  detail::fail("optimizer: must be adamw, sgd or muon, got \"", text, "\"");
}

std::unique_ptr<Optimizer> make_optimizer(OptimizerKind kind, nn::Module& module, const AdamWOptions& adamw,
                                          const SgdOptions& sgd, const MuonOptions& muon) {
  if (kind == OptimizerKind::sgd) return std::make_unique<Sgd>(module, sgd);
  if (kind == OptimizerKind::muon) return std::make_unique<Muon>(module, muon);
  return std::make_unique<AdamW>(module, adamw);
}

Optimizer::Optimizer(nn::Module& module, double weight_decay, const std::vector<Rule>& rules, bool first, bool second,
                     bool (*takes_matrix)(const nn::Parameter&))
    : counter_(zeros({1}, i64)) {
  const NoGrad off;
  std::vector<nn::Parameter*> all = module.parameters();
  for (const auto& rule : rules)
    if (std::none_of(all.begin(), all.end(), [&](auto* p) { return rule_covers(rule.pattern, p->path()); }))
      nn::find_parameters(module, rule.pattern);  // throws with near misses
  for (nn::Parameter* p : all) {
    if (!p->trainable()) continue;
    Slot slot;
    const std::string path = p->path();
    slot.weight_decay = decays_by_default(*p) ? weight_decay : 0;
    for (const auto& rule : rules) {
      if (!rule_covers(rule.pattern, path)) continue;
      slot.lr_scale = rule.lr_scale;
      if (rule.weight_decay >= 0) slot.weight_decay = rule.weight_decay;
    }
    slot.matrix = takes_matrix && takes_matrix(*p);
    const Tensor& value = p->value();
    if (is_half(value.dtype())) slot.master = cast(value.detach(), f32);
    const DType dtype = is_half(value.dtype()) ? f32 : value.dtype();
    if (first) slot.first = zeros(value.shape(), dtype, value.device());
    if (second && !slot.matrix) slot.second = zeros(value.shape(), dtype, value.device());
    parameters_.push_back(p);
    slots_.push_back(std::move(slot));
  }
}

void Optimizer::step(double lr, double grad_scale) {
  count_step();
  update_all(lr, grad_scale);
}

void Optimizer::capture_step(Graph& graph, const GradVerdict& verdict) {
  rates_.clear();
  graph_ = &graph;
  verdict_ = verdict;
  struct End {
    Optimizer& o;
    ~End() {
      o.graph_ = nullptr;
      o.verdict_ = {};
    }
  } const end{*this};
  update_all(1, 1);
}

void Optimizer::next_replay(double lr) {
  for (const Rate& r : rates_) {
    AdamwOptions o;
    o.lr = lr * r.lr_scale;
    o.beta1 = r.beta1;
    o.beta2 = r.beta2;
    o.weight_decay = r.weight_decay;
    o.step = steps() + 1;
    if (r.adamw)
      adamw_numbers(o, r.numbers.here);
    else
      *r.numbers.here = static_cast<float>(o.lr * r.factor);
  }
}

Tensor Optimizer::numbers_of(const Rate& wanted) {
  for (const Rate& r : rates_)
    if (r.adamw == wanted.adamw && r.lr_scale == wanted.lr_scale && r.factor == wanted.factor &&
        r.weight_decay == wanted.weight_decay)
      return r.numbers.there;
  rates_.push_back(wanted);
  rates_.back().numbers = graph_->numbers(wanted.adamw ? 3 : 1);
  return rates_.back().numbers.there;
}

AtRun Optimizer::sgd_at_run(const Group& group, double factor) {
  if (!graph_) return {};
  return {numbers_of({group.lr, factor, 0, 0, 0, false, {}}), verdict_.scale, verdict_.skip};
}

void Optimizer::update_all(double lr, double grad_scale) {
  const NoGrad off;
  std::vector<Group> groups;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const nn::Parameter& p = *parameters_[i];
    const Tensor g = grad_of(p.value());
    if (!g.defined() || !p.trainable()) continue;
    const Slot& slot = slots_[i];
    const DType dtype = p.value().dtype();
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& known) {
      return known.lr == lr * slot.lr_scale && known.weight_decay == slot.weight_decay && known.matrix == slot.matrix &&
             known.dtype == dtype;
    });
    if (group == groups.end())
      group = groups.insert(group, {lr * slot.lr_scale, slot.weight_decay, grad_scale, slot.matrix, dtype,
                                    {}, {}, {}, {}, {}});
    if (slot.master.defined()) group->weights.push_back(p.value());
    group->targets.push_back(slot.master.defined() ? slot.master : p.value());
    group->grads.push_back(g);
    group->first.push_back(slot.first);
    group->second.push_back(slot.second);
  }
  for (const Group& group : groups) update(group);
}

void Optimizer::zero_grad() {
  for (nn::Parameter* p : parameters_) clear_grad(p->value());
}

TensorList Optimizer::gradients() const {
  TensorList grads;
  for (const nn::Parameter* p : parameters_)
    if (const Tensor g = grad_of(p->value()); g.defined()) grads.push_back(g);
  return grads;
}

double Optimizer::grad_norm() const {
  const TensorList grads = gradients();
  return grads.empty() ? 0.0 : global_norm(grads);
}

GradVerdict Optimizer::grad_verdict(const TensorList& losses, double max_norm, const Tensor& loss_scale) const {
  return capo::grad_verdict(gradients(), losses, max_norm, loss_scale);
}

void Optimizer::scale_grads(double factor) {
  const NoGrad off;
  for (nn::Parameter* p : parameters_) {
    Tensor g = grad_of(p->value());
    if (!g.defined()) continue;
    clear_grad(p->value());  // so that unique() tells whether another leaf holds the same tensor
    if (g.unique() && g.is_contiguous() && !is_half(g.dtype()))
      scale_(g, factor);
    else
      g = g * factor;
    set_grad(p->value(), g);
  }
}

double Optimizer::clip_grad_norm(double max_norm) {
  CAPO_CHECK(max_norm > 0, "clip_grad_norm: max_norm must be positive, got ", max_norm);
  const double norm = grad_norm();
  if (norm > max_norm) scale_grads(max_norm / norm);
  return norm;
}

StateList Optimizer::state_list() const {
  StateList list{{"step", counter_}};
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const nn::Parameter& p = *parameters_[i];
    const auto add = [&](const char* kind, const Tensor& t) {
      if (t.defined()) list.push_back({cat(kind, "/", p.path()), t, p.layout()});
    };
    add(slots_[i].matrix ? "momentum" : first_name(), slots_[i].first);
    add(second_name(), slots_[i].second);
    add("master", slots_[i].master);
  }
  return list;
}

std::int64_t Optimizer::state_bytes() const {
  std::int64_t bytes = 0;
  for (const auto& s : slots_)
    for (const Tensor* t : {&s.master, &s.first, &s.second})
      if (t->defined()) bytes += static_cast<std::int64_t>(rounded_bytes(t->storage()->bytes()));
  return bytes;
}

void Optimizer::update_adamw(const Group& group, double beta1, double beta2, double eps) {
  AdamwOptions o;
  o.lr = group.lr;
  o.beta1 = beta1;
  o.beta2 = beta2;
  o.eps = eps;
  o.weight_decay = group.weight_decay;
  o.grad_scale = group.grad_scale;
  o.step = graph_ ? 1 : steps();
  AtRun at_run;
  if (graph_) {
    at_run = {numbers_of({group.lr, 1, group.weight_decay, beta1, beta2, true, {}}), verdict_.scale, verdict_.skip};
  }
  adamw_(group.targets, group.grads, group.first, group.second, o, at_run, group.weights);
}

std::string Optimizer::text_of(const std::vector<Rule>& rules) {
  std::string out;
  for (const auto& r : rules) out += cat(" rule ", r.pattern, " ", r.lr_scale, " ", r.weight_decay);
  return out;
}

Sgd::Sgd(nn::Module& module, const SgdOptions& options)
    : Optimizer(module, options.weight_decay, options.rules, options.momentum != 0, false), options_(options) {
  CAPO_CHECK(options.momentum >= 0 && options.momentum < 1, "sgd: momentum must be in [0, 1), got ", options.momentum);
  CAPO_CHECK(!options.nesterov || options.momentum > 0, "sgd: nesterov needs a momentum");
}

std::string Sgd::settings() const {
  return cat("sgd ", options_.momentum, options_.nesterov ? " nesterov" : "", " decay ", options_.weight_decay,
             text_of(options_.rules));
}

void Sgd::update(const Group& group) {
  capo::SgdOptions o;
  o.lr = group.lr;
  o.momentum = options_.momentum;
  o.weight_decay = group.weight_decay;
  o.grad_scale = group.grad_scale;
  o.nesterov = options_.nesterov;
  sgd_(group.targets, group.grads, group.first, o, sgd_at_run(group), group.weights);
}

AdamW::AdamW(nn::Module& module, const AdamWOptions& options)
    : Optimizer(module, options.weight_decay, options.rules, true, true), options_(options) {
  CAPO_CHECK(options.beta1 >= 0 && options.beta1 < 1 && options.beta2 >= 0 && options.beta2 < 1,
             "adamw: betas must be in [0, 1), got ", options.beta1, " and ", options.beta2);
  CAPO_CHECK(options.eps > 0, "adamw: eps must be positive, got ", options.eps);
}

std::string AdamW::settings() const {
  return cat("adamw ", options_.beta1, " ", options_.beta2, " ", options_.eps, " decay ", options_.weight_decay,
             text_of(options_.rules));
}

void AdamW::update(const Group& group) { update_adamw(group, options_.beta1, options_.beta2, options_.eps); }

}  // namespace capo::train
