// Profile: counts, work and allocations that are known, and a trace whose slices nest.
#include <capo/autograd/autograd.h>
#include <capo/engine/backend.h>
#include <capo/engine/files.h>
#include <capo/engine/json.h>
#include <capo/engine/profile.h>
#include <capo/engine/threads.h>
#include <capo/models/nn/layers.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/matmul.h>
#include <capo/ops/optim.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/temp_folder.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

using namespace capo;
using namespace capo::testing;

namespace {

const ProfileRow* row(const std::vector<ProfileRow>& rows, const std::string& name, bool backward) {
  for (const ProfileRow& r : rows)
    if ((r.op == name || (r.op.empty() && r.module == name)) && r.backward == backward) return &r;
  return nullptr;
}
#define CAPO_ROW(var, rows, name, backward)                \
  const ProfileRow* const var = row(rows, name, backward); \
  REQUIRE(var)

struct TwoLayers : nn::Layer<TwoLayers> {
  explicit TwoLayers(const nn::Build& build)
      : Layer(build),
        first(this, "0", 8, 16, true, nn::Init::normal(0.4)),
        second(this, "1", 16, 4, true, nn::Init::normal(0.4)) {}
  Tensor forward(const Tensor& x) { return second(gelu(first(x))); }
  nn::Linear first, second;
};

struct Event {
  std::int64_t start, end;  // nanoseconds
};
// The trace's complete events by (process, thread), in file order; checks the rest of its form on the way.
std::map<std::pair<int, int>, std::vector<Event>> slices_of(const std::string& trace) {
  check_json_object(trace, "trace", 6);
  std::map<std::pair<int, int>, std::vector<Event>> out;
  for (std::size_t at = 0; (at = trace.find("{\"ph\":\"X\"", at)) != trace.npos; ++at) {
    int pid = 0, tid = 0;
    double ts = -1, dur = -1;
    REQUIRE(std::sscanf(trace.c_str() + at, "{\"ph\":\"X\",\"pid\":%d,\"tid\":%d,\"ts\":%lf,\"dur\":%lf", &pid, &tid,
                        &ts, &dur) == 4);
    CHECK(ts >= 0);
    CHECK(dur >= 0);
    const auto start = static_cast<std::int64_t>(ts * 1000 + 0.5);
    out[{pid, tid}].push_back({start, start + static_cast<std::int64_t>(dur * 1000 + 0.5)});
  }
  return out;
}
// How deep the slices of a thread nest; -1 when two overlap without one lying in the other.
int depth_of(const std::vector<Event>& events) {
  std::vector<Event> open;
  int most = 0;
  for (const Event& e : events) {
    while (!open.empty() && open.back().end <= e.start) open.pop_back();
    if (!open.empty() && e.end > open.back().end) return -1;
    open.push_back(e);
    most = std::max(most, static_cast<int>(open.size()));
  }
  return most;
}

std::string trace_of(const Profile& profile) {
  const TempFolder folder;
  const std::string path = folder.path() + "/trace.json";
  profile.write_trace(path);
  return read_file(path, 64 << 20);
}

}  // namespace

