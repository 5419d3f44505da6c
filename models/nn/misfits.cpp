#include <capo/engine/error.h>
#include <capo/models/nn/misfits_internal.h>

namespace capo::nn {
namespace {

constexpr std::size_t kNamed = 5;

std::string told(const char* kind, const std::vector<std::string>& items) {
  if (items.empty()) return "";
  std::string text = cat("; ", items.size(), " ", kind, ":");
  for (std::size_t i = 0; i < items.size() && i < kNamed; ++i) text += cat(i ? ", " : " ", items[i]);
  return items.size() > kNamed ? text + ", .." : text;
}

}  // namespace

void Misfits::refuse(const std::string& who) const {
  CAPO_CHECK(missing.empty() && unexpected.empty() && misfitting.empty(), who, ": names, shapes and dtypes must agree",
             told("missing", missing), told("unexpected", unexpected), told("misfitting", misfitting));
}

}  // namespace capo::nn
