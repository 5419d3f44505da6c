#include <capo/ops/cpu/kernel.h>
#include <capo/ops/modulate.h>

namespace {

template <class T>
void forward(const capo::ModulateArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = a.columns;
  const T base = static_cast<T>(a.base);
  for (std::int64_t r = begin; r < end; ++r) {
    const std::int64_t sample = r / a.rows;
    const T* x = static_cast<const T*>(a.x) + r * n;
    const T* scale = static_cast<const T*>(a.scale) + sample * n;
    const T* plus = a.shift ? static_cast<const T*>(a.shift) + sample * n : static_cast<const T*>(a.residual) + r * n;
    T* y = static_cast<T*>(a.y) + r * n;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) y[i] = x[i] * (base + scale[i]) + plus[i];
  }
}

template <class T>
void backward(const capo::ModulateBackwardArgs& a, std::int64_t item) {
  const std::int64_t n = a.columns, chunks = (a.rows + capo::kModulateChunk - 1) / capo::kModulateChunk;
  const std::int64_t sample = item / chunks, first = (item - sample * chunks) * capo::kModulateChunk;
  const std::int64_t last = lesser(first + capo::kModulateChunk, a.rows);
  const T base = static_cast<T>(a.base);
  const T* scale = a.dx ? static_cast<const T*>(a.scale) + sample * n : nullptr;
  T* dscale = a.dscale_part ? static_cast<T*>(a.dscale_part) + item * n : nullptr;
  T* dshift = a.dshift_part ? static_cast<T*>(a.dshift_part) + item * n : nullptr;
  if (dscale)
    for (std::int64_t i = 0; i < n; ++i) dscale[i] = T(0);
  if (dshift)
    for (std::int64_t i = 0; i < n; ++i) dshift[i] = T(0);
  for (std::int64_t r = sample * a.rows + first; r < sample * a.rows + last; ++r) {
    const T* dy = static_cast<const T*>(a.dy) + r * n;
    if (a.dx) {
      T* dx = static_cast<T*>(a.dx) + r * n;
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) dx[i] = dy[i] * (base + scale[i]);
    }
    if (dscale) {
      const T* x = static_cast<const T*>(a.x) + r * n;
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
  args.dtype == capo::DType::f32 ? forward<float>(args, begin, end) : forward<double>(args, begin, end);
}

CAPO_CPU_KERNEL(modulate_backward, capo::ModulateBackwardArgs) {
  for (std::int64_t item = begin; item < end; ++item)
    args.dtype == capo::DType::f32 ? backward<float>(args, item) : backward<double>(args, item);
}
