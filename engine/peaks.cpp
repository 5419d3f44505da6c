// What the machine can do at most (profile.h).
#include <capo/engine/cpu.h>
#include <capo/engine/profile.h>
#include <capo/engine/threads.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace capo {
namespace {

constexpr int kSteps = 60000, kChains = 12, kRounds = 6;

// Independent chains of multiply-adds in registers, enough to fill the pipelines; written in assembly, so that no
// compiler folds them.
#define CAPO_CHAINS(V, step)                                                                      \
  V a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{}, k{}, l{}, m = V{} + 0.5f;                    \
  for (int n = 0; n < kSteps; ++n) {                                                              \
    step(a) step(b) step(c) step(d) step(e) step(f) step(g) step(h) step(i) step(j) step(k) step(l) \
  }                                                                                               \
  return 2.0 * kChains * sizeof(V) / sizeof(float) * kSteps;
typedef float F4 __attribute__((vector_size(16)));
#if defined(__x86_64__)
typedef float F8 __attribute__((vector_size(32)));
typedef float F16 __attribute__((vector_size(64)));
#define CAPO_FMA(x) asm volatile("vfmadd213ps %1, %1, %0" : "+v"(x) : "v"(m));
#define CAPO_MUL_ADD(x) asm volatile("mulps %1, %0\n\taddps %1, %0" : "+x"(x) : "x"(m));
[[gnu::target("avx512f")]] double chains_v4() { CAPO_CHAINS(F16, CAPO_FMA) }
[[gnu::target("avx2,fma")]] double chains_v3() { CAPO_CHAINS(F8, CAPO_FMA) }
double chains_v2() { CAPO_CHAINS(F4, CAPO_MUL_ADD) }
double chains() { return isa() == Isa::v4 ? chains_v4() : isa() == Isa::v3 ? chains_v3() : chains_v2(); }
#elif defined(__aarch64__)
#define CAPO_FMA(x) asm volatile("fmla %0.4s, %1.4s, %1.4s" : "+w"(x) : "w"(m));
double chains() { CAPO_CHAINS(F4, CAPO_FMA) }
#else
#define CAPO_MUL_ADD(x) x = x * m + m; asm volatile("" : "+m"(x));
double chains() { CAPO_CHAINS(F4, CAPO_MUL_ADD) }
#endif

using Clock = std::chrono::steady_clock;

// Per second, the best of some rounds: others may use the machine as well.
template <class F>
double best_rate(F&& work) {
  double best = 0;
  for (int r = 0; r < kRounds; ++r) {
    const auto start = Clock::now();
    const double done = work();
    best = std::max(best, done / std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

double fma_peak(int threads) {
  double per_thread = 0;
  return best_rate([&] {
    parallel_for(threads, 1, [&](std::int64_t begin, std::int64_t) {
      const double done = chains();
      if (begin == 0) per_thread = done;
    });
    return per_thread * threads;
  });
}

// In parts that a C library copies through the caches, and in parts that it may write past them.
double copy_peak(int threads) {
  constexpr std::int64_t kBytes = std::int64_t{64} << 20, kSmall = std::int64_t{256} << 10;
  const std::unique_ptr<char[]> from(new char[kBytes]), to(new char[kBytes]);
  std::memset(from.get(), 1, kBytes);
  std::memset(to.get(), 2, kBytes);
  double best = 0;
  for (const std::int64_t part : {kSmall, (kBytes + threads - 1) / threads})
    best = std::max(best, best_rate([&] {
      parallel_for(kBytes, part, [&](std::int64_t begin, std::int64_t end) {
        std::memcpy(to.get() + begin, from.get() + begin, static_cast<std::size_t>(end - begin));
      });
      return 2.0 * kBytes;
    }));
  return best;
}

}  // namespace

MachinePeaks machine_peaks() {
  static std::mutex mutex;
  static auto* known = new std::map<std::pair<int, Isa>, MachinePeaks>;
  const int threads = num_threads();
  const std::lock_guard lock(mutex);
  auto [it, fresh] = known->try_emplace({threads, isa()});
  if (fresh) it->second = {fma_peak(threads), copy_peak(threads)};
  return it->second;
}

}  // namespace capo
