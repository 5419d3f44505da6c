// CUDA kernels that no op's table lists. attention_mma and attention_backward_mma are the parts of the attention op that
// run on tensor cores: attention.cu calls them first.
#pragma once

#include <capo/ops/attention.h>

#include <cstdint>

namespace capo::kernels {

// Attention on tensor cores, items (b, h) pairs: false, having done nothing, unless the dtype is 16-bit and the heads
// are at most 256 wide. backward reads delta, which attention.cu has filled.
bool attention_mma(const AttentionArgs& args, std::int64_t items, void* stream);
bool attention_backward_mma(const AttentionGradArgs& args, std::int64_t items, void* stream);

}  // namespace capo::kernels
