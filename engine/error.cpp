#include <capo/engine/error.h>

#include <cmath>
#include <cstdio>
#include <mutex>

namespace capo {
namespace detail {

void append(std::string& out, std::string_view text) { out.append(text); }
void append_int(std::string& out, std::int64_t value) { out += std::to_string(value); }
void append_uint(std::string& out, std::uint64_t value) { out += std::to_string(value); }

void append_real(std::string& out, double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.9g", value);
  out += text;
}

void throw_error(const std::string& text) { throw Error(text); }

}  // namespace detail

namespace {
std::mutex log_mutex;
LogSink log_sink = nullptr;
void* log_user = nullptr;
}  // namespace

void set_log(LogSink sink, void* user) {
  std::lock_guard lock(log_mutex);
  log_sink = sink;
  log_user = user;
}

void log(LogLevel level, const std::string& text) {
  std::lock_guard lock(log_mutex);
  if (log_sink) log_sink(level, text.c_str(), log_user);
}

}  // namespace capo
