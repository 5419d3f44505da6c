#include <capo/models/nn/misfits_internal.h>
#include <capo/models/train/named.h>
#include <capo/ops/copy.h>

#include <unordered_map>

namespace capo::train {

Tensor to_host(const Tensor& t) { return to_device(t, kCpu); }

Tensor to_device(const Tensor& t, Device device) {
  const NoGrad off;
  return to(t, device);
}

nn::StateDict copy_out(const StateList& list) {
  const NoGrad off;
  nn::StateDict dict;
  dict.reserve(list.size());
  for (const auto& s : list) dict.push_back({s.name, nn::to_file_layout(to_host(s.value).detach(), s.layout)});
  return dict;
}

void check_names(const std::string& who, const StateList& list, const nn::StateDict& dict) {
  std::unordered_map<std::string, const Tensor*> given;
  nn::Misfits misfits;
  for (const auto& t : dict)
    CAPO_CHECK(given.emplace(t.name, &t.value).second, who, ": names must be unique, got ", t.name, " twice");
  for (const auto& s : list) {
    const auto it = given.find(s.name);
    if (it == given.end()) {
      misfits.missing.push_back(s.name);
      continue;
    }
    const Tensor& t = *it->second;
    const Shape wanted = nn::file_shape(s.value.shape(), s.layout);
    if (t.shape() != wanted || t.dtype() != s.value.dtype())
      misfits.misfitting.push_back(
          cat(s.name, " must be ", s.value.dtype(), " ", wanted, ", got ", t.dtype(), " ", t.shape()));
    given.erase(it);
  }
  for (const auto& t : dict)
    if (given.count(t.name)) misfits.unexpected.push_back(t.name);
  misfits.refuse(who);
}

void copy_in(const std::string& who, const StateList& list, const nn::StateDict& dict) {
  check_names(who, list, dict);
  const NoGrad off;
  std::unordered_map<std::string, const Tensor*> given;
  for (const auto& t : dict) given[t.name] = &t.value;
  for (const auto& s : list) {
    const Tensor ours = nn::from_file_layout(to_device(*given.at(s.name), s.value.device()), s.layout);
    copy_into(s.value, ours);
  }
}

}  // namespace capo::train
