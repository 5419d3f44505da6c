#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/integer_functors.h>
#include <capo/ops/reduce.h>

namespace {

using capo::ReduceArgs;
using capo::ReduceKind;

constexpr std::int64_t kBlock = 512;  // partial sums of this many elements keep the f32 error small

struct SumOf {
  template <class T> static T start() { return T(0); }
  template <class T> static T join(T a, T b) { return wrap_add(a, b); }
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

inline void offsets(int rank, const std::int64_t* shape, const std::int64_t* strides, std::int64_t k,
                    std::int64_t& at) {
  for (int i = rank - 1; i >= 0; --i) {
    at += k % shape[i] * strides[i];
    k /= shape[i];
  }
}

// 64 neighbouring outputs, contiguous in memory from `base` on, at once (the bias-gradient case): elements [first,
// last) of each of n.
template <class R, class T>
inline void columns(const ReduceArgs& p, std::int64_t base, T* y, std::int64_t n, std::int64_t first,
                    std::int64_t last) {
  T total[64], part[64], buffer[64];
  for (int j = 0; j < 64; ++j) total[j] = part[j] = R::template start<T>();
  std::int64_t index[8] = {}, at = 0, in_block = 0, rest = first;
  for (int i = p.reduced - 1; i >= 0 && first > 0; --i) {  // at first = 0 a size may be 0
    index[i] = rest % p.reduced_shape[i];
    at += index[i] * p.reduced_strides[i];
    rest /= p.reduced_shape[i];
  }
  for (std::int64_t r = first; r < last; ++r) {
    const T* src = read_row(p.x, p.dtype, base + at, n, buffer);
    if (n == 64) {
      for (int j = 0; j < 64; ++j) part[j] = R::join(part[j], src[j]);
    } else {
      for (std::int64_t j = 0; j < n; ++j) part[j] = R::join(part[j], src[j]);
    }
    if (++in_block == kBlock) {
      for (int j = 0; j < 64; ++j) total[j] = R::join(total[j], part[j]), part[j] = R::template start<T>();
      in_block = 0;
    }
    at += p.reduced_strides[p.reduced - 1];
    ++index[p.reduced - 1];
    for (int i = p.reduced - 1; i > 0 && index[i] == p.reduced_shape[i]; --i) {
      at += p.reduced_strides[i - 1] - p.reduced_shape[i] * p.reduced_strides[i];
      index[i] = 0;
      ++index[i - 1];
    }
  }
  for (std::int64_t j = 0; j < n; ++j) y[j] = R::join(total[j], part[j]);
}

// Elements [first, last) of the output whose first element is at `base`, run by run of the innermost reduced axis.
template <class R, class T>
inline T elements(const ReduceArgs& p, std::int64_t base, std::int64_t first, std::int64_t last) {
  const std::int64_t inner = p.reduced_shape[p.reduced - 1], stride = p.reduced_strides[p.reduced - 1];
  T total = R::template start<T>();
  for (std::int64_t e = first; e < last;) {
    const std::int64_t k = e % inner, n = lesser(inner - k, last - e);
    std::int64_t at = base + k * stride;
    offsets(p.reduced - 1, p.reduced_shape, p.reduced_strides, e / inner, at);
    for (std::int64_t i = 0; i < n; i += kBlock) {
      const std::int64_t count = lesser(kBlock, n - i), from = at + i * stride;
      if (stride == 1) {
        T buffer[kBlock];
        total = R::join(total, row<R>(read_row(p.x, p.dtype, from, count, buffer), count));
        continue;
      }
      T part = R::template start<T>();
      for (std::int64_t j = 0; j < count; ++j) part = R::join(part, read_one<T>(p.x, p.dtype, from + j * stride));
      total = R::join(total, part);
    }
    e += n;
  }
  return total;
}

// Items [begin, end) of [parts, outputs].
template <class R, class T>
void reduce(const ReduceArgs& p, std::int64_t begin, std::int64_t end) {
  T* y = static_cast<T*>(p.y);
  const std::int64_t width = p.kept_shape[p.kept - 1];
  const bool by_columns = p.reduced_strides[p.reduced - 1] != 1 && p.kept_strides[p.kept - 1] == 1;
  std::int64_t outputs = 1;
  for (int i = 0; i < p.kept; ++i) outputs *= p.kept_shape[i];
  for (std::int64_t k = begin; k < end;) {
    const std::int64_t part = k / outputs, first = part * p.length, last = lesser(first + p.length, p.count);
    std::int64_t base = 0;
    offsets(p.kept, p.kept_shape, p.kept_strides, k % outputs, base);
    if (by_columns) {
      const std::int64_t n = lesser(lesser(std::int64_t{64}, end - k), width - k % width);
      columns<R>(p, base, y + k, n, first, last);
      k += n;
    } else {
      y[k++] = elements<R, T>(p, base, first, last);
    }
  }
}

template <class R>
void by_dtype(const ReduceArgs& p, std::int64_t begin, std::int64_t end) {
  switch (p.dtype) {
    case capo::DType::f32: case capo::DType::bf16: case capo::DType::f16: return reduce<R, float>(p, begin, end);
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
