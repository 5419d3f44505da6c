#include <capo/models/train/metrics.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace capo::train {
namespace {

// Logits and labels, checked, in row-major host memory.
struct Judged {
  std::vector<double> z;
  std::vector<std::int64_t> label;
  std::int64_t n, classes;
  const double* row(std::int64_t i) const { return z.data() + i * classes; }
  std::int64_t truth(std::int64_t i) const { return label[static_cast<std::size_t>(i)]; }
  std::int64_t best(std::int64_t i) const { return std::max_element(row(i), row(i) + classes) - row(i); }
  // log of the sum of exponentials.
  double log_total(std::int64_t i) const {
    const double top = row(i)[best(i)];
    double total = 0;
    for (std::int64_t k = 0; k < classes; ++k) total += std::exp(row(i)[k] - top);
    return std::log(total) + top;
  }
};

Judged judged(const char* what, const Tensor& logits, const Tensor& labels, bool may_be_empty = false) {
  CAPO_CHECK(logits.rank() == 2 && logits.size(1) > 0 && (logits.dtype() == f32 || logits.dtype() == f64), what,
             ": logits must be f32 or f64 [N, K], got ", describe(logits));
  CAPO_CHECK(labels.rank() == 1 && labels.size(0) == logits.size(0) && labels.dtype() == i64, what,
             ": labels must be i64 [", logits.size(0), "], got ", describe(labels));
  CAPO_CHECK(may_be_empty || logits.size(0) > 0, what, ": needs at least one sample");
  Judged j{to_vector<double>(logits), to_vector<std::int64_t>(labels), logits.size(0), logits.size(1)};
  for (const double v : j.z) CAPO_CHECK(std::isfinite(v), what, ": logits must be finite, got ", v);
  for (const std::int64_t y : j.label)
    CAPO_CHECK(y >= 0 && y < j.classes, what, ": label must be in [0, ", j.classes, "), got ", y);
  return j;
}

// The diagonal over the sums of rows or columns.
std::vector<double> diagonal_share(const char* what, const Tensor& confusion, bool rows) {
  CAPO_CHECK(confusion.rank() == 2 && confusion.size(0) == confusion.size(1) && confusion.dtype() == i64, what,
             ": the matrix must be i64 [K, K], got ", describe(confusion));
  const auto m = to_vector<std::int64_t>(confusion);
  const auto k = static_cast<std::size_t>(confusion.size(0));
  std::vector<double> share(k, std::numeric_limits<double>::quiet_NaN());
  for (std::size_t i = 0; i < k; ++i) {
    std::int64_t total = 0;
    for (std::size_t j = 0; j < k; ++j) total += rows ? m[i * k + j] : m[j * k + i];
    if (total > 0) share[i] = static_cast<double>(m[i * k + i]) / static_cast<double>(total);
  }
  return share;
}

}  // namespace

double top_k_accuracy(const Tensor& logits, const Tensor& labels, std::int64_t k) {
  CAPO_CHECK(k >= 1, "top_k_accuracy: k must be at least 1, got ", k);
  const Judged j = judged("top_k_accuracy", logits, labels);
  std::int64_t hits = 0;
  for (std::int64_t i = 0; i < j.n; ++i) {
    const double* row = j.row(i);
    const std::int64_t y = j.truth(i);
    std::int64_t before = 0;
    for (std::int64_t c = 0; c < j.classes; ++c) before += row[c] > row[y] || (row[c] == row[y] && c < y);
    hits += before < k;
  }
  return static_cast<double>(hits) / static_cast<double>(j.n);
}

double mean_log_loss(const Tensor& logits, const Tensor& labels) {
  const Judged j = judged("mean_log_loss", logits, labels);
  double sum = 0;
  for (std::int64_t i = 0; i < j.n; ++i) sum += j.log_total(i) - j.row(i)[j.truth(i)];
  return sum / static_cast<double>(j.n);
}

Calibration calibration(const Tensor& logits, const Tensor& labels, int bins) {
  CAPO_CHECK(bins >= 1 && bins <= 10000, "calibration: bins must be in [1, 10000], got ", bins);
  const Judged j = judged("calibration", logits, labels);
  Calibration r;
  r.bins.resize(static_cast<std::size_t>(bins));
  for (std::int64_t i = 0; i < j.n; ++i) {
    const std::int64_t best = j.best(i);
    const double p = std::exp(j.row(i)[best] - j.log_total(i));
    const int at = static_cast<int>(std::ceil(p * bins)) - 1;
    CalibrationBin& bin = r.bins[static_cast<std::size_t>(std::clamp(at, 0, bins - 1))];
    ++bin.count;
    bin.confidence += p;
    bin.accuracy += best == j.truth(i);
  }
  for (CalibrationBin& bin : r.bins) {
    if (bin.count == 0) continue;
    bin.confidence /= static_cast<double>(bin.count);
    bin.accuracy /= static_cast<double>(bin.count);
    const double gap = std::fabs(bin.accuracy - bin.confidence);
    r.ece += gap * static_cast<double>(bin.count) / static_cast<double>(j.n);
    r.mce = std::max(r.mce, gap);
  }
  return r;
}

Tensor confusion_matrix(const Tensor& logits, const Tensor& labels) {
  const Judged j = judged("confusion_matrix", logits, labels, true);
  std::vector<std::int64_t> m(static_cast<std::size_t>(j.classes * j.classes), 0);
  for (std::int64_t i = 0; i < j.n; ++i) ++m[static_cast<std::size_t>(j.truth(i) * j.classes + j.best(i))];
  return from_vector(m, {j.classes, j.classes});
}

std::vector<double> class_recall(const Tensor& confusion) { return diagonal_share("class_recall", confusion, true); }
std::vector<double> class_precision(const Tensor& confusion) {
  return diagonal_share("class_precision", confusion, false);
}

}  // namespace capo::train
