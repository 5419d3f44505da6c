// How much of the summed axis the CPU's convolution sums at once (ops/cpu/conv.cpp). A result whose sum is longer is
// written, read and written again; the others may be added to what lies in their place.
#pragma once

#include <cstdint>

namespace capo {

inline constexpr std::int64_t kConvLongest = 2304;  // bytes of sources: a panel of 64 columns of weights is 144 KiB
inline constexpr std::int64_t kConvSegments = 32;   // pieces of them, each under a tap or under the taps of a line

}  // namespace capo
