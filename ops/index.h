// Reading and writing at positions given by i64 tensors, and ops whose results are such positions.
//
// Indices are i64, in [0, size); a wrong one throws "index must be in [0, 5), got 7 at [3]". On CUDA that look is one
// small kernel and one wait for the stream per call of an op of this page (gradients do not look again); in a captured
// graph the replay throws (engine/graph.h). Duplicates are added in the order in which they stand, so the bits never
// depend on threads. Gradients are ops of this page: all orders exist.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

// y[.., k, ..] = x[.., index[k], ..] on one axis; index [K]. Any dtype. grad: index_add into zeros.
Tensor index_select(const Tensor& x, std::int64_t axis, const Tensor& index);
// base with src[.., k, ..] added at [.., index[k], ..]; src has base's shape but K on the axis. f32, f64, i32, i64
// (bf16 and f16 summed in f32). grad: dy to base, index_select to src.
Tensor index_add(const Tensor& base, std::int64_t axis, const Tensor& index, const Tensor& src);

// y[i, j, k] = x[i, index[i, j, k], k] (axis 1 of 3): index and y have one shape, at most x's on the other axes
// (torch.gather). Any dtype. grad: scatter_add into zeros.
Tensor gather(const Tensor& x, std::int64_t axis, const Tensor& index);
// base with src[i, j, k] added at [i, index[i, j, k], k]; src and index have one shape (torch.scatter_add). dtypes as
// index_add. grad: dy to base, gather to src.
Tensor scatter_add(const Tensor& base, std::int64_t axis, const Tensor& index, const Tensor& src);

// Rows of weight [V, C]: ids [...] give [..., C].
Tensor embedding(const Tensor& weight, const Tensor& ids);
// 1 at ids[...], else 0: [..., classes]. No gradient.
Tensor one_hot(const Tensor& ids, std::int64_t classes, DType dtype = f32);

struct TopK {
  Tensor values;   // x.shape with k on the axis, best first; differentiable
  Tensor indices;  // i64
};
// The k greatest (or smallest) along an axis, sorted; equal ones by position; NaN counts as the greatest, as in
// PyTorch. k = size sorts. dtypes as index_add.
TopK topk(const Tensor& x, std::int64_t k, std::int64_t axis = -1, bool largest = true);

// i64 position of the extreme along an axis: the first of equals; the first NaN, if there is one. No gradient.
Tensor argmax(const Tensor& x, std::int64_t axis, bool keepdim = false);
Tensor argmin(const Tensor& x, std::int64_t axis, bool keepdim = false);

// Tensors seen as [outer, axis, inner], contiguous. index_select: one item per row of y, outer x count of them.
struct IndexSelectArgs {
  std::int64_t element_bytes;
  const void* x;  // [outer, size, inner]
  const std::int64_t* index;
  void* y;  // [outer, count, inner]
  std::int64_t size, count, inner;
};
// The least place whose index is outside [0, size) and not `ignore`, by each of `items` blocks; n: none. CUDA only.
struct IndexCheckArgs {
  const std::int64_t* index;
  std::int64_t size, n;
  std::int64_t* first_wrong;  // [items]
  std::int64_t ignore;
  std::int64_t* safe;         // [n] or null: index, 0 in place of what is outside
  std::int64_t* found;        // Graph::add_check's, or null
};
constexpr std::int64_t index_check_blocks(std::int64_t n) { return n < 256 * 1024 ? (n + 1023) / 1024 : 256; }
// One item per 64 columns: outer x ceil(inner / 64); each adds its rows in the order of index.
struct IndexAddArgs {
  DType dtype;
  const void* src;  // [outer, count, inner]
  const std::int64_t* index;
  void* y;  // [outer, size, inner], holds base
  std::int64_t size, count, inner;
  std::int64_t* scratch;  // CUDA: [3, count], to sort the index; CPU: null
};
// One item per element of index (contiguous, like y).
struct GatherArgs {
  std::int64_t element_bytes;
  const void* x;
  const std::int64_t* index;
  void* y;
  int rank, axis;
  std::int64_t shape[kMaxDims];  // of index
  std::int64_t sx[kMaxDims];     // of x
};
// One item per column: an element of index's shape without the axis.
struct ScatterAddArgs {
  DType dtype;
  const void* src;  // contiguous, like index
  const std::int64_t* index;
  void* y;                                                   // contiguous, holds base
  int rank;                                                  // without the axis, >= 1
  std::int64_t shape[kMaxDims], ss[kMaxDims], sy[kMaxDims];  // without the axis
  std::int64_t count, src_step, y_step;                      // along the axis
};
// One item per row.
struct TopKArgs {
  DType dtype;
  const void* x;          // [rows, size]
  std::int64_t* indices;  // [rows, k]
  std::int64_t size, k;
  bool largest;
  std::int64_t* scratch;  // CUDA: [2, rows, size], to sort; CPU: null
};
// One item per 64 columns, as IndexAddArgs.
struct ArgExtremeArgs {
  DType dtype;
  const void* x;    // [outer, size, inner]
  std::int64_t* y;  // [outer, inner]
  std::int64_t size, inner;
  bool largest;
};

}  // namespace capo
