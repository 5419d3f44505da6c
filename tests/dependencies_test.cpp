// CovLasso: optimality, limits, a planted dependency, streamed moments, bad input.
#include <doctest/doctest.h>

#include <capo/models/dependencies/covlasso.h>
#include <capo/tests/support.h>

#include <algorithm>
#include <cmath>
#include <random>

using namespace capo;
using namespace capo::dependencies;
using testing::contains;
using testing::error_of;

namespace {

constexpr int kColumns = 12;

// Rows of kColumns values; column 3 = 0.8 x column 1 - 0.5 x column 7 + a little noise, all about other means.
std::vector<float> planted(std::int64_t rows, double noise) {
  std::mt19937 gen(5);
  std::normal_distribution<double> normal;
  std::vector<float> x;
  for (std::int64_t r = 0; r < rows; ++r) {
    double f[kColumns];
    for (double& v : f) v = normal(gen);
    f[5] += 0.7 * f[1];
    f[3] = 0.8 * f[1] - 0.5 * f[7] + noise * normal(gen);
    for (int j = 0; j < kColumns; ++j) x.push_back(static_cast<float>(f[j] + 10 + j));
  }
  return x;
}
Matrix covariance_of(const std::vector<float>& x, std::int64_t part) {
  Moments m(kColumns);
  const auto rows = static_cast<std::int64_t>(x.size()) / kColumns;
  for (std::int64_t r = 0; r < rows; r += part) m.add(x.data() + r * kColumns, std::min(part, rows - r));
  CHECK(m.count() == rows);
  return m.covariance();
}
std::vector<int> all_but(int target) {
  std::vector<int> v;
  for (int j = 0; j < kColumns; ++j)
    if (j != target) v.push_back(j);
  return v;
}
// Gauss-Jordan without pivoting, for a positive definite matrix.
Matrix inverse(Matrix m) {
  Matrix out{m.n, std::vector<double>(m.v.size(), 0)};
  const auto n = static_cast<std::size_t>(m.n);
  for (std::size_t i = 0; i < n; ++i) out.v[i * n + i] = 1;
  for (std::size_t p = 0; p < n; ++p) {
    const double pivot = m.v[p * n + p];
    for (std::size_t j = 0; j < n; ++j) m.v[p * n + j] /= pivot, out.v[p * n + j] /= pivot;
    for (std::size_t i = 0; i < n; ++i) {
      const double f = m.v[i * n + p];
      for (std::size_t j = 0; j < n && i != p; ++j)
        m.v[i * n + j] -= f * m.v[p * n + j], out.v[i * n + j] -= f * out.v[p * n + j];
    }
  }
  return out;
}

}  // namespace

TEST_CASE("moments in parts are moments at once") {
  const auto x = planted(1000, 0.1);
  const Matrix whole = covariance_of(x, 1000), parts = covariance_of(x, 7);
  for (std::size_t i = 0; i < whole.v.size(); ++i) CHECK(std::abs(whole.v[i] - parts.v[i]) < 1e-12);
  double mean = 0, square = 0;
  for (std::size_t r = 0; r < 1000; ++r) mean += x[r * kColumns + 4] / 1000.0;
  for (std::size_t r = 0; r < 1000; ++r) square += (x[r * kColumns + 4] - mean) * (x[r * kColumns + 4] - mean) / 1000.0;
  CHECK(std::abs(whole(4, 4) - square) < 1e-10);
}

