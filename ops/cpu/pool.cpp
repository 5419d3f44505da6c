#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/pool.h>

namespace {

using capo::MaxPoolArgs;

constexpr std::int64_t kBackward = 512;  // channels at a time

struct Range {
  std::int64_t begin, end;
};
// The inputs of window o; never empty, as padding <= kernel / 2.
inline Range inputs(const MaxPoolArgs& p, int axis, std::int64_t o) {
  const std::int64_t from = o * p.stride[axis] - p.padding[axis];
  return {greater(from, std::int64_t{0}), lesser(from + p.kernel[axis], p.in[axis])};
}
// The windows over input i; may be empty.
inline Range windows(const MaxPoolArgs& p, int axis, std::int64_t i) {
  const std::int64_t reach = i + p.padding[axis], below = reach - p.kernel[axis];
  return {below < 0 ? 0 : below / p.stride[axis] + 1, lesser(reach / p.stride[axis] + 1, p.out[axis])};
}

template <class T>
void forward(const MaxPoolArgs& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t c = p.channels;
  for (std::int64_t pixel = begin; pixel < end; ++pixel) {
    std::int64_t rest = pixel;
    const std::int64_t o2 = rest % p.out[2];
    rest /= p.out[2];
    const std::int64_t o1 = rest % p.out[1];
    rest /= p.out[1];
    const Range r0 = inputs(p, 0, rest % p.out[0]), r1 = inputs(p, 1, o1), r2 = inputs(p, 2, o2);
    const std::int64_t image = rest / p.out[0] * p.in[0] * p.in[1] * p.in[2] * c;
    for (std::int64_t block = 0; block < c; block += 64) {
      const std::int64_t n = lesser(std::int64_t{64}, c - block);
      T best[64], buffer[64];
      std::int32_t at[64];
      bool fresh = true;
      for (std::int64_t i0 = r0.begin; i0 < r0.end; ++i0)
        for (std::int64_t i1 = r1.begin; i1 < r1.end; ++i1)
          for (std::int64_t i2 = r2.begin; i2 < r2.end; ++i2) {
            const std::int64_t place = (i0 * p.in[1] + i1) * p.in[2] + i2;
            const T* from = read_row(p.x, p.dtype, image + place * c + block, n, buffer);
            const std::int32_t here = static_cast<std::int32_t>(place);
            if (fresh) {
              for (std::int64_t j = 0; j < n; ++j) best[j] = from[j], at[j] = here;
              fresh = false;
              continue;
            }
            for (std::int64_t j = 0; j < n; ++j) {
              const T v = from[j], b = best[j];
              const bool better = b < v || v != v;
              best[j] = better ? v : b;
              at[j] = better ? here : at[j];
            }
          }
      T* y = open_row(p.y, p.dtype, pixel * c + block, buffer);
      for (std::int64_t j = 0; j < n; ++j) y[j] = best[j];
      close_row(p.y, p.dtype, pixel * c + block, n, y);
      if (p.index) {
        std::int32_t* index = p.index + pixel * c + block;
        for (std::int64_t j = 0; j < n; ++j) index[j] = at[j];
      }
    }
  }
}

template <class T>
void backward(const MaxPoolArgs& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t c = p.channels, volume = p.in[0] * p.in[1] * p.in[2];
  for (std::int64_t pixel = begin; pixel < end; ++pixel) {
    const std::int64_t image = pixel / volume, place = pixel % volume;
    const Range r0 = windows(p, 0, place / p.in[2] / p.in[1]), r1 = windows(p, 1, place / p.in[2] % p.in[1]),
                r2 = windows(p, 2, place % p.in[2]);
    const std::int32_t here = static_cast<std::int32_t>(place);
    for (std::int64_t block = 0; block < c; block += kBackward) {
      const std::int64_t n = lesser(kBackward, c - block);
      T sum[kBackward], buffer[kBackward];
      T* dx = open_row(p.y, p.dtype, pixel * c + block, sum);
      for (std::int64_t j = 0; j < n; ++j) dx[j] = 0;
      for (std::int64_t o0 = r0.begin; o0 < r0.end; ++o0)
        for (std::int64_t o1 = r1.begin; o1 < r1.end; ++o1)
          for (std::int64_t o2 = r2.begin; o2 < r2.end; ++o2) {
            const std::int64_t from = (((image * p.out[0] + o0) * p.out[1] + o1) * p.out[2] + o2) * c + block;
            const T* dy = read_row(p.x, p.dtype, from, n, buffer);
            const std::int32_t* index = p.index + from;
#pragma omp simd
            for (std::int64_t j = 0; j < n; ++j) dx[j] += index[j] == here ? dy[j] : T(0);
          }
      close_row(p.y, p.dtype, pixel * c + block, n, dx);
    }
  }
}

}  // namespace

CAPO_CPU_KERNEL(max_pool_forward, capo::MaxPoolArgs) {
  args.dtype == capo::DType::f64 ? forward<double>(args, begin, end) : forward<float>(args, begin, end);
}
CAPO_CPU_KERNEL(max_pool_backward, capo::MaxPoolArgs) {
  args.dtype == capo::DType::f64 ? backward<double>(args, begin, end) : backward<float>(args, begin, end);
}
