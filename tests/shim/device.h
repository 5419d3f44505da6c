// The shim's devices as tests set them and see them (backend.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace capo::shim {

struct DeviceSettings {
  int devices = 1;            // at most 2
  std::string why_none = "";  // what devices = 0 says
  std::size_t limit = SIZE_MAX;  // bytes of a device
  bool caching = false;       // blocks made from here on come from the engine's caching allocator, as on a card, in
                              // place of blocks of exact size that nobody reuses
};
DeviceSettings& device_settings();

// Puts the settings back.
class DeviceSettingsScope {
 public:
  DeviceSettingsScope() : before_(device_settings()) {}
  ~DeviceSettingsScope() { device_settings() = before_; }
  DeviceSettingsScope(const DeviceSettingsScope&) = delete;
  DeviceSettingsScope& operator=(const DeviceSettingsScope&) = delete;

 private:
  DeviceSettings before_;
};

int current_device();         // of the calling thread, as kernels find it
std::size_t used_bytes(int index);  // taken from the device, cached blocks too
std::size_t waiting_copies();

}  // namespace capo::shim
