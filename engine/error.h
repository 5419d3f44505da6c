// The one exception family and the checks that throw it.
//
// Text form: "op: rule, what came", e.g.
//   layer_norm: weight must be [768] to match the last axis of x [4, 196, 768], got [512]
// The text is built only on failure, out of line. The library never prints, exits or aborts.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace capo {

// Every error a user can cause. what() starts with the op's or file's name.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& text) : std::runtime_error(text) {}
};

// The device has no room; what() says how much was asked and what is held.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

namespace detail {

void append(std::string& out, std::string_view text);
void append_int(std::string& out, std::int64_t value);
void append_uint(std::string& out, std::uint64_t value);
void append_real(std::string& out, double value);

template <class T>
void append_any(std::string& out, const T& value) {
  if constexpr (std::is_same_v<T, bool>) {
    append(out, value ? "true" : "false");
  } else if constexpr (std::is_same_v<T, char>) {
    append(out, std::string_view(&value, 1));
  } else if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    append_int(out, value);
  } else if constexpr (std::is_integral_v<T>) {
    append_uint(out, value);
  } else if constexpr (std::is_floating_point_v<T>) {
    append_real(out, value);
  } else if constexpr (std::is_convertible_v<const T&, std::string_view>) {
    append(out, value);
  } else {
    append(out, to_string(value));  // found by argument-dependent lookup: Dims, DType, Device, ...
  }
}

[[noreturn]] void throw_error(const std::string& text);

}  // namespace detail

// Concatenates values into text: cat("got ", shape, " of ", dtype).
template <class... Args>
std::string cat(const Args&... args) {
  std::string out;
  (detail::append_any(out, args), ...);
  return out;
}

namespace detail {
template <class... Args>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Args&... args) {
  throw_error(cat(args...));
}
}  // namespace detail

enum class LogLevel { info, warning };
using LogSink = void (*)(LogLevel level, const char* text, void* user);

// Where the library speaks; silent until a sink is set. Thread safe: one call of the sink at a time, under locks, so it
// must not call the library.
void set_log(LogSink sink, void* user = nullptr);
void log(LogLevel level, const std::string& text);

}  // namespace capo

// User mistakes: CAPO_CHECK(ok, "op: rule, got ", value) throws capo::Error.
#define CAPO_CHECK(cond, ...)                                 \
  do {                                                        \
    if (!(cond)) [[unlikely]] ::capo::detail::fail(__VA_ARGS__); \
  } while (0)

// Invariants of our own code: checked in debug builds only.
#ifdef NDEBUG
#define CAPO_DCHECK(cond, ...) \
  do {                         \
  } while (0)
#else
#define CAPO_DCHECK(cond, ...) CAPO_CHECK(cond, __VA_ARGS__)
#endif
