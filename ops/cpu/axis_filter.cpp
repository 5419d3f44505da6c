#include <capo/ops/axis_filter.h>
#include <capo/ops/cpu/kernel.h>

namespace {

// Few channels: one pass over the taps with N sums in registers.
template <class T, int N>
void narrow(const capo::AxisFilterArgs& p, std::int64_t begin, std::int64_t end) {
  const T* weight = static_cast<const T*>(p.weight);
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t outer = item / p.rows, row = item % p.rows, first = p.begin[row], last = p.begin[row + 1];
    const T* x = static_cast<const T*>(p.x) + outer * p.columns * N;
    T* y = static_cast<T*>(p.y) + item * N;
    T sum[N] = {};
    for (std::int64_t t = first; t < last; ++t)
      for (int i = 0; i < N; ++i) sum[i] += weight[t] * x[p.column[t] * N + i];
    for (int i = 0; i < N; ++i) y[i] = sum[i];
  }
}

template <class T>
void filter(const capo::AxisFilterArgs& p, std::int64_t begin, std::int64_t end) {
  if (p.inner == 1) return narrow<T, 1>(p, begin, end);
  if (p.inner == 3) return narrow<T, 3>(p, begin, end);
  if (p.inner == 4) return narrow<T, 4>(p, begin, end);
  const T* weight = static_cast<const T*>(p.weight);
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t outer = item / p.rows, row = item % p.rows, first = p.begin[row], last = p.begin[row + 1];
    const T* x = static_cast<const T*>(p.x) + outer * p.columns * p.inner;
    T* y = static_cast<T*>(p.y) + item * p.inner;
    for (std::int64_t block = 0; block < p.inner; block += 64) {
      const std::int64_t n = lesser(std::int64_t{64}, p.inner - block);
      T sum[64] = {};
      for (std::int64_t t = first; t < last; ++t) {
        const T* from = x + p.column[t] * p.inner + block;
        const T w = weight[t];
        if (n == 64) {
          for (int i = 0; i < 64; ++i) sum[i] += w * from[i];
        } else {
          for (std::int64_t i = 0; i < n; ++i) sum[i] += w * from[i];
        }
      }
      for (std::int64_t i = 0; i < n; ++i) y[block + i] = sum[i];
    }
  }
}

}  // namespace

CAPO_CPU_KERNEL(axis_filter, capo::AxisFilterArgs) {
  args.dtype == capo::DType::f32 ? filter<float>(args, begin, end) : filter<double>(args, begin, end);
}
