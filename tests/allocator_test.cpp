// Memory: counting, pieces that are cut and joined, streams, the CPU's addresses, the debug allocator.
#include <capo/engine/caching_allocator.h>
#include <capo/engine/cpu_memory.h>
#include <capo/ops/copy.h>
#include <capo/tests/fake_device.h>
#include <capo/tests/op_test.h>
#include <capo/tests/support.h>

#include <doctest/doctest.h>

#include <unistd.h>

#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <sys/mman.h>

using namespace capo;
using namespace capo::test;
using namespace capo::testing;

TEST_CASE("rounded_bytes: steps of 64, one at least") {
  CHECK(rounded_bytes(0) == 64);
  CHECK(rounded_bytes(1) == 64);
  CHECK(rounded_bytes(64) == 64);
  CHECK(rounded_bytes(65) == 128);
  CHECK(rounded_bytes(4097) == 4160);
  CHECK(rounded_bytes(std::size_t{1} << 40) == std::size_t{1} << 40);
}

TEST_CASE("the cpu allocator counts, reuses and gives back") {
  Allocator& a = allocator(kCpu);
  a.release_all();
  CHECK(a.stats().cached_bytes == 0);
  a.reset_peak();
  const auto start = a.stats();
  void* p = a.allocate(5000);
  CHECK(reinterpret_cast<std::uintptr_t>(p) % 64 == 0);
  CHECK(a.stats().live_bytes == start.live_bytes + 5056);
  CHECK(a.stats().peak_bytes == start.live_bytes + 5056);
  a.release(p, 5000);
  CHECK(a.stats().live_bytes == start.live_bytes);
  CHECK(a.stats().cached_bytes == 5056);
  CHECK(a.allocate(5050) == p);  // the same rounded size: the same block
  CHECK(a.stats().cache_hits == start.cache_hits + 1);
  CHECK(a.stats().allocations == start.allocations + 2);
  CHECK(a.stats().cached_bytes == 0);
  a.release(p, 5050);
  a.release_all();
  CHECK(a.stats().cached_bytes == 0);
  CHECK(a.stats().peak_bytes == start.live_bytes + 5056);
  a.reset_peak();
  CHECK(a.stats().peak_bytes == start.live_bytes);
}

TEST_CASE("a full cache gives back blocks of other sizes before the one just released") {
  struct Source final : MemorySource {
    int given_back = 0;
    const char* name() const override { return "here"; }
    void* take(std::size_t bytes) override { return std::malloc(bytes); }
    void give_back(void* p, std::size_t) override {
      ++given_back;
      std::free(p);
    }
  } source;
  CachingAllocator a(source);
  const auto use = [&](std::size_t mib) {
    void* p = a.allocate(mib << 20);
    a.release(p, mib << 20);
    return p;
  };
  for (const std::size_t mib : {32, 36, 40, 44}) use(mib);
  CHECK(source.given_back == 0);
  void* last = use(48);  // 152 MiB were kept, and 2 x 48 + 64 may be
  CHECK(source.given_back >= 1);
  CHECK(use(48) == last);
  CHECK(a.stats().cache_hits == 1);
  CHECK(a.stats().cached_bytes <= std::int64_t{160} << 20);
  a.release_all();
  CHECK(a.stats().cached_bytes == 0);
}

TEST_CASE("the plain allocator asks for each block's exact size and keeps none") {
  struct Source final : MemorySource {
    std::vector<std::size_t> asked;
    int given_back = 0;
    const char* name() const override { return "here"; }
    void* take(std::size_t bytes) override {
      asked.push_back(bytes);
      return bytes > 1 << 20 ? nullptr : std::malloc(bytes);
    }
    void give_back(void* p, std::size_t) override {
      ++given_back;
      std::free(p);
    }
  } source;
  PlainAllocator a(source);
  void* p = a.allocate(1025);
  void* empty = a.allocate(0);
  CHECK(source.asked == std::vector<std::size_t>{1025, 1});
  CHECK(a.stats().live_bytes == 1088 + 64);
  a.release(p, 1025);
  CHECK(source.given_back == 1);
  CHECK(a.stats().live_bytes == 64);
  CHECK(a.stats().cached_bytes == 0);
  CHECK(a.stats().peak_bytes == 1152);
  CHECK(error_of([&] { a.allocate(2 << 20); }) ==
        "here allocator: 2097152 bytes asked (2.0 MiB), the system has no room, 64 bytes are in use (0.0 MiB) and 0 "
        "cached");
  a.release(empty, 0);
  a.reset_peak();
  CHECK(a.stats().peak_bytes == 0);
}

