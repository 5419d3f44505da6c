// Between cuda/gemm.cu, our own kernels, and cuda/cublaslt.cpp.
#pragma once

#include <capo/ops/matmul.h>

namespace capo {

// c[rows, n] = act(sum over chunks of src[chunk, rows, n] + bias) + residual, and z before the activation. src may be c
// or z, whose rows then follow each other.
struct GemmFinishArgs {
  DType dtype, src_dtype;  // src: f32, or like the rest
  const void *src, *bias;
  void *z, *c;
  Activation activation;
  std::int64_t chunks, rows, n;
  const void* residual;  // or null; only without activation
  std::int64_t c_row;    // from one row of c, z and residual to the next
};

namespace kernels {

void gemm_finish_cuda(const GemmFinishArgs& args, void* stream);

// Whether cuBLASLt has an algorithm for the product; multiply returns false, having done nothing, when it has none.
bool cublaslt_takes(const GemmArgs& args, void* stream);
bool cublaslt_multiply(const GemmArgs& args, void* stream);

}  // namespace kernels
}  // namespace capo
