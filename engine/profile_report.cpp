// Reading a profile: rows, the table, the trace.
#include <capo/engine/cpu.h>
#include <capo/engine/error.h>
#include <capo/engine/files.h>
#include <capo/engine/profile_session_internal.h>
#include <capo/engine/threads.h>

#include <algorithm>
#include <cstdio>

namespace capo {
namespace {

// "blocks.11.attn" -> "blocks.*.attn"
std::string with_stars(const std::string& path) {
  std::string out;
  for (std::size_t i = 0; i < path.size();) {
    const std::size_t end = std::min(path.find('.', i), path.size());
    const std::string part = path.substr(i, end - i);
    out += !part.empty() && part.find_first_not_of("0123456789") == part.npos ? "*" : part;
    if (end < path.size()) out += '.';
    i = end + 1;
  }
  return out;
}

void join(double& sum, double more) {
  if (more >= 0) sum = (sum < 0 ? 0 : sum) + more;
}

// What all threads recorded, by what `name` makes of (op, module).
template <class F>
std::vector<ProfileRow> merged(Profile::Session& s, F&& name) {
  std::map<std::tuple<std::string, std::string, bool>, ProfileRow> all;
  std::map<const ProfileRow*, bool> silent;
  for (const auto& log : s.logs) {
    const std::lock_guard lock(log->mutex);
    for (const auto& [key, row] : log->rows) {
      const auto& [op, module, backward] = key;
      ProfileRow named;
      named.backward = backward;
      name(named, op, s.texts[module]);
      ProfileRow& sum = all.try_emplace({named.op, named.module, backward}, named).first->second;
      sum.calls += row.calls;
      sum.launches += row.launches;
      sum.seconds += row.seconds;
      sum.thread_seconds += row.thread_seconds;
      join(sum.flops, row.flops);
      join(sum.bytes, row.bytes);
      sum.allocations += row.allocations;
      sum.allocated_bytes += row.allocated_bytes;
      const auto it = log->silent.find(&row);
      if (it != log->silent.end() && it->second) silent[&sum] = true;
    }
  }
  std::vector<ProfileRow> rows;
  for (auto& [key, row] : all) {
    if (silent.count(&row)) row.bytes = -1;
    if (row.launches > 0) rows.push_back(row);
  }
  std::stable_sort(rows.begin(), rows.end(),
                   [](const ProfileRow& a, const ProfileRow& b) { return a.seconds > b.seconds; });
  return rows;
}

template <class... Args>
std::string text(const char* format, Args... args) {
  char line[256];
  std::snprintf(line, sizeof line, format, args...);
  return line;
}

const char* pass_of(const ProfileRow& r) {
  if (r.backward) return "backward";
  return !r.op.empty() && r.op.back() == '_' ? "in place" : "forward";
}

// "123.4 GFLOP/s   56 %": of products' multiply-adds where there are any, else of bytes. Shares are left out without
// peaks.
std::string rates(const ProfileRow& r, const MachinePeaks& peaks, bool shares) {
  const bool computes = r.flops > 0;
  const double done = computes ? r.flops : r.bytes, most = computes ? peaks.flops : peaks.bytes;
  if (done <= 0 || r.seconds <= 0) return text("%9s %7s %8s", "", "", "");
  const double rate = done / r.seconds;
  std::string out = computes ? text("%9.1f %7s", rate * 1e-9, "") : text("%9s %7.1f", "", rate * 1e-9);
  return out + (shares ? text(" %6.0f %%", 100 * rate / most) : text(" %8s", ""));
}

std::string line_of(const ProfileRow& r, const std::string& name, double total, const MachinePeaks& peaks,
                    bool shares) {
  const double ms = 1e3 * r.seconds;
  std::string out =
      text("%-26.26s %-8s %7lld %10.2f %9.1f %5.1f %% ", name.c_str(), pass_of(r), static_cast<long long>(r.calls), ms,
           r.calls > 0 ? 1e3 * ms / static_cast<double>(r.calls) : 0.0, total > 0 ? 100 * r.seconds / total : 0.0);
  out += rates(r, peaks, shares);
  out += r.thread_seconds > 0 && r.seconds > 0 ? text(" %7.2f", r.thread_seconds / r.seconds) : text(" %7s", "");
  return out + text(" %7lld %9.1f\n", static_cast<long long>(r.allocations),
                    static_cast<double>(r.allocated_bytes) / 1048576.0);
}

const char* kHead = "%-26s %-8s %7s %10s %9s %7s %9s %7s %8s %7s %7s %9s\n";

std::string section(const char* first, const std::vector<ProfileRow>& rows, double total, const MachinePeaks& peaks,
                    bool shares) {
  std::string out = text(kHead, first, "pass", "calls", "total ms", "mean us", "share", "GFLOP/s", "GB/s", "of peak",
                         "threads", "allocs", "MiB");
  for (const ProfileRow& r : rows) {
    const std::string name = !r.op.empty() ? r.op : r.module.empty() ? "(no module)" : r.module;
    out += line_of(r, name, total, peaks, shares);
  }
  return out;
}

// ---- the trace

std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (const char c : s) {
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (u < 0x20) {
      out += text("\\u%04x", u);
    } else {
      out += c;
    }
  }
  return out + '"';
}

class TraceWriter {
 public:
  TraceWriter(const std::string& path, Profile::Session& s) : file_(path), session_(s) {}

