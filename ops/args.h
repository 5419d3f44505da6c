// Small helpers that many ops share between their public function and their kernels' argument structs.
#pragma once

#include <capo/engine/tensor.h>
#include <capo/ops/copy.h>

namespace capo {

// Where a kernel reads or writes t: null for an undefined tensor and on the meta device, where nothing runs.
inline void* data_or_null(const Tensor& t) { return t.defined() && !t.device().is_meta() ? t.data() : nullptr; }

inline Tensor contiguous_or_undefined(const Tensor& t) { return t.defined() ? contiguous(t) : t; }
inline Tensor cast_or_undefined(const Tensor& t, DType dtype) { return t.defined() ? cast(t, dtype) : t; }

// Half on a device whose kernels have no 16-bit form: the op casts to f32, computes, and casts back.
inline bool through_f32(const Tensor& x) { return is_half(x.dtype()) && !x.device().is_cuda(); }

// The CPU kernels of row-wise ops widen a row of halves at a time into a buffer of this many elements; longer rows go
// through f32.
inline constexpr std::int64_t kHalfRow = 4096;
inline bool long_row_through_f32(const Tensor& x) { return through_f32(x) && x.size(-1) > kHalfRow; }

// A norm's weight or bias as its kernels take it: on the CPU never 16-bit.
inline Tensor channels_for_kernel(const Tensor& t) {
  return !t.defined() ? t : contiguous(through_f32(t) ? cast(t, f32) : t);
}

// In which type a kernel sums values of type t.
constexpr DType accumulator(DType t) { return t == f64 ? f64 : f32; }

// Rows per chunk, so that a chunk is about 16,384 elements: enough work to hide a fork, and never dependent on threads.
inline std::int64_t row_grain(std::int64_t columns) { return 1 + 16384 / (columns + 1); }

// Of ops that write in place. Between two different views whose spans of one storage meet, the result would depend on
// which thread comes first; a view onto itself is fine: each element is read and written by one thread.
inline void check_overlap(const char* op, const Tensor& dst, const Tensor& src) {  // of one shape
  if (!(dst.storage() == src.storage()) || dst.numel() == 0) return;
  bool same = dst.offset() == src.offset();
  std::int64_t dst_last = dst.offset(), src_last = src.offset();
  for (int i = 0; i < dst.rank(); ++i) {
    same = same && (dst.shape()[i] == 1 || dst.strides()[i] == src.strides()[i]);
    dst_last += (dst.shape()[i] - 1) * dst.strides()[i];
    src_last += (src.shape()[i] - 1) * src.strides()[i];
  }
  CAPO_CHECK(same || dst_last < src.offset() || src_last < dst.offset(), op,
             ": source and destination must not overlap in memory (clone the source), got ", dst.shape(), " at ",
             dst.offset(), " with strides ", dst.strides(), " from ", src.offset(), " with strides ", src.strides());
}

// Channel values [C] or [B, C] (a row for each sample) in the shape that broadcasts beside x [B, .., C].
inline Shape beside(const Tensor& x, const Shape& channels) {
  Shape s = Shape::filled(x.rank(), 1);
  if (channels.size() == 2) s[0] = channels[0];
  s[x.rank() - 1] = x.size(-1);
  return s;
}

// What reductions and index arithmetic take.
inline void check_summable(const char* op, const Tensor& x) {
  CAPO_CHECK(is_floating(x.dtype()) || x.dtype() == i32 || x.dtype() == i64, op, ": needs floating, i32 or i64, got ",
             describe(x));
}

// The checks of every weight, bias and statistic that belongs to x's last axis (`what` names it in the error).
// allow_f32: x may be bf16 or f16 while t is f32. or_each: t may also be [B, C], a row for each sample of x.
inline void check_channels(const char* op, const char* what, const Tensor& t, const Tensor& x, bool allow_f32 = true,
                           bool or_each = false) {
  if (!t.defined()) return;
  const Shape all{x.size(-1)};
  if (!or_each || x.rank() < 2)
    CAPO_CHECK(t.shape() == all, op, ": ", what, " must be ", all, " to match the last axis of x ", x.shape(), ", got ",
               t.shape());
  else
    CAPO_CHECK(t.shape() == all || t.shape() == (Shape{x.size(0), x.size(-1)}), op, ": ", what, " must be ", all,
               " or [", x.size(0), ", ", x.size(-1), "] beside x ", x.shape(), ", got ", t.shape());
  CAPO_CHECK(t.dtype() == x.dtype() || (allow_f32 && is_half(x.dtype()) && t.dtype() == f32), op, ": ", what, " is ",
             t.dtype(), ", x is ", x.dtype(), ": mixed dtypes, cast one");
  CAPO_CHECK(t.device() == x.device(), op, ": ", what, " is on ", t.device(), ", x is on ", x.device());
}

}  // namespace capo