// Sanitizers stop the program on such a size; builds on the shim have ASan's allocator.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(CAPO_TEST_SHIM)
TEST_CASE("an impossible allocation is an error, not a crash") {
  bool thrown = false;
  try {
    empty({std::int64_t{1} << 58}, u8);
  } catch (const OutOfMemory& e) {
    thrown = contains(e.what(), "cpu allocator: ") && contains(e.what(), " bytes are in use");
  }
  CHECK(thrown);
}
#endif

TEST_CASE("the meta device counts the same bytes without memory") {
  Allocator& meta = allocator(kMeta);
  const auto start = meta.stats().live_bytes;
  {
    const Tensor huge = empty({1 << 20, 1 << 20}, f32, kMeta);
    CHECK(meta.stats().live_bytes - start == std::int64_t{1} << 42);
  }
  CHECK(meta.stats().live_bytes == start);
}

TEST_CASE("storages remember their allocator") {
  DebugAllocator& debug = DebugAllocator::instance();
  const auto before = debug.stats().live_bytes;
  Allocator* cached = set_cpu_allocator(&debug);
  Tensor t = empty({100});
  CHECK(set_cpu_allocator(cached) == &debug);
  CHECK(&allocator(kCpu) == cached);
  CHECK(debug.stats().live_bytes == before + static_cast<std::int64_t>(rounded_bytes(400)));
  CHECK(std::isnan(t.data<float>()[99]));
  t = Tensor();
  CHECK(debug.stats().live_bytes == before);
}

TEST_CASE("the debug allocator sees damage on both sides, live or released, once") {
  DebugAllocator& debug = DebugAllocator::instance();
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{64}, std::size_t{1000}}) {
    auto* p = static_cast<unsigned char*>(debug.allocate(bytes));
    CHECK(reinterpret_cast<std::uintptr_t>(p) % 64 == 0);
    CHECK_NOTHROW(debug.check());
    p[bytes] ^= 1;
    CHECK(contains(error_of([&] { debug.check(); }), cat("overwritten after a block of ", bytes, " bytes")));
    p[bytes] ^= 1;
    CHECK_NOTHROW(debug.check());
    p[-1] ^= 1;
    debug.release(p, bytes);
    CHECK(contains(error_of([&] { debug.check(); }), cat("overwritten before a block of ", bytes, " bytes")));
    CHECK_NOTHROW(debug.check());
  }
}

// ---------------------------------------------------------------- pieces and streams

TEST_CASE("a block goes back to its stream, and waits for the stream that was current when it was released") {
  FakeDevice source;
  CachingAllocator memory(source);
  void* const own = memory.allocate(1000);
  source.current = &source.a;
  CHECK(memory.allocate(1000) != own);
  memory.release(own, 1000);  // used last on a
  CHECK(source.marks == 1);
  void* const mine = memory.allocate(1000);
  CHECK(mine != own);
  memory.release(mine, 1000);
  CHECK(memory.allocate(1000) == mine);  // the same stream: at once, no mark
  CHECK(source.marks == 1);
  CHECK(source.waits.empty());
  source.current = nullptr;
  CHECK(memory.allocate(1000) == own);
  CHECK(source.waits == "own<a ");
  CHECK(source.marks == 0);
  memory.release(mine, 1000);  // a's block, released on our own stream
  CHECK(memory.allocate(1000) != mine);
  source.current = &source.a;
  CHECK(memory.allocate(1000) == mine);
  CHECK(source.waits == "own<a a<own ");
  memory.release(mine, 1000);
  memory.release_all();
  CHECK(source.marks == 0);
}

