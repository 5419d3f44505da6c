// CUDA kernels that no op's table lists: attention_mma is the part of the attention op that runs on tensor cores
// (attention.cu calls it first).
#pragma once

#include <capo/ops/attention.h>

#include <cstdint>

namespace capo::kernels {

// Attention forward on tensor cores, items (b, h) pairs: false, having done nothing, unless the dtype is 16-bit, the rows of
// q, k and v are 16-byte aligned, the heads at most 160 wide and dv even.
bool attention_mma(const AttentionArgs& args, std::int64_t items, void* stream);

}  // namespace capo::kernels
