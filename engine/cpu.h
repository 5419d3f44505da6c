// Which instruction set the CPU kernels run with.
#pragma once

#include <string>

namespace capo {

// Levels of the x86-64 psABI: v2 (SSE4.2), v3 (AVX2 + FMA), v4 (AVX-512).
enum class Isa : int { v2 = 0, v3 = 1, v4 = 2 };

// best_isa(), lowered by CAPO_ISA=v2|v3|v4 or set_isa().
Isa isa();
// Forces a level for all threads (tests run every one); throws above best_isa(). Not while an op runs.
void set_isa(Isa level);
// The highest level that both this processor and this build have; v2 in a build of one instruction set.
Isa best_isa();
std::string to_string(Isa level);
// Level v4 is in use and the processor multiplies pairs of bf16 (AVX512_BF16).
bool has_bf16_dot();

}  // namespace capo
