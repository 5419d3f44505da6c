// How good a classifier is: pure functions of its logits, f32 or f64 [N, K], and labels, i64 [N], both on the host.
// N may be 0 only where it says so; logits that are not finite and labels outside [0, K) throw. Of equal logits the
// lower class wins.
#pragma once

#include <capo/engine/tensor.h>

#include <cstdint>
#include <vector>

namespace capo::train {

// The share of samples whose label is among the k greatest logits; 1 <= k. Where K < k every sample counts.
double top_k_accuracy(const Tensor& logits, const Tensor& labels, std::int64_t k = 1);
// The mean of -log softmax(logits)[label].
double mean_log_loss(const Tensor& logits, const Tensor& labels);

// What a share `confidence` of certainty was worth: samples whose greatest probability lies in
// (i / bins, (i + 1) / bins].
struct CalibrationBin {
  std::int64_t count = 0;
  double confidence = 0, accuracy = 0;  // means over the bin; 0 where it is empty
};
struct Calibration {
  double ece = 0;  // sum of count / N |accuracy - confidence|: the expected calibration error
  double mce = 0;  // the greatest |accuracy - confidence| of a bin
  std::vector<CalibrationBin> bins;
};
// Bins of equal width. Source: Naeini et al. 2015, Guo et al. 2017 (15 bins).
Calibration calibration(const Tensor& logits, const Tensor& labels, int bins = 15);

// i64 [K, K]: how many samples of class i (row) were taken for class j (column). N may be 0.
Tensor confusion_matrix(const Tensor& logits, const Tensor& labels);
// Of such a matrix: the diagonal over the sums of the rows (of the columns); NaN for a class that never occurs.
std::vector<double> class_recall(const Tensor& confusion);
std::vector<double> class_precision(const Tensor& confusion);

}  // namespace capo::train
