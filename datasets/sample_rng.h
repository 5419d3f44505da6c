// Random numbers for samples: a stream per (seed, purpose, a, b), so that what happens to a sample depends on its
// place in the run and not on threads or history. Host only; tensors use engine/rng.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace capo {

class SampleRng {
 public:
  // purpose keeps streams for different uses apart; a and b are usually epoch and index.
  SampleRng(std::uint64_t seed, std::uint64_t purpose, std::uint64_t a, std::uint64_t b)
      : state_(mix(mix(mix(mix(seed + kStep) ^ purpose) + a * kStep) ^ (b * 0xd1342543de82ef95u + 1))) {}

  std::uint64_t next() { return mix(state_ += kStep); }  // splitmix64
  // [0, 1), 24 bits, exact.
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
  float uniform(float lo, float hi) { return lo + (hi - lo) * uniform(); }
  bool chance(float p) { return uniform() < p; }
  // [0, n) without bias, n > 0.
  std::int64_t below(std::int64_t n) {
    const auto range = static_cast<std::uint64_t>(n);
    const std::uint64_t limit = ~std::uint64_t{0} - (~std::uint64_t{0} % range + 1) % range;  // last acceptable value
    std::uint64_t v = next();
    while (v > limit) v = next();
    return static_cast<std::int64_t>(v % range);
  }
  double normal();
  // Beta(alpha, alpha), alpha > 0.
  double beta(double alpha);
  template <class T>
  void shuffle(std::vector<T>& v) {
    for (std::size_t i = v.size(); i > 1; --i) {
      std::swap(v[i - 1], v[static_cast<std::size_t>(below(static_cast<std::int64_t>(i)))]);
    }
  }

 private:
  static constexpr std::uint64_t kStep = 0x9e3779b97f4a7c15u;
  static constexpr std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double gamma(double shape);

  std::uint64_t state_;
};

// The purposes in use.
enum SampleStream : std::uint64_t {
  kStreamShuffle = 1, kStreamSubset, kStreamAugment, kStreamErase, kStreamMix, kStreamPatch, kStreamVolume
};

// The order of n things in an epoch.
std::vector<std::int64_t> shuffled_order(std::int64_t n, std::uint64_t seed, std::int64_t epoch);

}  // namespace capo
