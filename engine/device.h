// Where a tensor lives.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace capo {

// meta: shapes only, no memory; the planner runs whole training steps on it.
enum class DeviceType : std::uint8_t { cpu, cuda, meta };

struct Device {
  DeviceType type = DeviceType::cpu;
  std::int8_t index = 0;

  bool is_cpu() const { return type == DeviceType::cpu; }
  bool is_cuda() const { return type == DeviceType::cuda; }
  bool is_meta() const { return type == DeviceType::meta; }
  friend bool operator==(Device a, Device b) { return a.type == b.type && a.index == b.index; }
};

inline constexpr Device kCpu{DeviceType::cpu, 0};
inline constexpr Device kMeta{DeviceType::meta, 0};

std::string to_string(Device d);        // "cpu", "cuda:0", "meta"
Device parse_device(std::string_view);  // inverse, "cuda" is "cuda:0", indices to 9; throws on anything else

}  // namespace capo
