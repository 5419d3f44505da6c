// Holds runs of a model against a golden file (tests/golden): f64 to 1e-9, ten training losses to 1e-7, f32 to twice
// PyTorch's own f32 error. Include after doctest.
#pragma once

#include <capo/engine/safetensors.h>
#include <capo/tests/golden_rule.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

namespace capo::golden {

class File {
 public:
  explicit File(const std::string& name)
      : reader_(std::string(CAPO_SOURCE_DIR) + "/tests/golden/" + name + ".safetensors") {}
  std::vector<double> operator[](const std::string& key) const {
    const TensorEntry& e = reader_.at(key);
    std::vector<double> v(e.bytes() / sizeof(double));
    reader_.copy_bytes(e, v.data(), e.bytes());
    return v;
  }
  bool has(const std::string& key) const {
    const auto& all = reader_.entries();
    return std::any_of(all.begin(), all.end(), [&](const auto& e) { return e.name == key; });
  }
  // K of every "K.samples".
  std::vector<std::string> keys() const {
    std::vector<std::string> all;
    for (const auto& e : reader_.entries())
      if (e.name.ends_with(".samples")) all.push_back(e.name.substr(0, e.name.size() - 8));
    return all;
  }
  // K of every "zero.K": gradients that are nothing but rounding.
  std::vector<std::string> zeros() const {
    std::vector<std::string> all;
    for (const auto& e : reader_.entries())
      if (e.name.starts_with("zero.")) all.push_back(e.name.substr(5));
    return all;
  }

 private:
  SafetensorsReader reader_;
};

struct Run {
  std::map<std::string, std::vector<double>> values;  // the file's keys, PyTorch layout
  std::vector<double> losses;
};

inline double max_abs(const std::vector<double>& v) {
  double m = 0;
  for (double x : v) m = std::isnan(x) ? HUGE_VAL : std::max(m, std::abs(x));
  return m;
}

inline double largest_gradient(const Run& run) {
  double m = 0;
  for (const auto& [key, v] : run.values)
    if (key.starts_with("grad.")) m = std::max(m, max_abs(v));
  return m;
}

inline void check_f64(const std::string& name, const File& golden, const Run& wide) {
  const auto keys = golden.keys(), zeros = golden.zeros();
  REQUIRE(keys.size() + zeros.size() == wide.values.size());
  double worst = 0;
  for (const auto& key : keys) {
    REQUIRE_MESSAGE(wide.values.count(key), key);
    const auto& t = wide.values.at(key);
    const double norm = golden[key + ".norm"][0], max = golden[key + ".max"][0];
    double sum = 0;
    for (double v : t) sum += v * v;
    const auto off = [&](const std::string& what, double got, double want, double scale) {
      const double error = std::abs(got - want) / scale;
      worst = std::max(worst, error);
      CHECK_MESSAGE(error <= 1e-9, key << " " << what << ": " << got << ", PyTorch says " << want);
    };
    off("norm", std::sqrt(sum), norm, norm);
    off("max", max_abs(t), max, max);
    const auto samples = golden[key + ".samples"], projections = golden[key + ".proj"];
    for (std::size_t j = 0; j < samples.size(); ++j)
      off("sample", t[splitmix64(stream_of(key) + j) % t.size()], samples[j], max);
    for (std::size_t p = 0; p < projections.size(); ++p) {
      const std::uint64_t seed = stream_of(key + "#" + std::to_string(p));
      double dot = 0;
      for (std::size_t i = 0; i < t.size(); ++i) dot += t[i] * draw(seed, i);
      off("projection", dot, projections[p], norm);
    }
  }
  for (const auto& key : zeros) {
    REQUIRE_MESSAGE(wide.values.count(key), key);
    CHECK_MESSAGE(max_abs(wide.values.at(key)) <= 1e-10 * largest_gradient(wide), key);
  }
  MESSAGE(name << " f64: largest relative error " << worst << " over " << keys.size() << " keys");
  const auto losses = golden["losses"];
  REQUIRE(wide.losses.size() == losses.size());
  for (std::size_t i = 0; i < losses.size(); ++i)
    CHECK_MESSAGE(std::abs(wide.losses[i] - losses[i]) <= 1e-7 * losses[i],
                  "step " << i << ": " << wide.losses[i] << " " << losses[i]);
}

// f32 values against our own f64 ones, whose every element is there; the training losses against the file's.
// factor: how many times PyTorch's error is allowed.
inline void check_f32(const std::string& name, const File& golden, const Run& wide, const Run& narrow,
                      double factor = 2) {
  double share = 0;
  for (const auto& key : golden.keys()) {
    const auto &a = narrow.values.at(key), &b = wide.values.at(key);
    REQUIRE(a.size() == b.size());
    double error = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      const double d = std::abs(a[i] - b[i]);
      error = std::isnan(d) ? HUGE_VAL : std::max(error, d);
    }
    // A mean near zero is a difference of large numbers: 1 is the size of the running deviations beside it.
    error /= key.ends_with(".running_mean") ? std::max(1.0, max_abs(b)) : max_abs(b);
    double theirs = golden["f32.err." + key][0];
    // Of few elements one run's error is luck; files of small tensors hold the largest of 16 runs
    // (make_unet_golden.py).
    if (golden.has("f32.spread." + key)) theirs = std::max(theirs, golden["f32.spread." + key][0]);
    share = std::max(share, error / std::max(theirs, 5e-7));
    CHECK_MESSAGE(error <= std::max(factor * theirs, 1e-6), key << " f32: error " << error << ", PyTorch's " << theirs);
  }
  for (const auto& key : golden.zeros())
    CHECK_MESSAGE(max_abs(narrow.values.at(key)) <= 1e-5 * largest_gradient(wide), key);
  MESSAGE(name << " f32: at most " << share << " times PyTorch's error");
  const auto losses = golden["losses"], spread = golden["f32.spread.losses"];
  double loss_share = 0;
  for (std::size_t i = 0; i < losses.size(); ++i) {
    const double error = std::abs(narrow.losses[i] - losses[i]) / losses[i];
    loss_share = std::max(loss_share, error / std::max(spread[i], 5e-7));
    CHECK_MESSAGE(error <= std::max(2 * spread[i], 1e-6),
                  "f32 step " << i << ": error " << error << ", PyTorch's spread " << spread[i]);
  }
  MESSAGE(name << " f32 losses: at most " << loss_share << " times PyTorch's spread");
}

}  // namespace capo::golden
