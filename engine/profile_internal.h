// How the library tells a running Profile what it does. Everything begins with profiling(): off, a relaxed load is all.
#pragma once

#include <capo/engine/atomic.h>
#include <capo/engine/device.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace capo {

// What one launch does; negative: it does not tell. Products, convolutions and attention count multiply-adds as two
// operations, all others the bytes of their inputs and outputs, once each.
struct Work {
  std::int64_t flops = -1, bytes = -1;
  static Work computed(std::int64_t flops) { return {flops, -1}; }
  static Work moved(std::int64_t bytes) { return {-1, bytes}; }
};

namespace detail {

extern Atomic<int> profiles_running;
inline bool profiling() { return profiles_running.load() != 0; }
std::int64_t profile_clock();  // nanoseconds, never 0

// One launch while alive.
class TimedLaunch {
 public:
  TimedLaunch(const char* kernel, Device device, Work work, void* stream = nullptr);
  ~TimedLaunch();
  TimedLaunch(const TimedLaunch&) = delete;
  TimedLaunch& operator=(const TimedLaunch&) = delete;

 private:
  friend class TimedChunk;
  const char* kernel_;
  Device device_;
  Work work_;
  void *stream_, *before_ = nullptr;
  bool captured_;  // into a graph: it does not run now
  const void* thread_;
  std::int64_t number_, start_;
  Atomic<std::int64_t> thread_time_{0};
};

// A thread's part of it.
class TimedChunk {
 public:
  explicit TimedChunk(TimedLaunch& launch) : launch_(launch), start_(profile_clock()) {}
  ~TimedChunk();
  TimedChunk(const TimedChunk&) = delete;
  TimedChunk& operator=(const TimedChunk&) = delete;

 private:
  TimedLaunch& launch_;
  std::int64_t start_;
};

// What this thread launched and allocated since the last call is the work of `op` (a literal).
void name_launches(const char* op, const std::string& module);
void count_allocation(Device device, std::size_t bytes);
// In which module a node was made; its gradient is counted there.
void remember_node(std::uint64_t sequence, const std::string& module);
// A module runs. One that began before the profile did is not shown.
void begin_module(const std::string& path);
void end_module();

// A node's gradient while alive: what is launched meanwhile is its work.
class TimedNode {
 public:
  TimedNode(const char* op, std::uint64_t sequence) : on_(profiling()) {
    if (on_) begin(op, sequence);
  }
  ~TimedNode() {
    if (on_) end();
  }
  TimedNode(const TimedNode&) = delete;
  TimedNode& operator=(const TimedNode&) = delete;

 private:
  void begin(const char* op, std::uint64_t sequence);
  void end();
  bool on_;
  const char *op_ = nullptr, *outer_op_ = nullptr;
  std::uint32_t module_ = 0, outer_module_ = 0;
  bool outer_launched_ = false;
  std::int64_t start_ = 0;
};

// A backward pass while alive.
class TimedBackward {
 public:
  TimedBackward();
  ~TimedBackward();
  TimedBackward(const TimedBackward&) = delete;
  TimedBackward& operator=(const TimedBackward&) = delete;

 private:
  std::int64_t start_;
};

}  // namespace detail
}  // namespace capo
