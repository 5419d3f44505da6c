#include <capo/engine/error.h>
#include <capo/engine/threads.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <pthread.h>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace capo {
namespace {

// The processor's word of floating-point modes, and what flushes results and operands that are denormal in it.
#if defined(__x86_64__)
using Modes = unsigned;
constexpr Modes kFlush = 0x8040;  // FZ, DAZ
Modes modes() { return _mm_getcsr(); }
void set_modes(Modes m) { _mm_setcsr(m); }
#elif defined(__aarch64__)
using Modes = std::uint64_t;
constexpr Modes kFlush = 1u << 24;  // FPCR.FZ
Modes modes() {
  Modes m;
  asm volatile("mrs %0, fpcr" : "=r"(m));
  return m;
}
void set_modes(Modes m) { asm volatile("msr fpcr, %0" : : "r"(m)); }
#else  // denormals keep their values, and their price
using Modes = unsigned;
constexpr Modes kFlush = 0;
Modes modes() { return 0; }
void set_modes(Modes) {}
#endif

class FlushDenormals {
 public:
  FlushDenormals() : before_(modes()) { set_modes(before_ | kFlush); }
  ~FlushDenormals() { set_modes(before_); }

 private:
  Modes before_;
};

thread_local bool inside = false;  // this thread is running a chunk

struct Job {
  std::int64_t n, grain;
  detail::RangeFn fn;
  void* context;
  std::exception_ptr error = nullptr;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex error_mutex{};

  void work() {
    const FlushDenormals flush;
    inside = true;
    while (!failed.load(std::memory_order_relaxed)) {
      const std::int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) break;
      try {
        fn(context, begin, begin + grain < n ? begin + grain : n);
      } catch (...) {
        std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        failed = true;
      }
    }
    inside = false;
  }
};

constexpr std::size_t kWorkerStack = std::size_t{8} << 20;  // kernels keep up to 2.5 MB of blocks on it

// Workers sleep on a condition variable after a short spin; one job at a time.
class Pool {
 public:
  explicit Pool(int threads) : size_(threads) {
    workers_.reserve(static_cast<std::size_t>(threads - 1));
    pthread_attr_t attributes;  // std::thread takes the system's stack size, which may be 128 KB
    int code = pthread_attr_init(&attributes);
    CAPO_CHECK(code == 0, "threads: pthread_attr_init failed, ", std::generic_category().message(code));
    code = pthread_attr_setstacksize(&attributes, kWorkerStack);
    for (int i = 1; i < threads && code == 0; ++i) {
      pthread_t worker;
      code = pthread_create(&worker, &attributes, start, this);
      if (code == 0) workers_.push_back(worker);
    }
    pthread_attr_destroy(&attributes);
    if (code != 0) {  // the system's limit: those that run are joined
      const std::size_t started = workers_.size() + 1;
      stop();
      detail::fail("threads: the system allows no more than ", started, " of ", threads, ", ",
                   std::generic_category().message(code));
    }
  }
  ~Pool() { stop(); }
  int size() const { return size_; }

  void run(Job& job) {
    if (workers_.empty() || !busy_.try_lock()) {  // another caller holds the pool: work alone, same chunks, same bits
      job.work();
      return;
    }
    std::lock_guard busy(busy_, std::adopt_lock);
    {
      std::lock_guard lock(mutex_);
      job_ = &job;
      pending_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
      ticket_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work();
    for (int spin = 0; pending_.load(std::memory_order_acquire) != 0; ++spin)
      if (spin > 2000) std::this_thread::yield();
  }

 private:
  void stop() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      ticket_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (const pthread_t w : workers_) pthread_join(w, nullptr);
  }
  static void* start(void* pool) {
    static_cast<Pool*>(pool)->loop();
    return nullptr;
  }
  void loop() {
    std::uint64_t seen = 0;
    while (true) {
      for (int spin = 0; spin < 4000 && ticket_.load(std::memory_order_acquire) == seen; ++spin) pause();
      Job* job;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return ticket_.load(std::memory_order_relaxed) != seen; });
        seen = ticket_.load(std::memory_order_relaxed);
        if (stop_) return;
        job = job_;
      }
      job->work();
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  int size_;
  std::vector<pthread_t> workers_;
  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> ticket_{0};
  std::atomic<int> pending_{0};
  Job* job_ = nullptr;
  bool stop_ = false;
};

std::mutex pool_mutex;
int size_before_fork = 0;  // of the parent's pool; 0 in a process that is not forked
std::shared_ptr<Pool>& pool_slot();

// A forked child has none of the pool's threads: waiting for them or joining them would never end. So the pool is kept
// unused for good (in static memory: the heap may be locked here), and the child starts another when it needs one.
void drop_pool_in_child() {
  auto& slot = pool_slot();
  if (slot) {
    size_before_fork = slot->size();
    alignas(std::shared_ptr<Pool>) static unsigned char lost[sizeof(std::shared_ptr<Pool>)];
    new (lost) std::shared_ptr<Pool>(std::move(slot));
  }
  pool_mutex.unlock();
}

// Under pool_mutex, which a fork takes as well.
std::shared_ptr<Pool>& pool_slot() {
  static auto* slot = [] {
    const int code = pthread_atfork([] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); }, drop_pool_in_child);
    CAPO_CHECK(code == 0, "threads: pthread_atfork failed, ", std::generic_category().message(code));
    return new std::shared_ptr<Pool>;  // immortal: a detached thread may still compute at exit
  }();
  return *slot;
}
std::shared_ptr<Pool> pool() {
  std::lock_guard lock(pool_mutex);
  auto& p = pool_slot();
  if (!p) p = std::make_shared<Pool>(size_before_fork > 0 ? size_before_fork : detail::default_threads());
  return p;
}

}  // namespace

int num_threads() { return pool()->size(); }

void set_num_threads(int n) {
  CAPO_CHECK(n >= 1 && n <= 1024, "set_num_threads: must be 1..1024, got ", n);
  CAPO_CHECK(!inside, "set_num_threads: must not be called from inside parallel_for");
  auto fresh = std::make_shared<Pool>(n);
  std::lock_guard lock(pool_mutex);
  pool_slot() = std::move(fresh);
}

void detail::parallel_for(std::int64_t n, std::int64_t grain, RangeFn fn, void* context) {
  if (n <= 0) return;
  CAPO_CHECK(grain >= 1, "parallel_for: grain must be at least 1, got ", grain);
  if (inside) {  // nested: inline, in the same chunks
    for (std::int64_t begin = 0; begin < n; begin += grain) fn(context, begin, begin + grain < n ? begin + grain : n);
    return;
  }
  Job job{n, grain, fn, context};
  if (n <= grain)
    job.work();
  else
    pool()->run(job);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace capo
