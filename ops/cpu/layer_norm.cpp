#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/cpu/row.h>
#include <capo/ops/layer_norm.h>

namespace {

constexpr std::int64_t kBuffer = capo::kHalfRow + 16 * 7;  // rows that do not all begin in one set of the first cache

// A loop of its own, so that no product is contracted with the sum: the bits are those of the op add.
template <class T>
void add_rows(const T* a, const T* b, T* sum, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) sum[i] = a[i] + b[i];
}

template <class T>
void forward(const capo::LayerNormArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns, per_sample = a.rows / a.samples;
  const T count = static_cast<T>(n), eps = static_cast<T>(a.eps);
  alignas(64) T buffer[2][capo::kHalfRow];
  const bool streamed = streams(a.dtype, a.rows * n);
  for (std::int64_t r = begin; r < end; ++r) {
    const T* x = read_row(a.x, a.dtype, r * n, n, buffer[0]);
    const std::int64_t sample = r / per_sample;
    const T* w = a.weight ? static_cast<const T*>(a.weight) + sample * n : nullptr;
    const T* b = a.bias ? static_cast<const T*>(a.bias) + sample * n : nullptr;
    if (a.residual) {
      T* sum = open_row(a.sum, a.dtype, r * n, buffer[0]);
      add_rows(x, read_row(a.residual, a.dtype, r * n, n, buffer[1]), sum, n);
      close_row(a.sum, a.dtype, r * n, n, sum);
      x = read_row<T>(a.sum, a.dtype, r * n, n, buffer[0]);  // rounded
    }
    T m = T(0), rest = T(0), var;  // mean = m + rest: what rounding m lost
    if (a.rms) {
      var = sum_of<T>(n, [x](std::int64_t i) { return x[i] * x[i]; }) / count;
    } else {
      m = sum_of<T>(n, [x](std::int64_t i) { return x[i]; }) / count;
      const TwoSums<T> s = sums_of<T>(
          n, [x, m](std::int64_t i) { return x[i] - m; }, [x, m](std::int64_t i) { return (x[i] - m) * (x[i] - m); });
      rest = s.a / count;
      var = greater((s.b - s.a * rest) / count, T(0));
    }
    const T rstd = T(1) / m::sqrt(var + eps);
    if (a.mean) static_cast<T*>(a.mean)[r] = m + rest;
    if (a.rstd) static_cast<T*>(a.rstd)[r] = rstd;
    write_row(a.y, a.dtype, r * n, n, buffer[1], streamed, [=](std::int64_t from, std::int64_t to, T* y) {
      if (w && b) {
#pragma omp simd
        for (std::int64_t i = from; i < to; ++i) y[i - from] = ((x[i] - m) - rest) * rstd * w[i] + b[i];
      } else if (w) {
#pragma omp simd
        for (std::int64_t i = from; i < to; ++i) y[i - from] = ((x[i] - m) - rest) * rstd * w[i];
      } else if (b) {
#pragma omp simd
        for (std::int64_t i = from; i < to; ++i) y[i - from] = ((x[i] - m) - rest) * rstd + b[i];
      } else {
#pragma omp simd
        for (std::int64_t i = from; i < to; ++i) y[i - from] = ((x[i] - m) - rest) * rstd;
      }
    });
  }
  end_stream(streamed);
}

// With g = dy * weight and h = (x - mean) * rstd:  dx = rstd * (g - mean(g) - h * mean(g * h)); rms has no mean(g).
template <class T>
struct Row {
  const T *x, *dy;
  T* dx;
  T mean, rstd, shift, slope;
};

template <class T>
inline void find_slope(Row<T>& r, const T* w, bool rms, std::int64_t n) {
  const T *x = r.x, *dy = r.dy, mean = r.mean;
  const TwoSums<T> s = w ? sums_of<T>(n, [=](std::int64_t i) { return dy[i] * w[i]; },
                                      [=](std::int64_t i) { return dy[i] * w[i] * (x[i] - mean); })
                         : sums_of<T>(n, [=](std::int64_t i) { return dy[i]; },
                                      [=](std::int64_t i) { return dy[i] * (x[i] - mean); });
  r.shift = rms ? T(0) : s.a / static_cast<T>(n);
  r.slope = s.b * r.rstd * r.rstd / static_cast<T>(n);
}

