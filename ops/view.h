// Views: results share x's storage; only shape and strides change. Any dtype, any device. Each gradient is the inverse
// view (or its adjoint), so all orders exist.
#pragma once

#include <capo/engine/tensor.h>

#include <vector>

namespace capo {

// Same elements in row-major order; one size may be -1. Copies (recorded) when no strides can describe the result.
Tensor reshape(const Tensor& x, const Shape& shape);
// y.shape[i] = x.shape[axes[i]]; axes a permutation, negatives allowed.
Tensor permute(const Tensor& x, const Dims& axes);
Tensor transpose(const Tensor& x, std::int64_t a, std::int64_t b);
// Size-1 (or missing leading) axes repeated without memory. grad: sum_to.
Tensor expand(const Tensor& x, const Shape& shape);
// x[..., begin:end:step, ...] on one axis; 0 <= begin <= end <= size, step >= 1. grad: zeros with dy put back.
Tensor slice(const Tensor& x, std::int64_t axis, std::int64_t begin, std::int64_t end, std::int64_t step = 1);
// slice of width 1 without the axis.
Tensor select(const Tensor& x, std::int64_t axis, std::int64_t index);
// x cut along one axis into size(axis) views without that axis. grad: one buffer, filled from the parts.
std::vector<Tensor> unbind(const Tensor& x, std::int64_t axis);
Tensor squeeze(const Tensor& x, std::int64_t axis);
Tensor unsqueeze(const Tensor& x, std::int64_t axis);  // axis of the result
// Axes first..last (inclusive) become one.
Tensor flatten(const Tensor& x, std::int64_t first = 0, std::int64_t last = -1);
// The value without its history: the only op that cuts a gradient.
Tensor stop_gradient(const Tensor& x);

}  // namespace capo