TEST_CASE(
    "a block is cut from the smallest free piece that holds it, and joins its free neighbours when it is released") {
  FakeDevice source;
  CachingAllocator memory(source);
  const auto at = [&](std::size_t bytes) { return static_cast<char*>(memory.allocate(bytes)); };
  char *const large = at(4096), *const small = at(2048);
  memory.release(large, 4096);
  memory.release(small, 2048);
  CHECK(source.taken == 6144);
  CHECK(at(1024) == small);  // the smaller of the two
  char *const low = at(2048), *const high = at(1000), *const middle = at(1024);
  CHECK(low == large);
  CHECK(high == small + 1024);  // its size
  CHECK(middle == large + 2048);
  CHECK(memory.stats().live_bytes == 1024 + 2048 + 1024 + 1024);
  CHECK(memory.stats().cached_bytes == 1024);
  memory.release(low, 2048);
  CHECK(at(3072) != large);  // what is in use lies between
  memory.release(middle, 1024);
  CHECK(at(4096) == large);  // whole again
  CHECK(memory.stats().cached_bytes == 0);
  CHECK(source.taken == 6144 + 3072);
  memory.release(large, 4096);
  char *const first = at(1024), *const second = at(1024), *const third = at(2048);
  CHECK(first == large);
  CHECK(third == large + 2048);
  memory.release(first, 1024);
  memory.release(third, 2048);
  memory.release(second, 1024);  // with both neighbours at once
  CHECK(at(4096) == large);
  CHECK(source.taken == 6144 + 3072);
}

TEST_CASE(
    "pieces of one segment: joined on one stream, once what marks them has been waited for, and given back whole") {
  struct Segments final : FakeDevice {
    std::size_t segment(std::size_t bytes) const override { return (bytes + 8191) / 8192 * 8192; }
    std::size_t alignment() const override { return 256; }
  } source;
  CachingAllocator memory(source);
  char *const a = static_cast<char*>(memory.allocate(100)), *const b = static_cast<char*>(memory.allocate(300));
  CHECK(source.taken == 8192);
  CHECK(b == a + 256);
  CHECK(memory.stats().live_bytes == 128 + 320);
  CHECK(memory.stats().cached_bytes == 8192 - 256 - 512);
  memory.release_all();
  CHECK(source.taken == 8192);  // parts of it are in use
  source.current = &source.a;
  memory.release(b, 300);  // used last on a
  source.current = nullptr;
  CHECK(source.marks == 1);
  CHECK(memory.allocate(8192 - 256) != b);  // not joined with what may not be touched yet
  CHECK(source.taken == 2 * 8192);
  CHECK(memory.allocate(512) == b);
  CHECK(source.waits == "own<a ");
  source.current = &source.a;
  memory.release(b, 512);
  source.current = nullptr;
  memory.release(a, 100);
  memory.release_all();  // waits for the mark
  CHECK(source.waits == "own<a own<a ");
  CHECK(source.marks == 0);
  CHECK(source.taken == 8192);  // the second segment's block
  source.limit = 8192 + 4096;
  memory.allocate(4096);  // less than a segment, where no more fits
  CHECK(source.taken == 8192 + 4096);
}

TEST_CASE("a stream's memory is handed over, live blocks too when it ends") {
  FakeDevice source;
  CachingAllocator memory(source);
  source.current = &source.a;
  void *const kept = memory.allocate(256), *const freed = memory.allocate(512);
  memory.release(freed, 512);
  void* const scratch = memory.workspace(&source.a, 4096);
  CHECK(memory.workspace(&source.a, 1024) == scratch);
  CHECK(memory.workspace(&source.b, 1024) != scratch);
  CHECK(memory.workspace_bytes() == 5120);
  CHECK(memory.stats().live_bytes == 256);
  memory.hand_over(&source.a, nullptr, true);
  source.current = nullptr;
  CHECK(memory.allocate(512) == freed);
  CHECK(memory.allocate(4096) == scratch);
  CHECK(memory.workspace_bytes() == 1024);
  memory.release(kept, 256);
  CHECK(memory.allocate(256) == kept);
  CHECK(source.marks == 0);
  memory.release(kept, 256);
  memory.hand_over(nullptr, &source.b, false);
  source.current = &source.b;
  CHECK(memory.allocate(256) == kept);
  memory.release(kept, 256);
  memory.release_all();
  CHECK(memory.workspace_bytes() == 0);
  CHECK(memory.stats().cached_bytes == 0);
  CHECK(source.taken == 4096 + 512);  // what is live
}

