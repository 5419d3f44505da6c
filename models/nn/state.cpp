#include <capo/engine/sha256.h>
#include <capo/models/nn/misfits_internal.h>
#include <capo/models/nn/state.h>
#include <capo/ops/copy.h>
#include <capo/ops/view.h>

#include <algorithm>
#include <unordered_map>

namespace capo::nn {
namespace {

bool belongs(const Parameter& p, Part part) {
  switch (part) {
    case Part::model: return p.kind() != Kind::tuner;
    case Part::tuner: return p.kind() == Kind::tuner;
    case Part::head: return p.kind() == Kind::head;
    case Part::all: return true;
  }
  return false;
}

// [O, k.., I] <-> [O, I, k..]; the transposed convolution's [I, k.., O] moves its last axis the same way.
Dims axes_to_file(int rank) {
  Dims axes{0, rank - 1};
  for (int i = 1; i + 1 < rank; ++i) axes.push_back(i);
  return axes;
}
Dims axes_from_file(int rank) {
  Dims axes{0};
  for (int i = 2; i < rank; ++i) axes.push_back(i);
  axes.push_back(1);
  return axes;
}

bool skipped(const LoadOptions& options, const std::string& name) {
  return std::any_of(options.skip.begin(), options.skip.end(),
                     [&](const auto& pattern) { return matches(pattern, name); });
}

// What goes where; throws unless all agrees.
struct Matched {
  std::vector<std::pair<Parameter*, const Tensor*>> pairs;
  std::vector<std::string> left_out;
};
Matched match(Module& m, const StateDict& dict, const LoadOptions& options) {
  std::unordered_map<std::string, const Tensor*> given;
  for (const auto& t : dict)
    CAPO_CHECK(given.emplace(t.name, &t.value).second, "load_state: the dict has ", t.name, " twice");
  Matched matched;
  auto& [pairs, left_out] = matched;
  Misfits misfits;
  for (Parameter* p : m.parameters(true)) {
    if (!belongs(*p, options.part)) continue;
    const std::string path = p->path();
    const auto it = given.find(path);
    if (it == given.end()) {
      if (skipped(options, path))
        left_out.push_back(path);
      else
        misfits.missing.push_back(path);
      continue;
    }
    const Shape wanted = file_shape(p->value().shape(), p->layout());
    if (it->second->shape() == wanted && is_floating(it->second->dtype()) == is_floating(p->value().dtype()))
      pairs.push_back({p, it->second});
    else if (skipped(options, path))
      left_out.push_back(path);
    else
      misfits.misfitting.push_back(cat(path, " must be ", p->value().dtype(), " ", wanted, ", got ",
                                       it->second->dtype(), " ", it->second->shape()));
    given.erase(it);
  }
  for (const auto& t : dict) {
    if (!given.count(t.name)) continue;
    if (skipped(options, t.name))
      left_out.push_back(t.name);
    else
      misfits.unexpected.push_back(t.name);
  }
  misfits.refuse("load_state");
  return matched;
}

}  // namespace

Shape file_shape(const Shape& shape, Layout layout) {
  if (layout == Layout::plain || shape.size() < 3) return shape;
  Shape s;
  for (auto a : axes_to_file(shape.size())) s.push_back(shape[static_cast<int>(a)]);
  return s;
}
Tensor to_file_layout(const Tensor& t, Layout layout) {
  return layout == Layout::plain || t.rank() < 3 ? clone(t) : clone(permute(t, axes_to_file(t.rank())));
}
Tensor from_file_layout(const Tensor& t, Layout layout) {
  return layout == Layout::plain || t.rank() < 3 ? t : contiguous(permute(t, axes_from_file(t.rank())));
}

StateDict state_dict(Module& m, Part part) {
  const NoGrad off;
  StateDict dict;
  for (Parameter* p : m.parameters(true))
    if (belongs(*p, part)) dict.push_back({p->path(), to_file_layout(p->value(), p->layout())});
  return dict;
}

void check_state(Module& m, const StateDict& dict, const LoadOptions& options) { match(m, dict, options); }

std::vector<std::string> load_state(Module& m, const StateDict& dict, const LoadOptions& options) {
  const NoGrad off;
  Matched matched = match(m, dict, options);
  for (auto& [p, t] : matched.pairs) {
    // Cast on the host, where every dtype is.
    const Tensor ours = cast(from_file_layout(*t, p->layout()), p->value().dtype());
    copy_into(p->value(), to(ours, p->value().device()));
  }
  return std::move(matched.left_out);
}

void save_tensors(const std::string& path, const StateDict& dict, const Metadata& metadata) {
  std::vector<TensorSpec> specs;
  std::vector<const void*> data;
  std::vector<Tensor> keep;
  for (const auto& t : dict) {
    specs.push_back({t.name, t.value.dtype(), t.value.shape()});
    keep.push_back(contiguous(to(t.value.detach(), kCpu)));
    data.push_back(keep.back().data());
  }
  write_safetensors(path, specs, data, metadata);
}

StateDict read_tensors(const std::string& path) {
  const SafetensorsReader reader(path);
  StateDict dict;
  for (const auto& e : reader.entries()) {
    const Tensor t = empty(e.shape, e.dtype);
    reader.copy_bytes(e, t.data(), e.bytes());
    dict.push_back({e.name, t});
  }
  return dict;
}

void save_weights(Module& m, const std::string& path, DType dtype, const Metadata& metadata) {
  StateDict dict = state_dict(m, Part::model);
  for (auto& t : dict)
    if (is_floating(t.value.dtype())) t.value = cast(t.value, dtype);
  save_tensors(path, dict, metadata);
}

std::vector<std::string> load_weights(Module& m, const std::string& path, const LoadOptions& options) {
  try {
    return load_state(m, read_tensors(path), options);
  } catch (const Error& e) {
    const std::string text = e.what();
    if (text.rfind(path, 0) == 0) throw;
    throw Error(cat(path, ": ", text));
  }
}

std::string base_hash(Module& m) {
  std::vector<Parameter*> parameters;
  for (Parameter* p : m.parameters(true))
    if (p->kind() == Kind::base) parameters.push_back(p);
  std::sort(parameters.begin(), parameters.end(), [](auto* a, auto* b) { return a->path() < b->path(); });
  Sha256 hash;
  for (Parameter* p : parameters) {
    const Tensor t = to_file_layout(to(p->value().detach(), kCpu), p->layout());
    const std::string head = cat(p->path(), '\n', t.dtype(), '\n', t.shape(), '\n');
    hash.update(head.data(), head.size());
    hash.update(t.data(), t.nbytes());
  }
  return hash.hex();
}

}  // namespace capo::nn
