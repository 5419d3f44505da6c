// An exact checker of races and uninitialised reads: kernel files are compiled with -fsanitize=thread, and the
// functions that the compiler then calls at every load and store are ours, not libtsan's. One run in any order is
// enough, because what is checked is not what happened but what was ordered: by a barrier, by __syncwarp within a warp,
// or by the end of the launch. Shuffles do not order memory.
//
// One cell per byte of a reserved region in which all device and shared memory lies: the last write, and two reads by
// different threads. (A third reader that only a partial __syncwarp leaves unordered can be missed.)
#include <capo/tests/shim/race.h>
#include <capo/tests/shim/shim.hpp>

#include <map>

#include <sys/mman.h>

namespace capo::shim::race {
namespace {

constexpr std::size_t kRegion = std::size_t{128} << 20, kGap = 256;

struct Stamp {
  // block: within the launch; epoch: barriers so far; clock: the thread's in its warp.
  std::uint32_t launch, block, epoch, clock;
  std::int32_t thread;
};
struct Cell {
  Stamp write, read[2];
  std::uint8_t inside, initialised, pending, has_write, reads;  // pending: a cp.async into it is running
};

struct Region {
  unsigned char* base = nullptr;
  Cell* cells = nullptr;
  std::size_t used = kGap;
  std::map<const unsigned char*, std::pair<std::size_t, std::string>> names;  // of live parts
  std::map<std::size_t, std::vector<unsigned char*>> freed;
  std::uint32_t launch = 0, block = 0, epoch = 0;
  std::uint32_t clock[32][32][32];  // [warp][lane][lane it knows of]
  int thread = -1;
  std::string failure;
};

Region& region() {
  static Region& r = *new Region;
  if (!r.base) {
    r.base = static_cast<unsigned char*>(
        mmap(nullptr, kRegion, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    void* const cells = mmap(nullptr, kRegion * sizeof(Cell), PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CAPO_CHECK(r.base != MAP_FAILED && cells != MAP_FAILED, "shim: no memory for the race checker");
    r.cells = static_cast<Cell*>(cells);
  }
  return r;
}

void fresh(void* p, std::size_t bytes, const char* name) {
  Region& r = region();
  auto* const at = static_cast<unsigned char*>(p);
  r.names[at] = {bytes, name};
  for (std::size_t i = 0; i < bytes; ++i) {
    Cell& c = r.cells[at - r.base + static_cast<std::ptrdiff_t>(i)];
    c.inside = 1;
    c.initialised = c.pending = c.has_write = c.reads = 0;
  }
}

void forget(void* p, std::size_t bytes) {
  Region& r = region();
  auto* const at = static_cast<unsigned char*>(p);
  r.names.erase(at);
  for (std::size_t i = 0; i < bytes; ++i) r.cells[at - r.base + static_cast<std::ptrdiff_t>(i)].inside = 0;
}

std::string name_of(const unsigned char* p) {
  Region& r = region();
  auto it = r.names.upper_bound(p);
  if (it == r.names.begin()) return "memory";
  --it;
  const auto offset = static_cast<std::size_t>(p - it->first);
  return cat(it->second.second, " (", it->second.first, " bytes) at byte ", offset);
}

// Whether what the stamp says happened before what the running thread does now.
bool ordered(const Stamp& s) {
  const Region& r = region();
  if (s.launch != r.launch) return true;
  if (s.block != r.block) return false;
  if (s.thread == r.thread || s.epoch < r.epoch) return true;
  return s.thread / 32 == r.thread / 32 && r.clock[r.thread / 32][r.thread % 32][s.thread % 32] >= s.clock;
}

std::string who(const Stamp& s) {
  const Region& r = region();
  return s.block == r.block ? cat("thread ", s.thread) : cat("thread ", s.thread, " of another block (", s.block, ")");
}

void access(const void* address, std::size_t bytes, bool writes) {
  Region& r = region();
  const auto* const p = static_cast<const unsigned char*>(address);
  if (r.thread < 0 || p < r.base || p >= r.base + kRegion || !r.failure.empty()) return;
  const Stamp now{r.launch, r.block, r.epoch, r.clock[r.thread / 32][r.thread % 32][r.thread % 32], r.thread};
  const auto report = [&](std::size_t i, const std::string& what) {
    r.failure = cat("thread ", r.thread, " ", writes ? "writes " : "reads ", name_of(p + i), what);
  };
  for (std::size_t i = 0; i < bytes; ++i) {
    Cell& c = r.cells[p - r.base + static_cast<std::ptrdiff_t>(i)];
    if (!c.inside) return report(i, ": outside of it");
    if (c.pending) return report(i, ": a cp.async into it has not been waited for");
    if (!writes && !c.initialised) return report(i, ": never written");
    if (c.has_write && !ordered(c.write)) return report(i, cat(": race with the write of ", who(c.write)));
    if (writes) {
      for (int k = 0; k < c.reads; ++k)
        if (!ordered(c.read[k])) return report(i, cat(": race with the read of ", who(c.read[k])));
      c.write = now;
      c.initialised = c.has_write = 1;
      c.reads = 0;
      continue;
    }
    // Room for this read: that of the same thread, one that everything now follows, a free one, or none of the two.
    int k = 0;
    while (k < c.reads && !(c.read[k].thread == now.thread && c.read[k].block == now.block) && !ordered(c.read[k])) ++k;
    if (k == 2) continue;
    c.read[k] = now;
    if (k == c.reads) ++c.reads;
  }
}

}  // namespace

void* allocate(std::size_t bytes, const char* name) {
  Region& r = region();
  const std::size_t rounded = (bytes + 255) / 256 * 256;
  unsigned char* p;
  if (auto& list = r.freed[rounded]; !list.empty()) {
    p = list.back();
    list.pop_back();
  } else {
    p = r.base + r.used;
    r.used += rounded + kGap;
    CAPO_CHECK(r.used <= kRegion, "shim: the race checker's region is full");
  }
  fresh(p, bytes, name);
  return p;
}

void release(void* p) {
  Region& r = region();
  const std::size_t bytes = r.names.at(static_cast<unsigned char*>(p)).first;
  forget(p, bytes);
  r.freed[(bytes + 255) / 256 * 256].push_back(static_cast<unsigned char*>(p));
}

void* arena(std::size_t bytes) {
  Region& r = region();
  unsigned char* const p = r.base + r.used;
  r.used += bytes + kGap;
  return p;
}

void shared_part(void* p, std::size_t bytes, const char* name) { fresh(p, bytes, name); }
void shared_end(void* p, std::size_t bytes) { forget(p, bytes); }

void mark_initialised(const void* p, std::size_t bytes) {
  Region& r = region();
  if (p < r.base || p >= r.base + kRegion) return;  // the host's
  for (std::size_t i = 0; i < bytes; ++i)
    r.cells[static_cast<const unsigned char*>(p) - r.base + static_cast<std::ptrdiff_t>(i)].initialised = 1;
}

std::string unwritten(const void* address, std::size_t bytes) {
  Region& r = region();
  const auto* const p = static_cast<const unsigned char*>(address);
  if (p < r.base || p >= r.base + kRegion) return "";
  for (std::size_t i = 0; i < bytes; ++i)
    if (!r.cells[p - r.base + static_cast<std::ptrdiff_t>(i)].initialised) return name_of(p + i);
  return "";
}

void begin_launch() {
  Region& r = region();
  ++r.launch;
  r.failure.clear();
}

void begin_block(int block, int) {
  Region& r = region();
  r.block = static_cast<std::uint32_t>(block);
  r.epoch = 0;
  std::memset(r.clock, 0, sizeof r.clock);
  for (auto& warp : r.clock)
    for (int lane = 0; lane < 32; ++lane) warp[lane][lane] = 1;
}

void run_thread(int thread) { region().thread = thread; }

void barrier() { ++region().epoch; }

// Every lane of the mask now knows what any of them knew.
void sync_warp(int warp, unsigned mask) {
  auto& clock = region().clock[warp];
  for (int of = 0; of < 32; ++of) {
    std::uint32_t most = 0;
    for (int lane = 0; lane < 32; ++lane)
      if ((mask >> lane & 1) && clock[lane][of] > most) most = clock[lane][of];
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) clock[lane][of] = most;
  }
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) ++clock[lane][lane];
}

void read(const void* p, std::size_t bytes) { access(p, bytes, false); }
void write(const void* p, std::size_t bytes) { access(p, bytes, true); }

namespace {
void set_pending(const void* address, std::size_t bytes, std::uint8_t on) {
  Region& r = region();
  const auto* const p = static_cast<const unsigned char*>(address);
  if (p < r.base || p >= r.base + kRegion) return;
  for (std::size_t i = 0; i < bytes; ++i) r.cells[p - r.base + static_cast<std::ptrdiff_t>(i)].pending = on;
}
}  // namespace

void async_begin(const void* p, std::size_t bytes) {
  write(p, bytes);
  set_pending(p, bytes, 1);
}
void async_end(const void* p, std::size_t bytes) {
  set_pending(p, bytes, 0);
  write(p, bytes);
}

std::string take_failure() { return std::exchange(region().failure, {}); }

}  // namespace capo::shim::race

// ---------------------------------------------------------------- what -fsanitize=thread calls
extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define CAPO_TSAN(n)                                                                   \
  void __tsan_read##n(void* p) { capo::shim::race::read(p, n); }                       \
  void __tsan_write##n(void* p) { capo::shim::race::write(p, n); }                     \
  void __tsan_unaligned_read##n(void* p) { capo::shim::race::read(p, n); }             \
  void __tsan_unaligned_write##n(void* p) { capo::shim::race::write(p, n); }
CAPO_TSAN(1)
CAPO_TSAN(2)
CAPO_TSAN(4)
CAPO_TSAN(8)
CAPO_TSAN(16)
#undef CAPO_TSAN

void __tsan_read_range(void* p, std::size_t n) { capo::shim::race::read(p, n); }
void __tsan_write_range(void* p, std::size_t n) { capo::shim::race::write(p, n); }

}  // extern "C"
