// What examples/dependencies.cpp measures: the recall of a category whose logit is made of other categories'.
#pragma once

#include <capo/models/dependencies/covlasso.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace capo::examples {

// Logits of two networks side by side, [n, 2 k]: category i of the first is column i, of the second column k + i.
struct Table {
  std::vector<float> z;
  std::vector<std::int64_t> label;
  int categories = 0;
  const float* row(std::size_t r) const { return z.data() + r * 2 * static_cast<std::size_t>(categories); }
};

// Right answers for category d.target (the network that column belongs to) with its logit as it is, and replaced.
inline std::pair<int, int> right_answers(const Table& t, const std::vector<double>& mean,
                                         const dependencies::Dependency& d) {
  const int k = t.categories, own = d.target % k, first = d.target - own;
  int before = 0, after = 0;
  for (std::size_t r = 0; r < t.label.size(); ++r) {
    if (t.label[r] != own) continue;
    const float* z = t.row(r);
    double rival = -HUGE_VAL, replaced = mean[static_cast<std::size_t>(d.target)];
    for (int j = first; j < first + k; ++j)
      if (j != d.target) rival = std::max<double>(rival, z[j]);
    for (std::size_t s = 0; s < d.support.size(); ++s)
      replaced += d.theta[s] * (z[d.support[s]] - mean[static_cast<std::size_t>(d.support[s])]);
    before += z[d.target] > rival;
    after += replaced > rival;
  }
  return {before, after};
}

struct Summary {
  std::vector<dependencies::Dependency> found;           // of each category, at most max_support others
  std::vector<double> kept;                // recall after / before; 1 where it was 0 before
  std::vector<double> curve;               // mean of kept by support size
  // Means of the relative error and the least possible one; share with kept >= 0.9.
  double error = 0, floor = 0, keeping = 0;
};

inline Summary analyse(const dependencies::Matrix& c, const std::vector<double>& mean, const Table& test, int first,
                       int candidates_first, int max_support) {
  Summary s;
  s.curve.assign(static_cast<std::size_t>(max_support) + 1, 0);
  const int k = test.categories;
  for (int target = first; target < first + k; ++target) {
    std::vector<int> candidates;
    for (int j = candidates_first; j < candidates_first + k; ++j)
      if (j != target) candidates.push_back(j);
    std::vector<double> by_size(s.curve.size(), -1);
    dependencies::Dependency best{.target = target};
    const auto share = [&](const dependencies::Dependency& d) {
      const auto [before, after] = right_answers(test, mean, d);
      return before == 0 ? 1.0 : static_cast<double>(after) / before;
    };
    for (const dependencies::Dependency& step :
         dependencies::lasso_path(c, target, candidates, {.max_support = max_support})) {
      if (step.support == best.support) continue;
      best = dependencies::refit(c, target, step.support);
      by_size[best.support.size()] = share(best);
    }
    by_size[0] = std::max(by_size[0], 0.0);
    for (std::size_t i = 1; i < by_size.size(); ++i)
      if (by_size[i] < 0) by_size[i] = by_size[i - 1];  // the path jumps over some sizes
    for (std::size_t i = 0; i < by_size.size(); ++i) s.curve[i] += by_size[i] / k;
    s.kept.push_back(share(best));
    s.keeping += (s.kept.back() >= 0.9) / static_cast<double>(k);
    s.error += best.error / k;
    s.floor += dependencies::refit(c, target, candidates).error / k;
    s.found.push_back(std::move(best));
  }
  return s;
}

}  // namespace capo::examples
