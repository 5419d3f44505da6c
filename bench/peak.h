// The multiply-add peak of one core.
#pragma once

#include <capo/engine/cpu.h>

namespace capo::bench {

// Twelve independent chains of x = x * m + c in registers, a few milliseconds of them, with the instruction set in use.
// Returns how many FLOP that were; 0 on processors for which it is not written.
#if defined(__x86_64__)
namespace detail {
#define CAPO_CHAINS(V, step)                                                                       \
  V a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{}, k{}, l{}, m = V{} + 0.5f;                     \
  for (int n = 0; n < kSteps; ++n) {                                                               \
    step(a) step(b) step(c) step(d) step(e) step(f) step(g) step(h) step(i) step(j) step(k) step(l) \
  }                                                                                                \
  return 2.0 * 12 * sizeof(V) / 4 * kSteps;
#define CAPO_FMA(x) asm volatile("vfmadd213ps %1, %1, %0" : "+v"(x) : "v"(m));
#define CAPO_MUL_ADD(x) x = x * m + m; asm volatile("" : "+x"(x));
inline constexpr int kSteps = 200000;
typedef float F16 __attribute__((vector_size(64)));
typedef float F8 __attribute__((vector_size(32)));
typedef float F4 __attribute__((vector_size(16)));
[[gnu::target("avx512f")]] inline double chains_v4() { CAPO_CHAINS(F16, CAPO_FMA) }
[[gnu::target("avx2,fma")]] inline double chains_v3() { CAPO_CHAINS(F8, CAPO_FMA) }
inline double chains_v2() { CAPO_CHAINS(F4, CAPO_MUL_ADD) }
#undef CAPO_CHAINS
#undef CAPO_FMA
#undef CAPO_MUL_ADD
}  // namespace detail
inline double multiply_adds() {
  return isa() == Isa::v4 ? detail::chains_v4() : isa() == Isa::v3 ? detail::chains_v3() : detail::chains_v2();
}
#else
inline double multiply_adds() { return 0; }
#endif

}  // namespace capo::bench
