// What the programs of bench/cpu share: one op at a time, timed when asked (the protocol is in bench/serve.py).
#pragma once

#include <ctime>
#include <exception>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

namespace capo::bench {

struct Served {
  std::function<void()> run;
  double work = 0;               // FLOP or bytes of one call, where the asker cannot know it
  bool alone = false;            // on one thread: timed by its processor time, which other programs do not stretch
  nlohmann::json notes = nlohmann::json::object();
};

inline double clock_seconds(bool alone) {
  timespec t;
  clock_gettime(alone ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Seconds of one of `calls` calls.
inline double timed(const Served& served, int calls) {
  const double start = clock_seconds(served.alone);
  for (int i = 0; i < calls; ++i) served.run();
  return (clock_seconds(served.alone) - start) / calls;
}

inline void say(const char* word, const nlohmann::json& what) { std::cout << word << ' ' << what.dump() << std::endl; }

// Until the end of the input. Every case is warmed up by `make`'s caller: two calls, and one before each round.
inline void serve(const nlohmann::json& ready, const std::function<Served(const nlohmann::json&)>& make) {
  say("READY", ready);
  Served served;
  for (std::string line; std::getline(std::cin, line);) {
    if (line.empty()) continue;
    if (line[0] == '{') {
      try {
        served = {};  // its memory first
        served = make(nlohmann::json::parse(line));
        served.run();
        served.run();
        nlohmann::json answer{{"seconds", timed(served, 1)}, {"notes", served.notes}};
        if (served.work > 0) answer["work"] = served.work;
        say("CASE", answer);
      } catch (const std::exception& e) {
        served = {};
        say("CASE", {{"error", e.what()}});
      }
    } else if (served.run) {
      served.run();
      say("ROUND", {{"seconds", timed(served, std::max(1, std::stoi(line)))}});
    }
  }
  say("RESULT", nlohmann::json::object());
}

}  // namespace capo::bench
