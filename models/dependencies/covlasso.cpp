#include <capo/engine/error.h>
#include <capo/models/dependencies/covlasso.h>

#include <Eigen/Dense>

#include <algorithm>
#include <cmath>

namespace capo::dependencies {
namespace {

using Rows = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

Eigen::Map<const Rows> map(const Matrix& c) { return {c.v.data(), c.n, c.n}; }
std::size_t at(int i) { return static_cast<std::size_t>(i); }

void check_columns(const char* what, const Matrix& c, int target, const std::vector<int>& columns) {
  CAPO_CHECK(c.n > 0 && c.v.size() == at(c.n) * at(c.n), what, ": the matrix must hold n x n values, got ", c.v.size(),
             " for n = ", c.n);
  CAPO_CHECK(target >= 0 && target < c.n, what, ": target must be in [0, ", c.n, "), got ", target);
  CAPO_CHECK(c(target, target) > 0, what, ": column ", target, " never changes, nothing can depend on it");
  std::vector<bool> seen(at(c.n), false);
  for (int j : columns) {
    CAPO_CHECK(j >= 0 && j < c.n && j != target && !seen[at(j)], what, ": columns must be in [0, ", c.n,
               "), different from the target ", target, " and from each other, got ", j);
    seen[at(j)] = true;
  }
}

double soft(double x, double threshold) { return x > threshold ? x - threshold : x < -threshold ? x + threshold : 0; }

// theta and gradient = C theta, kept together.
class Descent {
 public:
  Descent(const Matrix& c, int target, const std::vector<int>& candidates)
      : c_(map(c)), target_(target), theta_(Eigen::VectorXd::Zero(c.n)), gradient_(-c_.col(target)) {
    theta_[target] = -1;
    for (int j : candidates)
      if (c(j, j) > 0) candidates_.push_back(j);
  }
  double largest_lambda() const {
    double most = 0;
    for (int j : candidates_) most = std::max(most, 2 * std::abs(gradient_[j]));
    return most;
  }
  // False when max_sweeps did not suffice. Sweeps over the support until it is still, then over all candidates.
  bool minimise(double lambda, double tolerance, int max_sweeps) {
    std::vector<int> active;
    for (int sweep = 0; sweep < max_sweeps;) {
      if (violation(lambda) <= tolerance) return true;
      for (int j : candidates_) update(j, lambda);
      ++sweep;
      active.clear();
      for (int j : candidates_)
        if (theta_[j] != 0) active.push_back(j);
      for (double moved = 1; moved > tolerance && sweep < max_sweeps; ++sweep) {
        moved = 0;
        for (int j : active) moved = std::max(moved, update(j, lambda));
      }
    }
    return violation(lambda) <= tolerance;
  }
  Dependency result(double lambda) const {
    Dependency d{.target = target_, .lambda = lambda};
    for (int j : candidates_)
      if (theta_[j] != 0) d.support.push_back(j);
    std::sort(d.support.begin(), d.support.end());
    for (int j : d.support) d.theta.push_back(theta_[j]);
    d.error = std::max(0.0, theta_.dot(gradient_)) / c_(target_, target_);
    return d;
  }

