// Pooling over the space axes of channels-last images: x [B, spatial.., C] with one, two or three of them.
//
// Sizes    out = floor((in + 2 padding - kernel) / stride) + 1 >= 1 (no ceil mode); stride defaults to kernel, padding
//          to 0 and is at most kernel / 2. kernel, stride and padding name every space axis.
// dtypes   f32, f64; bf16 and f16 (means through f32 on the CPU; max_pool's gradient is summed in f32).
// The global average is mean(x, {1, 2}).
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

// The greatest of each window; padding never wins; NaN does. grad: to the first of equals, as in PyTorch. Each input
// gathers from the windows over it, so the bits do not depend on threads; keeps i32 positions. Any order.
Tensor max_pool(const Tensor& x, const Dims& kernel, const Dims& stride = {}, const Dims& padding = {});
// The mean of each window: of all of it, padding included as zeros, or of the part inside. grad: axis_filter's.
Tensor avg_pool(const Tensor& x, const Dims& kernel, const Dims& stride = {}, const Dims& padding = {},
                bool count_include_pad = true);
// Means of bins [floor(i in / out), ceil((i + 1) in / out)), which may overlap (torch.nn.AdaptiveAvgPool).
Tensor adaptive_avg_pool(const Tensor& x, const Dims& size);

inline Tensor max_pool2d(const Tensor& x, std::int64_t kernel, std::int64_t stride = 0, std::int64_t padding = 0) {
  return max_pool(x, {kernel, kernel}, Dims::filled(2, stride ? stride : kernel), {padding, padding});
}
inline Tensor avg_pool2d(const Tensor& x, std::int64_t kernel, std::int64_t stride = 0, std::int64_t padding = 0,
                         bool count_include_pad = true) {
  return avg_pool(x, {kernel, kernel}, Dims::filled(2, stride ? stride : kernel), {padding, padding},
                  count_include_pad);
}
inline Tensor adaptive_avg_pool2d(const Tensor& x, std::int64_t out_h, std::int64_t out_w) {
  return adaptive_avg_pool(x, {out_h, out_w});
}

// Missing space axes lead with size 1. One item per output pixel (forward) or input pixel (backward).
struct MaxPoolArgs {
  DType dtype;
  const void* x;        // forward: x; backward: dy
  void* y;              // forward: y; backward: dx
  std::int32_t* index;  // position of the winner within its image, [B, out.., C]; forward: may be null
  std::int64_t in[3], out[3], kernel[3], stride[3], padding[3], channels;
};

}  // namespace capo
