// Learning-rate schedules: pure functions of the optimiser step.
#pragma once

#include <capo/engine/error.h>

#include <cmath>
#include <cstdint>
#include <string>

namespace capo::train {

enum class Decay { constant, linear, cosine };
inline std::string to_string(Decay d) { return d == Decay::constant ? "constant" : d == Decay::linear ? "linear" : "cosine"; }

// at(s) is the rate of optimiser step s = 0, 1, ...: a linear ramp lr (s + 1) / warmup_steps over the first
// warmup_steps, whose last step has lr itself; then from lr at s = warmup_steps down to min_lr at s = total_steps, and
// min_lr ever after. With constant decay: lr after the ramp.
struct Schedule {
  Decay decay = Decay::cosine;
  double lr = 1e-3;
  double min_lr = 0;
  std::int64_t warmup_steps = 0;
  std::int64_t total_steps = 0;  // the warm-up included

  double at(std::int64_t step) const {
    CAPO_CHECK(step >= 0, "schedule: step must be >= 0, got ", step);
    if (step < warmup_steps) return lr * static_cast<double>(step + 1) / static_cast<double>(warmup_steps);
    if (decay == Decay::constant) return lr;
    const auto span = static_cast<double>(total_steps - warmup_steps);
    if (step >= total_steps || span <= 0) return min_lr;
    const double t = static_cast<double>(step - warmup_steps) / span;
    const double left = decay == Decay::linear ? 1 - t : 0.5 * (1 + std::cos(3.141592653589793 * t));
    return min_lr + (lr - min_lr) * left;
  }
  friend bool operator==(const Schedule&, const Schedule&) = default;
};

}  // namespace capo::train