 private:
  // Minimises over coordinate j alone; returns how far its part of the gradient moved.
  double update(int j, double lambda) {
    const double old = theta_[j], own = c_(j, j);
    const double next = soft(own * old - gradient_[j], lambda / 2) / own;
    if (next == old) return 0;
    gradient_ += (next - old) * c_.col(j);
    theta_[j] = next;
    return 2 * own * std::abs(next - old);
  }
  // How far the optimality conditions are missed: |2 (C theta)_j| <= lambda, = -lambda sign(theta_j) on the support.
  double violation(double lambda) const {
    double most = 0;
    for (int j : candidates_) {
      const double g = 2 * gradient_[j];
      most = std::max(most, theta_[j] == 0 ? std::abs(g) - lambda : std::abs(g + (theta_[j] > 0 ? lambda : -lambda)));
    }
    return most;
  }
  Eigen::Map<const Rows> c_;
  int target_;
  std::vector<int> candidates_;
  Eigen::VectorXd theta_, gradient_;
};

}  // namespace

Moments::Moments(int n) : mean_(at(n)), sums_(at(n) * at(n)) {
  CAPO_CHECK(n > 0, "moments: columns must be positive, got ", n);
}

void Moments::add(const float* rows, std::int64_t count) {
  CAPO_CHECK(count >= 0, "moments: count must not be negative, got ", count);
  if (count == 0) return;
  const auto n = static_cast<Eigen::Index>(mean_.size());
  using Floats = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Rows x = Eigen::Map<const Floats>(rows, count, n).cast<double>();
  CAPO_CHECK(x.allFinite(), "moments: all values must be finite");
  const Eigen::RowVectorXd part = x.colwise().mean();
  x.rowwise() -= part;
  // Chan, Golub, LeVeque 1979: the union's sums are both parts' and the square of the distance between their means.
  Eigen::Map<Rows> sums(sums_.data(), n, n);
  Eigen::Map<Eigen::RowVectorXd> mean(mean_.data(), n);
  const Eigen::RowVectorXd apart = part - mean;
  const double a = static_cast<double>(count_), b = static_cast<double>(count);
  sums += x.transpose() * x + (a * b / (a + b)) * apart.transpose() * apart;
  mean += apart * (b / (a + b));
  count_ += count;
}

Matrix Moments::covariance() const {
  CAPO_CHECK(count_ > 0, "moments: no rows were added");
  Matrix c{static_cast<int>(mean_.size()), sums_};
  for (double& v : c.v) v /= static_cast<double>(count_);
  return c;
}

std::vector<Dependency> lasso_path(const Matrix& c, int target, const std::vector<int>& candidates,
                                   const PathOptions& o) {
  check_columns("lasso_path", c, target, candidates);
  CAPO_CHECK(o.steps > 0 && o.smallest > 0 && o.smallest < 1 && o.tolerance > 0 && o.max_support >= 0,
             "lasso_path: steps and tolerance must be positive, smallest in (0, 1), max_support not negative");
  Descent descent(c, target, candidates);
  const double largest = descent.largest_lambda();
  std::vector<Dependency> path;
  for (int step = 1; step <= o.steps && largest > 0; ++step) {
    const double lambda = largest * std::pow(o.smallest, static_cast<double>(step) / o.steps);
    CAPO_CHECK(descent.minimise(lambda, o.tolerance * largest, o.max_sweeps), "lasso_path: column ", target,
               " did not converge at lambda ", lambda, " in ", o.max_sweeps, " sweeps");
    path.push_back(descent.result(lambda));
    if (static_cast<int>(path.back().support.size()) <= o.max_support) continue;
    path.pop_back();
    break;
  }
  return path;
}

Dependency refit(const Matrix& c, int target, const std::vector<int>& support) {
  check_columns("refit", c, target, support);
  Dependency d{.target = target, .support = support};
  std::sort(d.support.begin(), d.support.end());
  const auto k = static_cast<Eigen::Index>(d.support.size());
  const double own = c(target, target);
  if (k == 0) return d;
  Eigen::MatrixXd gram(k, k);
  Eigen::VectorXd with(k);
  for (Eigen::Index i = 0; i < k; ++i) {
    with[i] = c(d.support[static_cast<std::size_t>(i)], target);
    for (Eigen::Index j = 0; j < k; ++j)
      gram(i, j) = c(d.support[static_cast<std::size_t>(i)], d.support[static_cast<std::size_t>(j)]);
  }
  const Eigen::VectorXd theta = gram.completeOrthogonalDecomposition().solve(with);
  d.theta.assign(theta.data(), theta.data() + k);
  d.error = std::max(0.0, own - 2 * theta.dot(with) + theta.dot(gram * theta)) / own;
  return d;
}

double least_error(const Matrix& c, int target) {
  std::vector<int> others;
  for (int j = 0; j < c.n; ++j)
    if (j != target) others.push_back(j);
  return refit(c, target, others).error;
}

}  // namespace capo::dependencies
