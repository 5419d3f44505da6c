#include <capo/ops/cpu/exp.h>
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
  alignas(64) T buffer[3][capo::kHalfRow];
  for (std::int64_t r = begin; r < end; ++r) {
    const T* x = read_row(a.x, a.dtype, r * n, n, buffer[0]);
    T* e = open_row(a.y, a.dtype, r * n, buffer[1], streamed);
    const T top = largest(x, n), total = m::exp_row(x, top, e, n);
    const T rest = a.log ? m::log(total) : T(0), scale = T(1) / total;
    const auto finish = [=, log = a.log](std::int64_t from, std::int64_t to, T* y) {
      if (log) {
#pragma omp simd
        for (std::int64_t i = from; i < to; ++i) y[i - from] = (x[i] - top) - rest;
      } else {
#pragma omp simd
        for (std::int64_t i = from; i < to; ++i) y[i - from] = e[i] * scale;
      }
    };
    write_row(a.y, a.dtype, r * n, n, streamed ? buffer[2] : e, streamed, finish);
  }
  end_stream(streamed);
}

template <class T>
void backward(const capo::SoftmaxArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  const bool streamed = streams(a.dtype, a.rows * n);
  alignas(64) T buffer[3][capo::kHalfRow];
  for (std::int64_t r = begin; r < end; ++r) {
    const T* y = read_row(a.x, a.dtype, r * n, n, buffer[0]);
    const T* dy = read_row(a.dy, a.dtype, r * n, n, buffer[1]);
    const T along = a.log ? sum_of<T>(n, [dy](std::int64_t i) { return dy[i]; })
                          : sum_of<T>(n, [dy, y](std::int64_t i) { return dy[i] * y[i]; });
    write_row(a.y, a.dtype, r * n, n, buffer[2], streamed, [=, log = a.log](std::int64_t from, std::int64_t to, T* dx) {
      if (log) {
#pragma omp simd
        for (std::int64_t i = from; i < to; ++i) dx[i - from] = dy[i] - m::exp(y[i]) * along;
      } else {
#pragma omp simd
        for (std::int64_t i = from; i < to; ++i) dx[i - from] = y[i] * (dy[i] - along);
      }
    });
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
