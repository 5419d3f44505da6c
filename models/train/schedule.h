// Learning-rate schedules: pure functions of the optimiser step.
#pragma once

#include <cstdint>
#include <string>

namespace capo::train {

enum class Decay { constant, linear, cosine };
std::string to_string(Decay d);

// at(s) is the rate of optimiser step s = 0, 1, ...: a linear ramp lr (s + 1) / warmup_steps over the first
// warmup_steps, whose last step has lr itself; then from lr at s = warmup_steps down to min_lr at s = total_steps, and
// min_lr ever after. With constant decay: lr after the ramp.
struct Schedule {
  Decay decay = Decay::cosine;
  double lr = 1e-3;
  double min_lr = 0;
  std::int64_t warmup_steps = 0;
  std::int64_t total_steps = 0;  // the warm-up included

  double at(std::int64_t step) const;
  friend bool operator==(const Schedule&, const Schedule&) = default;
};

}  // namespace capo::train
