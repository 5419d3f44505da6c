#include <capo/models/nn/module.h>
#include <capo/ops/copy.h>
#include <capo/ops/unary.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace capo::nn {
namespace {

std::string join(const std::string& up, std::string_view name) {
  return up.empty() ? std::string(name) : cat(up, ".", name);
}

Tensor initial(const Shape& shape, const Init& init, const Build& build, const std::string& path) {
  using Rule = Init::Rule;
  const auto filled = [&](double v) { return full(shape, v, build.dtype, build.device); };
  double fan_in = 1, fan_out = shape.empty() ? 1 : static_cast<double>(shape[0]);
  for (int i = 1; i < shape.size(); ++i) fan_in *= static_cast<double>(shape[i]);
  Generator rng(build.seed, stream_of(path));
  // Drawn on the host whatever the device: a seed gives the same bits everywhere.
  const Device here = build.device.is_meta() ? kMeta : kCpu;
  const auto drawn = [&](const Tensor& t) { return to(cast(t, build.dtype), build.device); };
  const auto uniform = [&](double bound) { return drawn(rand_uniform(shape, rng, -bound, bound, f32, here)); };
  switch (init.rule) {
    case Rule::zeros: return filled(0);
    case Rule::ones: return filled(1);
    case Rule::constant: return filled(init.a);
    case Rule::uniform: return uniform(init.a);
    case Rule::normal: return drawn(rand_normal(shape, rng, 0, init.a, f32, here));
    case Rule::trunc_normal: return drawn(clamp(rand_normal(shape, rng, 0, init.a, f32, here), -2, 2));
    case Rule::xavier_uniform: return uniform(std::sqrt(6.0 / (fan_in + fan_out)));
    case Rule::kaiming_uniform: return uniform(std::sqrt(6.0 / ((1 + init.a * init.a) * fan_in)));
  }
  return {};
}

bool match_here(std::string_view p, std::string_view s) {
  if (p.empty()) return s.empty();
  if (p.substr(0, 2) == "**") {
    for (std::size_t i = 0; i <= s.size(); ++i)
      if (match_here(p.substr(2), s.substr(i))) return true;
    return false;
  }
  if (p[0] == '*') {
    for (std::size_t i = 0; i <= s.size(); ++i) {
      if (match_here(p.substr(1), s.substr(i))) return true;
      if (i < s.size() && s[i] == '.') break;
    }
    return false;
  }
  return !s.empty() && p[0] == s[0] && match_here(p.substr(1), s.substr(1));
}

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t up = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = up;
    }
  }
  return row[b.size()];
}

[[noreturn]] void fail_no_match(const char* what, std::string_view pattern, std::vector<std::string> paths) {
  std::stable_sort(paths.begin(), paths.end(), [&](const auto& a, const auto& b) {
    return edit_distance(pattern, a) < edit_distance(pattern, b);
  });
  std::string near;
  for (std::size_t i = 0; i < paths.size() && i < 5; ++i) near += cat(i ? ", " : "", paths[i]);
  detail::fail("pattern: \"", pattern, "\" matches no ", what, "; near: ", near);
}

}  // namespace

Parameter::Parameter(Module* up, std::string_view name, const Shape& shape, Init init, Layout layout, bool buffer)
    : up_(up), name_(name), layout_(layout), buffer_(buffer) {
  value_ = initial(shape, init, up->build(), join(up->path(), name));
  if (!buffer_) set_requires_grad(value_, true);
  up->parameters_.push_back(this);
}

std::string Parameter::path() const { return join(up_->path(), name_); }
Kind Parameter::kind() const { return up_->kind(); }

void Parameter::set(const Tensor& t) {
  CAPO_CHECK(t.shape() == value_.shape() && t.dtype() == value_.dtype() && t.device() == value_.device(), path(),
             ": a new value must be ", describe(value_), ", got ", describe(t));
  const bool on = requires_grad(value_);
  value_ = t.grad_slot() ? t.detach() : t;
  if (!buffer_) set_requires_grad(value_, on);
}

void Parameter::set_trainable(bool on) {
  if (!buffer_) set_requires_grad(value_, on);
}

Module::Module(const Build& build) : build_(build) {}

Module::Module(Module* up, std::string_view name) : up_(up), name_(name) {
  CAPO_CHECK(up, "module: a child needs a parent, \"", name, "\" has none");
  CAPO_CHECK(!name.empty() && name.find('.') == std::string_view::npos, "module: a name is one path segment, got \"",
             name, "\"");
  for (const auto& c : up->children_)
    CAPO_CHECK(c->name_ != name, "module: ", up->path_, " has two children named ", name);
  path_ = join(up->path_, name);
  build_ = up->build_;
  kind_ = up->kind_;
  training_ = up->training_;
  up->children_.push_back(this);
}

Module::~Module() {
  taps_.clear();
  if (up_) std::erase(up_->children_, this);
}

