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

// One draw for each run: times 0 or the scale, as by a factor for each sample.
void scale_runs(const capo::DropoutArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t pieces = (a.run + capo::kDropPiece - 1) / capo::kDropPiece;
  float buffer[kPiece];
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t draw = item / pieces, from = item % pieces * capo::kDropPiece;
    const std::int64_t stop = lesser(from + capo::kDropPiece, a.run);
    std::uint32_t words[kPhiloxWords];
    philox_words(a.range.seed, a.range.stream, a.range.offset + static_cast<std::uint64_t>(draw / 4), words);
    const float factor = words[draw % 4] < a.threshold ? 0.0f : static_cast<float>(a.scale);
    for (std::int64_t i = from; i < stop; i += kPiece) {
      const std::int64_t at = draw * a.run + i, n = lesser(kPiece, stop - i);
      const float* x = read_row(a.x, a.dtype, at, n, buffer);
      float* y = open_row(a.y, a.dtype, at, buffer);
#pragma omp simd
      for (std::int64_t j = 0; j < n; ++j) y[j] = x[j] * factor;
      close_row(a.y, a.dtype, at, n, y);
    }
  }
}

}  // namespace

CAPO_CPU_KERNEL(dropout, capo::DropoutArgs) {
  if (args.run > 1) return scale_runs(args, begin, end);
  args.dtype == capo::DType::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}