// Elements [from, to) of everything in one pass.
template <class T>
inline void whole_row(const Row<T>& r, const T* w, T* dw, T* db, std::int64_t from, std::int64_t to) {
  const T *x = r.x, *dy = r.dy, mean = r.mean, rstd = r.rstd, shift = r.shift, slope = r.slope;
  T* dx = r.dx;
#pragma omp simd
  for (std::int64_t i = from; i < to; ++i) {
    const T g = dy[i], h = x[i] - mean;
    dx[i - from] = (g * w[i] - shift - h * slope) * rstd;
    dw[i] += g * (h * rstd);
    db[i] += g;
  }
}

template <class T>
inline void one_row(const Row<T>& r, const T* w, T* dw, T* db, std::int64_t from, std::int64_t to) {
  const T *x = r.x, *dy = r.dy, mean = r.mean, rstd = r.rstd, shift = r.shift, slope = r.slope;
  T* dx = r.dx;
  if (dx && w) {
#pragma omp simd
    for (std::int64_t i = from; i < to; ++i) dx[i - from] = (dy[i] * w[i] - shift - (x[i] - mean) * slope) * rstd;
  } else if (dx) {
#pragma omp simd
    for (std::int64_t i = from; i < to; ++i) dx[i - from] = (dy[i] - shift - (x[i] - mean) * slope) * rstd;
  }
  if (dw) {
#pragma omp simd
    for (std::int64_t i = from; i < to; ++i) dw[i] += dy[i] * ((x[i] - mean) * rstd);
  }
  if (db) {
#pragma omp simd
    for (std::int64_t i = from; i < to; ++i) db[i] += dy[i];
  }
}

template <class T>
void backward_rows(const capo::LayerNormBackwardArgs& a, std::int64_t chunk) {
  const std::int64_t n = a.columns, per_sample = a.rows / a.samples;
  const std::int64_t chunks = (per_sample + capo::kLayerNormChunk - 1) / capo::kLayerNormChunk, sample = chunk / chunks;
  const std::int64_t first = sample * per_sample + (chunk - sample * chunks) * capo::kLayerNormChunk;
  const std::int64_t last = lesser(first + capo::kLayerNormChunk, (sample + 1) * per_sample);
  const T* w = a.weight ? static_cast<const T*>(a.weight) + sample * n : nullptr;
  T* dw = a.dweight_part ? static_cast<T*>(a.dweight_part) + chunk * n : nullptr;
  T* db = a.dbias_part ? static_cast<T*>(a.dbias_part) + chunk * n : nullptr;
  if (dw)
    for (std::int64_t i = 0; i < n; ++i) dw[i] = T(0);
  if (db)
    for (std::int64_t i = 0; i < n; ++i) db[i] = T(0);
  alignas(64) T buffer[4][kBuffer];
  const bool streamed = a.dx && streams(a.dtype, a.rows * n);
  const bool whole = a.dx && w && dw && db;
  const auto open = [&](std::int64_t r) {
    Row<T> row{a.x ? read_row(a.x, a.dtype, r * n, n, buffer[0]) : nullptr,
               read_row(a.dy, a.dtype, r * n, n, buffer[1]),
               a.dx ? open_row(a.dx, a.dtype, r * n, buffer[2], streamed) : nullptr,
               a.mean ? static_cast<const T*>(a.mean)[r] : T(0), a.rstd ? static_cast<const T*>(a.rstd)[r] : T(0),
               T(0), T(0)};
    if (a.dx) find_slope(row, w, a.rms, n);
    return row;
  };
  const auto close = [&](std::int64_t r, const Row<T>& row, std::int64_t i, std::int64_t j) {
    if (!a.dx) return;
    if (a.dsum) add_rows(read_row(a.dsum, a.dtype, r * n + i, j - i, buffer[3]), row.dx, row.dx, j - i);
    close_row(a.dx, a.dtype, r * n + i, j - i, row.dx, streamed);
  };
  for (std::int64_t r = first; r < last; ++r) {
    const Row<T> row = open(r);
    for (std::int64_t i = 0, j; i < n; i = j) {
      j = streamed ? piece_end(a.dx, r * n, i, n) : n;
      whole ? whole_row(row, w, dw, db, i, j) : one_row(row, w, dw, db, i, j);
      close(r, row, i, j);
    }
  }
  end_stream(streamed);
}

}  // namespace

CAPO_CPU_KERNEL(layer_norm, capo::LayerNormArgs) {
  args.dtype == capo::DType::f64 ? forward<double>(args, begin, end) : forward<float>(args, begin, end);
}

CAPO_CPU_KERNEL(layer_norm_backward, capo::LayerNormBackwardArgs) {
  for (std::int64_t chunk = begin; chunk < end; ++chunk)
    args.dtype == capo::DType::f64 ? backward_rows<double>(args, chunk) : backward_rows<float>(args, chunk);
}
