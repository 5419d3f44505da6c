#include <capo/engine/backend.h>
#include <capo/models/train/out_of_memory_internal.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <unordered_set>
#include <utility>

namespace capo::train {
namespace {

std::string mib(std::int64_t bytes) {
  char text[48];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / 1048576.0);
  return text;
}

std::int64_t bytes_of(const std::vector<nn::Parameter*>& parameters) {
  std::unordered_set<const Storage*> seen;
  std::int64_t bytes = 0;
  for (const nn::Parameter* p : parameters) {
    const Storage* s = p->value().storage().get();
    if (seen.insert(s).second) bytes += static_cast<std::int64_t>(rounded_bytes(s->bytes()));
  }
  return bytes;
}

// The forward's kept bytes by module, largest first, and whether it came to its end.
std::pair<std::vector<std::pair<std::int64_t, std::string>>, bool> kept_bytes(Task& task, const Batch& batch) {
  std::vector<Tensor> weights;
  for (nn::Parameter* p : task.module().parameters(true)) weights.push_back(p->value());
  const SavedBytes saved(weights);
  bool whole = true;
  try {
    const Tensor loss = task.loss(batch);
  } catch (const OutOfMemory&) {
    whole = false;
  }
  std::map<std::string, std::int64_t> modules;
  for (const auto& row : saved.rows()) modules[row.module] += row.bytes;
  std::vector<std::pair<std::int64_t, std::string>> sorted;
  for (const auto& [path, bytes] : modules) sorted.emplace_back(bytes, path.empty() ? "(model)" : path);
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  return {sorted, whole};
}

}  // namespace

std::string what_is_held(Task& task, const Optimizer& optimizer, const Ema* ema, const Batch& batch) {
  const Device device = task.module().build().device;
  std::string text =
      cat("\nheld on ", device, ": weights ", mib(bytes_of(task.module().parameters(true))), ", optimizer ",
          mib(optimizer.state_bytes()), ", averages ", mib(ema ? ema->state_bytes() : 0));
  if (batch.x.defined()) {
    const auto [modules, whole] = kept_bytes(task, batch);
    std::int64_t total = 0;
    for (const auto& [bytes, path] : modules) total += bytes;
    text += cat("\nkept for the backward pass ",
                whole ? "at the end of the forward: " : "when the forward ran out of memory: ", mib(total));
    for (std::size_t i = 0; i < modules.size() && i < 8; ++i)
      text += cat("\n  ", modules[i].second, " ", mib(modules[i].first));
  }
  const DeviceMemory m = device_memory(device);
  text += cat("\nnow: ", mib(m.blocks.live_bytes), " in use, ", mib(m.blocks.cached_bytes), " cached, workspaces ",
              mib(m.workspace));
  if (m.total > 0) text += cat(", ", mib(m.free), " of ", mib(m.total), " free");
  return text;
}

}  // namespace capo::train
