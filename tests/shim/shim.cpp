#include <capo/tests/shim/shim.hpp>

#include <capo/tests/shim/race.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <numeric>
#include <random>

#include <pthread.h>
#include <sys/mman.h>
#if defined(__x86_64__) && !defined(CAPO_SHIM_UCONTEXT)
#define CAPO_SHIM_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define CAPO_SHIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CAPO_SHIM_ASAN 1
#endif
#endif
#if defined(CAPO_SHIM_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

capo::shim::Coordinate threadIdx, blockIdx, blockDim, gridDim;

// ---------------------------------------------------------------- stacks and the switch between them
#if defined(CAPO_SHIM_SWITCH)
// Saves the callee-saved registers on this stack and its pointer in *save, then continues on `to`.
extern "C" void capo_shim_switch(void** save, void* to);
asm(R"(
.text
.globl capo_shim_switch
.type capo_shim_switch, @function
capo_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size capo_shim_switch, .-capo_shim_switch
)");
#endif

namespace capo::shim {
namespace {

constexpr std::size_t kStack = 256 * 1024, kGuard = 4096, kRedzone = 64, kArena = 512 * 1024;
constexpr std::size_t kMaxStatic = 48 * 1024, kMaxShared = 227 * 1024;
constexpr int kMaxThreads = 1024;

struct Fiber {
  char* base = nullptr;  // lowest address
  std::size_t size = 0;
  void* fake = nullptr;  // ASan's
#if defined(CAPO_SHIM_SWITCH)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
};

struct Async {
  void* to;
  const void* from;
  int bytes, valid, group;
};

struct Thread {
  Fiber* fiber = nullptr;
  bool done = false;
  const char* waits = nullptr;  // for what, while it waits
  const char* file = nullptr;
  int line = 0;
  unsigned mask = 0;
  int groups = 0;  // committed
  std::vector<Async> async;
};

struct Meeting {
  unsigned mask, arrived;
  const char* kind;
  std::size_t size;
  const char* file;
  int line;
  void* payload[32];
};

struct Part {
  unsigned char* at;
  std::size_t bytes;
  const char *name, *file;
  int line;
};

struct State {
  Config config;
  std::mt19937_64 random;
  const Launch* launch = nullptr;
  std::int64_t block = 0;
  int threads = 0, warps = 0, finished = 0, at_barrier = 0, barrier_first = 0, current = -1;
  std::vector<Thread> thread;
  unsigned ready[32] = {};
  int priority[32] = {};
  std::vector<Meeting> meetings[32];
  Fiber main;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> free;
  std::exception_ptr error;

  unsigned char* arena = nullptr;
  std::size_t arena_used = 0, static_bytes = 0, dynamic_bytes = 0;
  std::vector<Part> arrays, parts;