TEST_CASE("neighbours of two streams stay two pieces") {
  FakeDevice source;
  CachingAllocator memory(source);
  source.current = &source.a;
  memory.release(memory.allocate(2048), 2048);
  void *const low = memory.allocate(1024), *const high = memory.allocate(1024);
  CHECK(source.taken == 2048);
  memory.release(low, 1024);
  memory.hand_over(&source.a, &source.b, false);  // what is free
  memory.release(high, 1024);
  CHECK(memory.allocate(1024) == high);
  memory.release(high, 1024);
  source.current = &source.b;
  CHECK(memory.allocate(2048) != low);
  CHECK(memory.allocate(1024) == low);
  CHECK(source.waits.empty());
}

TEST_CASE("a pool's piece is not joined with everybody's before the pool is dropped") {
  FakeDevice source;
  CachingAllocator memory(source);
  source.current = &source.a;
  void* const all = memory.allocate(2048);
  memory.release(all, 2048);
  memory.begin_pool();
  CHECK(memory.allocate(1024) == all);
  memory.release(all, 1024);
  CachingAllocator::Pool* const pool = memory.end_pool();
  void *const other = memory.allocate(2048), *const rest = memory.allocate(1024);
  CHECK(other != all);
  CHECK(rest == static_cast<char*>(all) + 1024);
  memory.release(other, 2048);
  memory.release(rest, 1024);
  source.current = nullptr;
  memory.drop_pool(pool);
  CHECK(memory.allocate(1024) == all);  // the nameless stream's, whose it becomes
  memory.release(all, 1024);
  memory.hand_over(&source.a, nullptr, true);
  void *const one = memory.allocate(2048), *const two = memory.allocate(2048);
  CHECK((one == all || two == all));  // whole again
}

TEST_CASE("without room the cache goes back and the source is asked once more; then the error says what there is") {
  FakeDevice source;
  source.limit = 8192;
  CachingAllocator memory(source);
  void* const cached = memory.allocate(4096);
  void* const live = memory.allocate(2048);
  memory.release(cached, 4096);
  void* const larger = memory.allocate(5120);
  CHECK(memory.stats().cached_bytes == 0);
  memory.release(live, 2048);
  const std::string text = error_of([&] { memory.allocate(6144); });
  CHECK(text ==
        "fake allocator: 6144 bytes asked (0.0 MiB), the system has no room, 5120 bytes are in use (0.0 MiB) and 0 "
        "cached, after 2048 cached bytes were given back; 3072 are free");
  memory.release(larger, 5120);
  memory.release_all();
  CHECK(source.taken == 0);
}

namespace {

// A thousand blocks come and go on three streams; each keeps what was written into it.
void walk(CachingAllocator& memory, FakeDevice* streams) {
  struct Block {
    unsigned char* p;
    std::size_t bytes;
    unsigned char value;
  };
  std::mt19937 draw(7);
  std::vector<Block> live;
  std::int64_t bytes = 0;
  int damaged = 0;
  for (int i = 0; i < 5000; ++i) {
    if (streams) streams->current = std::array<void*, 3>{nullptr, &streams->a, &streams->b}[draw() % 3];
    if (live.size() < 40 || (live.size() < 400 && draw() % 2)) {
      const std::size_t size = draw() % (draw() % 4 ? 3000 : 300000);
      auto* p = static_cast<unsigned char*>(memory.allocate(size));
      const auto value = static_cast<unsigned char>(draw());
      std::memset(p, value, size);
      live.push_back({p, size, value});
      bytes += static_cast<std::int64_t>(rounded_bytes(size));
    } else {
      std::swap(live[draw() % live.size()], live.back());
      const Block b = live.back();
      live.pop_back();
      if (!std::all_of(b.p, b.p + b.bytes, [&](unsigned char v) { return v == b.value; })) ++damaged;
      memory.release(b.p, b.bytes);
      bytes -= static_cast<std::int64_t>(rounded_bytes(b.bytes));
    }
    if (i % 1000 == 999) memory.release_all();
    if (memory.stats().live_bytes != bytes) ++damaged;
  }
  for (const Block& b : live) memory.release(b.p, b.bytes);
  CHECK(damaged == 0);
  CHECK(memory.stats().live_bytes == 0);
}

bool resident(const void* p) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  unsigned char yes = 0;
  ::mincore(reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(p) / page * page), page, &yes);
  return yes & 1;
}

}  // namespace

