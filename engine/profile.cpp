// Recording: each thread has a log of its own, so that threads meet only when a profile is read.
#include <capo/engine/profile_session_internal.h>

#include <capo/engine/backend.h>
#include <capo/engine/error.h>

#include <chrono>
#include <utility>

namespace capo {

using detail::profile_clock;
using Session = Profile::Session;

namespace detail {
Atomic<int> profiles_running{0};
}

namespace {

// The session that runs, or ran last: immortal, since a detached thread may still look at exit.
std::mutex& current_mutex() {
  static auto* m = new std::mutex;
  return *m;
}
std::shared_ptr<Session>& current_slot() {
  static auto* s = new std::shared_ptr<Session>;
  return *s;
}
Atomic<std::uint64_t> current_number{0};

struct Mine {
  std::uint64_t number = 0;
  std::shared_ptr<Session> session;
  std::shared_ptr<ThreadLog> log;
};
thread_local Mine mine;

// This thread's log in the session that runs.
ThreadLog& my_log() {
  if (mine.number != current_number.load()) {
    const std::lock_guard lock(current_mutex());
    mine.number = current_number.load();
    mine.session = current_slot();
    mine.log = mine.session->new_log();
  }
  return *mine.log;
}

std::int64_t milliseconds_to_ns(double ms) { return static_cast<std::int64_t>(ms * 1e6); }

// Reads the clocks of finished launches on a device and gives their marks back.
void resolve(Session& session, ThreadLog& log, std::size_t up_to) {
  for (std::size_t i = 0; i < up_to; ++i) {
    DeviceLaunch& g = log.device_launches[i];
    DeviceBackend& b = *backend();
    const std::int64_t took = milliseconds_to_ns(b.milliseconds(g.index, g.before, g.after));
    if (g.row) g.row->seconds += 1e-9 * static_cast<double>(took);
    if (g.slice < log.slices.size()) {
      Slice& s = log.slices[g.slice];
      s.start = session.device_time(g.index, g.before, s.start);
      s.end = s.start + took;
    }
    b.drop_clock_mark(g.index, g.before);
    b.drop_clock_mark(g.index, g.after);
  }
  log.device_launches.erase(log.device_launches.begin(),
                            log.device_launches.begin() + static_cast<std::ptrdiff_t>(up_to));
  log.unnamed_device_launches = 0;
}

// What the log has not yet given to an op belongs to `op`. The log is locked.
void claim(Session& session, ThreadLog& log, const char* op, std::uint32_t module) {
  Unclaimed& p = log.pending;
  if (p.launches == 0 && p.allocations == 0) return;
  const bool in_node = log.node_op != nullptr;
  ProfileRow& row = log.rows[{in_node ? log.node_op : op, in_node ? log.node_module : module, log.backward > 0}];
  row.launches += p.launches;
  if (!in_node && p.launches > 0) ++row.calls;
  log.node_launched = log.node_launched || p.launches > 0;
  row.seconds += 1e-9 * static_cast<double>(p.time);
  row.thread_seconds += 1e-9 * static_cast<double>(p.thread_time);
  if (p.flops >= 0) row.flops = (row.flops < 0 ? 0 : row.flops) + static_cast<double>(p.flops);
  if (p.bytes >= 0) row.bytes = (row.bytes < 0 ? 0 : row.bytes) + static_cast<double>(p.bytes);
  log.silent[&row] = log.silent[&row] || p.silent;
  row.allocations += p.allocations;
  row.allocated_bytes += p.allocated_bytes;
  for (std::size_t i = p.first_slice; i < log.slices.size(); ++i)
    if (Slice& s = log.slices[i]; s.kind == Slice::launch && !s.name) {
      s.name = op;
      s.module = row_module(log, module);
    }
  for (std::size_t i = log.device_launches.size() - log.unnamed_device_launches; i < log.device_launches.size(); ++i)
    log.device_launches[i].row = &row;
  log.unnamed_device_launches = 0;
  p = Unclaimed{};
  p.first_slice = log.slices.size();
  if (log.device_launches.size() > 2048) resolve(session, log, log.device_launches.size());
}

}  // namespace

std::uint32_t row_module(const ThreadLog& log, std::uint32_t module) { return log.node_op ? log.node_module : module; }

std::shared_ptr<ThreadLog> Session::new_log() {  // current_mutex is held
  const std::lock_guard lock(mutex);
  logs.push_back(std::make_shared<ThreadLog>());
  logs.back()->number = static_cast<int>(logs.size());
  return logs.back();
}

std::uint32_t Session::intern(const std::string& text) {
  const std::lock_guard lock(mutex);
  const auto [it, fresh] = ids.try_emplace(text, static_cast<std::uint32_t>(texts.size()));
  if (fresh) texts.push_back(text);
  return it->second;
}

// A device's clock is set at its first launch: right when it is idle then.
void Session::set_clock(int index, void* stream) {
  const std::lock_guard lock(mutex);
  if (bases.count(index)) return;
  void* const mark = backend()->clock_mark(index, stream);
  bases[index] = {mark, profile_clock()};
}

std::int64_t Session::device_time(int index, void* mark, std::int64_t otherwise) {
  const std::lock_guard lock(mutex);
  const auto it = bases.find(index);
  if (it == bases.end()) return otherwise;
  return it->second.host + milliseconds_to_ns(backend()->milliseconds(index, it->second.mark, mark));
}

Profile::Profile(ProfileOptions options) : session_(std::make_shared<Session>()) {
  session_->options = options;
  session_->intern("");
}

Profile::~Profile() {
  try {
    stop();
  } catch (const Error&) {  // a device failed; who uses it next hears of it
  }
}

bool Profile::running() const { return session_->running; }

void Profile::start() {
  const std::lock_guard lock(current_mutex());
  CAPO_CHECK(detail::profiles_running.load() == 0, "profile: one runs already");
  if (current_slot() != session_) {
    current_slot() = session_;
    current_number.add(1);
  }
  session_->running = true;
  session_->started = profile_clock();
  detail::profiles_running.store(1);
}

void Profile::stop() {
  if (!session_->running) return;
  const std::int64_t now = profile_clock();
  Session& s = *session_;
  {
    const std::lock_guard lock(current_mutex());
    detail::profiles_running.store(0);
    s.running = false;
    s.seconds += 1e-9 * static_cast<double>(now - s.started);
  }
  std::vector<std::shared_ptr<ThreadLog>> logs;
  {
    const std::lock_guard lock(s.mutex);
    logs = s.logs;
  }
  for (const auto& log : logs) {
    const std::lock_guard lock(log->mutex);
    if (log->pending.launches > 0) claim(s, *log, log->pending.kernel, 0);
    resolve(s, *log, log->device_launches.size());
    log->modules.clear();
    log->backward = 0;
    log->node_op = nullptr;
  }
  for (auto& [index, base] : s.bases) backend()->drop_clock_mark(index, base.mark);
  s.bases.clear();
}

double Profile::seconds() const { return session_->seconds; }

namespace {

void add_slice(const Slice& slice) {
  ThreadLog& log = my_log();
  const std::lock_guard lock(log.mutex);
  log.add(slice, mine.session->options.slices);
}

// The live bytes of a device, when they changed. The log is locked.
void sample_memory(ThreadLog& log, Device device) {
  const std::int64_t live = allocator(device).stats().live_bytes;
  if (log.live_bytes == live && log.live_device == device) return;
  log.live_bytes = live;
  log.live_device = device;
  Slice s;
  s.kind = Slice::memory;
  s.device = device;
  s.start = s.end = profile_clock();
  s.amount = live;
  log.add(s, mine.session->options.slices);
}

}  // namespace

namespace detail {

std::int64_t profile_clock() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
             .count() |
         1;
}

TimedLaunch::TimedLaunch(const char* kernel, Device device, Work work, void* stream)
    : kernel_(kernel),
      device_(device),
      work_(work),
      stream_(stream),
      captured_(capturing_graph()),
      thread_(nullptr),
      number_(0),
      start_(0) {
  if (captured_) return;
  ThreadLog& log = my_log();
  thread_ = &log;
  number_ = mine.session->next_launch();
  {
    const std::lock_guard lock(log.mutex);
    sample_memory(log, device);
  }
  if (device.is_cuda()) {
    mine.session->set_clock(device.index, stream);
    before_ = backend_for(device).clock_mark(device.index, stream);
  }
  start_ = profile_clock();
}

TimedLaunch::~TimedLaunch() {
  if (captured_) return;
  const std::int64_t end = profile_clock();
  ThreadLog& log = my_log();
  const std::lock_guard lock(log.mutex);
  Unclaimed& p = log.pending;
  if (p.launches++ == 0) p.kernel = kernel_;
  if (work_.flops >= 0) p.flops = (p.flops < 0 ? 0 : p.flops) + work_.flops;
  if (work_.bytes >= 0) p.bytes = (p.bytes < 0 ? 0 : p.bytes) + work_.bytes;
  p.silent = p.silent || (work_.flops < 0 && work_.bytes < 0);
  Slice s;
  s.kind = Slice::launch;
  s.kernel = kernel_;
  s.device = device_;
  s.backward = log.backward > 0;
  s.start = start_;
  s.end = end;
  s.work = work_;
  s.amount = number_;
  const bool kept = log.add(s, mine.session->options.slices);
  if (!before_) {
    p.time += end - start_;
    p.thread_time += thread_time_.load();
    return;
  }
  void* after = nullptr;
  try {
    after = backend()->clock_mark(device_.index, stream_);
  } catch (const Error&) {  // the launch failed as well: its error is on the way
    backend()->drop_clock_mark(device_.index, before_);
    return;
  }
  log.device_launches.push_back({device_.index, before_, after, kept ? log.slices.size() - 1 : SIZE_MAX, nullptr});
  ++log.unnamed_device_launches;
}

TimedChunk::~TimedChunk() {
  const std::int64_t end = profile_clock();
  launch_.thread_time_.add(end - start_);
  ThreadLog& log = my_log();
  if (&log == launch_.thread_) return;  // stands as the launch itself
  const std::lock_guard lock(log.mutex);
  if (!log.slices.empty() && log.slices.back().kind == Slice::part && log.slices.back().amount == launch_.number_) {
    log.slices.back().end = end;
    return;
  }
  Slice s;
  s.kind = Slice::part;
  s.kernel = launch_.kernel_;
  s.start = start_;
  s.end = end;
  s.amount = launch_.number_;
  log.add(s, mine.session->options.slices);
}

void name_launches(const char* op, const std::string& module) {
  ThreadLog& log = my_log();
  const std::lock_guard lock(log.mutex);
  if (log.pending.launches == 0 && log.pending.allocations == 0) return;
  claim(*mine.session, log, op, mine.session->intern(module));
}

void count_allocation(Device device, std::size_t bytes) {
  if (device.is_meta()) return;
  ThreadLog& log = my_log();
  const std::lock_guard lock(log.mutex);
  ++log.pending.allocations;
  log.pending.allocated_bytes += static_cast<std::int64_t>(rounded_bytes(bytes));
}

void remember_node(std::uint64_t sequence, const std::string& module) {
  my_log();
  Session& s = *mine.session;
  const std::uint32_t id = s.intern(module);
  const std::lock_guard lock(s.mutex);
  s.nodes[sequence] = id;
}

void begin_module(const std::string& path) {
  ThreadLog& log = my_log();
  const std::uint32_t module = mine.session->intern(path);
  const std::lock_guard lock(log.mutex);
  log.modules.push_back({module, profile_clock()});
}

void end_module() {
  ThreadLog& log = my_log();
  const std::lock_guard lock(log.mutex);
  if (log.modules.empty()) return;
  Slice s;
  s.kind = Slice::module_scope;
  s.module = log.modules.back().first;
  s.start = log.modules.back().second;
  s.end = profile_clock();
  log.modules.pop_back();
  log.add(s, mine.session->options.slices);
}

void TimedNode::begin(const char* op, std::uint64_t sequence) {
  ThreadLog& log = my_log();
  Session& session = *mine.session;
  {
    const std::lock_guard lock(session.mutex);
    if (const auto it = session.nodes.find(sequence); it != session.nodes.end()) {
      module_ = it->second;
      session.nodes.erase(it);
    }
  }
  const std::lock_guard lock(log.mutex);
  op_ = op;
  outer_op_ = std::exchange(log.node_op, op);
  outer_module_ = std::exchange(log.node_module, module_);
  outer_launched_ = std::exchange(log.node_launched, false);
  start_ = profile_clock();
}

void TimedNode::end() {
  ThreadLog& log = my_log();
  const std::lock_guard lock(log.mutex);
  if (log.node_op != op_) return;  // begun in another profile
  claim(*mine.session, log, op_, module_);
  if (log.node_launched) ++log.rows[{op_, module_, log.backward > 0}].calls;
  log.node_op = outer_op_;
  log.node_module = outer_module_;
  log.node_launched = outer_launched_;
  Slice s;
  s.kind = Slice::node;
  s.name = op_;
  s.module = module_;
  s.start = start_;
  s.end = profile_clock();
  log.add(s, mine.session->options.slices);
}

TimedBackward::TimedBackward() : start_(0) {
  if (!profiling()) return;
  ThreadLog& log = my_log();
  const std::lock_guard lock(log.mutex);
  ++log.backward;
  start_ = profile_clock();
}

TimedBackward::~TimedBackward() {
  if (!start_) return;
  ThreadLog& log = my_log();
  const std::lock_guard lock(log.mutex);
  if (log.backward == 0) return;  // begun in another profile
  --log.backward;
  Slice s;
  s.kind = Slice::scope;
  s.name = "backward";
  s.start = start_;
  s.end = profile_clock();
  log.add(s, mine.session->options.slices);
}

}  // namespace detail

ProfileScope::ProfileScope(const char* name) : name_(name), start_(detail::profiling() ? profile_clock() : 0) {}

ProfileScope::~ProfileScope() {
  if (!start_ || !detail::profiling()) return;
  Slice s;
  s.kind = Slice::scope;
  s.name = name_;
  s.start = start_;
  s.end = profile_clock();
  add_slice(s);
}

}  // namespace capo