  bool recording = false, capturing = false;
  std::vector<Launch> recorded;
  std::map<const void*, unsigned> launched;
};

State& state() {
  static State& s = *new State;  // immortal: nothing is freed at exit
  return s;
}

std::string thread_name(int t) { return cat("thread ", t, " (warp ", t / 32, ", lane ", t % 32, ")"); }

std::string place(const char* file, int line) {
  const std::string path = file ? file : "";
  return cat(path.substr(path.find_last_of('/') + 1), ":", line);
}

// ---------------------------------------------------------------- fibers
void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool leaving) {
#if defined(CAPO_SHIM_ASAN)
  __sanitizer_start_switch_fiber(leaving ? nullptr : &from.fake, to.base, to.size);
#endif
#if defined(CAPO_SHIM_SWITCH)
  capo_shim_switch(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(CAPO_SHIM_ASAN)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

void root();

Fiber* fresh_fiber() {
  State& s = state();
  if (s.free.empty()) {
    auto f = std::make_unique<Fiber>();
    void* const p =
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CAPO_CHECK(p != MAP_FAILED, "shim: no memory for a stack");
    mprotect(p, kGuard, PROT_NONE);
    f->base = static_cast<char*>(p) + kGuard;
    f->size = kStack;
    s.free.push_back(f.get());
    s.fibers.push_back(std::move(f));
  }
  Fiber* const f = s.free.back();
  s.free.pop_back();
#if defined(CAPO_SHIM_ASAN)
  __asan_unpoison_memory_region(f->base, f->size);  // frames of an abandoned run
  f->fake = nullptr;
#endif
#if defined(CAPO_SHIM_SWITCH)
  auto** top = reinterpret_cast<void**>(f->base + f->size);
  *--top = nullptr;  // root's return address
  *--top = reinterpret_cast<void*>(root);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->sp = top;
#else
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->base;
  f->context.uc_stack.ss_size = f->size;
  f->context.uc_link = nullptr;
  makecontext(&f->context, root, 0);
#endif
  return f;
}

void set_current(int t) {
  state().current = t;
  race::run_thread(t);
  if (t >= 0) threadIdx = {static_cast<unsigned>(t), 0, 0};
}

// ---------------------------------------------------------------- the scheduler
void draw_priorities() {
  State& s = state();
  if (s.config.order == Order::warp_ahead) std::shuffle(s.priority, s.priority + s.warps, s.random);
}

[[noreturn]] void deadlock() {
  State& s = state();
  std::string text = cat(s.launch->name, ": block ", s.block, ": no thread can run;");
  for (int t = 0; t < s.threads; ++t) {
    const Thread& a = s.thread[static_cast<std::size_t>(t)];
    if (a.done || !a.waits) continue;
    bool first = true;
    int same = 0;
    for (int u = 0; u < s.threads; ++u) {
      const Thread& b = s.thread[static_cast<std::size_t>(u)];
      if (b.done || b.waits != a.waits || b.line != a.line || b.file != a.file || b.mask != a.mask) continue;
      if (u < t) first = false;
      ++same;
    }
    if (first)
      text += cat(" ", same, " wait in ", a.waits, " at ", place(a.file, a.line), " (mask ", a.mask, "), first ",
                  thread_name(t), ";");
  }
  throw Error(cat(text, " ", s.finished, " have left"));
}

int pick() {
  State& s = state();
  const auto low = [&](int w) { return w * 32 + std::countr_zero(s.ready[w]); };
  switch (s.config.order) {
    case Order::forward:
      for (int w = 0; w < s.warps; ++w)
        if (s.ready[w]) return low(w);
      break;
    case Order::reverse:
      for (int w = s.warps; w-- > 0;)
        if (s.ready[w]) return w * 32 + 31 - std::countl_zero(s.ready[w]);
      break;
    case Order::warp_ahead:
      for (int i = 0; i < s.warps; ++i)
        if (s.ready[s.priority[i]]) return low(s.priority[i]);
      break;
    case Order::random: {
      int total = 0;
      for (int w = 0; w < s.warps; ++w) total += std::popcount(s.ready[w]);
      if (!total) break;
      int k = static_cast<int>(s.random() % static_cast<unsigned>(total));
      for (int w = 0; w < s.warps; ++w) {
        const int here = std::popcount(s.ready[w]);
        if (k >= here) {
          k -= here;
          continue;
        }
        unsigned bits = s.ready[w];
        while (k--) bits &= bits - 1;
        return w * 32 + std::countr_zero(bits);
      }
    }
  }
  deadlock();
}

void check_race() {
  if (!race::kOn) return;
  const std::string text = race::take_failure();
  if (text.empty()) return;
  State& s = state();
  throw Error(cat(s.launch->name, ": block ", s.block, ": ", text));
}

Thread& self() { return state().thread[static_cast<std::size_t>(state().current)]; }

void set_ready(int t, bool on) {
  unsigned& word = state().ready[t / 32];
  word = on ? word | 1u << (t % 32) : word & ~(1u << (t % 32));
}

// The current thread waits: runs another, and returns when this one has been made ready and picked.
void wait(const char* what, unsigned mask, const char* file, int line) {
  State& s = state();
  Thread& me = self();
  me.waits = what, me.mask = mask, me.file = file, me.line = line;
  const int next = pick();
  Thread& to = s.thread[static_cast<std::size_t>(next)];
  if (&to != &me) {
    if (!to.fiber) to.fiber = fresh_fiber();
    set_current(next);
    switch_fiber(*me.fiber, *to.fiber, false);
  }
  me.waits = nullptr;
}

void finish_thread() {
  State& s = state();
  Thread& me = self();
  check_race();
  const int t = s.current;
  if (!me.async.empty()) fail("leaves with cp.async that nothing waited for", nullptr, 0);
  if (s.at_barrier)
    fail(cat("leaves while ", thread_name(s.barrier_first), " waits in __syncthreads"),
         s.thread[static_cast<std::size_t>(s.barrier_first)].file,
         s.thread[static_cast<std::size_t>(s.barrier_first)].line);
  for (const Meeting& m : s.meetings[t / 32])
    if (m.mask >> (t % 32) & 1) fail(cat("leaves, but is in the mask of ", m.kind), m.file, m.line);
  me.done = true;
  set_ready(t, false);
  ++s.finished;
}

// Runs threads from the start until one of them waits; then this stack is that thread's, and goes on here after it.
void root() {
  State& s = state();
#if defined(CAPO_SHIM_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Fiber* const mine = self().fiber;
  for (;;) {
    Fiber* to = nullptr;
    try {
      s.launch->invoke(s.launch->kernel, s.launch->args.data());
      finish_thread();
      if (s.finished == s.threads) {
        to = &s.main;
      } else {
        const int next = pick();
        set_current(next);
        to = self().fiber;
      }
    } catch (...) {
      s.error = std::current_exception();
      to = &s.main;
    }
    if (!to) {
      self().fiber = mine;
      continue;
    }
    s.free.push_back(mine);
    switch_fiber(*mine, *to, true);
  }
}

// ---------------------------------------------------------------- shared memory
void poison(void* p, std::size_t n, bool on) {
#if defined(CAPO_SHIM_ASAN)
  on ? __asan_poison_memory_region(p, n) : __asan_unpoison_memory_region(p, n);
#else
  (void)p, (void)n, (void)on;
#endif
}

void reset_arena() {
  State& s = state();
  if (!s.arena) {
#if defined(CAPO_SHIM_RACE)
    s.arena = static_cast<unsigned char*>(race::arena(kArena));
#else
    s.arena = static_cast<unsigned char*>(std::aligned_alloc(256, kArena));
#endif
    s.arena_used = kArena;
  }
  poison(s.arena, s.arena_used, false);
  std::memset(s.arena, 0xff, s.arena_used);
#if defined(CAPO_SHIM_RACE)
  for (const auto* list : {&s.arrays, &s.parts})
    for (const Part& p : *list) race::shared_end(p.at, p.bytes);
#endif
  poison(s.arena, kArena, true);
  s.arena_used = kRedzone;
  s.static_bytes = s.dynamic_bytes = 0;
  s.arrays.clear();
  s.parts.clear();
}

unsigned char* shared_bytes(std::size_t bytes, std::size_t align, const char* name) {
  State& s = state();
  const std::size_t begin = (s.arena_used + align - 1) / align * align;
  s.arena_used = begin + bytes + kRedzone;
  if (s.arena_used > kArena) fail(cat("no room for shared ", name), nullptr, 0);
  poison(s.arena + begin, bytes, false);
#if defined(CAPO_SHIM_RACE)
  race::shared_part(s.arena + begin, bytes, name);
#else
  (void)name;
#endif
  return s.arena + begin;
}

void run_block() {
  State& s = state();
  s.thread.assign(static_cast<std::size_t>(s.threads), Thread{});
  s.warps = s.threads / 32;
  s.finished = s.at_barrier = 0;
  for (int w = 0; w < s.warps; ++w) s.ready[w] = ~0u, s.priority[w] = w, s.meetings[w].clear();
  for (int w = s.warps; w < 32; ++w) s.ready[w] = 0;
  s.free.clear();
  for (const auto& f : s.fibers) s.free.push_back(f.get());
  draw_priorities();
  reset_arena();
  blockIdx = {static_cast<unsigned>(s.block), 0, 0};
  race::begin_block(static_cast<int>(s.block), s.threads);
  const int first = pick();
  s.thread[static_cast<std::size_t>(first)].fiber = fresh_fiber();
  set_current(first);
  switch_fiber(s.main, *self().fiber, false);
  set_current(-1);
  if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

}  // namespace

Config& config() { return state().config; }

const std::vector<Config>& orders() {
  static const std::vector<Config> all = {{Order::forward, 0}, {Order::reverse, 0}, {Order::warp_ahead, 1}};
  static const std::vector<Config> one(all.begin(), all.begin() + 1);
  return race::kOn ? one : all;
}

const std::map<const void*, unsigned>& launched_kernels() { return state().launched; }

void fail(const std::string& what, const char* file, int line) {
  State& s = state();
  throw Error(cat(s.launch ? s.launch->name : "shim", ": block ", s.block, ", ", thread_name(s.current), ": ", what,
                  file ? cat(" at ", place(file, line)) : std::string()));
}

void* shared_array(std::size_t bytes, std::size_t align, const char* name, const char* file, int line) {
  State& s = state();
  for (const Part& p : s.arrays)
    if (p.line == line && p.bytes == bytes && p.file == file) return p.at;
  s.static_bytes += bytes;
  if (s.static_bytes > kMaxStatic) fail(cat("more than ", kMaxStatic, " bytes of CAPO_SHARED"), file, line);
  unsigned char* const p = shared_bytes(bytes, std::max<std::size_t>(align, 16), name);
  s.arrays.push_back({p, bytes, name, file, line});
  return p;
}

void* dynamic_part(int& index, std::size_t bytes) {
  State& s = state();
  const auto i = static_cast<std::size_t>(index++);
  if (i < s.parts.size()) {
    if (s.parts[i].bytes != bytes)
      fail(cat("carves ", bytes, " bytes as part ", i, ", another thread ", s.parts[i].bytes), nullptr, 0);
    return s.parts[i].at;
  }
  s.dynamic_bytes += (bytes + 15) / 16 * 16;
  if (s.dynamic_bytes > s.launch->shared)
    fail(cat("carves ", s.dynamic_bytes, " bytes of dynamic shared memory, the launch gave ", s.launch->shared),
         nullptr, 0);
  unsigned char* const p = shared_bytes(bytes, 16, "dynamic part");
  s.parts.push_back({p, bytes, "dynamic part", nullptr, 0});
  return p;
}

void barrier(const char* file, int line) {
  State& s = state();
  check_race();
  if (s.finished) fail(cat(s.finished, " threads of the block have left before this __syncthreads"), file, line);
  if (s.at_barrier == 0) {
    s.barrier_first = s.current;
  } else {
    const Thread& first = s.thread[static_cast<std::size_t>(s.barrier_first)];
    if (first.line != line || first.file != file)
      fail(cat("divergent __syncthreads: ", thread_name(s.barrier_first), " waits at ", place(first.file, first.line),
               ", this one"),
           file, line);
  }
  if (++s.at_barrier < s.threads) {
    set_ready(s.current, false);
    wait("__syncthreads", 0, file, line);
    return;
  }
  s.at_barrier = 0;
  for (int w = 0; w < s.warps; ++w) s.ready[w] = ~0u;
  draw_priorities();
  race::barrier();
  wait("__syncthreads", 0, file, line);
}

void collective(unsigned mask, const char* kind, std::size_t size, void* payload, Complete complete, bool orders_memory,
                const char* file, int line) {
  State& s = state();
  check_race();
  const int t = s.current, lane = t % 32, warp = t / 32;
  if (!(mask >> lane & 1)) fail(cat(kind, " with mask ", mask, ", which this lane is not in"), file, line);
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && s.thread[static_cast<std::size_t>(warp * 32 + i)].done)
      fail(cat(kind, " with mask ", mask, ": lane ", i, " has left"), file, line);
  auto& list = s.meetings[warp];
  std::size_t at = list.size();
  for (std::size_t i = 0; i < list.size(); ++i) {
    const Meeting& m = list[i];
    if (m.mask == mask) {
      if (std::strcmp(m.kind, kind) || m.size != size || m.line != line || m.file != file)
        fail(cat("divergent warp: lanes ", m.arrived, " wait in ", m.kind, " at ", place(m.file, m.line),
                 ", this lane in ", kind),
             file, line);
      at = i;
    } else if (m.mask & mask) {
      fail(cat(kind, " with mask ", mask, ", while lanes ", m.arrived, " wait in ", m.kind, " with mask ", m.mask,
               " at ", place(m.file, m.line)),
           file, line);
    }
  }
  if (at == list.size()) list.push_back({mask, 0, kind, size, file, line, {}});
  list[at].arrived |= 1u << lane;
  list[at].payload[lane] = payload;
  if (list[at].arrived != mask) {
    set_ready(t, false);
    wait(kind, mask, file, line);
    return;
  }
  const Meeting m = list[at];
  list.erase(list.begin() + static_cast<std::ptrdiff_t>(at));
  complete(m.payload, mask);
  if (orders_memory) race::sync_warp(warp, mask);
  s.ready[warp] |= mask;
  if (s.config.order != Order::forward) wait(kind, mask, file, line);
}

namespace {
struct MatrixRow {
  std::uint16_t row[8];
  std::uint32_t* out;
};

std::uint32_t get(void* const payload[32], int matrix, int i, int j) {
  return static_cast<const MatrixRow*>(payload[matrix * 8 + i])->row[j];
}
}  // namespace

void ldmatrix_x4(std::uint32_t* r, const void* row, bool transposed, const char* file, int line) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16) fail("misaligned ldmatrix row", file, line);
  MatrixRow mine;
  std::memcpy(mine.row, row, 16);
  race::read(row, 16);
  mine.out = r;
  collective(0xffffffffu, transposed ? "ldmatrix.trans" : "ldmatrix", 0, &mine,
             transposed ? Complete([](void* const payload[32], unsigned) {
               for (int lane = 0; lane < 32; ++lane)
                 for (int m = 0; m < 4; ++m)
                   static_cast<MatrixRow*>(payload[lane])->out[m] =
                       get(payload, m, lane % 4 * 2, lane / 4) | get(payload, m, lane % 4 * 2 + 1, lane / 4) << 16;
             })
                        : Complete([](void* const payload[32], unsigned) {
               for (int lane = 0; lane < 32; ++lane)
                 for (int m = 0; m < 4; ++m)
                   static_cast<MatrixRow*>(payload[lane])->out[m] =
                       get(payload, m, lane / 4, lane % 4 * 2) | get(payload, m, lane / 4, lane % 4 * 2 + 1) << 16;
             }),
             false, file, line);
}

