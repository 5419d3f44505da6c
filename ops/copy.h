// Creation, copies, casts and random fills.
#pragma once

#include <capo/engine/rng.h>
#include <capo/engine/tensor.h>

#include <vector>

namespace capo {

// Values go to integer dtypes as in cast().
Tensor full(const Shape& shape, double value, DType dtype = f32, Device device = kCpu);
inline Tensor zeros(const Shape& shape, DType dtype = f32, Device device = kCpu) {
  return full(shape, 0, dtype, device);
}
inline Tensor ones(const Shape& shape, DType dtype = f32, Device device = kCpu) {
  return full(shape, 1, dtype, device);
}
inline Tensor zeros_like(const Tensor& t) { return full(t.shape(), 0, t.dtype(), t.device()); }
Tensor arange(std::int64_t n, DType dtype = i64, Device device = kCpu);  // 0 .. n-1, cast from i64

// f32 or f64. uniform in [low, high), low <= high; normal by Box-Muller. Element i depends on its number and the
// generator's state only (engine/rng.h).
Tensor rand_uniform(const Shape& shape, Generator& rng, double low = 0, double high = 1, DType dtype = f32,
                    Device device = kCpu);
Tensor rand_normal(const Shape& shape, Generator& rng, double mean = 0, double std = 1, DType dtype = f32,
                   Device device = kCpu);

// x itself when its memory is row-major without gaps, else a copy that is. grad: identity.
Tensor contiguous(const Tensor& x);
// A fresh contiguous copy. grad: identity.
Tensor clone(const Tensor& x);
// Any dtype to any other; floating to integer truncates toward zero (a value outside the integer's range gives its
// nearest end, NaN 0), integer to a narrower one wraps around, to bool tests != 0. x itself when equal.
// grad (floating to floating): cast back.
Tensor cast(const Tensor& x, DType dtype);

// x on another device: x itself when it is there already, else a contiguous copy. To meta only the shape goes; from
// meta to anywhere throws. grad: back to x's device.
Tensor to(const Tensor& x, Device device);

// Writes src (same shape, cast if needed) into dst, which may be any view; in place, not recorded, bumps the version.
// With a mask (bool, same shape) only where it is true. dst must not repeat memory (an expanded axis throws), and src
// and mask must not overlap it: unless they are the same view, the spans from first to last element must not meet.
void copy_into(const Tensor& dst, const Tensor& src, const Tensor& mask = {});
// Every element of a contiguous dst; in place as above.
void fill_(const Tensor& dst, double value);

struct CopyArgs {
  DType src_dtype, dst_dtype;
  const void* src;
  void* dst;
  const bool* mask;  // or null
  int rank;
  std::int64_t shape[kMaxDims], ss[kMaxDims], sd[kMaxDims], sm[kMaxDims];
};
struct FillArgs {
  DType dtype;
  void* dst;
  double value;
  bool iota;  // dst[i] = i
};
struct RandomArgs {
  DType dtype;
  void* dst;
  RngRange range;
  double a, b;   // uniform: low, high; normal: mean, std
  bool normal;
};

}  // namespace capo
