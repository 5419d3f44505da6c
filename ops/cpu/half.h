// bf16 and f16 as storage, for ops/cpu files: a kernel computes on rows of f32, which are widened into a buffer in the
// first cache as they are read and rounded to nearest even as they are written. The bits are those of an f32 kernel
// between two casts. f32 and f64 rows are used where they lie.
#pragma once

#include <capo/ops/args.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/streaming_internal.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// Local twins of engine/dtype.h's conversions: those are shared inline functions, which these files must not use.
inline float load(capo::BFloat16 v) {
  return m::from_bits(static_cast<std::int32_t>(static_cast<std::uint32_t>(v.bits) << 16));
}
inline float load(capo::Half v) {
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x8000u) << 16, a = v.bits & 0x7fffu;
  const std::uint32_t normal = a >= 0x7c00u ? 0x7f800000u | ((a & 0x3ffu) << 13) : (a << 13) + 0x38000000u;
  const float small = static_cast<float>(a) * 0x1p-24f;
  const std::uint32_t bits = a >= 0x400u ? normal : static_cast<std::uint32_t>(m::to_bits(small));
  return m::from_bits(static_cast<std::int32_t>(sign | bits));
}
template <class T>
  requires(!requires(T v) { *v; })  // gemm.h's load takes pointers
inline T load(T v) { return v; }

// To the nearest, ties to even; NaN stays NaN.
inline void store(capo::BFloat16& y, float v) {
  const std::uint32_t u = static_cast<std::uint32_t>(m::to_bits(v));
  const std::uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  y.bits = static_cast<std::uint16_t>(v != v ? (u >> 16) | 0x40u : r);
}
inline void store(capo::Half& y, float v) {
  const std::uint32_t u = static_cast<std::uint32_t>(m::to_bits(v)), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const float shifted = m::from_bits(static_cast<std::int32_t>(a)) + 0.5f;  // subnormals: the f32 adder rounds
  const std::uint32_t small = static_cast<std::uint32_t>(m::to_bits(shifted)) - 0x3f000000u;
  const std::uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
  std::uint32_t r = a < 0x38800000u ? small : normal;
  r = a >= 0x477ff000u ? 0x7c00u : r;
  r = a > 0x7f800000u ? 0x7e00u : r;
  y.bits = static_cast<std::uint16_t>(sign | r);
}

inline void store(float& y, float v) { y = v; }
inline void store(double& y, double v) { y = v; }

template <class E>
inline E round_to(float v) {
  E y;
  store(y, v);
  return y;
}

template <class E>
[[gnu::noinline]] inline void widen(const E* x, float* y, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = load(x[i]);
}
template <class E>
[[gnu::noinline]] inline void narrow(const float* x, E* y, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) store(y[i], x[i]);
}

inline bool in_16_bits(capo::DType t) { return t == capo::DType::bf16 || t == capo::DType::f16; }

constexpr std::int64_t kPiece = 1024;  // elements that an elementwise kernel takes at a time when they are 16-bit
constexpr std::int64_t kStreamPiece = 256;  // that one computes before they are streamed
inline std::int64_t piece(capo::DType t, bool streamed, std::int64_t n) {
  return streamed ? lesser(n, kStreamPiece) : in_16_bits(t) ? lesser(n, kPiece) : n;
}

// Elements [at, at + n) of x: where they lie, or widened into buffer. T is float, for f64 double.
template <class T>
inline const T* read_row(const void* x, capo::DType dtype, std::int64_t at, std::int64_t n, T* buffer) {
  if constexpr (__is_same(T, float)) {
    if (dtype == capo::DType::bf16) return widen(static_cast<const capo::BFloat16*>(x) + at, buffer, n), buffer;
    if (dtype == capo::DType::f16) return widen(static_cast<const capo::Half*>(x) + at, buffer, n), buffer;
  }
  return static_cast<const T*>(x) + at;
}

