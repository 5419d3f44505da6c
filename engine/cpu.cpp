#include <capo/engine/cpu.h>
#include <capo/engine/error.h>

#include <atomic>
#include <cstdlib>
#include <string_view>

namespace capo {

std::string to_string(Isa level) {
  constexpr const char* names[] = {"v2", "v3", "v4"};
  return names[static_cast<int>(level)];
}

Isa best_isa() {
#if defined(__x86_64__) && !defined(CAPO_ONE_ISA)
  __builtin_cpu_init();
  // The whole levels, as the kernels are compiled for: a virtual machine may hide single features.
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::v4;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::v3;
#endif
  return Isa::v2;
}

namespace {

Isa initial() {
  Isa level = best_isa();
  if (const char* text = std::getenv("CAPO_ISA")) {
    const std::string_view wanted = text;
    for (Isa x : {Isa::v2, Isa::v3, Isa::v4})
      if (wanted == to_string(x) && x <= level) return x;
    log(LogLevel::warning, cat("CAPO_ISA: must be v2, v3 or v4 and at most ", level, ", got \"", wanted, "\""));
  }
  return level;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> level{initial()};
  return level;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

bool has_bf16_dot() {
#if defined(__x86_64__) && !defined(CAPO_ONE_ISA)
  static const bool available = __builtin_cpu_supports("avx512bf16");
  return available && isa() == Isa::v4;
#else
  return false;
#endif
}

void set_isa(Isa level) {
  CAPO_CHECK(level <= best_isa(), "set_isa: this processor and build have ", best_isa(), ", asked for ", level);
  current() = level;
}

}  // namespace capo
