// Which instruction set the CPU kernels run with.
#pragma once

#include <string>

namespace capo {

// Levels of the x86-64 psABI: v2 (SSE4.2), v3 (AVX2 + FMA), v4 (AVX-512).
enum class Isa : int { v2 = 0, v3 = 1, v4 = 2 };

// The best level of this processor, lowered by CAPO_ISA=v2|v3|v4 or set_isa().
Isa isa();
// Forces a level (tests run every one); throws when the processor or the build lacks it.
void set_isa(Isa level);
Isa best_isa();
std::string to_string(Isa level);
// Level v4 is in use and the processor multiplies pairs of bf16 (AVX512_BF16).
bool has_bf16_dot();

}  // namespace capo