  void write() {
    buffer_ = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
    name(kHost, 0, "process_name", "host");
    std::int64_t first = INT64_MAX;
    std::map<int, bool> devices;
    for (const auto& log : session_.logs)
      for (const Slice& s : log->slices) {
        first = std::min(first, s.start);
        if (s.device.is_cuda()) devices[s.device.index] = true;
      }
    first_ = first;
    for (const auto& [index, used] : devices) name(kDevice + index, 0, "process_name", cat("cuda:", index));
    for (const auto& log : session_.logs) {
      const std::lock_guard lock(log->mutex);
      thread(*log);
    }
    file_.write(buffer_ + "\n]}\n");
    file_.commit();
  }

 private:
  static constexpr int kHost = 1, kDevice = 10;

  void thread(const ThreadLog& log) {
    const bool worker = !log.slices.empty() && std::all_of(log.slices.begin(), log.slices.end(),
                                                           [](const Slice& s) { return s.kind == Slice::part; });
    name(kHost, log.number, "thread_name", cat(worker ? "worker " : "thread ", log.number));
    std::vector<const Slice*> slices;
    for (const Slice& s : log.slices) slices.push_back(&s);
    // Outer before inner, as viewers expect.
    std::stable_sort(slices.begin(), slices.end(), [](const Slice* a, const Slice* b) {
      return a->start != b->start ? a->start < b->start : a->end > b->end;
    });
    for (const Slice* s : slices) slice(*s, log.number);
    if (log.left_out > 0)
      put(text(R"({"ph":"i","pid":%d,"tid":%d,"ts":%.3f,"s":"t","name":"%zu more slices are left out"})", kHost,
               log.number, log.slices.empty() ? 0.0 : us(log.slices.back().end), log.left_out));
  }

  void slice(const Slice& s, int thread) {
    if (s.kind == Slice::memory) {
      put(text(R"({"ph":"C","pid":%d,"name":"live MiB, %s","ts":%.3f,"args":{"MiB":%.3f}})", kHost,
               to_string(s.device).c_str(), us(s.start), static_cast<double>(s.amount) / 1048576.0));
      return;
    }
    std::string out = text(R"({"ph":"X","pid":%d,"tid":%d,"ts":%.3f,"dur":%.3f,"name":)",
                           s.device.is_cuda() ? kDevice + s.device.index : kHost, thread, us(s.start),
                           static_cast<double>(s.end - s.start) * 1e-3);
    out += quoted(title(s)) + ",\"cat\":\"" + category(s) + "\"";
    put(out + arguments(s) + "}");
  }