TEST_CASE("profile: calls, work and allocations that are known") {
  set_num_threads(2);
  const Tensor x = ones({32, 8}), w = ones({16, 8}), b = ones({16});
  Profile profile;
  profile.start();
  for (int i = 0; i < 3; ++i) linear(x, w, b);
  for (int i = 0; i < 5; ++i) x + x;
  const Tensor t = transpose(x, 0, 1);  // launches nothing: no row
  contiguous(t);
  add_(x, x);
  profile.stop();
  const auto rows = profile.by_op();
  CAPO_ROW(products, rows, "linear", false);
  CHECK(products->calls == 3);
  CHECK(products->flops == 3 * 2.0 * 32 * 16 * 8);
  CHECK(products->allocations >= 3);  // results, and what is packed
  CHECK(products->seconds > 0);
  CHECK(products->thread_seconds > 0);
  CAPO_ROW(sums, rows, "add", false);
  CHECK(sums->calls == 5);
  CHECK(sums->launches == 5);
  CHECK(sums->bytes == 5 * 3.0 * 32 * 8 * 4);
  CHECK(sums->flops < 0);
  CHECK(sums->allocations == 5);
  CHECK(sums->allocated_bytes == 5 * 32 * 8 * 4);
  CAPO_ROW(copies, rows, "clone", false);
  CHECK(copies->calls == 1);
  CAPO_ROW(in_place, rows, "add_", false);
  CHECK(in_place->bytes == 3.0 * 32 * 8 * 4);
  CHECK(in_place->allocations == 0);
  CHECK(rows.size() == 4);
  double total = 0;
  for (const auto& r : rows) total += r.seconds;
  CHECK(total <= profile.seconds());
}

TEST_CASE("profile: forward and backward apart, by op and by module") {
  TwoLayers model(nn::Build{});
  const Tensor x = ones({32, 8});
  Profile profile;
  for (int pass = 0; pass < 2; ++pass) {  // goes on: adds up
    profile.start();
    backward(sum(model(x)));
    profile.stop();
  }
  const auto ops = profile.by_op(), modules = profile.by_module();
  CAPO_ROW(forward, ops, "linear", false);
  CHECK(forward->calls == 4);
  CHECK(forward->flops == 2 * 2.0 * 32 * (8 * 16 + 16 * 4));
  CAPO_ROW(gradient, ops, "linear", true);
  CHECK(gradient->calls == 4);
  CHECK(gradient->flops == 2 * 2.0 * 32 * (8 * 16 + 2 * 16 * 4));  // x needs none
  CAPO_ROW(activation, ops, "gelu", true);
  CHECK(activation->calls == 2);
  CAPO_ROW(layers, modules, "*", false);
  CHECK(layers->calls == 4);
  CHECK(layers->flops == forward->flops);
  CAPO_ROW(back, modules, "*", true);
  CHECK(back->calls == 4);
  CHECK(back->flops == gradient->flops);
}

TEST_CASE("profile: in-place ops and what makes tensors go by their names") {
  const TensorList p = {ones({100})}, g = {ones({100})}, m = {zeros({100})}, v = {zeros({100})};
  Generator rng(1);
  Profile profile;
  profile.start();
  rand_normal({7}, rng);
  full({3}, 2);
  adamw_(p, g, m, v, {});
  global_norm(g);
  fill_(p[0], 1);
  p[0] + p[0];
  profile.stop();
  const auto rows = profile.by_op();
  for (const char* name : {"rand_normal", "full", "adamw_", "global_norm", "sum", "fill_", "add"}) {
    CAPO_ROW(r, rows, name, false);
    CHECK(r->calls == 1);
  }
  CHECK(row(rows, "adamw_", false)->bytes == 7.0 * 100 * 4);
  CHECK(rows.size() == 7);
}

TEST_CASE("profile: nothing when off, and the same bits when on") {
  Generator rng(3);
  const Tensor x = rand_normal({128, 128}, rng);
  Profile profile;
  const Tensor before = matmul(x, x);
  CHECK(profile.by_op().empty());
  profile.start();
  const Tensor during = matmul(x, x);
  profile.stop();
  const Tensor after = matmul(x, x);
  REQUIRE(profile.by_op().size() == 1);
  CHECK(profile.by_op()[0].calls == 1);
  CHECK(std::memcmp(before.data(), during.data(), before.nbytes()) == 0);
  CHECK(std::memcmp(before.data(), after.data(), before.nbytes()) == 0);
  CHECK(Profile().by_op().empty());
}

