// Neural dependencies: a category's logit as a linear combination of a few others, in one network or between two.
//
//   theta(lambda) = argmin  theta^T C theta + lambda |theta|_1   with theta_target = -1,   C = E[(f - E f)(f - E f)^T]
//
// so that f_target - E f_target is nearly sum_j theta_j (f_j - E f_j): CovLasso (Feng et al. 2022, "Neural Dependencies
// Emerging from Learning Massive Categories"). The paper takes raw second moments; we centre, because the common mean
// of logits otherwise dominates C. Between networks f and g, C is that of the concatenated logits, the target a column
// of f, the candidates the columns of g. Everything is host f64.
#pragma once

#include <cstdint>
#include <vector>

namespace capo::dependencies {

// n x n, row by row.
struct Matrix {
  int n = 0;
  std::vector<double> v;
  double operator()(int i, int j) const {
    return v[static_cast<std::size_t>(i) * static_cast<std::size_t>(n) + static_cast<std::size_t>(j)];
  }
};

// Mean and covariance of rows that come in parts; no part is kept. Order of the rows changes only the last bits.
class Moments {
 public:
  explicit Moments(int n);  // columns, > 0
  void add(const float* rows, std::int64_t count);  // [count, n]; values that are not finite throw
  std::int64_t count() const { return count_; }
  const std::vector<double>& mean() const { return mean_; }
  Matrix covariance() const;  // sums over the count, not count - 1; throws before the first row

 private:
  std::int64_t count_ = 0;
  std::vector<double> mean_, sums_;  // sums_: [n, n] products about the mean
};

struct Dependency {
  int target = 0;
  double lambda = 0;              // 0: least squares
  std::vector<int> support = {};  // columns, ascending
  std::vector<double> theta = {}; // of the support
  double error = 1;               // E residual^2 / E (f_target - mean)^2
};

struct PathOptions {
  int max_support = 20;      // the path ends before the first lambda that needs more
  int steps = 200;           // lambdas, geometric from the largest that gives no support ..
  double smallest = 1e-6;    // .. to this share of it
  double tolerance = 1e-9;   // of the optimality conditions, over the largest lambda
  int max_sweeps = 100000;   // per lambda; not converged by then: throws
};

// CovLasso along falling lambda, by coordinate descent, each start from the last. `candidates`: columns, without the
// target, no column twice. Columns of zero variance are never chosen; a target of zero variance throws.
std::vector<Dependency> lasso_path(const Matrix& c, int target, const std::vector<int>& candidates,
                                   const PathOptions& options = {});

// Least squares on a given support (the smallest solution where the support's columns are dependent): Lasso's choice
// without its shrinkage.
Dependency refit(const Matrix& c, int target, const std::vector<int>& support);

// What no support can beat: 1 / (C^-1)_ii over C_ii, over all other columns; 0 where C is singular there.
double least_error(const Matrix& c, int target);

}  // namespace capo::dependencies
