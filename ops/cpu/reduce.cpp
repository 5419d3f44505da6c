#include <capo/ops/cpu/kernel.h>
#include <capo/ops/reduce.h>

namespace {

using capo::ReduceArgs;
using capo::ReduceKind;

constexpr std::int64_t kBlock = 512;  // partial sums of this many elements keep the f32 error small

struct SumOf {
  template <class T> static T start() { return T(0); }
  template <class T> static T join(T a, T b) { return a + b; }
};
struct MaxOf {
  template <class T> static T start() { return lowest(T(0)); }
  template <class T> static T join(T a, T b) { return a != a ? a : (b != b ? b : (a < b ? b : a)); }
  static float lowest(float) { return -__builtin_inff(); }
  static double lowest(double) { return -__builtin_inf(); }
  static std::int32_t lowest(std::int32_t) { return INT32_MIN; }
  static std::int64_t lowest(std::int64_t) { return INT64_MIN; }
};
struct MinOf {
  template <class T> static T start() { return highest(T(0)); }
  template <class T> static T join(T a, T b) { return a != a ? a : (b != b ? b : (b < a ? b : a)); }
  static float highest(float) { return __builtin_inff(); }
  static double highest(double) { return __builtin_inf(); }
  static std::int32_t highest(std::int32_t) { return INT32_MAX; }
  static std::int64_t highest(std::int64_t) { return INT64_MAX; }
};

// 16 independent lanes, joined in a fixed tree.
template <class R, class T>
inline T row(const T* x, std::int64_t n) {
  T lane[16];
  for (int j = 0; j < 16; ++j) lane[j] = R::template start<T>();
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) lane[j] = R::join(lane[j], x[i + j]);
  for (int j = 0; i < n; ++i, ++j) lane[j] = R::join(lane[j], x[i]);
  for (int half = 8; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] = R::join(lane[j], lane[j + half]);
  return lane[0];
}

inline void offsets(int rank, const std::int64_t* shape, const std::int64_t* strides, std::int64_t k, std::int64_t& at) {
  for (int i = rank - 1; i >= 0; --i) {
    at += k % shape[i] * strides[i];
    k /= shape[i];
  }
}

// Outputs [begin, end); the reduced axes are walked for each output, or for 64 neighbouring outputs at once when they
// are contiguous in memory (the bias-gradient case).
template <class R, class T>
void reduce(const ReduceArgs& p, std::int64_t begin, std::int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const std::int64_t inner = p.reduced_shape[p.reduced - 1], stride = p.reduced_strides[p.reduced - 1];
  const std::int64_t width = p.kept_shape[p.kept - 1];
  if (stride != 1 && p.kept_strides[p.kept - 1] == 1) {
    for (std::int64_t k = begin; k < end;) {
      const std::int64_t n = lesser(lesser(std::int64_t{64}, end - k), width - k % width);
      std::int64_t base = 0;
      offsets(p.kept, p.kept_shape, p.kept_strides, k, base);
      T total[64], part[64];
      for (int j = 0; j < 64; ++j) total[j] = part[j] = R::template start<T>();
      std::int64_t index[8] = {}, at = base, in_block = 0;
      for (std::int64_t r = 0; r < p.count; ++r) {
        const T* src = x + at;
        if (n == 64) {
          for (int j = 0; j < 64; ++j) part[j] = R::join(part[j], src[j]);
        } else {
          for (std::int64_t j = 0; j < n; ++j) part[j] = R::join(part[j], src[j]);
        }
        if (++in_block == kBlock) {
          for (int j = 0; j < 64; ++j) total[j] = R::join(total[j], part[j]), part[j] = R::template start<T>();
          in_block = 0;
        }
        at += stride;
        ++index[p.reduced - 1];
        for (int i = p.reduced - 1; i > 0 && index[i] == p.reduced_shape[i]; --i) {
          at += p.reduced_strides[i - 1] - p.reduced_shape[i] * p.reduced_strides[i];
          index[i] = 0;
          ++index[i - 1];
        }
      }
      for (std::int64_t j = 0; j < n; ++j) y[k + j] = R::join(total[j], part[j]);
      k += n;
    }
    return;
  }
  const std::int64_t rows = inner > 0 ? p.count / inner : 0;
  for (std::int64_t k = begin; k < end; ++k) {
    std::int64_t base = 0;
    offsets(p.kept, p.kept_shape, p.kept_strides, k, base);
    T total = R::template start<T>();
    for (std::int64_t r = 0; r < rows; ++r) {
      std::int64_t at = base;
      offsets(p.reduced - 1, p.reduced_shape, p.reduced_strides, r, at);
      if (stride == 1) {
        for (std::int64_t i = 0; i < inner; i += kBlock) total = R::join(total, row<R>(x + at + i, lesser(kBlock, inner - i)));
      } else {
        for (std::int64_t i = 0; i < inner; i += kBlock) {
          T part = R::template start<T>();
          const std::int64_t stop = lesser(inner, i + kBlock);
          for (std::int64_t j = i; j < stop; ++j) part = R::join(part, x[at + j * stride]);
          total = R::join(total, part);
        }
      }
    }
    y[k] = total;
  }
}

template <class R>
void by_dtype(const ReduceArgs& p, std::int64_t begin, std::int64_t end) {
  switch (p.dtype) {
    case capo::DType::f32: return reduce<R, float>(p, begin, end);
    case capo::DType::f64: return reduce<R, double>(p, begin, end);
    case capo::DType::i32: return reduce<R, std::int32_t>(p, begin, end);
    case capo::DType::i64: return reduce<R, std::int64_t>(p, begin, end);
    default: return;
  }
}

}  // namespace

CAPO_CPU_KERNEL(reduce, capo::ReduceArgs) {
  switch (args.kind) {
    case ReduceKind::sum: return by_dtype<SumOf>(args, begin, end);
    case ReduceKind::max: return by_dtype<MaxOf>(args, begin, end);
    case ReduceKind::min: return by_dtype<MinOf>(args, begin, end);
  }
}
