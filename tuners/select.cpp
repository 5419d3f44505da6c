#include <capo/models/nn/conv_layers.h>
#include <capo/models/nn/layers.h>
#include <capo/tuners/select.h>

#include <algorithm>

namespace capo::tuners {
namespace {

template <class... T>
bool is_any(nn::Module& m) {
  return (dynamic_cast<T*>(&m) || ...);
}
int groups_of(nn::Module& m) {
  const auto* conv = dynamic_cast<nn::Conv*>(&m);
  return conv ? conv->options.groups : 0;
}

// Some kernel axis has more than one tap.
bool is_spatial(nn::Module& m) {
  const auto* conv = dynamic_cast<nn::Conv*>(&m);
  if (!conv) return false;
  const Shape& w = conv->weight.value().shape();  // [out, k.., in / groups]
  return std::any_of(w.begin() + 1, w.end() - 1, [](std::int64_t taps) { return taps > 1; });
}

struct LayerKind {
  const char* name;
  bool (*is)(nn::Module&);
};
constexpr LayerKind kKinds[] = {
    // The topmost module of that kind: what lies below belongs to it.
    {"head", [](nn::Module& m) { return m.kind() == nn::Kind::head && m.parent()->kind() != nn::Kind::head; }},
    {"norm",
     [](nn::Module& m) {
       return is_any<nn::LayerNorm, nn::RmsNorm, nn::BatchNorm, nn::GroupNorm, nn::InstanceNorm>(m);
     }},
    {"linear", [](nn::Module& m) { return is_any<nn::Linear>(m); }},
    {"conv", [](nn::Module& m) { return groups_of(m) == 1; }},
    {"grouped_conv", [](nn::Module& m) { return groups_of(m) > 1; }},
    {"spatial_conv", is_spatial},
};

const LayerKind& kind_of(const std::string& name) {
  std::string all;
  for (const LayerKind& k : kKinds) {
    if (name == k.name) return k;
    all += (all.empty() ? "" : ", ") + std::string(k.name);
  }
  detail::fail("spec: unknown kind of layer \"@", name, "\"; known: ", all);
}

}  // namespace

bool names_kind(const std::string& pattern) { return pattern.find('@') != std::string::npos; }

std::vector<nn::Module*> select(nn::Module& model, const std::string& pattern) {
  const std::size_t at = pattern.find('@');
  const std::string paths = at == 0 ? "**" : pattern.substr(0, at);
  const LayerKind* kind = names_kind(pattern) ? &kind_of(pattern.substr(at + 1)) : nullptr;
  std::vector<nn::Module*> found;
  for (nn::Module* m : nn::find_modules(model, paths))
    if (m->kind() != nn::Kind::tuner && (!kind || kind->is(*m))) found.push_back(m);
  CAPO_CHECK(!found.empty(), "spec: \"", pattern, kind ? "\" matches no such layer" : "\" matches tuners only");
  return found;
}

}  // namespace capo::tuners
