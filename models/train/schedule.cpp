#include <capo/engine/error.h>
#include <capo/models/train/schedule.h>

#include <cmath>

namespace capo::train {

std::string to_string(Decay d) {
  return d == Decay::constant ? "constant" : d == Decay::linear ? "linear" : "cosine";
}

double Schedule::at(std::int64_t step) const {
  CAPO_CHECK(step >= 0, "schedule: step must be >= 0, got ", step);
  if (step < warmup_steps) return lr * static_cast<double>(step + 1) / static_cast<double>(warmup_steps);
  if (decay == Decay::constant) return lr;
  const auto span = static_cast<double>(total_steps - warmup_steps);
  if (step >= total_steps || span <= 0) return min_lr;
  const double t = static_cast<double>(step - warmup_steps) / span;
  const double left = decay == Decay::linear ? 1 - t : 0.5 * (1 + std::cos(3.141592653589793 * t));
  return min_lr + (lr - min_lr) * left;
}

}  // namespace capo::train
