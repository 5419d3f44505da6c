#include <capo/ops/copy.h>
#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/nest.h>
#include <capo/ops/cpu/philox.h>
#include <capo/ops/integer_functors.h>

namespace {

using capo::BFloat16;
using capo::DType;
using capo::Half;

template <class T>
struct Store {
  template <class S>
  static T from(S v) { return convert_to<T>(v); }
};
template <>
struct Store<bool> {
  template <class S>
  static bool from(S v) { return v != S(0); }
};
template <>
struct Store<BFloat16> {
  template <class S>
  static BFloat16 from(S v) { return round_to<BFloat16>(static_cast<float>(v)); }
};
template <>
struct Store<Half> {
  template <class S>
  static Half from(S v) { return round_to<Half>(static_cast<float>(v)); }
};

// Between which a large copy is streamed: f32 (as i32 when its bits are moved), bf16 and f16.
template <class S>
constexpr bool kFloat = __is_same(S, float) || __is_same(S, BFloat16) || __is_same(S, Half);
template <class S, class D>
constexpr bool kFloats = (kFloat<S> && kFloat<D>) || (__is_same(S, D) && (sizeof(D) == 4 || sizeof(D) == 2));

template <class S, class D>
void copy_loop(const capo::CopyArgs& p, std::int64_t begin, std::int64_t end) {
  const S* src = static_cast<const S*>(p.src);
  D* dst = static_cast<D*>(p.dst);
  const int last = p.rank - 1;
  const std::int64_t is = p.ss[last], id = p.sd[last];
  if (p.mask) {
    const std::int64_t* const strides[] = {p.ss, p.sd, p.sm};
    const bool* mask = p.mask;
    const std::int64_t im = p.sm[last];
    walk_rows(p.rank, p.shape, strides, begin, end, [=](std::int64_t, std::int64_t n, const std::int64_t* at) {
      const S* s = src + at[0];
      D* d = dst + at[1];
      const bool* use = mask + at[2];
      for (std::int64_t i = 0; i < n; ++i)
        if (use[i * im]) d[i * id] = Store<D>::from(load(s[i * is]));
    });
    return;
  }
  bool streamed = false;
  if constexpr (kFloats<S, D>) {
    std::int64_t bytes = is == 1 && id == 1 ? static_cast<std::int64_t>(sizeof(D)) : 0;
    for (int i = 0; i < p.rank; ++i) bytes *= p.shape[i];
    streamed = bytes >= capo::kStreamed;
  }
  for_rows(p.rank, p.shape, p.ss, p.sd, begin, end,
           [=](std::int64_t, std::int64_t n, std::int64_t os, std::int64_t od) {
             const S* s = src + os;
             D* d = dst + od;
             if constexpr (kFloats<S, D>) {
               D buffer[kPiece];
               for (std::int64_t i = 0; streamed && i < n; i += kPiece) {
                 const std::int64_t count = lesser(kPiece, n - i);
#pragma omp simd
                 for (std::int64_t j = 0; j < count; ++j) buffer[j] = Store<D>::from(load(s[i + j]));
                 stream(buffer, d + i, count * static_cast<std::int64_t>(sizeof(D)));
               }
               if (streamed) return;
             }
             if (is == 1 && id == 1) {
#pragma omp simd
               for (std::int64_t i = 0; i < n; ++i) d[i] = Store<D>::from(load(s[i]));
             } else {
               for (std::int64_t i = 0; i < n; ++i) d[i * id] = Store<D>::from(load(s[i * is]));
             }
           });
  end_stream(streamed);
}

// Equal dtypes move bits.
template <class W>
void move_loop(const capo::CopyArgs& p, std::int64_t begin, std::int64_t end) {
  copy_loop<W, W>(p, begin, end);
}

template <class S>
void from(const capo::CopyArgs& p, std::int64_t begin, std::int64_t end) {
  switch (p.dst_dtype) {
    case DType::f32: return copy_loop<S, float>(p, begin, end);
    case DType::f64: return copy_loop<S, double>(p, begin, end);
    case DType::bf16: return copy_loop<S, BFloat16>(p, begin, end);
    case DType::f16: return copy_loop<S, Half>(p, begin, end);
    case DType::i32: return copy_loop<S, std::int32_t>(p, begin, end);
    case DType::i64: return copy_loop<S, std::int64_t>(p, begin, end);
    case DType::u8: return copy_loop<S, std::uint8_t>(p, begin, end);
    case DType::i8: return copy_loop<S, std::int8_t>(p, begin, end);
    case DType::boolean: return copy_loop<S, bool>(p, begin, end);
  }
}

template <class T>
void fill_loop(const capo::FillArgs& p, std::int64_t begin, std::int64_t end) {
  T* dst = static_cast<T*>(p.dst);
  if (p.iota) {
    for (std::int64_t i = begin; i < end; ++i) dst[i] = Store<T>::from(i);
    return;
  }
  const T v = Store<T>::from(p.value);
  for (std::int64_t i = begin; i < end; ++i) dst[i] = v;
}

// One work item is one Philox block: four elements.
template <class T>
void random_loop(const capo::RandomArgs& p, std::int64_t begin, std::int64_t end) {
  T* dst = static_cast<T*>(p.dst);
  std::uint32_t words[kPhiloxWords];
  for (std::int64_t block = begin; block < end; ++block) {
    const std::int64_t at = (block - begin) % kPhiloxBlocks;
    if (at == 0) philox_words(p.range.seed, p.range.stream, p.range.offset + static_cast<std::uint64_t>(block), words);
    double u[4];
    for (int j = 0; j < 4; ++j) u[j] = (static_cast<double>(words[4 * at + j]) + 0.5) * 0x1p-32;
    if (p.normal) {
      for (int j = 0; j < 4; j += 2) {
        const double r = __builtin_sqrt(-2.0 * __builtin_log(u[j])), angle = 6.283185307179586476925 * u[j + 1];
        dst[4 * block + j] = static_cast<T>(p.a + p.b * r * __builtin_cos(angle));
        dst[4 * block + j + 1] = static_cast<T>(p.a + p.b * r * __builtin_sin(angle));
      }
    } else {
      for (int j = 0; j < 4; ++j) {  // rounding to T may reach the upper bound, which is excluded
        const T v = static_cast<T>(p.a + (p.b - p.a) * u[j]);
        dst[4 * block + j] = v < static_cast<T>(p.b) ? v : static_cast<T>(p.a);
      }
    }
  }
}

}  // namespace

