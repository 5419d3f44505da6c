#include <capo/engine/dtype.h>

namespace capo {

std::string to_string(DType t) {
  constexpr const char* names[] = {"f32", "f64", "bf16", "f16", "i32", "i64", "u8", "i8", "bool"};
  return names[static_cast<int>(t)];
}

Half to_f16(float v) {
  const auto u = std::bit_cast<std::uint32_t>(v);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};   // NaN
  if (a >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more: infinity
  if (a < 0x38800000u) {  // subnormal half: let the f32 adder round at the right bit
    const float r = std::bit_cast<float>(a) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(r) - 0x3f000000u))};
  }
  const std::uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

float to_f32(Half v) {
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x8000u) << 16;
  const std::uint32_t a = v.bits & 0x7fffu;
  if (a >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((a & 0x3ffu) << 13));
  if (a >= 0x400u) return std::bit_cast<float>(sign | ((a << 13) + 0x38000000u));
  const float magnitude = static_cast<float>(a) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

}  // namespace capo
