#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/cpu/row.h>
#include <capo/ops/cross_entropy.h>

namespace {

template <class T>
void run(const capo::CrossEntropyArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  const T smooth = static_cast<T>(a.smoothing), keep = T(1) - smooth, even = smooth / static_cast<T>(n);
  for (std::int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.logits) + r * n;
    T* d = a.dlogits ? static_cast<T*>(a.dlogits) + r * n : nullptr;
    const bool counted = !a.labels || a.labels[r] != a.ignore_index;
    if (a.counted) static_cast<T*>(a.counted)[r] = counted ? T(1) : T(0);
    if (!counted) {
      static_cast<T*>(a.loss)[r] = T(0);
      if (d)
        for (std::int64_t i = 0; i < n; ++i) d[i] = T(0);
      continue;
    }
    const T top = largest(x, n);
    // A label that leads: its own term, exactly 1, stays out of the sum. In 1 + others a small loss, and the gradient
    // that goes with it, would round away.
    const std::int64_t label = a.labels ? a.labels[r] : 0;
    const bool leads = a.labels && x[label] == top && n <= INT32_MAX;
    T others;
    if (d) {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) d[i] = m::exp(x[i] - top);
      if (leads) d[label] = T(0);
      others = sum_of<T>(n, [d](std::int64_t i) { return d[i]; });
    } else if (leads) {
      const std::int32_t skip = static_cast<std::int32_t>(label);  // half as many vectors to compare
      others = sum_of<T>(
          n, [=](std::int64_t i) { return static_cast<std::int32_t>(i) == skip ? T(0) : m::exp(x[i] - top); });
    } else {
      others = sum_of<T>(n, [x, top](std::int64_t i) { return m::exp(x[i] - top); });
    }
    const T total = leads ? T(1) + others : others;
    const T rest = leads ? m::log1p(others) : m::log(total), scale = T(1) / total;
    T loss, mass = T(1);  // mass: the sum of q
    if (a.labels) {
      loss = keep * (rest - (x[label] - top));
      if (smooth > T(0)) loss += even * sum_of<T>(n, [=](std::int64_t i) { return rest - (x[i] - top); });
      if (d) {
#pragma omp simd
        for (std::int64_t i = 0; i < n; ++i) d[i] = d[i] * scale - even;
        if (leads)  // 1 / total - 1; x - top is 0, or NaN when both are infinite
          d[label] = (x[label] - top) - others * scale + (smooth - even);
        else
          d[label] -= keep;
      }
    } else {
      const T* t = static_cast<const T*>(a.target) + r * n;
      const TwoSums<T> s = sums_of<T>(n, [=](std::int64_t i) { return (t[i] * keep + even) * (rest - (x[i] - top)); },
                                      [=](std::int64_t i) { return t[i] * keep + even; });
      loss = s.a;
      mass = s.b;
      if (d) {
        const T up = scale * mass;
#pragma omp simd
        for (std::int64_t i = 0; i < n; ++i) d[i] = d[i] * up - (t[i] * keep + even);
      }
    }
    static_cast<T*>(a.loss)[r] = loss;
  }
}

}  // namespace

CAPO_CPU_KERNEL(cross_entropy, capo::CrossEntropyArgs) {
  args.dtype == capo::DType::f32 ? run<float>(args, begin, end) : run<double>(args, begin, end);
}
