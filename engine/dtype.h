// Element types and the two 16-bit storage formats.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <string_view>

namespace capo {

enum class DType : std::uint8_t { f32, f64, bf16, f16, i32, i64, u8, i8, boolean };

inline constexpr DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16, i32 = DType::i32,
                       i64 = DType::i64, u8 = DType::u8, i8 = DType::i8, boolean = DType::boolean;

constexpr std::size_t size_of(DType t) {
  constexpr std::uint8_t bytes[] = {4, 8, 2, 2, 4, 8, 1, 1, 1};
  return bytes[static_cast<int>(t)];
}
constexpr bool is_floating(DType t) { return t == f32 || t == f64 || t == bf16 || t == f16; }
constexpr bool is_half(DType t) { return t == bf16 || t == f16; }  // 16-bit storage, computed in f32
constexpr bool is_integer(DType t) { return t == i32 || t == i64 || t == u8 || t == i8; }

// "f32", "bf16", "bool", ...
std::string to_string(DType t);

// Storage of a brain float / IEEE half; arithmetic is always done in f32.
struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

// Round to nearest even; NaN stays NaN.
constexpr BFloat16 to_bf16(float v) {
  const auto u = std::bit_cast<std::uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
constexpr float to_f32(BFloat16 v) { return std::bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16); }
Half to_f16(float v);  // round to nearest even, overflow to infinity
float to_f32(Half v);

// C++ type -> DType, for data<T>() checks.
template <class T>
struct dtype_of;
template <> struct dtype_of<float> { static constexpr DType value = f32; };
template <> struct dtype_of<double> { static constexpr DType value = f64; };
template <> struct dtype_of<BFloat16> { static constexpr DType value = bf16; };
template <> struct dtype_of<Half> { static constexpr DType value = f16; };
template <> struct dtype_of<std::int32_t> { static constexpr DType value = i32; };
template <> struct dtype_of<std::int64_t> { static constexpr DType value = i64; };
template <> struct dtype_of<std::uint8_t> { static constexpr DType value = u8; };
template <> struct dtype_of<std::int8_t> { static constexpr DType value = i8; };
template <> struct dtype_of<bool> { static constexpr DType value = boolean; };

}  // namespace capo
