#include <capo/engine/cpu_memory.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

namespace capo {
namespace {

constexpr std::size_t kHugePage = 2 << 20, kLeastStretch = 64 << 20;

char* round_up(char* p, std::size_t to) {
  return reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(p) + to - 1) / to * to);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
class SanitizedHeap final : public MemorySource {
 public:
  const char* name() const override { return "cpu"; }
  void* take(std::size_t bytes) override { return std::aligned_alloc(64, bytes); }
  void give_back(void* p, std::size_t) override { std::free(p); }
};
#endif

}  // namespace

AddressSpace::~AddressSpace() {
  for (const Stretch& s : stretches_) ::munmap(s.begin, static_cast<std::size_t>(s.end - s.begin));
}

// A new stretch that holds `bytes`; half as much as wished for while the system refuses.
bool AddressSpace::reserve(std::size_t bytes) {
  const std::size_t least = std::max(bytes, kLeastStretch) + kHugePage;
  for (std::size_t size = std::max(2 * most_, least);; size = std::max(size / 2, least)) {
    void* const p = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      if (size == least) return false;
      continue;
    }
    stretches_.push_back({static_cast<char*>(p), static_cast<char*>(p) + size});
    if (top_ != end_) holes_.emplace(top_, static_cast<std::size_t>(end_ - top_));
    top_ = round_up(stretches_.back().begin, kHugePage);
    end_ = stretches_.back().end;
#ifdef MADV_HUGEPAGE
    ::madvise(p, size, MADV_HUGEPAGE);  // a wish: nothing depends on it
#endif
    return true;
  }
}

void* AddressSpace::take(std::size_t bytes) {
  if (bytes > most_ - used_) return nullptr;
  auto best = holes_.end();
  for (auto it = holes_.begin(); it != holes_.end(); ++it)
    if (it->second >= bytes && (best == holes_.end() || it->second < best->second)) best = it;
  if (best != holes_.end()) {
    const auto [p, size] = *best;
    holes_.erase(best);
    if (size > bytes) holes_.emplace(p + bytes, size - bytes);
    used_ += bytes;
    return p;
  }
  if (bytes > static_cast<std::size_t>(end_ - top_) && !reserve(bytes)) return nullptr;
  used_ += bytes;
  return std::exchange(top_, top_ + bytes);
}

bool AddressSpace::extend(void* end, std::size_t bytes) {
  if (end != top_ || bytes > most_ - used_ || bytes > static_cast<std::size_t>(end_ - top_)) return false;
  top_ += bytes;
  used_ += bytes;
  return true;
}

void AddressSpace::give_back(void* p, std::size_t bytes) {
  used_ -= bytes;
  auto at = holes_.emplace(static_cast<char*>(p), bytes).first;
  if (at != holes_.begin())
    if (const auto before = std::prev(at); before->first + before->second == at->first) {
      before->second += at->second;
      holes_.erase(at);
      at = before;
    }
  if (const auto next = std::next(at); next != holes_.end() && at->first + at->second == next->first) {
    at->second += next->second;
    holes_.erase(next);
  }
  // Whole pages: those at its ends go with it where the other part of them was given back before.
  static const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  char* const end = at->first + at->second;
  char* from = round_up(static_cast<char*>(p) - page + 1, page);
  if (from < at->first) from += page;
  char* to = round_up(static_cast<char*>(p) + bytes, page);
  if (to > end) to -= page;
  if (from < to) ::madvise(from, static_cast<std::size_t>(to - from), MADV_DONTNEED);
  if (end != top_) return;
  top_ = at->first;
  holes_.erase(at);
}

// Immortal: tensors in static storage may outlive any destructor order.
MemorySource& cpu_memory() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  static auto* m = new SanitizedHeap;
#else
  static auto* m = [] {
    struct sysinfo machine{};
    ::sysinfo(&machine);
    return new AddressSpace((std::size_t{machine.totalram} + machine.totalswap) * machine.mem_unit);
  }();
#endif
  return *m;
}

}  // namespace capo
