#include <capo/models/segment/components.h>
#include <capo/models/segment/label_map_internal.h>
#include <capo/models/segment/partition.h>

#include <cmath>
#include <limits>
#include <map>

namespace capo::segment {

PartitionScores partition_scores(const Tensor& prediction, const Tensor& truth) {
  const auto [p, t] = label_pair("partition_scores", prediction, truth);
  std::map<std::pair<std::int64_t, std::int64_t>, double> both;
  std::map<std::int64_t, double> of_truth, of_prediction;
  double n = 0, alone = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    if (t[i] == 0) continue;
    ++n;
    ++of_truth[t[i]];
    if (p[i] == 0) {
      ++alone;
    } else {
      ++of_prediction[p[i]];
      ++both[{t[i], p[i]}];
    }
  }
  if (n == 0) {
    const double none = std::numeric_limits<double>::quiet_NaN();
    return {none, none, none, none};
  }
  double s2 = 0, t2 = alone / (n * n), st2 = t2;          // sums of squares
  double hs = 0, ht = alone / n * std::log(n), hst = ht;  // entropies; hst: of the pairs
  const auto add = [n](double count, double& squares, double& entropy) {
    const double share = count / n;
    squares += share * share;
    entropy -= share * std::log(share);
  };
  for (const auto& [label, count] : of_truth) add(count, s2, hs);
  for (const auto& [label, count] : of_prediction) add(count, t2, ht);
  for (const auto& [labels, count] : both) add(count, st2, hst);
  const bool trivial = of_truth.size() == 1 && both.size() + static_cast<std::size_t>(alone) == 1;
  return {2 * st2 / (s2 + t2), trivial ? 1 : 2 * (hs + ht - hst) / (hs + ht), st2 / s2, st2 / t2};
}

PartitionScores membrane_scores(const Tensor& prediction, const Tensor& truth) {
  CAPO_CHECK(prediction.rank() == 2, "membrane_scores: needs one slice [H, W], got ", prediction.shape());
  return partition_scores(grown_components(prediction), components(truth));
}

}  // namespace capo::segment