template <class T>
inline T read_one(const void* x, capo::DType dtype, std::int64_t at) {
  if constexpr (__is_same(T, float)) {
    if (dtype == capo::DType::bf16) return load(static_cast<const capo::BFloat16*>(x)[at]);
    if (dtype == capo::DType::f16) return load(static_cast<const capo::Half*>(x)[at]);
  }
  return static_cast<const T*>(x)[at];
}

// Whether a kernel of rows writes its result past the caches.
inline bool streams(capo::DType dtype, std::int64_t elements) {
  return dtype == capo::DType::f32 && elements * 4 >= capo::kStreamed;
}
#if defined(__SSE2__)
// One line of 64 bytes, to a multiple of 64.
inline void stream_line(const void* from, void* to) {
  const auto* x = static_cast<const float*>(from);
  auto* y = static_cast<float*>(to);
#if defined(__AVX512F__)
  _mm512_stream_ps(y, _mm512_loadu_ps(x));
#elif defined(__AVX__)
  for (int j = 0; j < 16; j += 8) _mm256_stream_ps(y + j, _mm256_loadu_ps(x + j));
#else
  for (int j = 0; j < 16; j += 4) _mm_stream_ps(y + j, _mm_loadu_ps(x + j));
#endif
}
#endif
inline std::int64_t bytes_to_line(const void* p) {
  return static_cast<std::int64_t>((64 - reinterpret_cast<std::uintptr_t>(p) % 64) % 64);
}
// Whole lines past the caches, the ends as usual.
[[gnu::noinline]] inline void stream(const void* from, void* to, std::int64_t bytes) {
  const char* x = static_cast<const char*>(from);
  char* y = static_cast<char*>(to);
  std::int64_t i = 0;
#if defined(__SSE2__)
  i = lesser(bytes_to_line(y), bytes);
  if (i > 0) __builtin_memcpy(y, x, static_cast<std::size_t>(i));
  for (; i + 64 <= bytes; i += 64) stream_line(x + i, y + i);
#endif
  if (i < bytes) __builtin_memcpy(y + i, x + i, static_cast<std::size_t>(bytes - i));
}
// At the end of a chunk that streamed: another thread's reads come after its writes.
inline void end_stream([[maybe_unused]] bool streamed) {
#if defined(__SSE2__)
  if (streamed) _mm_sfence();
#endif
}

// Where to put elements from `at` on; close_row then rounds or streams what was put into buffer.
template <class T>
inline T* open_row(void* y, capo::DType dtype, std::int64_t at, T* buffer, bool streamed = false) {
  return __is_same(T, float) && (streamed || in_16_bits(dtype)) ? buffer : static_cast<T*>(y) + at;
}
template <class T>
inline void close_row(void* y, capo::DType dtype, std::int64_t at, std::int64_t n, const T* buffer,
                      bool streamed = false) {
  if constexpr (__is_same(T, float)) {
    if (streamed) return stream(buffer, static_cast<float*>(y) + at, n * 4);
    if (dtype == capo::DType::bf16) narrow(buffer, static_cast<capo::BFloat16*>(y) + at, n);
    if (dtype == capo::DType::f16) narrow(buffer, static_cast<capo::Half*>(y) + at, n);
  }
}

// Puts a row: f(i, j, to) puts its elements [i, j) to to[0], to[1], ... A line at a time where it is streamed: by way
// of a longer buffer, loads waited for stores to other addresses that end in the same 12 bits, up to twice the time.
template <class T, class F>
inline void write_row(void* y, capo::DType dtype, std::int64_t at, std::int64_t n, T* buffer,
                      [[maybe_unused]] bool streamed, F f) {
  T* row = open_row(y, dtype, at, buffer);
  std::int64_t i = 0;
#if defined(__SSE2__)
  if (__is_same(T, float) && streamed) {
    i = lesser(bytes_to_line(row) / 4, n);
    if (i > 0) f(0, i, row);
    for (; i + 16 <= n; i += 16) {
      alignas(64) T line[16];
      f(i, i + 16, line);
      stream_line(line, row + i);
    }
  }
#endif
  if (i < n) f(i, n, row + i);
  close_row(y, dtype, at, n, row);
}

}  // namespace
