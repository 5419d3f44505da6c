#include <capo/engine/device.h>
#include <capo/engine/error.h>

namespace capo {

std::string to_string(Device d) {
  switch (d.type) {
    case DeviceType::cpu: return "cpu";
    case DeviceType::cuda: return "cuda:" + std::to_string(d.index);
    case DeviceType::meta: return "meta";
  }
  return "?";
}

Device parse_device(std::string_view text) {
  if (text == "cpu") return kCpu;
  if (text == "meta") return kMeta;
  if (text == "cuda") return {DeviceType::cuda, 0};
  if (text.size() == 6 && text.substr(0, 5) == "cuda:" && text[5] >= '0' && text[5] <= '9')
    return {DeviceType::cuda, static_cast<std::int8_t>(text[5] - '0')};
  detail::fail("device: must be cpu, cuda, cuda:N or meta, got \"", text, "\"");
}

}  // namespace capo