void cp_async(void* to, const void* from, int bytes, int valid, const char* file, int line) {
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % static_cast<unsigned>(bytes) != 0;
  };
  if (misaligned(to) || (valid && misaligned(from))) fail("misaligned cp.async", file, line);
  Thread& me = self();
  me.async.push_back({to, from, bytes, valid, me.groups});
  // Anything, until its wait: too early is as visible as too late.
  std::memset(to, 0xff, static_cast<std::size_t>(bytes));
  race::async_begin(to, static_cast<std::size_t>(bytes));
}

void cp_async_commit() { ++self().groups; }

void cp_async_wait(int left) {
  Thread& me = self();
  std::erase_if(me.async, [&](const Async& a) {
    if (a.group >= me.groups - left) return false;
    if (a.valid) std::memcpy(a.to, a.from, static_cast<std::size_t>(a.valid));
    std::memset(static_cast<char*>(a.to) + a.valid, 0, static_cast<std::size_t>(a.bytes - a.valid));
    race::read(a.from, static_cast<std::size_t>(a.valid));
    race::async_end(a.to, static_cast<std::size_t>(a.bytes));
    return true;
  });
}

void run(const Launch& launch) {
  State& s = state();
  CAPO_CHECK(launch.blocks >= 1 && launch.blocks < std::int64_t{1} << 31, launch.name,
             ": blocks must be 1 to 2^31 - 1, got ", launch.blocks);
  CAPO_CHECK(launch.threads >= 32 && launch.threads % 32 == 0 && launch.threads <= kMaxThreads, launch.name,
             ": threads must be a multiple of 32 up to 1024, got ", launch.threads);
  CAPO_CHECK(launch.shared <= kMaxShared, launch.name, ": at most ", kMaxShared, " bytes of shared memory, got ",
             launch.shared);
  if (s.recording) s.recorded.push_back(launch);
  if (s.capturing) return;
  s.launched[launch.kernel] |= 1u << static_cast<int>(s.config.order);
  if (!s.main.base) {
    pthread_attr_t attributes;
    void* base = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &base, &s.main.size);
    pthread_attr_destroy(&attributes);
    s.main.base = static_cast<char*>(base);
  }
  s.launch = &launch;
  s.threads = launch.threads;
  s.random.seed(s.config.seed);
  blockDim = {static_cast<unsigned>(launch.threads), 1, 1};
  gridDim = {static_cast<unsigned>(launch.blocks), 1, 1};
  race::begin_launch();
  std::vector<std::int64_t> blocks(static_cast<std::size_t>(launch.blocks));
  std::iota(blocks.begin(), blocks.end(), 0);
  if (s.config.order == Order::reverse) std::reverse(blocks.begin(), blocks.end());
  if (s.config.order == Order::random || s.config.order == Order::warp_ahead)
    std::shuffle(blocks.begin(), blocks.end(), s.random);
  for (const std::int64_t block : blocks) {
    s.block = block;
    run_block();
  }
}

