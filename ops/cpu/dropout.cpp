#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/philox.h>
#include <capo/ops/dropout.h>

namespace {

template <class T>
void run(const capo::DropoutArgs& a, std::int64_t begin, std::int64_t end) {
  const T scale = static_cast<T>(a.scale);
  for (std::int64_t block = begin; block < end; block += kPhiloxBlocks) {
    std::uint32_t words[kPhiloxWords];
    philox_words(a.range.seed, a.range.stream, a.range.offset + static_cast<std::uint64_t>(block), words);
    const T* x = static_cast<const T*>(a.x) + 4 * block;
    T* y = static_cast<T*>(a.y) + 4 * block;
    const std::int64_t n = lesser(4 * lesser(end - block, std::int64_t{kPhiloxBlocks}), a.elements - 4 * block);
    if (n == kPhiloxWords) {
#pragma omp simd
      for (int i = 0; i < kPhiloxWords; ++i) y[i] = words[i] < a.threshold ? T(0) : x[i] * scale;
    } else {
      for (std::int64_t i = 0; i < n; ++i) y[i] = words[i] < a.threshold ? T(0) : x[i] * scale;
    }
  }
}

}  // namespace

CAPO_CPU_KERNEL(dropout, capo::DropoutArgs) {
  args.dtype == capo::DType::f32 ? run<float>(args, begin, end) : run<double>(args, begin, end);
}
