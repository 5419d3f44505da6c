// Where a program's time goes: by op, by module, and as a trace that Perfetto shows. docs/profile.md reads one.
//
//   Profile profile;
//   profile.start();
//   ...                                      // some training steps
//   profile.stop();
//   std::puts(profile.table().c_str());
//   profile.write_trace("profile.json");     // open it at https://ui.perfetto.dev
//
// All threads are seen. Off, a launch costs one relaxed load more than without profiling. On, the CPU's kernels are
// timed by the clock around each launch; on CUDA events stand before and after it on its stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace capo {

// One line of the table. In backward, what a node's gradient launches counts as that node's op, fan-in sums as their
// own.
struct ProfileRow {
  std::string op;      // "linear", "adamw_"; empty in by_module()
  std::string module;  // with numbers as *: "blocks.*.attn.qkv"; empty in by_op()
  bool backward = false;
  std::int64_t calls = 0;  // of ops, or of nodes' gradients, that launched something
  std::int64_t launches = 0;
  double seconds = 0;         // of its launches
  double thread_seconds = 0;  // CPU: of all threads that took part
  double flops = -1;  // of products, convolutions and attention (an addition and a multiplication are 2); -1: none
  double bytes = -1;  // of the other launches: inputs and outputs, once each; -1: one of them does not tell
  std::int64_t allocations = 0, allocated_bytes = 0;
};

// The most that this machine does, measured on num_threads() threads: f32 multiply-adds in registers with the
// instruction set in use, and a copy between two buffers larger than caches (bytes read and written). Takes a quarter
// of a second once.
struct MachinePeaks {
  double flops = 0, bytes = 0;  // per second
};
MachinePeaks machine_peaks();

struct ProfileOptions {
  std::size_t slices = 1'000'000;  // of one thread in the trace; later ones count in the table only
};

class Profile {
 public:
  explicit Profile(ProfileOptions options = {});
  ~Profile();  // stops
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  // Throws when this or another profile runs. After stop() it may go on: results add up.
  void start();
  // Ends on the thread that called start(). Waits for the CUDA devices that worked meanwhile.
  void stop();
  bool running() const;
  double seconds() const;  // between start() and stop(), all together

  // When stopped. Most time first.
  std::vector<ProfileRow> by_op() const;
  std::vector<ProfileRow> by_module() const;
  // Both, with rates and their shares of machine_peaks() (not on CUDA, whose peaks are not measured), the part of the
  // time that no op accounts for.
  std::string table() const;
  // Chrome's trace events: per thread its scopes, modules and launches, nested; workers' parts of a launch; CUDA
  // streams; live bytes of each device. Replaces the file.
  void write_trace(const std::string& path) const;

  struct Session;

 private:
  std::shared_ptr<Session> session_;
};

// A slice of the trace while alive, on its thread: "step", "wait for data". Nothing when no profile runs. The name must
// live as long as the program (a literal).
class ProfileScope {
 public:
  explicit ProfileScope(const char* name);
  ~ProfileScope();
  ProfileScope(const ProfileScope&) = delete;
  ProfileScope& operator=(const ProfileScope&) = delete;

 private:
  const char* name_;
  std::int64_t start_;  // 0: off
};

}  // namespace capo
