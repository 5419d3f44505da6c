// CUDA kernels that no op's table lists: attention_mma is the part of the attention op that runs on tensor cores
// (attention.cu calls it first). sum and column_sum are driven by tests/shim alone: reduce.cu's own plan serves the ops.
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

// Attention forward on tensor cores, items (b, h) pairs: false, having done nothing, unless the dtype is 16-bit, the rows of
// q, k and v are 16-byte aligned, the heads at most 160 wide and dv even.
bool attention_mma(const AttentionArgs& args, std::int64_t items, void* stream);

}  // namespace kernels
}  // namespace capo
