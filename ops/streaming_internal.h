// How large a result is written past the caches (ops/cpu/half.h says how, ops/conv.cpp decides for convolutions).
#pragma once

#include <cstdint>

namespace capo {

// Bytes. No cache holds so much until it is read, and a plain store would first read what it replaces.
inline constexpr std::int64_t kStreamed = std::int64_t{32} << 20;

}  // namespace capo
