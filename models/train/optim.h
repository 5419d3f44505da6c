// Optimisers over a module's trainable parameters.
//
//   train::AdamW opt(model, {.lr = 1e-3, .weight_decay = 0.05, .rules = {{"head", 10}, {"blocks.*.attn.**", 1, 0}}});
//   backward(loss);
//   opt.clip_grad_norm(1.0);
//   opt.step(schedule.at(opt.steps()));
//   opt.zero_grad();
//
// Parameters that are trainable when the optimiser is made are its parameters; the optimiser keeps pointers to them, so
// it must go before a tuner is detached. One step counter counts optimiser steps, whatever was accumulated.
// Parameters in bf16 or f16 are updated through an f32 master that the optimiser owns: make it after loading weights.
#pragma once

#include <capo/engine/graph.h>
#include <capo/models/train/named.h>
#include <capo/ops/optim.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace capo::train {

// Settings for the parameters that `pattern` matches (the parameter's path, or a module's: then all below it). Later
// rules override earlier ones. A pattern that matches no parameter at all throws.
struct Rule {
  std::string pattern;
  double lr_scale = 1;
  double weight_decay = -1;  // < 0: the optimiser's own
};

struct SgdOptions {
  double momentum = 0.9;
  bool nesterov = false;
  double weight_decay = 0;  // added to the gradient (L2), as in PyTorch
  std::vector<Rule> rules = {};
};

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
  double weight_decay = 0.05;  // decoupled: p *= 1 - lr wd before the update
  std::vector<Rule> rules = {};
};

// For the matrices of hidden layers (muon_takes); all other parameters go by AdamW with beta1, beta2 and eps.
struct MuonOptions {
  double momentum = 0.95;
  bool nesterov = true;
  int ns_steps = 5;            // of Newton-Schulz; 1 to 99
  double weight_decay = 0.05;  // decoupled, for both kinds
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
  std::vector<Rule> rules = {};
};

// True for parameters that decay by default: rank >= 2, and not cls_token, pos_embed, reg_token, dist_token.
bool decays_by_default(const nn::Parameter& p);
// True for parameters that Muon orthogonalises: rank 2, of no head (nn::Kind::head), no embedding table, no token; of
// tuners only the weights of their Linears (an adapter's), not tables of learned tokens and not LoRA's factors. The
// patch embedding and convolutions have rank 4 and go by AdamW.
bool muon_takes(const nn::Parameter& p);

class Optimizer {
 public:
  virtual ~Optimizer() = default;
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  // One update with learning rate `lr` (times each rule's lr_scale) from the gradients in the parameters' slots, taken
  // times grad_scale (clipping without another pass). Parameters without a gradient, or frozen meanwhile, stay as they
  // are. Works on the meta device.
  void step(double lr, double grad_scale = 1);
  // Drops the gradients (their memory goes back).
  void zero_grad();
  // Steps done.
  std::int64_t steps() const { return *counter_.data<std::int64_t>(); }

  // sqrt of the sum of squares of all gradients, f64, in fixed order. 0 without gradients; NaN or inf when one has it.
  double grad_norm() const;
  // Scales all gradients by max_norm / norm when norm > max_norm; returns the norm before. max_norm > 0.
  double clip_grad_norm(double max_norm);
  void scale_grads(double factor);

  // The gradients' part of step() in a captured graph: norm, clipping to max_norm (0: none) and whether to step at all,
  // made on the device (ops/optim.h).
  GradVerdict grad_verdict(const TensorList& losses, double max_norm, const Tensor& loss_scale = {}) const;
  // The update itself in a captured graph, of the parameters that have a gradient now. Before each replay
  // next_replay(lr) sets what the update reads at run; after it count_step() says that the verdict let it happen.
  void capture_step(Graph& graph, const GradVerdict& verdict);
  void next_replay(double lr);
  void count_step() { ++*counter_.data<std::int64_t>(); }

  // What resuming needs: "step" (i64), "momentum/<path>", "m/<path>", "v/<path>", "master/<path>"; PyTorch layout.
  nn::StateDict state() const { return copy_out(state_list()); }
  // Strict: the same names, shapes and dtypes; otherwise throws once listing all, and nothing is changed.
  void load_state(const nn::StateDict& dict) { copy_in(name(), state_list(), dict); }
  StateList state_list() const;

  const std::vector<nn::Parameter*>& parameters() const { return parameters_; }
  // As the rules left them, by position in parameters().
  double lr_scale(std::size_t i) const { return slots_[i].lr_scale; }
  double weight_decay(std::size_t i) const { return slots_[i].weight_decay; }
  // Bytes of moments and masters.
  std::int64_t state_bytes() const;
  virtual const char* name() const = 0;
  virtual std::string settings() const = 0;  // name, options and rules in one line

