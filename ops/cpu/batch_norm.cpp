#include <capo/ops/batch_norm.h>
#include <capo/ops/cpu/kernel.h>

namespace {

constexpr std::int64_t kBlock = 256;

// Products are kept from joining the sum that follows them: a function of its own. + 0 as in the op affine.
template <class T>
__attribute__((noinline)) void scaled(const T* x, T by, T* y, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = x[i] * by + T(0);
}

template <class T>
void move_on(T* running, const T* batch, T keep, T weight, std::int64_t n) {
  T part[kBlock];
  scaled(running, keep, running, n);
  scaled(batch, weight, part, n);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) running[i] += part[i];
}

template <class T>
void update(const capo::RunningStatsArgs& a, std::int64_t begin, std::int64_t end) {
  const T keep = static_cast<T>(a.keep), weight = static_cast<T>(a.weight), unbias = static_cast<T>(a.unbias);
  for (std::int64_t c = begin; c < end; c += kBlock) {
    const std::int64_t n = lesser(kBlock, end - c);
    T var[kBlock];
    scaled(static_cast<const T*>(a.var) + c, unbias, var, n);
    move_on(static_cast<T*>(a.running_mean) + c, static_cast<const T*>(a.mean) + c, keep, weight, n);
    move_on(static_cast<T*>(a.running_var) + c, var, keep, weight, n);
  }
}

}  // namespace

CAPO_CPU_KERNEL(batch_norm_running, capo::RunningStatsArgs) {
  args.dtype == capo::DType::f64 ? update<double>(args, begin, end) : update<float>(args, begin, end);
}
