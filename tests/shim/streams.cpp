#include <capo/tests/shim/shim.hpp>
#include <capo/tests/shim/streams.h>

namespace capo::shim {

void Streams::copy(void* stream, void* dst, const void* src, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  Queue& q = queues_[stream];
  q.copies.push_back({dst, src, bytes});
  ++q.given;
}

Streams::Mark Streams::mark(void* stream) {
  const std::lock_guard lock(mutex_);
  return {stream, queues_[stream].given};
}

void Streams::run_until(Queue& q, std::uint64_t number) {
  while (q.given - q.copies.size() < number) {
    const Copy c = q.copies.front();
    q.copies.pop_front();
    std::memcpy(c.dst, c.src, c.bytes);
    mark_initialised(c.dst, c.bytes);
  }
}

void Streams::run(const Mark& mark) {
  const std::lock_guard lock(mutex_);
  run_until(queues_[mark.stream], mark.number);
}

void Streams::run_all(void* stream) { run(mark(stream)); }

void Streams::run_all() {
  const std::lock_guard lock(mutex_);
  for (auto& [stream, q] : queues_) run_until(q, q.given);
}

void Streams::run_into(const void* p, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto* const begin = static_cast<const char*>(p);
  for (auto& [stream, q] : queues_)
    for (const Copy& c : q.copies)
      if (static_cast<const char*>(c.dst) < begin + bytes && begin < static_cast<const char*>(c.dst) + c.bytes) {
        run_until(q, q.given);
        break;
      }
}

std::size_t Streams::waiting() {
  const std::lock_guard lock(mutex_);
  std::size_t n = 0;
  for (const auto& [stream, q] : queues_) n += q.copies.size();
  return n;
}

}  // namespace capo::shim