// ---------------------------------------------------------------- record and replay
void start_recording() {
  state().recorded.clear();
  state().recording = true;
}

void start_capture() {
  start_recording();
  state().capturing = true;
}

std::vector<Launch> stop_recording() {
  state().recording = state().capturing = false;
  return std::exchange(state().recorded, {});
}

void copy(void* dst, const void* src, std::size_t bytes) {
  State& s = state();
  if (s.recording) {
    s.recorded.push_back({"copy", nullptr, nullptr, 0, 0, 0, {}, {0}});
    detail::keep(s.recorded.back(), dst);
    detail::keep(s.recorded.back(), src);
    detail::keep(s.recorded.back(), bytes);
  }
  if (s.capturing) return;
  std::memcpy(dst, src, bytes);
  mark_initialised(dst, bytes);
}

void replay(const std::vector<Launch>& launches) {
  for (const Launch& l : launches) {
    if (l.kernel) {
      run(l);
      continue;
    }
    void *dst, *src;
    std::size_t bytes;
    std::memcpy(&dst, l.args.data() + l.offset[0], sizeof dst);
    std::memcpy(&src, l.args.data() + l.offset[1], sizeof src);
    std::memcpy(&bytes, l.args.data() + l.offset[2], sizeof bytes);
    copy(dst, src, bytes);
  }
}

