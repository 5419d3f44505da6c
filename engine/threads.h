// One pool behind one parallel_for.
//
// Results never depend on the number of threads: [0, n) is cut into chunks of `grain`, whatever the pool's size, and
// each chunk is computed by one thread. Inside a worker, parallel_for runs inline. Denormals are flushed to zero in
// every participant, the caller included, and its mode is restored afterwards.
//
// Workers have stacks of 8 MB. The caller computes on its own stack: a few ops need up to 2 MB of it, and say so.
// After fork() the child starts threads of its own, as many as the parent had; fork outside of chunks only.
#pragma once

#include <cstdint>
#include <type_traits>

namespace capo {

// Default: CAPO_THREADS when set, else the processors available to this process: those of its affinity mask, not more
// than the CPU quotas of its cgroups (v1, v2) rounded up, at most 1024.
int num_threads();
// Takes effect at the next parallel_for; n in 1..1024. Throws from inside one, and when the system refuses the threads.
void set_num_threads(int n);

namespace detail {
using RangeFn = void (*)(void* context, std::int64_t begin, std::int64_t end);
void parallel_for(std::int64_t n, std::int64_t grain, RangeFn fn, void* context);

int default_threads();
// What the quotas of this process's cgroups amount to, in processors; 0: none. Tests put a root before /proc and /sys.
int cpu_quota(const char* root);
}  // namespace detail

// Calls f(begin, end) for chunks of [0, n), each of at most `grain` (>= 1) and starting at a multiple of it.
// The first exception is rethrown in the caller after all chunks that had started are done.
template <class F>
void parallel_for(std::int64_t n, std::int64_t grain, F&& f) {
  detail::parallel_for(
      n, grain,
      [](void* context, std::int64_t begin, std::int64_t end) {
        (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace capo
