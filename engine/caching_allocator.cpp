#include <capo/engine/caching_allocator.h>
#include <capo/engine/error.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <iterator>

namespace capo {
namespace {

std::atomic<MemoryNote> memory_note{nullptr};

std::string mib(std::int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / 1048576.0);
  return text;
}

}  // namespace

void set_memory_note(MemoryNote note) { memory_note.store(note); }

void fail_no_room(const MemorySource& source, std::size_t bytes, const MemoryStats& held, std::int64_t given_back) {
  std::string text = cat(source.name(), " allocator: ", bytes, " bytes asked (", mib(static_cast<std::int64_t>(bytes)),
                         "), the system has no room, ", held.live_bytes, " bytes are in use (", mib(held.live_bytes),
                         ") and ", held.cached_bytes, " cached");
  if (given_back > 0) text += cat(", after ", given_back, " cached bytes were given back");
  text += source.room();
  if (const MemoryNote note = memory_note.load()) note(text);
  throw OutOfMemory(text);
}

// free: for the pool's own use again. kept: released by others while it was open.
struct CachingAllocator::Pool {
  Free free;
  std::vector<Pieces::iterator> kept;
};

// The pool that the calling thread is to allocate from, or null.
CachingAllocator::Pool* CachingAllocator::pool_of_caller() const {
  return open_ && open_thread_ == std::this_thread::get_id() ? open_ : nullptr;
}

// What a block of these bytes takes of the source's memory.
std::size_t CachingAllocator::room_for(std::size_t bytes) const {
  const std::size_t a = source_.alignment();
  return (rounded_bytes(bytes) + a - 1) / a * a;
}

CachingAllocator::Free& CachingAllocator::home_of(const Piece& piece) {
  return piece.pool ? piece.pool->free : free_[piece.stream];
}

// The smallest free piece of at least this size, the lowest of several; pieces_.end() without one.
CachingAllocator::Pieces::iterator CachingAllocator::find(Free& from, std::size_t size, bool may_wait) {
  for (auto it = from.lower_bound({size, nullptr}); it != from.end(); ++it)
    if (const auto at = pieces_.find(it->second); may_wait || !at->second.mark) return at;
  return pieces_.end();
}

void CachingAllocator::forget(Pieces::iterator at) { home_of(at->second).erase({at->second.size, at->first}); }

// Puts a piece in use among the free ones, in one with its free neighbours.
CachingAllocator::Pieces::iterator CachingAllocator::free_piece(Pieces::iterator at) {
  const auto joins = [](const Pieces::iterator& low, const Pieces::iterator& high) {
    const Piece &a = low->second, &b = high->second;
    return a.free && b.free && !b.first && !a.mark && !b.mark && a.stream == b.stream && a.pool == b.pool &&
           low->first + a.size == high->first;
  };
  at->second.free = true;
  stats_.cached_bytes += static_cast<std::int64_t>(at->second.size);
  if (const auto next = std::next(at); next != pieces_.end() && joins(at, next)) {
    forget(next);
    at->second.size += next->second.size;
    pieces_.erase(next);
  }
  if (at != pieces_.begin())
    if (const auto before = std::prev(at); joins(before, at)) {
      forget(before);
      before->second.size += at->second.size;
      pieces_.erase(at);
      at = before;
    }
  home_of(at->second).emplace(at->second.size, at->first);
  return at;
}

// Takes `size` bytes of a free piece into use; the rest stays free.
CachingAllocator::Pieces::iterator CachingAllocator::claim(Pieces::iterator at, std::size_t size) {
  Piece& piece = at->second;
  forget(at);
  stats_.cached_bytes -= static_cast<std::int64_t>(piece.size);
  if (piece.mark) source_.wait_and_drop(piece.stream, std::exchange(piece.mark, nullptr));
  piece.free = false;
  if (piece.size > size) {
    Piece rest = piece;
    rest.size -= size;
    rest.first = false;
    piece.size = size;
    free_piece(pieces_.emplace_hint(std::next(at), at->first + size, rest));
  }
  return at;
}

