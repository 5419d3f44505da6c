// Kernels with one planted bug each, and a step whose rate and seed come by value or by pointer.
#pragma once

#include <cstdint>

namespace capo::planted {

enum class Bug {
  none, global_index, shared_index, carved_index, no_barrier, unwritten, wrong_mask, divergent_shuffle,
  divergent_barrier, early_exit, no_wait, shared_word, other_block, no_syncwarp
};

inline constexpr int kThreads = 96;

// y[i] = x of the mirrored thread in the block. x and y have blocks * kThreads elements, 16-byte aligned.
void mirror(Bug bug, const float* x, float* y, std::int64_t blocks);

struct StepState {
  float rate;
  std::uint32_t seed;
};

// One step of w -= rate * mask(seed, i) * g, the mask by a hash. With `frozen` rate and seed are arguments; otherwise
// the kernel reads them from the device's state.
void step(bool frozen, float* w, const float* g, std::int64_t n, float rate, std::uint32_t seed,
          const StepState* state);

// d [16, 8] = a [16, 16] b^T with b [8, 16], bf16 or f16 bits: A through ldmatrix, B as documented in ptx.h. The rows
// of a are 16-byte aligned. wrong counts (lane, register) pairs where ldmatrix differs from the documented fragment.
void tile_product(bool is_bf16, const std::uint16_t* a, const std::uint16_t* b, float* d, int* wrong);

}  // namespace capo::planted