TEST_CASE("no two blocks in use share a byte: pieces of single segments, of larger ones, of one stretch of addresses") {
  constexpr std::size_t kRoom = 256 << 20;
  struct Segments final : FakeDevice {  // that touch, and are not one for that
    std::size_t segment(std::size_t bytes) const override { return (bytes + 65535) / 65536 * 65536; }
    std::size_t alignment() const override { return 256; }
    void* take(std::size_t bytes) override {
      void* const p = std::exchange(next, next + bytes);
      REQUIRE(next <= room + kRoom);
      size[p] = bytes;
      taken += bytes;
      return p;
    }
    void give_back(void* p, std::size_t bytes) override {
      CHECK(bytes == size.at(p));
      taken -= bytes;
      size.erase(p);
    }
    ~Segments() override {
      size.clear();
      std::free(room);
    }
    char *room = static_cast<char*>(std::aligned_alloc(256, kRoom)), *next = room;
  } segments;
  FakeDevice single;
  for (FakeDevice* source : {&single, static_cast<FakeDevice*>(&segments)}) {
    CachingAllocator memory(*source);
    walk(memory, source);
    for (void* stream : {static_cast<void*>(&source->a), static_cast<void*>(&source->b)})
      memory.hand_over(stream, nullptr, true);
    memory.release_all();
    CHECK(memory.stats().cached_bytes == 0);
    CHECK(source->taken == 0);
    CHECK(source->marks == 0);
  }
  AddressSpace addresses(std::size_t{1} << 30);
  CachingAllocator memory(addresses);
  walk(memory, nullptr);
  const std::int64_t peak = memory.stats().peak_bytes;
  CHECK(memory.stats().cached_bytes < peak + peak / 4);  // what is free is mostly one piece
  memory.release_all();
  CHECK(memory.stats().cached_bytes == 0);
}

// ---------------------------------------------------------------- the CPU's addresses

TEST_CASE("addresses: taken from below, given back in parts, taken again where they lay") {
  AddressSpace space(64 << 20);
  constexpr std::size_t kMiB = 1 << 20;
  auto* const a = static_cast<char*>(space.take(kMiB));
  auto* const b = static_cast<char*>(space.take(2 * kMiB));
  CHECK(reinterpret_cast<std::uintptr_t>(a) % 64 == 0);
  CHECK(b == a + kMiB);
  CHECK_FALSE(space.extend(b, kMiB));  // not at the end
  CHECK(space.extend(b + 2 * kMiB, kMiB));
  std::memset(a, 1, 4 * kMiB);
  CHECK(resident(b + kMiB));
  space.give_back(b, kMiB);
  CHECK_FALSE(resident(b + kMiB / 2));
  CHECK(resident(b + kMiB));
  CHECK(*(b + kMiB) == 1);
  CHECK(space.take(kMiB / 2) == b);  // the hole
  CHECK(space.take(kMiB) == b + 3 * kMiB);  // too large for it
  space.give_back(b + 3 * kMiB, kMiB);
  space.give_back(b + kMiB, 2 * kMiB);
  CHECK(space.take(3 * kMiB) == b + kMiB / 2);  // hole and end are one
}

TEST_CASE("addresses: no more than the machine has, however they lie") {
  AddressSpace space(8 << 20);
  void* const half = space.take(4 << 20);
  CHECK(space.take(5 << 20) == nullptr);
  CHECK_FALSE(space.extend(static_cast<char*>(half) + (4 << 20), 5 << 20));
  void* const rest = space.take(4 << 20);
  CHECK(rest != nullptr);
  CHECK(space.take(64) == nullptr);
  space.give_back(half, 4 << 20);
  CHECK(space.take(4 << 20) == half);
}