TEST_CASE("profile: one at a time, read when stopped") {
  Profile one, two;
  one.start();
  CHECK_THROWS_AS(two.start(), Error);
  CHECK_THROWS_AS(one.start(), Error);
  CHECK_THROWS_AS(one.by_op(), Error);
  CHECK_THROWS_AS(one.write_trace("unused"), Error);
  one.stop();
  one.stop();
  two.start();
  two.stop();
  {
    Profile forgotten;
    forgotten.start();
  }
  CHECK_NOTHROW(one.start());
}

TEST_CASE("profile: the trace is JSON, its slices nest, workers have their own") {
  set_num_threads(3);
  TwoLayers model(nn::Build{});
  const Tensor x = ones({32, 8}), large = ones({1 << 20});
  Profile profile;
  profile.start();
  {
    const ProfileScope step("a \"step\"");
    backward(sum(model(x)));
    large + large;
  }
  profile.stop();
  const std::string trace = trace_of(profile);
  const auto threads = slices_of(trace);
  int deepest = 0;
  for (const auto& [thread, events] : threads) {
    const int depth = depth_of(events);
    CHECK(depth > 0);
    deepest = std::max(deepest, depth);
  }
  CHECK(deepest >= 4);  // step, backward, a node's gradient, its launch
  for (const char* name : {"\"a \\\"step\\\"\"", "\"backward\"", "\"linear backward\"", "\"0\"", "\"live MiB, cpu\"",
                           "GFLOP/s", "thread_name"})
    CHECK_MESSAGE(trace.find(name) != trace.npos, name);
  const std::string table = profile.table();
  for (const char* name : {"linear", "gelu", "module ", "backward", "multiply-adds", "of peak"})
    CHECK_MESSAGE(table.find(name) != table.npos, name);
}

TEST_CASE("profile: a trace that is full says so, the table goes on") {
  const Tensor x = ones({4});
  Profile profile({.slices = 10});
  profile.start();
  for (int i = 0; i < 100; ++i) x + x;
  profile.stop();
  REQUIRE(profile.by_op().size() == 1);
  CHECK(profile.by_op()[0].calls == 100);
  const std::string trace = trace_of(profile);
  std::size_t slices = 0;
  for (const auto& [thread, events] : slices_of(trace)) slices += events.size();
  CHECK(slices <= 10);
  CHECK(trace.find("more slices are left out") != trace.npos);
}

TEST_CASE("profile: checkpointed segments and passes inside passes") {
  const Tensor x = ones({8, 8}), w = ones({8, 8});
  set_requires_grad(w, true);
  Profile profile;
  profile.start();
  const auto y =
      checkpoint([&](const std::vector<Tensor>& in) { return std::vector<Tensor>{gelu(matmul(in[0], w))}; }, {x}, {w});
  backward(sum(y[0]));
  profile.stop();
  const auto rows = profile.by_op();
  CHECK(row(rows, "matmul", false)->calls == 1);
  CHECK(row(rows, "checkpoint", true)->calls == 1);  // the segment again
  CHECK(row(rows, "matmul", true)->calls == 1);
  for (const auto& [thread, events] : slices_of(trace_of(profile))) CHECK(depth_of(events) > 0);
}

TEST_CASE("profile: a CUDA device's launches") {
  if (device_count() == 0) return;
  const Device device{DeviceType::cuda, 0};
  const Tensor x = ones({64}, f32, device);
  Profile profile;
  profile.start();
  for (int i = 0; i < 4; ++i) x + x;
  profile.stop();
  const auto rows = profile.by_op();
  CAPO_ROW(r, rows, "add", false);
  CHECK(r->calls == 4);
  CHECK(r->bytes == 4 * 3.0 * 64 * 4);
  CHECK(r->thread_seconds == 0);
  CHECK(trace_of(profile).find("\"cuda:0\"") != std::string::npos);
}

TEST_CASE("profile: what the machine can do") {
  const MachinePeaks peaks = machine_peaks();
  CHECK(peaks.flops > 1e8);
  CHECK(peaks.bytes > 1e8);
  CHECK(machine_peaks().flops == peaks.flops);  // once
}