const Module& Module::root() const { return up_ ? up_->root() : *this; }

std::vector<Module*> Module::modules() {
  std::vector<Module*> all{this};
  for (Module* c : children_)
    for (Module* m : c->modules()) all.push_back(m);
  return all;
}

std::vector<Parameter*> Module::parameters(bool buffers) {
  std::vector<Parameter*> all;
  for (Module* m : modules())
    for (Parameter* p : m->parameters_)
      if (buffers || !p->is_buffer()) all.push_back(p);
  return all;
}

void Module::train(bool on) {
  for (Module* m : modules()) m->training_ = on;
}

void Module::move_to(Device device) {
  CAPO_CHECK(!up_, path_, ": only a whole model moves to another device");
  const NoGrad off;
  for (Module* m : modules()) {
    m->build_.device = device;
    for (Parameter* p : m->parameters_) {
      const bool on = requires_grad(p->value_);
      p->value_ = to(p->value_.detach(), device);
      if (!p->buffer_) set_requires_grad(p->value_, on);
    }
  }
}

void Module::set_trainable(bool on) {
  for (Parameter* p : parameters()) p->set_trainable(on);
}

void Module::detach(std::string_view name) {
  const auto it = std::find_if(taps_.begin(), taps_.end(), [&](const Hung& h) { return h.name == name && h.owned; });
  CAPO_CHECK(it != taps_.end(), path_, ": no tuner named \"", name, "\" is attached");
  taps_.erase(it);
}

void Module::detach_observers() {
  std::erase_if(taps_, [](const Hung& h) { return !h.owned; });
}

std::vector<std::string> Module::tap_names() const {
  std::vector<std::string> names;
  for (const auto& h : taps_)
    if (h.owned) names.push_back(h.name);
  return names;
}

Module* Module::tap(std::string_view name) const {
  for (const auto& h : taps_)
    if (h.name == name) return h.owned.get();
  return nullptr;
}

void Module::check_runs_taps(std::string_view name) const {
  CAPO_CHECK(runs_taps(), path_.empty() ? "the root" : path_, ": is only a container, ", name,
             " would never run there");
}

Tensor Module::reapply(const Tensor&) { detail::fail(path_, ": cannot be applied to other tokens"); }

bool matches(std::string_view pattern, std::string_view path) { return match_here(pattern, path); }

std::vector<Parameter*> find_parameters(Module& m, std::string_view pattern) {
  std::vector<Parameter*> found;
  std::vector<std::string> paths;
  for (Parameter* p : m.parameters(true)) {
    paths.push_back(p->path());
    if (matches(pattern, paths.back())) found.push_back(p);
  }
  if (found.empty()) fail_no_match("parameter", pattern, paths);
  return found;
}

std::vector<Module*> find_modules(Module& m, std::string_view pattern) {
  std::vector<Module*> found;
  std::vector<std::string> paths;
  for (Module* x : m.modules()) {
    if (x->path().empty()) continue;
    paths.push_back(x->path());
    if (matches(pattern, x->path())) found.push_back(x);
  }
  if (found.empty()) fail_no_match("module", pattern, paths);
  return found;
}

namespace {
void set_trainable_matching(Module& m, std::string_view pattern, bool on) {
  bool any = false;
  std::vector<std::string> paths;
  for (Module* x : m.modules()) {
    if (!x->path().empty()) paths.push_back(x->path());
    if (x->path().empty() || !matches(pattern, x->path())) continue;
    any = true;
    x->set_trainable(on);
  }
  for (Parameter* p : m.parameters()) {
    paths.push_back(p->path());
    if (!matches(pattern, paths.back())) continue;
    any = true;
    p->set_trainable(on);
  }
  if (!any) fail_no_match("module or parameter", pattern, paths);
}
}  // namespace

void freeze(Module& m, std::string_view pattern) { set_trainable_matching(m, pattern, false); }
void unfreeze(Module& m, std::string_view pattern) { set_trainable_matching(m, pattern, true); }

std::int64_t parameter_count(Module& m, bool trainable_only) {
  std::int64_t n = 0;
  for (Parameter* p : m.parameters())
    if (!trainable_only || p->trainable()) n += p->value().numel();
  return n;
}

std::string summary(Module& m) {
  std::string out;
  char line[256];
  for (Parameter* p : m.parameters(true)) {
    std::snprintf(line, sizeof line, "%-44s %-20s %12lld %s\n", p->path().c_str(),
                  to_string(p->value().shape()).c_str(), static_cast<long long>(p->value().numel()),
                  p->is_buffer()   ? "buffer"
                  : p->trainable() ? "trainable"
                                   : "frozen");
    out += line;
  }
  std::snprintf(line, sizeof line, "%lld parameters, %lld trainable\n", static_cast<long long>(parameter_count(m)),
                static_cast<long long>(parameter_count(m, true)));
  return out + line;
}

}  // namespace capo::nn
