// What the Trainer says when a step finds no memory.
#pragma once

#include <capo/models/train/trainer.h>

namespace capo::train {

// What a step of `task` holds on the model's device: weights, optimiser state, averages, and what its forward pass
// keeps for the backward, by module; an empty batch leaves that out. The forward is run again for it, as far as
// it gets.
std::string what_is_held(Task& task, const Optimizer& optimizer, const Ema* ema, const Batch& batch);

}  // namespace capo::train
