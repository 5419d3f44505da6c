// CUDA kernels that no op's table lists. attention_mma and attention_backward_mma are the parts of the attention op
// that run on tensor cores: attention.cu calls them first. conv_mma is conv.cu's.
#pragma once

#include <capo/ops/attention.h>
#include <capo/ops/conv.h>

#include <cstdint>

namespace capo::kernels {

// Attention on tensor cores, items (b, h) pairs: false, having done nothing, unless the dtype is 16-bit and the heads
// are at most 256 wide. backward reads delta, which attention.cu has filled.
bool attention_mma(const AttentionArgs& args, std::int64_t items, void* stream);
bool attention_backward_mma(const AttentionGradArgs& args, std::int64_t items, void* stream);

// Convolution and data gradient of 16-bit elements, all but depthwise; the parts alone where args.parts is given.
void conv_mma(const ConvDirectArgs& args, void* stream);

}  // namespace capo::kernels