// From the source; once more without the cache where it has no room, unless a graph is captured: then nothing may go
// back.
CachingAllocator::Pieces::iterator CachingAllocator::take(std::size_t bytes, std::size_t size, void* stream) {
  if (!pieces_.empty()) {  // what is free at the end of all may only have to grow
    const auto last = std::prev(pieces_.end());
    Piece& piece = last->second;
    if (piece.free && !piece.mark && !piece.pool && piece.stream == stream && piece.size < size &&
        source_.extend(last->first + piece.size, size - piece.size)) {
      forget(last);
      stats_.cached_bytes += static_cast<std::int64_t>(size - piece.size);
      piece.size = size;
      home_of(piece).emplace(size, last->first);
      return claim(last, size);
    }
  }
  std::size_t whole = source_.segment(size);
  void* p = source_.take(whole);
  if (!p && whole != size) p = source_.take(whole = size);
  if (!p) {
    const std::int64_t cached = stats_.cached_bytes;
    if (cached > 0 && !open_) {
      drop_cache();
      p = source_.take(size);
    }
    if (!p) fail_no_room(source_, bytes, stats_, cached - stats_.cached_bytes);
  }
  const auto at = pieces_.emplace(static_cast<char*>(p), Piece{whole, stream, nullptr, !source_.divisible()}).first;
  return claim(free_piece(at), size);
}

// A piece for use on `stream`: of the pool, of the cache, of the source.
CachingAllocator::Pieces::iterator CachingAllocator::obtain(std::size_t bytes, std::size_t size, void* stream,
                                                            Pool* pool) {
  auto at = pool ? find(pool->free, size, false) : pieces_.end();
  // What is captured cannot wait for what was not.
  if (at == pieces_.end()) at = find(free_[stream], size, !pool_of_caller());
  if (at == pieces_.end()) return take(bytes, size, stream);
  ++stats_.cache_hits;
  return claim(at, size);
}

void* CachingAllocator::allocate(std::size_t bytes) {
  void* const stream = source_.stream();
  const std::lock_guard lock(mutex_);
  Pool* const pool = pool_of_caller();
  const auto at = obtain(bytes, room_for(bytes), stream, pool);
  at->second.stream = stream;
  at->second.pool = pool;
  count_allocation(stats_, rounded_bytes(bytes));
  return at->first;
}

void CachingAllocator::release(void* p, std::size_t bytes) {
  void* const stream = source_.stream();
  const std::lock_guard lock(mutex_);
  stats_.live_bytes -= static_cast<std::int64_t>(rounded_bytes(bytes));
  const auto at = pieces_.find(static_cast<char*>(p));
  if (at->second.pool) {
    free_piece(at);
  } else if (Pool* const pool = pool_of_caller()) {
    pool->kept.push_back(at);
    stats_.cached_bytes += static_cast<std::int64_t>(at->second.size);
  } else {
    keep(at, stream);
  }
}

// Everybody's again; marked where it was used last on another stream than its own.
void CachingAllocator::keep(Pieces::iterator at, void* stream) {
  if (at->second.stream != stream) at->second.mark = source_.mark(stream);
  const auto newest = free_piece(at);
  if (!open_) shrink(newest);
}

// Whether a free piece may go back to the source.
bool CachingAllocator::whole(Pieces::const_iterator at) const {
  if (source_.divisible()) return true;
  const auto next = std::next(at);
  return at->second.first && (next == pieces_.end() || next->second.first);
}

bool CachingAllocator::give_back(Pieces::iterator at) {
  if (!whole(at)) return false;
  const Piece& piece = at->second;
  if (piece.mark) source_.wait_and_drop(piece.stream, piece.mark);
  forget(at);
  stats_.cached_bytes -= static_cast<std::int64_t>(piece.size);
  source_.give_back(at->first, piece.size);
  pieces_.erase(at);
  return true;
}