  std::string title(const Slice& s) const {
    const std::string op = s.name ? s.name : s.kernel ? s.kernel : "";
    switch (s.kind) {
      case Slice::module_scope:
        return session_.texts[s.module].empty() ? "model" : session_.texts[s.module];
      case Slice::node:
        return op + " backward";
      case Slice::launch:
        return s.kernel && op != s.kernel ? cat(op, " (", s.kernel, ")") : op;
      default:
        return op;
    }
  }
  static const char* category(const Slice& s) {
    switch (s.kind) {
      case Slice::module_scope:
        return "module";
      case Slice::node:
        return "gradient";
      case Slice::launch:
        return s.backward ? "launch,backward" : "launch";
      case Slice::part:
        return "part";
      default:
        return "scope";
    }
  }
  std::string arguments(const Slice& s) const {
    std::string out;
    const auto add = [&](const std::string& field) { out += (out.empty() ? "" : ",") + field; };
    if (s.kind != Slice::module_scope && !session_.texts[s.module].empty())
      add("\"module\":" + quoted(session_.texts[s.module]));
    const double seconds = 1e-9 * static_cast<double>(s.end - s.start);
    if (s.work.flops >= 0 && seconds > 0)
      add(text(R"("GFLOP/s":%.2f)", 1e-9 * static_cast<double>(s.work.flops) / seconds));
    if (s.work.bytes >= 0 && seconds > 0)
      add(text(R"("GB/s":%.2f)", 1e-9 * static_cast<double>(s.work.bytes) / seconds));
    if (s.kind == Slice::launch || s.kind == Slice::part)
      add(text(R"("launch":%lld)", static_cast<long long>(s.amount)));
    return out.empty() ? "" : ",\"args\":{" + out + "}";
  }

  double us(std::int64_t t) const { return static_cast<double>(t - first_) * 1e-3; }
  void name(int pid, int tid, const char* what, const std::string& value) {
    put(text(R"({"ph":"M","pid":%d,"tid":%d,"name":"%s","args":{"name":)", pid, tid, what) + quoted(value) + "}}");
  }
  void put(const std::string& event) {
    if (any_) buffer_ += ",\n";
    any_ = true;
    buffer_ += event;
    if (buffer_.size() < (std::size_t{1} << 20)) return;
    file_.write(buffer_);
    buffer_.clear();
  }

  AtomicFile file_;
  Profile::Session& session_;
  std::string buffer_;
  std::int64_t first_ = 0;
  bool any_ = false;
};

}  // namespace

std::vector<ProfileRow> Profile::by_op() const {
  CAPO_CHECK(!running(), "profile: stop it before it is read");
  return merged(*session_, [](ProfileRow& r, const char* op, const std::string&) { r.op = op; });
}

std::vector<ProfileRow> Profile::by_module() const {
  CAPO_CHECK(!running(), "profile: stop it before it is read");
  return merged(*session_,
                [](ProfileRow& r, const char*, const std::string& module) { r.module = with_stars(module); });
}

std::string Profile::table() const {
  const std::vector<ProfileRow> ops = by_op(), modules = by_module();
  bool on_cuda = false, modular = false;
  for (const auto& log : session_->logs)
    for (const Slice& s : log->slices) on_cuda = on_cuda || s.device.is_cuda();
  for (const ProfileRow& r : modules) modular = modular || !r.module.empty();
  const MachinePeaks peaks = on_cuda ? MachinePeaks{} : machine_peaks();
  double total = 0;
  for (const ProfileRow& r : ops) total += r.seconds;
  std::string out = text("%.3f s, of which %.3f s (%.1f %%) in launches", seconds(), total,
                         seconds() > 0 ? 100 * total / seconds() : 0.0);
  if (on_cuda)
    out += " on CUDA streams; shares of peaks are not measured there\n";
  else
    out += text("; %d threads, %s: %.0f GFLOP/s of f32 multiply-adds and %.1f GB/s of copying at most\n", num_threads(),
                to_string(isa()).c_str(), peaks.flops * 1e-9, peaks.bytes * 1e-9);
  out += section("op", ops, total, peaks, !on_cuda);
  if (modular) out += "\n" + section("module", modules, total, peaks, !on_cuda);
  return out;
}

void Profile::write_trace(const std::string& path) const {
  CAPO_CHECK(!running(), "profile: stop it before it is read");
  TraceWriter(path, *session_).write();
}

}  // namespace capo