std::vector<std::string> frozen_arguments(const std::vector<Launch>& a, const std::vector<Launch>& b) {
  std::vector<std::string> out;
  if (a.size() != b.size()) out.push_back(cat("the steps have ", a.size(), " and ", b.size(), " launches"));
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const Launch &x = a[i], &y = b[i];
    if (x.kernel != y.kernel || x.blocks != y.blocks || x.threads != y.threads || x.shared != y.shared) {
      out.push_back(cat("launch ", i, ": ", x.name, " and ", y.name, " differ in kernel or shape"));
      continue;
    }
    for (std::size_t k = 0; k + 1 < x.offset.size(); ++k)
      if (std::memcmp(x.args.data() + x.offset[k], y.args.data() + x.offset[k], x.offset[k + 1] - x.offset[k]))
        out.push_back(cat(x.name, ", argument ", k));
  }
  return out;
}

// ---------------------------------------------------------------- device memory
void* allocate(std::size_t bytes, [[maybe_unused]] const char* name) {
#if defined(CAPO_SHIM_RACE)
  void* const p = race::allocate(bytes, name);
#else
  void* p = nullptr;  // the exact size: ASan's redzone begins at the last byte
  CAPO_CHECK(posix_memalign(&p, 256, bytes ? bytes : 1) == 0, "shim: no memory");
#endif
  std::memset(p, 0xff, bytes);
  return p;
}

void release(void* p) {
#if defined(CAPO_SHIM_RACE)
  race::release(p);
#else
  std::free(p);
#endif
}

void mark_initialised([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if defined(CAPO_SHIM_RACE)
  race::mark_initialised(p, bytes);
#endif
}

void check_written(const void* p, std::size_t bytes) {
  const std::string text = race::unwritten(p, bytes);
  CAPO_CHECK(text.empty(), "shim: the host reads ", text, ": never written");
}

}  // namespace capo::shim