// A program that goes on to other shapes would otherwise keep what the first ones needed for good.
void CachingAllocator::shrink(Pieces::iterator newest) {
  const std::int64_t most = 2 * stats_.peak_bytes + (64 << 20);
  if (stats_.cached_bytes <= most) return;
  std::vector<std::pair<std::size_t, Pieces::iterator>> others;
  for (auto at = pieces_.begin(); at != pieces_.end(); ++at)
    if (at != newest && at->second.free && !at->second.pool && whole(at)) others.emplace_back(at->second.size, at);
  std::sort(others.begin(), others.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (const auto& [size, at] : others)
    if (stats_.cached_bytes > most) give_back(at);
  if (stats_.cached_bytes > most) give_back(newest);
}

void CachingAllocator::drop_cache() {
  std::vector<Pieces::iterator> marked;  // apart from their neighbours until now
  for (auto at = pieces_.begin(); at != pieces_.end(); ++at)
    if (at->second.mark) marked.push_back(at);
  for (const auto at : marked) free_piece(claim(at, at->second.size));
  for (auto at = pieces_.begin(); at != pieces_.end();) {
    const auto next = std::next(at);
    if (at->second.free && !at->second.pool) give_back(at);
    at = next;
  }
}

// A workspace that its stream no longer needs.
void CachingAllocator::retire(const Scratch& s) {
  if (pools_ > 0) return retired_.push_back(s), void();
  scratch_bytes_ -= static_cast<std::int64_t>(s.bytes);
  const auto at = pieces_.find(static_cast<char*>(s.p));
  keep(at, at->second.stream);
}

void* CachingAllocator::workspace(void* stream, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  Scratch& s = scratch_[stream];
  if (s.bytes >= bytes) return s.p;
  const std::size_t size = room_for(bytes);
  void* const p = obtain(bytes, size, stream, nullptr)->first;
  if (s.p) retire(s);
  s = {p, size};
  scratch_bytes_ += static_cast<std::int64_t>(size);
  return p;
}

std::int64_t CachingAllocator::workspace_bytes() const {
  const std::lock_guard lock(mutex_);
  return scratch_bytes_;
}

void CachingAllocator::hand_over(void* from, void* to, bool live) {
  if (from == to) return;
  const std::lock_guard lock(mutex_);
  // What everybody may have: taken out of its set before its owner changes, joined with its new neighbours after.
  std::vector<Pieces::iterator> freed;
  for (auto at = pieces_.begin(); at != pieces_.end(); ++at)
    if (at->second.stream == from && at->second.free && !at->second.pool) freed.push_back(at);
  for (const auto at : freed) {
    forget(at);
    at->second.stream = to;
    at->second.free = false;
  }
  for (const auto at : freed) {
    stats_.cached_bytes -= static_cast<std::int64_t>(at->second.size);
    free_piece(at);
  }
  free_.erase(from);
  if (!live) return;
  for (auto& [p, piece] : pieces_)  // what is in use and what pools hold
    if (piece.stream == from) piece.stream = to;
  if (const auto it = scratch_.find(from); it != scratch_.end()) {
    retire(it->second);
    scratch_.erase(it);
  }
}

void CachingAllocator::begin_pool() {
  const std::lock_guard lock(mutex_);
  CAPO_CHECK(!open_, source_.name(), " allocator: a graph is being captured already");
  open_ = new Pool;
  ++pools_;
  open_thread_ = std::this_thread::get_id();
}

CachingAllocator::Pool* CachingAllocator::end_pool() {
  const std::lock_guard lock(mutex_);
  return std::exchange(open_, nullptr);
}

// The work may still run on the caller's stream.
void CachingAllocator::drop_pool(Pool* pool) {
  void* const stream = source_.stream();
  const std::lock_guard lock(mutex_);
  std::vector<Pieces::iterator> returned = std::move(pool->kept);
  for (auto at = pieces_.begin(); at != pieces_.end(); ++at) {
    Piece& piece = at->second;
    if (piece.pool != pool) continue;
    piece.pool = nullptr;
    if (!std::exchange(piece.free, false)) continue;
    piece.stream = nullptr;
    returned.push_back(at);
  }
  delete pool;
  for (const auto at : returned) stats_.cached_bytes -= static_cast<std::int64_t>(at->second.size);
  for (const auto at : returned) keep(at, stream);
  if (--pools_ > 0) return;
  for (const Scratch& s : std::exchange(retired_, {})) retire(s);
}

MemoryStats CachingAllocator::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void CachingAllocator::reset_peak() {
  const std::lock_guard lock(mutex_);
  stats_.peak_bytes = stats_.live_bytes;
}

void CachingAllocator::release_all() {
  const std::lock_guard lock(mutex_);
  if (pools_ == 0)
    for (const auto& [stream, s] : std::exchange(scratch_, {})) retire(s);
  drop_cache();
}

void* PlainAllocator::allocate(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  void* p = source_.take(bytes > 0 ? bytes : 1);
  if (!p) fail_no_room(source_, bytes, stats_);
  count_allocation(stats_, rounded_bytes(bytes));
  return p;
}

void PlainAllocator::release(void* p, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  stats_.live_bytes -= static_cast<std::int64_t>(rounded_bytes(bytes));
  source_.give_back(p, bytes > 0 ? bytes : 1);
}

MemoryStats PlainAllocator::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void PlainAllocator::reset_peak() {
  const std::lock_guard lock(mutex_);
  stats_.peak_bytes = stats_.live_bytes;
}

}  // namespace capo
