// Joining, cutting and rearranging along axes. Any dtype, any device; nothing is computed, elements move.
//
// Gradients are ops of the same kind (slices, concatenations, the opposite roll), so all orders exist. Contiguous
// results, except for split and chunk, which are views.
#pragma once

#include <capo/engine/tensor.h>

#include <vector>

namespace capo {

// Tensors of one dtype, device and shape except along `axis`, one after the other. At least one.
Tensor concat(const std::vector<Tensor>& xs, std::int64_t axis);
// Equal shapes along a new axis (an axis of the result).
Tensor stack(const std::vector<Tensor>& xs, std::int64_t axis);

// Views x[..., sum(sizes[:i]) : + sizes[i], ...]; the sizes must add up to x.size(axis). One node with one gradient, a
// concat: cheaper than so many slices.
std::vector<Tensor> split(const Tensor& x, const std::vector<std::int64_t>& sizes, std::int64_t axis);
// split into `chunks` equal parts; x.size(axis) must divide.
std::vector<Tensor> chunk(const Tensor& x, std::int64_t chunks, std::int64_t axis);

// before[i] elements of `value` in front of axis i and after[i] behind it; both name every axis, none negative.
Tensor pad(const Tensor& x, const Dims& before, const Dims& after, double value = 0);
// Reverses the order along the axes.
Tensor flip(const Tensor& x, const Dims& axes);
// y[(i + shifts[k]) mod n] = x[i] along axes[k]; any sign of shift.
Tensor roll(const Tensor& x, const Dims& shifts, const Dims& axes);
// The whole tensor counts[i] times along axis i (NumPy's tile, torch's Tensor.repeat). counts may name more axes than
// x has: new leading ones. Rank of the result at most 7.
Tensor repeat(const Tensor& x, const Dims& counts);

}  // namespace capo