TEST_CASE("every point of the path is optimal") {
  const Matrix c = covariance_of(planted(500, 0.3), 500);
  const auto path = lasso_path(c, 3, all_but(3), {.max_support = kColumns});
  REQUIRE(path.size() == 200);
  CHECK(path.back().support.size() == kColumns - 1);
  double last = 1;
  for (const Dependency& d : path) {
    std::vector<double> theta(kColumns, 0);
    theta[3] = -1;
    for (std::size_t k = 0; k < d.support.size(); ++k) theta[static_cast<std::size_t>(d.support[k])] = d.theta[k];
    double error = 0;
    for (int i = 0; i < kColumns; ++i) {
      double g = 0;
      for (int j = 0; j < kColumns; ++j) g += c(i, j) * theta[static_cast<std::size_t>(j)];
      error += theta[static_cast<std::size_t>(i)] * g / c(3, 3);
      const double t = theta[static_cast<std::size_t>(i)];
      if (i == 3) continue;
      if (t == 0) CHECK(std::abs(2 * g) <= d.lambda + 1e-8);
      else CHECK(std::abs(2 * g + (t > 0 ? d.lambda : -d.lambda)) < 1e-8);
    }
    CHECK(std::abs(error - d.error) < 1e-12);
    CHECK(d.error <= last + 1e-12);
    last = d.error;
  }
}

TEST_CASE("without a penalty the error is 1 over the inverse's diagonal") {
  const Matrix c = covariance_of(planted(500, 0.3), 500), inv = inverse(c);
  for (int i = 0; i < kColumns; ++i) {
    const double least = 1 / inv(i, i) / c(i, i);
    CHECK(std::abs(least_error(c, i) - least) < 1e-10);
    CHECK(std::abs(lasso_path(c, i, all_but(i), {.max_support = kColumns}).back().error - least) < 1e-6);
  }
}

TEST_CASE("a planted dependency is found, others are not") {
  const Matrix c = covariance_of(planted(4000, 0.05), 512);
  const auto path = lasso_path(c, 3, all_but(3), {.max_support = 2});
  const Dependency d = refit(c, 3, path.back().support);
  CHECK(d.support == std::vector<int>{1, 7});
  CHECK(std::abs(d.theta[0] - 0.8) < 0.01);
  CHECK(std::abs(d.theta[1] + 0.5) < 0.01);
  CHECK(d.error < 0.004);
  CHECK(path.back().error > d.error);  // shrinkage
  CHECK(least_error(c, 9) > 0.9);
  CHECK(lasso_path(c, 3, {1, 2}, {.max_support = 5}).back().support.size() <= 2);  // candidates alone
  CHECK(lasso_path(c, 3, {}, {}).empty());
}

TEST_CASE("an exact dependency, twin columns, constant columns") {
  auto x = planted(300, 0);
  for (std::size_t r = 0; r < 300; ++r) x[r * kColumns + 8] = x[r * kColumns + 1], x[r * kColumns + 2] = 4;
  const Matrix c = covariance_of(x, 300);
  CHECK(least_error(c, 3) < 1e-9);
  const Dependency d = refit(c, 3, {1, 7, 8});
  CHECK(std::abs(d.theta[0] - 0.4) < 1e-4);  // the smallest solution shares between twins
  CHECK(std::abs(d.theta[2] - 0.4) < 1e-4);
  for (const auto& p : lasso_path(c, 3, all_but(3), {.max_support = kColumns}))
    CHECK(std::find(p.support.begin(), p.support.end(), 2) == p.support.end());
  CHECK(contains(error_of([&] { lasso_path(c, 2, all_but(2)); }), "lasso_path: column 2 never changes"));
}

TEST_CASE("bad input") {
  const Matrix c = covariance_of(planted(50, 1), 50);
  CHECK(contains(error_of([&] { lasso_path(c, 12, {}); }), "target must be in [0, 12), got 12"));
  CHECK(contains(error_of([&] { lasso_path(c, 3, {1, 3}); }),
                 "different from the target 3 and from each other, got 3"));
  CHECK(contains(error_of([&] { refit(c, 3, {1, 1}); }), "refit: columns must be in [0, 12)"));
  CHECK(contains(error_of([&] { lasso_path(c, 3, {1}, {.max_sweeps = 0}); }), "did not converge"));
  CHECK(contains(error_of([] { Moments(0); }), "columns must be positive, got 0"));
  CHECK(contains(error_of([] { Moments(3).covariance(); }), "no rows were added"));
  const float bad[2] = {1, std::nanf("")};
  CHECK(contains(error_of([&] { Moments(2).add(bad, 1); }), "all values must be finite"));
}
