// How good a classifier is: by hand, and against plain loops on drawn logits.
#include <doctest/doctest.h>

#include <capo/models/train/metrics.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/softmax.h>
#include <capo/tests/op_test.h>
#include <capo/tests/support.h>

#include <cmath>
#include <vector>

using namespace capo;
using namespace capo::testing;

namespace {
Tensor drawn_labels(std::int64_t n, std::int64_t classes) {
  std::vector<std::int64_t> y;
  for (std::int64_t i = 0; i < n; ++i) y.push_back((i * i + 3 * i) % classes);
  return from_vector(y, {n});
}
}  // namespace

TEST_CASE("top-k, by hand; ties go to the lower class") {
  const Tensor z = from_vector<double>({1, 3, 2,   //
                                        5, 5, 0,   //
                                        0, 5, 5,   //
                                        9, 1, 2}, {4, 3});
  const Tensor y = from_vector<std::int64_t>({1, 1, 1, 2}, {4});
  CHECK(train::top_k_accuracy(z, y, 1) == 0.5);
  CHECK(train::top_k_accuracy(z, y, 2) == 1.0);
  CHECK(train::top_k_accuracy(z, from_vector<std::int64_t>({0, 2, 0, 1}, {4}), 2) == 0.0);
  CHECK(train::top_k_accuracy(z, y, 9) == 1.0);
  CHECK(train::top_k_accuracy(cast(z, f32), y, 1) == 0.5);
}

TEST_CASE("log loss and calibration against plain loops") {
  const std::int64_t n = 200, k = 7;
  const Tensor z = test::normal({n, k}, "z") * 3.0, y = drawn_labels(n, k);
  const auto p = to_vector<double>(softmax(z));
  const auto truth = to_vector<std::int64_t>(y);
  for (int bins : {1, 15, 40}) {
    double loss = 0, ece = 0;
    std::vector<double> conf(static_cast<std::size_t>(bins)), hit(conf), count(conf);
    for (std::int64_t i = 0; i < n; ++i) {
      std::int64_t best = 0;
      for (std::int64_t c = 1; c < k; ++c)
        if (p[static_cast<std::size_t>(i * k + c)] > p[static_cast<std::size_t>(i * k + best)]) best = c;
      const double top = p[static_cast<std::size_t>(i * k + best)];
      loss -= std::log(p[static_cast<std::size_t>(i * k + truth[static_cast<std::size_t>(i)])]) / n;
      std::size_t at = 0;
      while (top > static_cast<double>(at + 1) / bins) ++at;
      conf[at] += top, hit[at] += best == truth[static_cast<std::size_t>(i)], count[at] += 1;
    }
    for (std::size_t b = 0; b < conf.size(); ++b) ece += std::fabs(hit[b] - conf[b]) / n;
    const train::Calibration c = train::calibration(z, y, bins);
    CHECK(c.ece == doctest::Approx(ece).epsilon(1e-12));
    for (std::size_t b = 0; b < conf.size(); ++b) CHECK(c.bins[b].count == count[b]);
    CHECK(train::mean_log_loss(z, y) == doctest::Approx(loss).epsilon(1e-12));
  }
  // Always certain (p = 1 falls into the last bin), right three times of four.
  const train::Calibration c = train::calibration(from_vector<double>({900, 0, 900, 0, 0, 900, 900, 0}, {4, 2}),
                                                  from_vector<std::int64_t>({0, 0, 1, 1}, {4}));
  CHECK(c.ece == 0.25);
  CHECK(c.mce == 0.25);
  CHECK(c.bins[14].count == 4);
}

TEST_CASE("confusion matrix, recall and precision") {
  const Tensor z = from_vector<double>({2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0}, {4, 3});
  const Tensor m = train::confusion_matrix(z, from_vector<std::int64_t>({0, 0, 1, 0}, {4}));
  CHECK(to_vector<std::int64_t>(m) == std::vector<std::int64_t>{2, 1, 0, 0, 1, 0, 0, 0, 0});
  const auto recall = train::class_recall(m), precision = train::class_precision(m);
  CHECK(recall[0] == doctest::Approx(2.0 / 3));
  CHECK(precision[1] == 0.5);
  CHECK(std::isnan(recall[2]));
  CHECK(std::isnan(precision[2]));
  CHECK(to_vector<std::int64_t>(train::confusion_matrix(zeros({0, 2}), zeros({0}, i64))) ==
        std::vector<std::int64_t>{0, 0, 0, 0});
}

TEST_CASE("bad input is named") {
  const Tensor z = zeros({2, 3}), y = zeros({2}, i64);
  const auto error = [](const Tensor& a, const Tensor& b) { return error_of([&] { train::top_k_accuracy(a, b); }); };
  CHECK(error(zeros({2}), y) == "top_k_accuracy: logits must be f32 or f64 [N, K], got f32 [2] cpu");
  CHECK(contains(error(z, zeros({3}, i64)), "labels must be i64 [2]"));
  CHECK(contains(error(z, from_vector<std::int64_t>({0, 3}, {2})), "label must be in [0, 3), got 3"));
  CHECK(contains(error(z / 0.0, y), "logits must be finite"));
  CHECK(contains(error(zeros({0, 3}), zeros({0}, i64)), "needs at least one sample"));
  CHECK(contains(error_of([&] { train::calibration(z, y, 0); }), "bins must be in [1, 10000]"));
  CHECK(contains(error_of([&] { train::class_recall(z); }), "the matrix must be i64 [K, K]"));
}
