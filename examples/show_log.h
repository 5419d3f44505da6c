// The library never prints; an example sends what it has to say to stderr.
#pragma once

#include <capo/engine/error.h>

#include <cstdio>

namespace capo::examples {

inline void show_log() {
  set_log([](LogLevel level, const char* text, void*) {
    std::fprintf(stderr, "%s%s\n", level == LogLevel::warning ? "warning: " : "", text);
  });
}

}  // namespace capo::examples
