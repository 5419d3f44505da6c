#include <capo/ops/cpu/kernel.h>
#include <capo/ops/integer_functors.h>
#include <capo/ops/stats.h>

namespace {

template <class T, class Sum>
void running_sums(const capo::CumsumArgs& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t blocks = (p.inner + 63) / 64;
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t outer = item / blocks, first = item % blocks * 64, n = lesser(std::int64_t{64}, p.inner - first);
    const T* x = static_cast<const T*>(p.x) + outer * p.size * p.inner + first;
    T* y = static_cast<T*>(p.y) + outer * p.size * p.inner + first;
    Sum total[64] = {};
    for (std::int64_t k = 0; k < p.size; ++k) {
      const std::int64_t at = (p.reverse ? p.size - 1 - k : k) * p.inner;
      for (std::int64_t j = 0; j < n; ++j) {
        total[j] = wrap_add(total[j], static_cast<Sum>(x[at + j]));
        y[at + j] = static_cast<T>(total[j]);
      }
    }
  }
}

}  // namespace

CAPO_CPU_KERNEL(cumsum, capo::CumsumArgs) {
  switch (args.dtype) {
    case capo::DType::f32:
      return running_sums<float, double>(args, begin, end);
    case capo::DType::f64:
      return running_sums<double, double>(args, begin, end);
    case capo::DType::i32:
      return running_sums<std::int32_t, std::int32_t>(args, begin, end);
    case capo::DType::i64:
      return running_sums<std::int64_t, std::int64_t>(args, begin, end);
    default:
      return;
  }
}
