// What every U-Net asks of its input.
#pragma once

#include <capo/engine/tensor.h>

namespace capo::unet {

// Throws unless x is [B, spatial.., channels] with as many spatial axes as divisor, each size a positive multiple of
// its entry.
void check_sizes(const Tensor& x, std::int64_t channels, const Dims& divisor);

}  // namespace capo::unet
