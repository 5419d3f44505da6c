// What the programs of bench/gpu share: options, random data, cases timed in interleaved rounds, the RESULT line.
//
// Every program ends with one line "RESULT {json}". With --device cpu --tiny each runs in seconds on any machine: that
// is how ctest keeps them alive; the figures then mean nothing.
#pragma once

#include <capo/engine/rng.h>
#include <capo/engine/tensor.h>

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace capo::bench {

struct Options {
  std::string program;
  Device device{DeviceType::cuda, 0};
  bool tiny = false;
  int rounds = 15;
  std::string only;                // cases whose name contains it
  std::vector<std::string> extra;  // flags and values that the program itself understands
  // The value after `flag` among extra, or `otherwise`; whether a lone flag is there. Both take what they find out of
  // extra, and no_more() throws on what nobody took.
  std::string value(const std::string& flag, const std::string& otherwise);
  bool has(const std::string& flag);
  DType dtype();  // --dtype f32, bf16 or f16; bf16 unless given on CUDA, f32 on the CPU
  void no_more() const;
};
// --device D, --tiny, --rounds N, --only TEXT; all else is left in `extra`.
Options parse(int argc, char** argv);

// Normal, mean 0 and standard deviation 1, made on the host from a fixed seed: the same on every device.
Tensor random(const Shape& shape, DType dtype, Device device);

struct Case {
  std::string name;
  double work;  // FLOP or bytes of one call
  std::function<void()> run;
  std::vector<double> seconds = {};  // of one call, one entry a round
  int calls = 0;                     // timed together
  bool captured = false;             // as one CUDA graph, so that no host time is in it
};
// Times all cases: each is warmed up and, on CUDA, captured; then every round runs every case once, in order, so that a
// busy or hot moment hits all of them. Nothing that outlives a call may be made after this.
void measure(std::vector<Case>& cases, const Options& options);

double median(std::vector<double> v);
// Of a over b, round by round.
double median_ratio(const std::vector<double>& a, const std::vector<double>& b);
// {"median", "min", "max"} of seconds; "rate" = work per second at the median.
nlohmann::json figures(const Case& c);
void print_result(const nlohmann::json& result);

// Of this process, from the kernel (Linux): bytes resident now, and the most since the last call of
// reset_resident_peak(), which first gives freed memory back to the system. 0 elsewhere.
std::int64_t resident_bytes();
std::int64_t resident_peak_bytes();
void reset_resident_peak();

// main() of every program: prints an exception's text and returns 1.
int guarded(int argc, char** argv, void (*body)(Options));

}  // namespace capo::bench
