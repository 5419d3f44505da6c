#include <capo/bench/gpu/harness.h>
#include <capo/bench/gpu/replay.h>
#include <capo/engine/allocator.h>
#include <capo/engine/error.h>
#include <capo/ops/copy.h>
#include <capo/ops/matmul.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#ifdef __linux__
#include <malloc.h>
#endif

namespace capo::bench {

std::string Options::value(const std::string& flag, const std::string& otherwise) {
  const auto at = std::find(extra.begin(), extra.end(), flag);
  if (at == extra.end()) return otherwise;
  CAPO_CHECK(at + 1 != extra.end(), program, ": ", flag, " needs a value");
  const std::string found = *(at + 1);
  extra.erase(at, at + 2);
  return found;
}

bool Options::has(const std::string& flag) {
  const auto at = std::find(extra.begin(), extra.end(), flag);
  if (at == extra.end()) return false;
  extra.erase(at);
  return true;
}

DType Options::dtype() {
  const std::string text = value("--dtype", device.is_cuda() ? "bf16" : "f32");
  for (const DType t : {f32, bf16, f16})
    if (text == to_string(t)) return t;
  detail::fail(program, ": --dtype must be f32, bf16 or f16, got ", text);
}

void Options::no_more() const { CAPO_CHECK(extra.empty(), program, ": unknown argument ", extra.front()); }

Options parse(int argc, char** argv) {
  Options o;
  o.program = argv[0];
  o.program = o.program.substr(o.program.rfind('/') + 1);
  o.extra.assign(argv + 1, argv + argc);
  o.device = parse_device(o.value("--device", "cuda"));
  o.tiny = o.has("--tiny");
  o.rounds = std::atoi(o.value("--rounds", o.tiny ? "2" : "15").c_str());
  CAPO_CHECK(o.rounds > 0, o.program, ": --rounds must be positive");
  o.only = o.value("--only", "");
  return o;
}

Tensor random(const Shape& shape, DType dtype, Device device) {
  static Generator rng(1);
  return to(cast(rand_normal(shape, rng), dtype), device);
}

void measure(std::vector<Case>& cases, const Options& options) {
  std::erase_if(cases, [&](const Case& c) { return c.name.find(options.only) == std::string::npos; });
  const double least = options.tiny ? 0 : 5e-3;
  std::vector<Replay> replays;
  replays.reserve(cases.size());
  for (Case& c : cases) {
    replays.emplace_back(options.device, c.run, least);
    c.calls = replays.back().calls();
    c.captured = replays.back().captured();
  }
  for (int round = 0; round < options.rounds; ++round)
    for (std::size_t i = 0; i < cases.size(); ++i) cases[i].seconds.push_back(replays[i].seconds());
}

double median(std::vector<double> v) {
  CAPO_CHECK(!v.empty(), "median: nothing was measured");
  std::sort(v.begin(), v.end());
  return v.size() % 2 ? v[v.size() / 2] : (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;
}

double median_ratio(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) ratios.push_back(a[i] / b[i]);
  return median(ratios);
}

nlohmann::json figures(const Case& c) {
  const double middle = median(c.seconds);
  const auto [least, most] = std::minmax_element(c.seconds.begin(), c.seconds.end());
  return {{"median", middle}, {"min", *least},          {"max", *most},           {"rate", c.work / middle},
          {"calls", c.calls}, {"captured", c.captured}, {"rounds", c.seconds.size()}};
}

void print_result(const nlohmann::json& result) {
  std::printf("RESULT %s\n", result.dump().c_str());
  std::fflush(stdout);
}

namespace {
std::int64_t status_bytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind(field + ":", 0) == 0) return 1024 * std::atoll(line.c_str() + field.size() + 1);
  return 0;
}
}  // namespace

std::int64_t resident_bytes() { return status_bytes("VmRSS"); }
std::int64_t resident_peak_bytes() { return status_bytes("VmHWM"); }
void reset_resident_peak() {
  allocator(kCpu).release_all();
#ifdef __linux__
  malloc_trim(0);
  std::ofstream("/proc/self/clear_refs") << 5;
#endif
}

int guarded(int argc, char** argv, void (*body)(Options)) try {
  Options options = parse(argc, argv);
  set_product_tuning(!options.has("--untuned"));
  body(std::move(options));
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s: %s\n", argv[0], e.what());
  return 1;
}

}  // namespace capo::bench
