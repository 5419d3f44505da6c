// Who keeps how many bytes for the backward pass; which module runs; an observer of ops.
#include <capo/autograd/autograd.h>

#include <capo/engine/caching_allocator.h>
#include <capo/engine/profile_internal.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <unordered_set>
#include <utility>

namespace capo {

struct SavedBytes::State {
  std::unordered_set<const Storage*> seen;
  std::vector<Ref<Storage>> alive;  // a freed address must not be taken for a known storage
  std::vector<Row> rows;
  std::map<std::pair<std::string, std::string>, std::size_t> index;
};

namespace {
thread_local SavedBytes* current = nullptr;
thread_local const std::string* module_path = nullptr;
thread_local OpObserver* observer = nullptr;
const std::string kNoModule;

// For an OutOfMemory while a SavedBytes watches this thread: who keeps most for the backward pass.
void name_holders(std::string& text) {
  if (!current) return;
  std::map<std::string, std::int64_t> modules;
  for (const auto& row : current->rows()) modules[row.module] += row.bytes;
  std::vector<std::pair<std::int64_t, std::string>> most;
  for (const auto& [path, bytes] : modules) most.emplace_back(-bytes, path.empty() ? "the model itself" : path);
  std::sort(most.begin(), most.end());
  char line[64];
  std::snprintf(line, sizeof line, "%.1f", static_cast<double>(current->total()) / 1048576.0);
  text += cat("; kept for the backward pass so far: ", line, " MiB");
  for (std::size_t i = 0; i < most.size() && i < 5; ++i) {
    std::snprintf(line, sizeof line, "%.1f", static_cast<double>(-most[i].first) / 1048576.0);
    text += cat(", ", line, " in ", most[i].second);
  }
}
}  // namespace

SavedBytes::SavedBytes(const std::vector<Tensor>& ignore) : state_(new State), outer_(current) {
  for (const auto& t : ignore)
    if (t.defined() && state_->seen.insert(t.storage().get()).second) state_->alive.push_back(t.storage());
  current = this;
  set_memory_note(name_holders);
}
SavedBytes::~SavedBytes() {
  current = outer_;
  delete state_;
}
std::vector<SavedBytes::Row> SavedBytes::rows() const { return state_->rows; }
std::int64_t SavedBytes::total() const {
  std::int64_t bytes = 0;
  for (const auto& row : state_->rows) bytes += row.bytes;
  return bytes;
}

void account_saved(const char* op, const Saved& saved) {
  if (!current) return;
  auto& s = *current->state_;
  for (const auto& item : saved.items_) {
    if (!item.tensor.defined() || !s.seen.insert(item.tensor.storage().get()).second) continue;
    s.alive.push_back(item.tensor.storage());
    const auto [it, fresh] = s.index.try_emplace({current_module(), op}, s.rows.size());
    if (fresh) s.rows.push_back({current_module(), op, 0, 0});
    s.rows[it->second].bytes += static_cast<std::int64_t>(rounded_bytes(item.tensor.storage()->bytes()));
    ++s.rows[it->second].tensors;
  }
}

ModuleScope::ModuleScope(const std::string* path) : before_(module_path) {
  module_path = path;
  if (detail::profiling()) detail::begin_module(*path);
}
ModuleScope::~ModuleScope() {
  if (detail::profiling()) detail::end_module();
  module_path = before_;
}
const std::string& current_module() { return module_path ? *module_path : kNoModule; }

OpObserver::OpObserver(Hook hook, void* user) : hook_(hook), user_(user), outer_(observer) { observer = this; }
OpObserver::~OpObserver() { observer = outer_; }

// Also called with an undefined y, by ops that neither record nor return a tensor: for the profile alone.
void detail::observe(const char* op, const Tensor& y) {
  if (profiling()) name_launches(op, current_module());
  if (!observer || !y.defined()) return;
  struct Pause {
    OpObserver* self = std::exchange(observer, nullptr);
    ~Pause() { observer = self; }
  } const pause;
  pause.self->hook_(op, y, pause.self->user_);
}

}  // namespace capo
