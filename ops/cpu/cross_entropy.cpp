#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/cpu/row.h>
#include <capo/ops/cross_entropy.h>

namespace {

// What the gradient of row r is multiplied by.
template <class T>
inline T upstream_of(const capo::CrossEntropyArgs& a, std::int64_t r) {
  return static_cast<const T*>(a.upstream)[r * a.upstream_step];
}

template <class T>
void run(const capo::CrossEntropyArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  T x_row[capo::kHalfRow], t_row[capo::kHalfRow], d_row[capo::kHalfRow];  // of 16-bit tensors
  const T smooth = static_cast<T>(a.smoothing), keep = T(1) - smooth, even = smooth / static_cast<T>(n);
  for (std::int64_t r = begin; r < end; ++r) {
    T* d = a.dlogits ? open_row(a.dlogits, a.dtype, r * n, d_row) : nullptr;
    const auto finish = [&](T row_loss) {
      if (a.loss) static_cast<T*>(a.loss)[r] = row_loss;
      if (!d) return;
      if (a.upstream) {
        const T up = upstream_of<T>(a, r);
        for (std::int64_t i = 0; i < n; ++i) d[i] *= up;
      }
      close_row(a.dlogits, a.dtype, r * n, n, d);
    };
    const bool counted = !a.labels || a.labels[r] != a.ignore_index;
    if (a.counted) static_cast<T*>(a.counted)[r] = counted ? T(1) : T(0);
    if (!counted) {
      if (d)
        for (std::int64_t i = 0; i < n; ++i) d[i] = T(0);
      finish(T(0));
      continue;
    }
    const T* x = read_row<T>(a.logits, a.dtype, r * n, n, x_row);
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
      const T* t = read_row<T>(a.target, a.dtype, r * n, n, t_row);
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
    finish(loss);
  }
}

// Rows of few classes, as those of segmentation, lie side by side, a vector for a class: alone each would fill one
// lane. Hard labels without smoothing; the same steps as above.
constexpr std::int64_t kNarrow = 8;
constexpr std::int64_t kRows = 64;

template <class T>
void run_narrow(const capo::CrossEntropyArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  T x[kNarrow][kRows], top[kRows], own[kRows], others[kRows], scale[kRows], loss[kRows];
  T block[kRows * kNarrow];  // of 16-bit tensors
  std::int32_t label[kRows], leads[kRows];  // label: -1 where the row is ignored
  for (std::int64_t r = begin; r < end; r += kRows) {
    const std::int64_t rows = lesser(kRows, end - r);
    const T* logits = read_row<T>(a.logits, a.dtype, r * n, rows * n, block);
    for (std::int64_t c = 0; c < n; ++c) {
      for (std::int64_t j = 0; j < rows; ++j) x[c][j] = logits[j * n + c];
      for (std::int64_t j = rows; j < kRows; ++j) x[c][j] = T(0);
    }
    for (std::int64_t j = 0; j < kRows; ++j)
      label[j] = j < rows && a.labels[r + j] != a.ignore_index ? static_cast<std::int32_t>(a.labels[r + j]) : -1;

    for (int j = 0; j < kRows; ++j) top[j] = static_cast<T>(-__builtin_inf()), own[j] = others[j] = T(0);
    for (std::int64_t c = 0; c < n; ++c)
      for (int j = 0; j < kRows; ++j) {
        top[j] = greater(top[j], x[c][j]);
        own[j] = label[j] == c ? x[c][j] : own[j];
      }
    for (int j = 0; j < kRows; ++j) leads[j] = label[j] >= 0 && own[j] == top[j];
    for (std::int64_t c = 0; c < n; ++c)
#pragma omp simd
      for (int j = 0; j < kRows; ++j) {
        const T e = m::exp(x[c][j] - top[j]);
        x[c][j] = leads[j] && label[j] == c ? T(0) : e;
        others[j] += x[c][j];
      }
#pragma omp simd
    for (int j = 0; j < kRows; ++j) {
      const T total = leads[j] ? T(1) + others[j] : others[j];
      const T rest = leads[j] ? m::log1p(others[j]) : m::log(total);
      scale[j] = T(1) / total;
      loss[j] = label[j] < 0 ? T(0) : rest - (own[j] - top[j]);
    }
    if (a.loss)
      for (std::int64_t j = 0; j < rows; ++j) static_cast<T*>(a.loss)[r + j] = loss[j];
    if (a.counted)
      for (std::int64_t j = 0; j < rows; ++j) static_cast<T*>(a.counted)[r + j] = label[j] < 0 ? T(0) : T(1);
    if (!a.dlogits) continue;
    T* d = open_row(a.dlogits, a.dtype, r * n, block);
    for (std::int64_t c = 0; c < n; ++c) {
      for (int j = 0; j < kRows; ++j) {
        const T p = x[c][j] * scale[j], lead = (own[j] - top[j]) - others[j] * scale[j];
        const T g = label[j] == c ? (leads[j] ? lead : p - T(1)) : p;
        x[c][j] = label[j] < 0 ? T(0) : g;
      }
      if (a.upstream)
        for (std::int64_t j = 0; j < rows; ++j) x[c][j] *= upstream_of<T>(a, r + j);
      for (std::int64_t j = 0; j < rows; ++j) d[j * n + c] = x[c][j];
    }
    close_row(a.dlogits, a.dtype, r * n, rows * n, d);
  }
}

}  // namespace

CAPO_CPU_KERNEL(cross_entropy, capo::CrossEntropyArgs) {
  const bool f64 = args.dtype == capo::DType::f64;
  if (args.labels && args.columns <= kNarrow && args.smoothing == 0)
    f64 ? run_narrow<double>(args, begin, end) : run_narrow<float>(args, begin, end);
  else
    f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}
