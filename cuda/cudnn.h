// cuDNN as a path of our ops beside their own kernels (cuda/cudnn_conv.cpp, cuda/cudnn_attention.cpp). Needs no header
// of cuDNN's.
#pragma once

#include <capo/ops/attention.h>
#include <capo/ops/conv.h>

namespace capo::kernels {

// Off unless the environment says CAPO_CUDNN=1 (or =log: also a line to the log sink for each new problem, with the
// engine chosen or why our own kernel runs); until it has passed the tests on a card. Each throws where it is wanted
// and the build or the machine has no cuDNN 9, and returns false, having done nothing, where it is off or has no plan
// that keeps our contract: same bits every time, sums in f32, f32 operands not rounded.
bool cudnn_conv(const ConvDirectArgs& args, void* stream);
bool cudnn_conv_weight_gradient(const ConvWeightPartsArgs& args, void* stream);
// items: (b, h) pairs. The backward takes what asks for dq, dk and dv and has no dlse; it makes delta itself, and where
// it returns false some of the results and delta may have been written.
bool cudnn_attention(const AttentionArgs& args, std::int64_t items, void* stream);
bool cudnn_attention_backward(const AttentionGradArgs& args, std::int64_t items, void* stream);

}  // namespace capo::kernels
