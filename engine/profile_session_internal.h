// What a Profile has recorded: shared by profile.cpp, which writes it, and profile_report.cpp, which reads it.
#pragma once

#include <capo/engine/profile.h>
#include <capo/engine/profile_internal.h>

#include <map>
#include <mutex>
#include <tuple>
#include <unordered_map>

namespace capo {

// A part of the trace.
struct Slice {
  enum Kind : unsigned char { launch, part, scope, module_scope, node, memory } kind = launch;
  bool backward = false;
  Device device = kCpu;
  std::uint32_t module = 0;    // in Session::texts
  const char* name = nullptr;  // op or scope
  const char* kernel = nullptr;
  std::int64_t start = 0, end = 0;  // nanoseconds of profile_clock()
  std::int64_t amount = 0;          // launch, part: its number; memory: live bytes
  Work work = {};
};

// Launches and allocations that no op has claimed yet.
struct Unclaimed {
  const char* kernel = nullptr;
  std::int64_t launches = 0, time = 0, thread_time = 0, flops = -1, bytes = -1, allocations = 0, allocated_bytes = 0;
  bool silent = false;  // one does not tell what it did
  std::size_t first_slice = 0;
};

struct DeviceLaunch {
  int index;
  void *before, *after;  // marks
  std::size_t slice;
  ProfileRow* row;
};

struct ThreadLog {
  std::mutex mutex;
  int number = 0;
  std::vector<Slice> slices;
  std::size_t left_out = 0;
  std::map<std::tuple<const char*, std::uint32_t, bool>, ProfileRow> rows;  // op, module, backward; without texts
  std::map<const ProfileRow*, bool> silent;
  Unclaimed pending;
  std::vector<DeviceLaunch> device_launches;  // whose times are not read yet
  std::size_t unnamed_device_launches = 0;    // the last of them
  const char* node_op = nullptr;              // the gradient that runs
  std::uint32_t node_module = 0;
  bool node_launched = false;
  int backward = 0;                                             // passes that run, one inside another
  std::vector<std::pair<std::uint32_t, std::int64_t>> modules;  // that run, with their starts
  std::int64_t live_bytes = -1;
  Device live_device = kCpu;

  bool add(const Slice& s, std::size_t most) {
    if (slices.size() >= most) {
      ++left_out;
      return false;
    }
    slices.push_back(s);
    return true;
  }
};
std::uint32_t row_module(const ThreadLog& log, std::uint32_t module);

struct Profile::Session {
  struct Base {
    void* mark;
    std::int64_t host;
  };

  ProfileOptions options;
  bool running = false;
  double seconds = 0;
  std::int64_t started = 0;
  std::mutex mutex;  // of what follows
  std::vector<std::shared_ptr<ThreadLog>> logs;
  std::unordered_map<std::string, std::uint32_t> ids;
  std::vector<std::string> texts;
  std::unordered_map<std::uint64_t, std::uint32_t> nodes;  // modules of nodes
  std::map<int, Base> bases;                               // of device clocks
  std::int64_t launches = 0;

  std::shared_ptr<ThreadLog> new_log();
  std::uint32_t intern(const std::string& text);
  std::int64_t next_launch() {
    const std::lock_guard lock(mutex);
    return ++launches;
  }
  void set_clock(int index, void* stream);
  std::int64_t device_time(int index, void* mark, std::int64_t otherwise);
};

}  // namespace capo
