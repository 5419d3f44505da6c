// The order of copies that run beside the kernels, on the host: a copy waits as long as the rules allow, so that
// whoever reads its result without waiting for it finds what was there before (NaN in a fresh block), and whoever
// changes its source too early spoils it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>

namespace capo::shim {

class Streams {
 public:
  struct Mark {
    void* stream;
    std::uint64_t number;  // of copies that the stream had been given
  };

  void copy(void* stream, void* dst, const void* src, std::size_t bytes);
  Mark mark(void* stream);
  void run(const Mark& mark);  // what stands before it
  void run_all(void* stream);
  void run_all();
  void run_into(const void* p, std::size_t bytes);  // streams that will write there
  std::size_t waiting();

 private:
  struct Copy {
    void* dst;
    const void* src;
    std::size_t bytes;
  };
  struct Queue {
    std::deque<Copy> copies;
    std::uint64_t given = 0;
  };
  void run_until(Queue& queue, std::uint64_t number);

  std::mutex mutex_;
  std::map<void*, Queue> queues_;
};

}  // namespace capo::shim
