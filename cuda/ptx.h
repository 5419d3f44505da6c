// The one place of inline PTX: tensor-core tiles, matrix loads and asynchronous copies, each with a host version that
// follows the fragment layouts of the PTX ISA (tests/shim). sm_80 and newer.
//
// A warp's fragments, with g = lane / 4 and t = lane % 4; a register holds two 16-bit values, the lower index low:
//   A [16, 16]  a[0] row g,     columns 2t, 2t+1      a[1] row g + 8, the same columns
//               a[2] row g,     columns 2t+8, 2t+9    a[3] row g + 8
//   B [16, 8]   b[0] column g,  rows 2t, 2t+1         b[1] column g,  rows 2t+8, 2t+9
//   D [16, 8]   d[0], d[1] row g, columns 2t, 2t+1    d[2], d[3] row g + 8
#pragma once

#include <capo/cuda/gpu.h>

namespace capo::gpu {

// ---- conversions (round to nearest even; NaN stays NaN)
__device__ inline float from_bf16(std::uint16_t h) {
#if defined(CAPO_HOST_SHIM)
  return std::bit_cast<float>(static_cast<std::uint32_t>(h) << 16);
#else
  return __uint_as_float(static_cast<std::uint32_t>(h) << 16);
#endif
}
__device__ inline std::uint32_t to_bf16x2(float low, float high) {
#if defined(CAPO_HOST_SHIM)
  const auto one = [](float f) -> std::uint32_t {
    const auto u = std::bit_cast<std::uint32_t>(f);
    if (f != f) return 0x7fff;
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
  };
  return one(low) | one(high) << 16;
#else
  std::uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#endif
}

#if !defined(CAPO_HOST_SHIM)

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// d += a b, all 32 lanes.
__device__ inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit values from shared memory; lanes 8i..8i+7 give the 16-byte aligned rows of matrix i.
// r[i] of a lane: row g, columns 2t, 2t+1 of matrix i; transposed: column g, rows 2t, 2t+1.
__device__ inline void ldmatrix(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ inline void ldmatrix_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Copies `bytes` of 16 aligned bytes to shared memory and fills up with zeros (0: global is not read). Nothing may be
// read before cp_async_wait<n>, which leaves at most the n newest committed groups running, and, from other threads, a
// barrier.
__device__ inline void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes) : "memory");
}
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
  cp_async_16(shared, global, valid ? 16 : 0);
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(kLeft) : "memory");
}

#else  // the host versions

namespace detail {

struct MmaPayload {
  float* d;
  const std::uint32_t *a, *b;
};

template <bool kBf16>
float half_value(std::uint32_t pair, int which) {
  const auto h = static_cast<std::uint16_t>(pair >> (16 * which));
  if constexpr (kBf16) {
    return from_bf16(h);
  } else {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    float v = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
              : exponent == 31 ? (fraction ? NAN : INFINITY)
                               : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return h >> 15 ? -v : v;
  }
}

template <bool kBf16>
void mma_all(void* const payload[32], unsigned) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<MmaPayload*>(payload[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j) {
        a[g + i % 2 * 8][2 * t + j + i / 2 * 8] = half_value<kBf16>(p.a[i], j);
        d[g + i / 2 * 8][2 * t + i % 2] = p.d[i];
        if (i < 2) b[2 * t + j + i * 8][g] = half_value<kBf16>(p.b[i], j);
      }
  }
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k][n];
      d[m][n] += sum;
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<MmaPayload*>(payload[lane])->d[i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

}  // namespace detail

inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], CAPO_SHIM_HERE) {
  detail::MmaPayload p{d, a, b};
  shim::collective(kFullMask, "mma", 0, &p, detail::mma_all<true>, false, file, line);
}
inline void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], CAPO_SHIM_HERE) {
  detail::MmaPayload p{d, a, b};
  shim::collective(kFullMask, "mma", 0, &p, detail::mma_all<false>, false, file, line);
}

inline void ldmatrix(std::uint32_t (&r)[4], const void* row, CAPO_SHIM_HERE) {
  shim::ldmatrix_x4(r, row, false, file, line);
}
inline void ldmatrix_transposed(std::uint32_t (&r)[4], const void* row, CAPO_SHIM_HERE) {
  shim::ldmatrix_x4(r, row, true, file, line);
}

inline void cp_async_16(void* shared, const void* global, int bytes, CAPO_SHIM_HERE) {
  shim::cp_async(shared, global, 16, bytes, file, line);
}
inline void cp_async_16(void* shared, const void* global, bool valid, CAPO_SHIM_HERE) {
  cp_async_16(shared, global, valid ? 16 : 0, file, line);
}
inline void cp_async_commit() { shim::cp_async_commit(); }
template <int kLeft>
void cp_async_wait() {
  shim::cp_async_wait(kLeft);
}

#endif

}  // namespace capo::gpu
