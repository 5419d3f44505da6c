// Small helpers that many tests share: the text of an Error, scopes that put settings back, comparisons.
#pragma once

#include <capo/engine/cpu.h>
#include <capo/engine/tensor.h>
#include <capo/engine/threads.h>

#include <cmath>
#include <string>
#include <vector>

namespace capo::testing {

// what() of the capo::Error that f throws; "no error" when it throws none. Other exceptions pass.
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
inline bool starts_with(const std::string& text, const std::string& part) { return text.rfind(part, 0) == 0; }

// Puts the number of threads back.
class ThreadsScope {
 public:
  ThreadsScope() : before_(num_threads()) {}
  explicit ThreadsScope(int n) : ThreadsScope() { set_num_threads(n); }
  ~ThreadsScope() { set_num_threads(before_); }
  ThreadsScope(const ThreadsScope&) = delete;
  ThreadsScope& operator=(const ThreadsScope&) = delete;

 private:
  int before_;
};

// Puts the instruction set back.
class IsaScope {
 public:
  IsaScope() : before_(isa()) {}
  ~IsaScope() { set_isa(before_); }
  IsaScope(const IsaScope&) = delete;
  IsaScope& operator=(const IsaScope&) = delete;

 private:
  Isa before_;
};

// max |a - b| / max |b|; infinite when a difference is NaN.
inline double relative_error(const Tensor& a, const Tensor& b) {
  const auto x = to_vector<double>(a), y = to_vector<double>(b);
  CAPO_CHECK(a.shape() == b.shape(), "relative_error: shapes must be equal, got ", a.shape(), " and ", b.shape());
  double difference = 0, scale = 1e-30;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double d = std::fabs(x[i] - y[i]);
    if (std::isnan(d)) return HUGE_VAL;
    difference = std::fmax(difference, d);
    scale = std::fmax(scale, std::fabs(y[i]));
  }
  return difference / scale;
}

// Of a contiguous tensor.
inline std::string bytes_of(const Tensor& t) {
  return t.numel() ? std::string(static_cast<const char*>(t.data()), t.nbytes()) : std::string();
}

}  // namespace capo::testing
