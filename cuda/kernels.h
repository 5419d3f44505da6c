// CUDA kernels that no op's table lists. attention_mma and attention_backward_mma are the parts of the attention op that
// run on tensor cores: attention.cu calls them first. sum and column_sum are driven by tests/shim alone: reduce.cu's own
// plan serves the ops.
#pragma once

#include <capo/ops/attention.h>

#include <cstdint>

namespace capo {

// y = the sum of x[0..n) in a fixed order: chunks of kSumChunk into part, whose sum one block takes. No atomics.
inline constexpr std::int64_t kSumChunk = 4096;
struct SumArgs {
  const float* x;
  float* part;  // [sum_chunks(n)] scratch
  float* y;     // [1]; 0 when n == 0
  std::int64_t n;
};
constexpr std::int64_t sum_chunks(std::int64_t n) { return (n + kSumChunk - 1) / kSumChunk; }

// y[c] = sum over r of x[r, c], rows in order: the second stage of weight gradients.
struct ColumnSumArgs {
  const float* x;  // [rows, columns]
  float* y;        // [columns]
  std::int64_t rows, columns;
};

namespace kernels {

void sum_cuda(const SumArgs& args, void* stream);
void column_sum_cuda(const ColumnSumArgs& args, void* stream);

// Attention on tensor cores, items (b, h) pairs: false, having done nothing, unless the dtype is 16-bit and the heads
// are at most 256 wide. backward reads delta, which attention.cu has filled.
bool attention_mma(const AttentionArgs& args, std::int64_t items, void* stream);
bool attention_backward_mma(const AttentionGradArgs& args, std::int64_t items, void* stream);

}  // namespace kernels
}  // namespace capo
