// Must be reported by ThreadSanitizer: two threads of the library's pool write one variable.
#include <capo/engine/threads.h>

#include <atomic>
#include <chrono>
#include <cstdio>

int main() {
  capo::set_num_threads(2);
  volatile std::int64_t last = 0;
  std::atomic<int> arrived{0};
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  capo::parallel_for(2, 1, [&](std::int64_t begin, std::int64_t) {
    arrived.fetch_add(1, std::memory_order_relaxed);  // orders nothing: both chunks run at once, on two threads
    while (arrived.load(std::memory_order_relaxed) < 2 && std::chrono::steady_clock::now() < end) {
    }
    for (int i = 0; i < 10000; ++i) last = begin;  // often: two writes at the very same moment may escape
  });
  std::printf("not noticed: %d\n", static_cast<int>(last));
}
