#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/cpu/wide.h>
#include <capo/ops/layer_norm.h>

namespace {

// Elements that rows beyond the caches ask of memory while their results are computed. Two rows are read here: left to
// the processor, which follows them one at a time, memory rests meanwhile (a fifth of the time).
constexpr std::int64_t kAhead = 2304;

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
  alignas(64) T buffer[2][kRowBuffer];
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
      var = sum_row<T>(n, [x](auto at, std::int64_t i) { return at(x + i) * at(x + i); }) / count;
    } else {
      m = sum_row<T>(n, [x](auto at, std::int64_t i) { return at(x + i); }) / count;
      const Two<T> s = sums_row<T>(n, [x, m](auto at, std::int64_t i) {
        const auto d = at(x + i) - m;
        return Two{d, d * d};
      });
      rest = s.a / count;
      var = greater((s.b - s.a * rest) / count, T(0));
    }
    const T rstd = T(1) / m::sqrt(var + eps);
    if (a.mean) static_cast<T*>(a.mean)[r] = m + rest;
    if (a.rstd) static_cast<T*>(a.rstd)[r] = rstd;
    const T shift = rest * rstd;
    const auto put = [&](auto f) { put_row(a.y, a.dtype, r * n, n, buffer[1], streamed, f); };
    const auto h = [=](auto at, std::int64_t i) { return (at(x + i) - m) * rstd - shift; };
    if (w && b)
      put([=](auto at, std::int64_t i) { return h(at, i) * at(w + i) + at(b + i); });
    else if (w)
      put([=](auto at, std::int64_t i) { return h(at, i) * at(w + i); });
    else if (b)
      put([=](auto at, std::int64_t i) { return h(at, i) + at(b + i); });
    else
      put(h);
  }
  end_stream(streamed);
}

// With g = dy * weight and h = (x - mean) * rstd:  dx = rstd * (g - mean(g) - h * mean(g * h)); rms has no mean(g).
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
  alignas(64) T buffer[4][kRowBuffer];
  const bool streamed = a.dx && streams(a.dtype, a.rows * n);
  const bool staged = streamed && n <= kRowBuffer;  // where dsum is added first
  const std::int64_t ahead = streamed ? kAhead : 0;
  for (std::int64_t r = first; r < last; ++r) {
    const T* x = a.x ? read_row(a.x, a.dtype, r * n, n, buffer[0]) : nullptr;
    const T* dy = read_row(a.dy, a.dtype, r * n, n, buffer[1]);
    const T mean = a.mean ? static_cast<const T*>(a.mean)[r] : T(0);
    const T rstd = a.rstd ? static_cast<const T*>(a.rstd)[r] : T(0);
    const auto dw_at = [=](auto at, std::int64_t i) { return at(dw + i) + at(dy + i) * ((at(x + i) - mean) * rstd); };
    const auto db_at = [=](auto at, std::int64_t i) { return at(db + i) + at(dy + i); };
    if (a.dx) {
      const auto g = [=](auto at, std::int64_t i) { return w ? at(dy + i) * at(w + i) : at(dy + i); };
      const Two<T> s = sums_row<T>(n, [=](auto at, std::int64_t i) {
        const auto v = g(at, i);
        return Two{v, v * (at(x + i) - mean)};
      });
      const T shift = a.rms ? T(0) : s.a / static_cast<T>(n), slope = s.b * rstd * rstd / static_cast<T>(n);
      const auto dx_at = [=](auto at, std::int64_t i) {
        return (g(at, i) - shift - (at(x + i) - mean) * slope) * rstd;
      };
      const auto write = [&](auto f) {
        if (!a.dsum) return put_row(a.dx, a.dtype, r * n, n, buffer[2], streamed, f);
        T* dx = open_row(a.dx, a.dtype, r * n, buffer[2], staged);
        fill_row(dx, 0, n, f);
        add_rows(read_row(a.dsum, a.dtype, r * n, n, buffer[3]), dx, dx, n);
        close_row(a.dx, a.dtype, r * n, n, dx, staged);
      };
      if (dw && db) {
        write([=](auto at, std::int64_t i) {
          __builtin_prefetch(x + i + ahead, 0, 2);
          __builtin_prefetch(dy + i + ahead, 0, 2);
          put(dw + i, dw_at(at, i));
          put(db + i, db_at(at, i));
          return dx_at(at, i);
        });
        continue;
      }
      write(dx_at);
    }
    if (dw) fill_row(dw, 0, n, dw_at);
    if (db) fill_row(db, 0, n, db_at);
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
