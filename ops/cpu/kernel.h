// For CPU kernel files (ops/cpu/*.cpp) only. Each is compiled once per instruction set with CAPO_ISA = v2, v3 or v4.
//
// Rules: everything but the kernels themselves lives in an unnamed namespace, and no header with inline functions of
// external linkage is used (std::max, std::vector, ...): the linker merges such functions across the three builds and
// would let AVX-512 code reach an older processor. tests/isa_symbols checks the object files for weak symbols.
// Loops are plain C++ that GCC vectorises (-O3 -fno-math-errno -fno-trapping-math -fopenmp-simd); f32 mathematics comes
// from math.h, f64 from libm.
#pragma once

#include <cstdint>

#if !defined(CAPO_ISA)
#error "ops/cpu files are compiled with -DCAPO_ISA=v2|v3|v4"
#endif

#define CAPO_JOIN2(a, b) a##_##b
#define CAPO_JOIN(a, b) CAPO_JOIN2(a, b)

// CAPO_CPU_KERNEL(layer_norm_forward, LayerNormArgs) { ... args, begin, end ... }
#define CAPO_CPU_KERNEL(name, Args)                                                                \
  namespace capo::kernels {                                                                        \
  void CAPO_JOIN(name, CAPO_ISA)(const Args& args, std::int64_t begin, std::int64_t end);          \
  }                                                                                                \
  void capo::kernels::CAPO_JOIN(name, CAPO_ISA)(const Args& args, std::int64_t begin, std::int64_t end)

namespace {

template <class T>
inline T lesser(T a, T b) { return b < a ? b : a; }
template <class T>
inline T greater(T a, T b) { return a < b ? b : a; }

}  // namespace