 protected:
  struct Slot {
    double lr_scale = 1, weight_decay = 0;
    Tensor master;         // f32, for half parameters
    Tensor first, second;  // momentum; or m and v
    bool matrix = false;
  };
  // takes_matrix (or null): parameters that have a momentum alone and groups of their own.
  Optimizer(nn::Module& module, double weight_decay, const std::vector<Rule>& rules, bool first, bool second,
            bool (*takes_matrix)(const nn::Parameter&) = nullptr);
  // Tensors that are updated alike: parameters, or masters beside 16-bit parameters in weights (else weights is empty);
  // gradients of the parameters' dtype, Slot::first, Slot::second. While captured lr is the rule's lr_scale.
  struct Group {
    double lr, weight_decay, grad_scale;
    bool matrix;
    DType dtype;  // of the parameters and gradients
    std::vector<Tensor> targets, grads, first, second, weights;
  };
  // steps() counts this step.
  virtual void update(const Group& group) = 0;
  void update_adamw(const Group& group, double beta1, double beta2, double eps);
  // What an update by sgd_ with the rate group.lr * factor reads at run: nothing unless captured.
  AtRun sgd_at_run(const Group& group, double factor = 1);
  AtRun only_skip() const { return {{}, {}, verdict_.skip}; }
  bool capturing() const { return graph_ != nullptr; }
  static std::string text_of(const std::vector<Rule>& rules);
  // Names of Slot::first and Slot::second in state(); a matrix has "momentum".
  virtual const char* first_name() const = 0;
  virtual const char* second_name() const { return ""; }

 private:
  // Numbers that captured kernels read: one for sgd_, three for adamw_.
  struct Rate {
    double lr_scale, factor, weight_decay, beta1, beta2;
    bool adamw;
    Graph::Numbers numbers;
  };
  void update_all(double lr, double grad_scale);
  TensorList gradients() const;
  Tensor numbers_of(const Rate& wanted);

  std::vector<nn::Parameter*> parameters_;
  std::vector<Slot> slots_;
  Tensor counter_;  // i64, on the host
  Graph* graph_ = nullptr;  // while it captures
  GradVerdict verdict_;     // likewise
  std::vector<Rate> rates_;
};

// v = momentum v + g, p -= lr v (nesterov: p -= lr (g + momentum v)); g includes weight_decay p. PyTorch's SGD.
class Sgd final : public Optimizer {
 public:
  explicit Sgd(nn::Module& module, const SgdOptions& options = {});
  const char* name() const override { return "sgd"; }
  std::string settings() const override;

 private:
  void update(const Group& group) override;
  const char* first_name() const override { return "momentum"; }
  SgdOptions options_;
};

// Loshchilov and Hutter 2019, in PyTorch's form: p *= 1 - lr wd; m, v; 
// p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps).
class AdamW final : public Optimizer {
 public:
  explicit AdamW(nn::Module& module, const AdamWOptions& options = {});
  const char* name() const override { return "adamw"; }
  std::string settings() const override;

 private:
  void update(const Group& group) override;
  const char* first_name() const override { return "m"; }
  const char* second_name() const override { return "v"; }
  AdamWOptions options_;
};

// Jordan et al. 2024, in the form of torch.optim.Muon with adjust_lr_fn = "match_rms_adamw" (Liu et al. 2025, so that
// AdamW's lr and weight decay carry over). For the matrices p [r, c] that muon_takes:
//   buf = momentum buf + (1 - momentum) g;  u = nesterov ? momentum buf + (1 - momentum) g : buf
//   p *= 1 - lr wd;  p -= lr 0.2 sqrt(max(r, c)) newton_schulz(u)
// The one difference: PyTorch rounds u to bf16 before Newton-Schulz, here it keeps p's dtype (f32 for half parameters);
// set_matmul_precision(bf16) holds for its products too.
// Everything else: AdamW. Both take step()'s lr. State: "momentum/<path>" for the matrices, "m/" and "v/" for the rest.
class Muon final : public Optimizer {
 public:
  explicit Muon(nn::Module& module, const MuonOptions& options = {});
  const char* name() const override { return "muon"; }
  std::string settings() const override;

 private:
  void update(const Group& group) override;
  void update_alike(const Group& group, const std::vector<std::size_t>& at);
  const char* first_name() const override { return "m"; }
  const char* second_name() const override { return "v"; }
  MuonOptions options_;
};

// Matrices x [..., r, c] (f32, f64) with the SVD's vectors kept and its values pushed towards 1 (to about 0.7 to 1.2 in
// 5 steps, tiny ones less far): X = x / max(|x|_F, 1e-7), then `steps` times A = X X^T, X = a X + (b A + c A A) X with
// (a, b, c) = (3.4445, -4.7750, 2.0315); tall matrices as their transposes. Not recorded. x is taken by value: moved
// in, its memory goes back early.
Tensor newton_schulz(Tensor x, int steps = 5);

enum class OptimizerKind { adamw, sgd, muon };
std::string to_string(OptimizerKind kind);
// "adamw", "sgd", "muon"; other text throws.
OptimizerKind optimizer_kind(std::string_view text);
std::unique_ptr<Optimizer> make_optimizer(OptimizerKind kind, nn::Module& module, const AdamWOptions& adamw = {},
                                          const SgdOptions& sgd = {}, const MuonOptions& muon = {});

}  // namespace capo::train
