// Exponential moving average of a module's trainable parameters, and of the running statistics beside them.
//
//   train::Ema ema(model, 0.9999);
//   ... opt.step(lr); ema.update();
//   { const train::EmaScope averaged(ema); evaluate(model); }   // the model runs with the averages inside
#pragma once

#include <capo/engine/graph.h>
#include <capo/models/train/named.h>

#include <cstdint>
#include <vector>

namespace capo::train {

// shadow = d shadow + (1 - d) p after each optimiser step, starting at the parameters' values; with warm_up,
// d = min(decay, (1 + n) / (10 + n)) after n updates. Shadows of bf16 and f16 parameters are f32.
// Floating buffers of modules that train a parameter of their own (running statistics of norms) are averaged likewise:
// they belong to the weights of their time. What is frozen does not change and has no shadow.
class Ema {
 public:
  explicit Ema(nn::Module& module, double decay = 0.9999, bool warm_up = false);
  Ema(const Ema&) = delete;
  Ema& operator=(const Ema&) = delete;

  void update();
  // update() in a captured graph, left out while the device's `skip` (f32 [1]) is not 0. Before each replay
  // next_replay() sets the decay; after it count_update() says that it happened.
  void capture_update(Graph& graph, const Tensor& skip);
  void next_replay();
  void count_update() { ++*counter_.data<std::int64_t>(); }
  std::int64_t updates() const { return *counter_.data<std::int64_t>(); }
  double decay() const { return decay_; }

  // Exchanges shadows and parameters; a second call exchanges them back, to the bit. No update() in between.
  void swap();
  bool swapped() const { return swapped_; }

  // "updates" (i64) and one tensor per parameter path, PyTorch layout.
  nn::StateDict state() const { return copy_out(state_list()); }
  // Strict, as Optimizer::load_state.
  void load_state(const nn::StateDict& dict) { copy_in("ema", state_list(), dict); }
  StateList state_list() const;  // not while swapped

  std::int64_t state_bytes() const;

 private:
  double next_decay() const;
  void update_all(double decay, const Tensor& weight, const Tensor& skip);

  struct Entry {
    nn::Parameter* parameter;
    Tensor shadow;
    Tensor backup;  // while swapped, of parameters whose dtype is not the shadow's
  };
  std::vector<Entry> entries_;
  double decay_;
  bool warm_up_;
  bool swapped_ = false;
  Tensor counter_;  // i64, on the host
  Graph::Numbers weight_ = {};  // captured: 1 - the decay
};

class EmaScope {
 public:
  explicit EmaScope(Ema& ema) : ema_(ema) { ema_.swap(); }
  ~EmaScope() { ema_.swap(); }
  EmaScope(const EmaScope&) = delete;
  EmaScope& operator=(const EmaScope&) = delete;

 private:
  Ema& ema_;
};

}  // namespace capo::train
