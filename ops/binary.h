// Elementwise functions of two tensors with NumPy broadcasting, comparisons and selection.
//
// dtypes  a and b equal: f32, f64, i32, i64, bf16 and f16 (computed in f32); comparisons give bool, logic takes
//         bool. No promotion: mixed dtypes throw, cast explicitly.
// grad    add, sub, mul, div, maximum, minimum (ties: the gradient goes to a), made of ops: any order. A NaN is
//         the maximum and the minimum and takes the gradient, a's if both are NaN.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

enum class BinaryKind : int { add, sub, mul, div, maximum, minimum, eq, ne, lt, le, gt, ge, logical_and, logical_or };
const char* name_of(BinaryKind kind);

Tensor binary(BinaryKind kind, const Tensor& a, const Tensor& b);

inline Tensor add(const Tensor& a, const Tensor& b) { return binary(BinaryKind::add, a, b); }
inline Tensor sub(const Tensor& a, const Tensor& b) { return binary(BinaryKind::sub, a, b); }
inline Tensor mul(const Tensor& a, const Tensor& b) { return binary(BinaryKind::mul, a, b); }
inline Tensor div(const Tensor& a, const Tensor& b) { return binary(BinaryKind::div, a, b); }
inline Tensor maximum(const Tensor& a, const Tensor& b) { return binary(BinaryKind::maximum, a, b); }
inline Tensor minimum(const Tensor& a, const Tensor& b) { return binary(BinaryKind::minimum, a, b); }
inline Tensor equal(const Tensor& a, const Tensor& b) { return binary(BinaryKind::eq, a, b); }
inline Tensor not_equal(const Tensor& a, const Tensor& b) { return binary(BinaryKind::ne, a, b); }
inline Tensor less(const Tensor& a, const Tensor& b) { return binary(BinaryKind::lt, a, b); }
inline Tensor less_equal(const Tensor& a, const Tensor& b) { return binary(BinaryKind::le, a, b); }
inline Tensor greater(const Tensor& a, const Tensor& b) { return binary(BinaryKind::gt, a, b); }
inline Tensor greater_equal(const Tensor& a, const Tensor& b) { return binary(BinaryKind::ge, a, b); }
inline Tensor logical_and(const Tensor& a, const Tensor& b) { return binary(BinaryKind::logical_and, a, b); }
inline Tensor logical_or(const Tensor& a, const Tensor& b) { return binary(BinaryKind::logical_or, a, b); }

// The scalar side takes the tensor's dtype, here and in the operators; beside integers it must be whole.
Tensor greater(const Tensor& a, double b);
Tensor greater_equal(const Tensor& a, double b);
Tensor less_equal(const Tensor& a, double b);
Tensor less(const Tensor& a, double b);

inline Tensor operator+(const Tensor& a, const Tensor& b) { return add(a, b); }
inline Tensor operator-(const Tensor& a, const Tensor& b) { return sub(a, b); }
inline Tensor operator*(const Tensor& a, const Tensor& b) { return mul(a, b); }
inline Tensor operator/(const Tensor& a, const Tensor& b) { return div(a, b); }
Tensor operator+(const Tensor& a, double b);
Tensor operator-(const Tensor& a, double b);
Tensor operator*(const Tensor& a, double b);
Tensor operator/(const Tensor& a, double b);
Tensor operator-(double a, const Tensor& b);
inline Tensor operator+(double a, const Tensor& b) { return b + a; }
inline Tensor operator*(double a, const Tensor& b) { return b * a; }
Tensor operator-(const Tensor& a);

// condition ? a : b, all three broadcast; condition is bool. grad: to a where true, to b where false.
Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b);

// Sums x down to `shape` (the inverse of broadcasting). grad: expand.
Tensor sum_to(const Tensor& x, const Shape& shape);

// In place: a is f32 or f64, contiguous, not made by an op, and a leaf only under NoGrad; its version is bumped. A
// contiguous b may be a itself, but must not overlap it otherwise.
void add_(const Tensor& a, const Tensor& b, double scale = 1.0);  // a += scale * b, of equal shape, dtype and device
void mul_(const Tensor& a, double scale);                         // a *= scale

struct BinaryArgs {
  BinaryKind kind;
  DType dtype;  // of a and b
  const void *a, *b;
  void* y;
  int rank;  // of the collapsed loop nest, >= 1
  std::int64_t shape[kMaxDims], sa[kMaxDims], sb[kMaxDims];
};
struct WhereArgs {
  int element_bytes;  // of a, b and y: 1, 2, 4 or 8; values are moved as they are
  const bool* condition;
  const void *a, *b;
  void* y;
  int rank;  // as above
  std::int64_t shape[kMaxDims], sc[kMaxDims], sa[kMaxDims], sb[kMaxDims];
};
struct AxpyArgs {
  DType dtype;
  void* a;
  const void* b;  // null: scale only
  double scale;
};

}  // namespace capo
