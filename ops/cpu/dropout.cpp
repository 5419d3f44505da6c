#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/philox.h>
#include <capo/ops/dropout.h>

namespace {

template <class T>
void run(const capo::DropoutArgs& a, std::int64_t begin, std::int64_t end) {
  const T scale = static_cast<T>(a.scale);
  T buffer[kPhiloxWords];
  for (std::int64_t block = begin; block < end; block += kPhiloxBlocks) {
    std::uint32_t words[kPhiloxWords];
    philox_words(a.range.seed, a.range.stream, a.range.offset + static_cast<std::uint64_t>(block), words);
    const std::int64_t n = lesser(4 * lesser(end - block, std::int64_t{kPhiloxBlocks}), a.elements - 4 * block);
    const T* x = read_row(a.x, a.dtype, 4 * block, n, buffer);
    T* y = open_row(a.y, a.dtype, 4 * block, buffer);
    if (n == kPhiloxWords) {
#pragma omp simd
      for (int i = 0; i < kPhiloxWords; ++i) y[i] = words[i] < a.threshold ? T(0) : x[i] * scale;
    } else {
      for (std::int64_t i = 0; i < n; ++i) y[i] = words[i] < a.threshold ? T(0) : x[i] * scale;
    }
    close_row(a.y, a.dtype, 4 * block, n, y);
  }
}

}  // namespace

CAPO_CPU_KERNEL(dropout, capo::DropoutArgs) {
  args.dtype == capo::DType::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}
