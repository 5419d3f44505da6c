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

#include <capo/models/train/named.h>

#include <cstdint>
#include <memory>
#include <string>
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

// True for parameters that decay by default: rank >= 2, and not cls_token, pos_embed, reg_token, dist_token.
bool decays_by_default(const nn::Parameter& p);

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
  };
  Optimizer(nn::Module& module, double weight_decay, const std::vector<Rule>& rules, bool first, bool second);
  // Tensors that are updated alike: parameters or masters, gradients of their dtype, Slot::first, Slot::second.
  struct Group {
    double lr, weight_decay, grad_scale;
    std::vector<Tensor> targets, grads, first, second;
  };
  // steps() counts this step.
  virtual void update(const Group& group) = 0;
  // Names of Slot::first and Slot::second in state().
  virtual const char* first_name() const = 0;
  virtual const char* second_name() const { return ""; }

 private:
  std::vector<nn::Parameter*> parameters_;
  std::vector<Slot> slots_;
  Tensor counter_;  // i64, on the host
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

// Loshchilov and Hutter 2019, in PyTorch's form: p *= 1 - lr wd; m, v; p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps).
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

enum class OptimizerKind { adamw, sgd };
std::string to_string(OptimizerKind kind);

}  // namespace capo::train
