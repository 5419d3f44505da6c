#include <capo/models/segment/components.h>
#include <capo/models/segment/label_map_internal.h>

#include <utility>

namespace capo::segment {
namespace {

struct Parts {
  Grid grid;
  std::vector<std::int64_t> label;
};

Parts find(const char* op, const Tensor& mask) {
  Parts p{Grid(op, mask.shape()), {}};
  const std::vector<std::int64_t> inside = labels_of(op, mask);
  p.label.assign(inside.size(), 0);
  std::int64_t count = 0;
  std::vector<std::int64_t> open;
  for (std::size_t first = 0; first < inside.size(); ++first) {
    if (!inside[first] || p.label[first]) continue;
    p.label[first] = ++count;
    open.push_back(static_cast<std::int64_t>(first));
    while (!open.empty()) {
      const std::int64_t at = open.back();
      open.pop_back();
      p.grid.for_each_neighbour(at, [&](std::int64_t next) {
        const auto n = static_cast<std::size_t>(next);
        if (!inside[n] || p.label[n]) return;
        p.label[n] = count;
        open.push_back(next);
      });
    }
  }
  return p;
}

}  // namespace

Tensor components(const Tensor& mask) { return from_vector(find("components", mask).label, mask.shape()); }

Tensor grown_components(const Tensor& mask) {
  Parts p = find("grown_components", mask);
  std::vector<std::int64_t> front, reached;
  std::vector<char> known(p.label.size());
  for (std::size_t i = 0; i < p.label.size(); ++i) {
    known[i] = p.label[i] != 0;
    if (known[i]) front.push_back(static_cast<std::int64_t>(i));
  }
  // One step at a time: what a pixel becomes depends on the steps before alone.
  std::vector<std::pair<std::int64_t, std::int64_t>> taken;
  while (!front.empty()) {
    reached.clear();
    for (const auto at : front)
      p.grid.for_each_neighbour(at, [&](std::int64_t next) {
        if (known[static_cast<std::size_t>(next)]) return;
        known[static_cast<std::size_t>(next)] = 1;
        reached.push_back(next);
      });
    taken.clear();
    for (const auto at : reached) {
      std::int64_t one = 0;
      bool meets = false;
      p.grid.for_each_neighbour(at, [&](std::int64_t next) {
        const std::int64_t l = p.label[static_cast<std::size_t>(next)];
        meets = meets || (one && l && l != one);
        if (l) one = l;
      });
      taken.push_back({at, meets ? 0 : one});
    }
    for (const auto& [at, label] : taken) p.label[static_cast<std::size_t>(at)] = label;
    front = reached;
  }
  return from_vector(p.label, mask.shape());
}

}  // namespace capo::segment
