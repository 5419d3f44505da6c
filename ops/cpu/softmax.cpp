#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/cpu/row.h>
#include <capo/ops/softmax.h>

namespace {

template <class T>
void forward(const capo::SoftmaxArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  const bool streamed = n <= capo::kHalfRow && streams(a.dtype, a.rows * n);
  T buffer[2][capo::kHalfRow];
  for (std::int64_t r = begin; r < end; ++r) {
    const T* x = read_row(a.x, a.dtype, r * n, n, buffer[0]);
    T* y = open_row(a.y, a.dtype, r * n, buffer[1], streamed);
    const T top = largest(x, n);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) y[i] = m::exp_small(x[i] - top);
    const T total = sum_of<T>(n, [y](std::int64_t i) { return y[i]; });
    if (a.log) {
      const T rest = m::log(total);
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) y[i] = (x[i] - top) - rest;
    } else {
      const T scale = T(1) / total;
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) y[i] *= scale;
    }
    close_row(a.y, a.dtype, r * n, n, y, streamed);
  }
  end_stream(streamed);
}

template <class T>
void backward(const capo::SoftmaxArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  const bool streamed = n <= capo::kHalfRow && streams(a.dtype, a.rows * n);
  T buffer[3][capo::kHalfRow];
  for (std::int64_t r = begin; r < end; ++r) {
    const T* y = read_row(a.x, a.dtype, r * n, n, buffer[0]);
    const T* dy = read_row(a.dy, a.dtype, r * n, n, buffer[1]);
    T* dx = open_row(a.y, a.dtype, r * n, buffer[2], streamed);
    if (a.log) {
      const T total = sum_of<T>(n, [dy](std::int64_t i) { return dy[i]; });
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) dx[i] = dy[i] - m::exp(y[i]) * total;
    } else {
      const T along = sum_of<T>(n, [dy, y](std::int64_t i) { return dy[i] * y[i]; });
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) dx[i] = y[i] * (dy[i] - along);
    }
    close_row(a.y, a.dtype, r * n, n, dx, streamed);
  }
  end_stream(streamed);
}

template <class T>
void run(const capo::SoftmaxArgs& a, std::int64_t begin, std::int64_t end) {
  a.dy ? backward<T>(a, begin, end) : forward<T>(a, begin, end);
}

}  // namespace

CAPO_CPU_KERNEL(softmax, capo::SoftmaxArgs) {
  args.dtype == capo::DType::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}