CAPO_CPU_KERNEL(copy, capo::CopyArgs) {
  if (args.src_dtype == args.dst_dtype) switch (args.dst_dtype) {
      case DType::f64: case DType::i64: return move_loop<std::int64_t>(args, begin, end);
      case DType::f32: case DType::i32: return move_loop<std::int32_t>(args, begin, end);
      case DType::bf16: case DType::f16: return move_loop<std::int16_t>(args, begin, end);
      default: return move_loop<std::int8_t>(args, begin, end);
    }
  switch (args.src_dtype) {
    case DType::f32: return from<float>(args, begin, end);
    case DType::f64: return from<double>(args, begin, end);
    case DType::bf16: return from<BFloat16>(args, begin, end);
    case DType::f16: return from<Half>(args, begin, end);
    case DType::i32: return from<std::int32_t>(args, begin, end);
    case DType::i64: return from<std::int64_t>(args, begin, end);
    case DType::u8: return from<std::uint8_t>(args, begin, end);
    case DType::i8: return from<std::int8_t>(args, begin, end);
    case DType::boolean: return from<bool>(args, begin, end);
  }
}

CAPO_CPU_KERNEL(fill, capo::FillArgs) {
  switch (args.dtype) {
    case DType::f32: return fill_loop<float>(args, begin, end);
    case DType::f64: return fill_loop<double>(args, begin, end);
    case DType::bf16: return fill_loop<BFloat16>(args, begin, end);
    case DType::f16: return fill_loop<Half>(args, begin, end);
    case DType::i32: return fill_loop<std::int32_t>(args, begin, end);
    case DType::i64: return fill_loop<std::int64_t>(args, begin, end);
    case DType::u8: return fill_loop<std::uint8_t>(args, begin, end);
    case DType::i8: return fill_loop<std::int8_t>(args, begin, end);
    case DType::boolean: return fill_loop<bool>(args, begin, end);
  }
}

CAPO_CPU_KERNEL(random, capo::RandomArgs) {
  args.dtype == DType::f32 ? random_loop<float>(args, begin, end) : random_loop<double>(args, begin, end);
}
