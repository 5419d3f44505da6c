#include <capo/datasets/sample_rng.h>

#include <cmath>
#include <numeric>

namespace capo {

double SampleRng::normal() {
  const double u = (static_cast<double>(next() >> 11) + 1) * 0x1p-53, v = static_cast<double>(next() >> 11) * 0x1p-53;
  return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v);
}

double SampleRng::beta(double alpha) {
  const double a = gamma(alpha), b = gamma(alpha);
  return a + b > 0 ? a / (a + b) : (next() & 1 ? 1.0 : 0.0);  // both underflow at tiny alpha: one of the ends
}

// Marsaglia and Tsang, 2000.
double SampleRng::gamma(double shape) {
  if (shape < 1) {
    const double u = (static_cast<double>(next() >> 11) + 1) * 0x1p-53;
    return gamma(shape + 1) * std::pow(u, 1 / shape);
  }
  const double d = shape - 1.0 / 3, c = 1 / std::sqrt(9 * d);
  for (;;) {
    const double x = normal(), t = 1 + c * x;
    if (t <= 0) continue;
    const double v = t * t * t, u = (static_cast<double>(next() >> 11) + 1) * 0x1p-53;
    if (std::log(u) < 0.5 * x * x + d - d * v + d * std::log(v)) return d * v;
  }
}

std::vector<std::int64_t> shuffled_order(std::int64_t n, std::uint64_t seed, std::int64_t epoch) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  SampleRng(seed, kStreamShuffle, static_cast<std::uint64_t>(epoch), 0).shuffle(order);
  return order;
}

}  // namespace capo
