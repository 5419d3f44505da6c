// Matrix products: matmul, linear with its bias and activation in the product's epilogue, and add_linear, which adds to
// a result that is already there.
//
// dtypes  a, b (x, w, b) equal: f32, f64; bf16 and f16 summed in f32 and rounded once (CPU: bf16 dot products where the
//         processor has them, else widened as they are packed; CUDA: tensor cores, no f64). Mixed dtypes and devices
//         throw.
// bits    sums are blocked by shape only: the same for any thread count.
// bf16    with set_matmul_precision(bf16), f32 operands are rounded to bf16 on their way in and summed in f32.
#pragma once

#include <capo/engine/tensor.h>
#include <capo/ops/activation.h>

#include <vector>

namespace capo {

// How matmul and linear, and their gradients, take f32 operands: as they are, or rounded to bf16 (nearest, ties to
// even) with f32 products and sums, which is up to twice as fast where the processor has bf16 dot products and merely
// rounded where it has not. For the whole process, f32 unless set; f64 is never touched. PyTorch's
// set_float32_matmul_precision("medium"). Another dtype than these two throws.
DType matmul_precision();
void set_matmul_precision(DType precision);

// CUDA: whether a product of a new shape times the first offers of cuBLASLt and keeps the fastest for the process,
// instead of taking the first one. A few milliseconds for each shape. Off unless set: which offer wins may differ from
// one process to the next, and with it the last bits; within a process they repeat.
bool product_tuning();
void set_product_tuning(bool on);

// [..., M, K] x [..., K, N] -> [..., M, N], contiguous. Leading axes broadcast. Any strides, read without copies. K = 0
// gives zeros. A rank below 2 throws.
// grad  da = dy b^T, db = a^T dy, summed over broadcast axes; made of ops: any order.
Tensor matmul(const Tensor& a, const Tensor& b);

// act(x w^T + b): x [..., I] of rank >= 1, w [O, I], b [O] or undefined -> [..., O], contiguous (PyTorch's Linear).
// grad  dx = dz w, dw = dz^T x, db = sum of dz's rows, dz = dy act'(z); made of ops, except that a first-order dz comes
//       from a fused kernel. Keeps x only for dw, w only for dx, and for the activation z = x w^T + b (relu: y itself).
//   Tensor hidden = linear(x, fc1_weight, fc1_bias, Activation::gelu);  // [B, N, 768] -> [B, N, 3072]
Tensor linear(const Tensor& x, const Tensor& w, const Tensor& b = {}, Activation activation = Activation::none);

// r with x w^T + b of each branch added to its columns: columns column .. column + O' of the result are those of r plus
// x w^T + b, the others r's own. r [..., O], x [..., I] with r's leading axes, w [O', I], b [O'] or undefined; one to
// eight branches, their columns in ascending order and apart. The sum joins the product where it is written: no pass
// over r, no tensor of r's size besides the result. What a LoRA (its last product) and an adapter add to a frozen
// layer. Values: add's of r and linear's.
// grad  dr = dy; dx, dw, db are linear's of dy's columns, as is what is kept.
//   y = add_linear(y, {{linear(x, a), b}});  // y + (x a^T) b^T
struct LinearBranch {
  Tensor x, w, b = {};
  std::int64_t column = 0;
};
Tensor add_linear(const Tensor& r, const std::vector<LinearBranch>& branches);

constexpr std::int64_t kMatmulPackedBytes = 256 << 10;  // of the packed part of A that a work item keeps

// C[batch, m, n] = act(A B + bias) + residual. A work item of the kernel is one (batch, chunk of k, block of rows,
// block of columns); with `parts` each chunk's sum goes to its own plane of `c`, which matmul_sum joins and finishes.
struct MatmulArgs {
  DType dtype;          // of a, b, bias, z and c; parts are f32 where it has 16 bits
  const void *a, *b;    // b: the matrix, or the panels that matmul_pack made of it
  bool packed;
  bool bf16;            // f32 operands are rounded to bf16
  bool bf16_dot;        // bf16 operands, stored or rounded: multiplied by the processor's bf16 dot product
  bool a_in_place;      // A's rows are read as they lie, at most 256 a block; else packed, unless turned, at most 96
  std::int64_t a_part;  // packed: so long a part of k fits; 16-bit C without parts: k_chunk at most
  bool parts;
  bool dots;            // a_in_place, b_k = 1, few rows or columns: vectors along k, nothing packed
  bool turned;          // f32 and f64: a_row = b_col = 1, a long k: A's columns are read as they lie, nothing packed
  bool far;             // C is larger than what a cache holds
  const void* bias;     // [n] or null
  void* z;              // where A B + bias goes as well, or null
  void* c;              // [batch, k_chunks, m, n]
  const void* residual; // laid out like c, or null; only without activation
  std::int64_t c_row;   // from one row of c, z and residual to the next; n for chunks of k
  Activation activation;
  std::int64_t m, n, k;
  std::int64_t a_row, a_k, b_k, b_col;  // strides
  int rank;             // of the batch
  std::int64_t batch[kMaxDims], sa[kMaxDims], sb[kMaxDims];  // packed: sb counts packed matrices
  std::int64_t row_block, col_block, k_chunk;
  std::int64_t row_blocks, col_blocks, k_chunks;
};
// An item is a panel group: (matrix, block of k, 64 columns). packed: [matrix][block of k][panel][k][column]; with
// bf16_dot two neighbours along k share one 32-bit element.
struct MatmulPackArgs {
  DType dtype;
  bool bf16, bf16_dot;
  const void* b;
  void* packed;
  std::int64_t n, k, k_chunk, b_k, b_col;
  int rank;
  std::int64_t batch[kMaxDims], sb[kMaxDims];
};
// c[i] = act(sum over chunks of parts[batch, chunk, i] + bias) + residual; items are elements of c.
struct MatmulSumArgs {
  DType dtype;
  const void* parts;
  const void* bias;
  void *z, *c;
  Activation activation;
  std::int64_t chunks, plane, n;  // plane = m * n
  const void* residual;           // or null
  std::int64_t c_row;             // of c, z and residual
};

// The same product on CUDA, nothing packed: c[matrices, m, n] = act(a b + bias) + residual. With k_chunks > 1 the sums
// of each chunk of k go to their own plane of `parts`, and a second kernel adds them in order.
struct GemmArgs {
  DType dtype;
  bool bf16;             // f32 operands are rounded to bf16
  const void *a, *b, *bias;
  void *z, *c;
  const void* residual;  // or null; only without activation and z
  std::int64_t c_row;    // from one row of c, z and residual to the next
  void* a_sums;          // [m]: the sums of a over k, or null; only where the library takes it, and for one matrix
  float* parts;          // [k_chunks, matrices, m, n], or null
  Activation activation;
  std::int64_t m, n, k;
  std::int64_t a_row, a_k, b_k, b_col;
  int rank;
  std::int64_t batch[kMaxDims], sa[kMaxDims], sb[kMaxDims];
  std::int64_t matrices, k_chunk, k_chunks;
};

}  // namespace capo
