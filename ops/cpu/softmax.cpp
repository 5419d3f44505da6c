#include <capo/ops/cpu/exp.h>
#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/cpu/row.h>
#include <capo/ops/cpu/wide.h>
#include <capo/ops/softmax.h>

namespace {

template <class T>
void forward(const capo::SoftmaxArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  const bool streamed = n <= capo::kHalfRow && streams(a.dtype, a.rows * n);
  const std::int64_t ahead = streamed ? n : 0;  // the next row is asked for while this one is put
  alignas(64) T buffer[2][kRowBuffer];
  for (std::int64_t r = begin; r < end; ++r) {
    const T* x = read_row(a.x, a.dtype, r * n, n, buffer[0]);
    T* e = open_row(a.y, a.dtype, r * n, buffer[1], streamed);
    const T top = largest(x, n), total = m::exp_row(x, top, e, n);
    const T rest = a.log ? m::log(total) : T(0), scale = T(1) / total;
    const auto finish = [&](auto f) { put_row(a.y, a.dtype, r * n, n, e, streamed, f); };
    if (a.log)
      finish([=](auto at, std::int64_t i) { return (at(x + i) - top) - rest; });
    else
      finish([=](auto at, std::int64_t i) {
        __builtin_prefetch(x + i + ahead, 0, 2);
        return at(e + i) * scale;
      });
  }
  end_stream(streamed);
}

template <class T>
void backward(const capo::SoftmaxArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  const bool streamed = streams(a.dtype, a.rows * n);
  alignas(64) T buffer[3][kRowBuffer];
  for (std::int64_t r = begin; r < end; ++r) {
    const T* y = read_row(a.x, a.dtype, r * n, n, buffer[0]);
    const T* dy = read_row(a.dy, a.dtype, r * n, n, buffer[1]);
    if (!a.log) {
      const T along = sum_row<T>(n, [=](auto at, std::int64_t i) { return at(dy + i) * at(y + i); });
      put_row(a.y, a.dtype, r * n, n, buffer[2], streamed,
              [=](auto at, std::int64_t i) { return at(y + i) * (at(dy + i) - along); });
      continue;
    }
    const T along = sum_row<T>(n, [=](auto at, std::int64_t i) { return at(dy + i); });
    write_row(a.y, a.dtype, r * n, n, buffer[2], streamed, [=](std::int64_t from, std::int64_t to, T* dx) {
#pragma omp simd
      for (std::int64_t i = from; i < to; ++i) dx[i - from] = dy[i] - m::exp(y[i]) * along;
    });
  }
  end_stream(streamed);
}

// Rows of few elements, as the classes of segmentation, lie side by side, a vector for an element: alone each would
// fill one lane. Sums go from the first element to the last.
constexpr std::int64_t kNarrow = 8;
constexpr std::int64_t kRows = 64;
static_assert(kNarrow * kRows <= capo::kHalfRow);

template <class T>
inline void turn(const T* x, std::int64_t rows, std::int64_t n, T (*columns)[kRows]) {
  for (std::int64_t c = 0; c < n; ++c) {
    for (std::int64_t j = 0; j < rows; ++j) columns[c][j] = x[j * n + c];
    for (std::int64_t j = rows; j < kRows; ++j) columns[c][j] = T(0);
  }
}
template <class T>
inline void turn_back(const T (*columns)[kRows], std::int64_t rows, std::int64_t n, T* y) {
  for (std::int64_t c = 0; c < n; ++c)
    for (std::int64_t j = 0; j < rows; ++j) y[j * n + c] = columns[c][j];
}

template <class T>
void forward_narrow(const capo::SoftmaxArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  const bool streamed = streams(a.dtype, a.rows * n);
  alignas(64) T buffer[2][kNarrow * kRows], x[kNarrow][kRows], top[kRows], total[kRows], rest[kRows];
  for (std::int64_t r = begin; r < end; r += kRows) {
    const std::int64_t rows = lesser(kRows, end - r);
    turn(read_row(a.x, a.dtype, r * n, rows * n, buffer[0]), rows, n, x);
    for (int j = 0; j < kRows; ++j) top[j] = static_cast<T>(-__builtin_inf()), total[j] = T(0);
    for (std::int64_t c = 0; c < n; ++c)
      for (int j = 0; j < kRows; ++j) top[j] = greater(top[j], x[c][j]);
    for (std::int64_t c = 0; c < n; ++c)
#pragma omp simd
      for (int j = 0; j < kRows; ++j) {
        const T d = x[c][j] - top[j], e = m::exp_small(d);
        x[c][j] = a.log ? d : e;
        total[j] += e;
      }
#pragma omp simd
    for (int j = 0; j < kRows; ++j) rest[j] = a.log ? m::log(total[j]) : T(1) / total[j];
    for (std::int64_t c = 0; c < n; ++c)
      for (int j = 0; j < kRows; ++j) x[c][j] = a.log ? x[c][j] - rest[j] : x[c][j] * rest[j];
    T* y = open_row(a.y, a.dtype, r * n, buffer[1], streamed);
    turn_back(x, rows, n, y);
    close_row(a.y, a.dtype, r * n, rows * n, y, streamed);
  }
  end_stream(streamed);
}

template <class T>
void backward_narrow(const capo::SoftmaxArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  const bool streamed = streams(a.dtype, a.rows * n);
  alignas(64) T buffer[2][kNarrow * kRows], y[kNarrow][kRows], dy[kNarrow][kRows], along[kRows];
  for (std::int64_t r = begin; r < end; r += kRows) {
    const std::int64_t rows = lesser(kRows, end - r);
    turn(read_row(a.x, a.dtype, r * n, rows * n, buffer[0]), rows, n, y);
    turn(read_row(a.dy, a.dtype, r * n, rows * n, buffer[0]), rows, n, dy);
    for (int j = 0; j < kRows; ++j) along[j] = T(0);
    for (std::int64_t c = 0; c < n; ++c)
      for (int j = 0; j < kRows; ++j) along[j] += a.log ? dy[c][j] : dy[c][j] * y[c][j];
    for (std::int64_t c = 0; c < n; ++c)
#pragma omp simd
      for (int j = 0; j < kRows; ++j)
        y[c][j] = a.log ? dy[c][j] - m::exp(y[c][j]) * along[j] : y[c][j] * (dy[c][j] - along[j]);
    T* dx = open_row(a.y, a.dtype, r * n, buffer[1], streamed);
    turn_back(y, rows, n, dx);
    close_row(a.y, a.dtype, r * n, rows * n, dx, streamed);
  }
  end_stream(streamed);
}

template <class T>
void run(const capo::SoftmaxArgs& a, std::int64_t begin, std::int64_t end) {
  if (a.columns > 0 && a.columns <= kNarrow)
    a.dy ? backward_narrow<T>(a, begin, end) : forward_narrow<T>(a, begin, end);
  else
    a.dy ? backward<T>(a, begin, end) : forward<T>(a, begin, end);
}

}  // namespace

CAPO_CPU_KERNEL(softmax, capo::SoftmaxArgs) {
  args.dtype == capo::DType::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}
