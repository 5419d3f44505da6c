#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/modulate.h>

namespace {

template <class T>
void forward(const capo::ModulateArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  const T base = static_cast<T>(a.base);
  T buffer[3][capo::kHalfRow];
  const T *scale = nullptr, *plus = nullptr;
  std::int64_t before = -1;
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int64_t sample = r / a.rows;
    if (sample != before) {
      scale = read_row(a.scale, a.dtype, sample * n, n, buffer[0]);
      if (a.shift) plus = read_row(a.shift, a.dtype, sample * n, n, buffer[1]);
      before = sample;
    }
    if (!a.shift) plus = read_row(a.residual, a.dtype, r * n, n, buffer[1]);
    const T* x = read_row(a.x, a.dtype, r * n, n, buffer[2]);
    T* y = open_row(a.y, a.dtype, r * n, buffer[2]);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) y[i] = x[i] * (base + scale[i]) + plus[i];
    close_row(a.y, a.dtype, r * n, n, y);
  }
}

template <class T>
void backward(const capo::ModulateBackwardArgs& a, std::int64_t item) {
  const std::int64_t n = a.columns, chunks = (a.rows + capo::kModulateChunk - 1) / capo::kModulateChunk;
  const std::int64_t sample = item / chunks, first = (item - sample * chunks) * capo::kModulateChunk;
  const std::int64_t last = lesser(first + capo::kModulateChunk, a.rows);
  const T base = static_cast<T>(a.base);
  T buffer[3][capo::kHalfRow];
  const T* scale = a.dx ? read_row(a.scale, a.dtype, sample * n, n, buffer[0]) : nullptr;
  T* dscale = a.dscale_part ? static_cast<T*>(a.dscale_part) + item * n : nullptr;
  T* dshift = a.dshift_part ? static_cast<T*>(a.dshift_part) + item * n : nullptr;
  if (dscale)
    for (std::int64_t i = 0; i < n; ++i) dscale[i] = T(0);
  if (dshift)
    for (std::int64_t i = 0; i < n; ++i) dshift[i] = T(0);
  for (std::int64_t r = sample * a.rows + first; r < sample * a.rows + last; ++r) {
    const T* dy = read_row(a.dy, a.dtype, r * n, n, buffer[1]);
    if (a.dx) {
      T* dx = open_row(a.dx, a.dtype, r * n, buffer[2]);
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) dx[i] = dy[i] * (base + scale[i]);
      close_row(a.dx, a.dtype, r * n, n, dx);
    }
    if (dscale) {
      const T* x = read_row(a.x, a.dtype, r * n, n, buffer[2]);
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) dscale[i] += dy[i] * x[i];
    }
    if (dshift) {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) dshift[i] += dy[i];
    }
  }
}

}  // namespace

CAPO_CPU_KERNEL(modulate, capo::ModulateArgs) {
  args.dtype == capo::DType::f64 ? forward<double>(args, begin, end) : forward<float>(args, begin, end);
}

CAPO_CPU_KERNEL(modulate_backward, capo::ModulateBackwardArgs) {
  for (std::int64_t item = begin; item < end; ++item)
    args.dtype == capo::DType::f64 ? backward<double>(args, item) : backward<float>(args, item);
}
