// engine/: dtypes, shapes, tensors, threads, random numbers. Memory, files and safetensors have their own tests.
#include <capo/engine/backend.h>
#include <capo/engine/cpu.h>
#include <capo/engine/rng.h>
#include <capo/engine/threads.h>
#include <capo/ops/copy.h>
#include <capo/tests/op_test.h>
#include <capo/tests/support.h>
#include <capo/tests/temp_folder.h>

#include <doctest/doctest.h>

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <set>
#include <thread>

using namespace capo;
using namespace capo::test;
using namespace capo::testing;

namespace {

bool same_float(float a, float b) { return std::memcmp(&a, &b, 4) == 0 || (a != a && b != b); }

// IEEE half by its definition: sign, 5 bits of exponent, 10 of fraction.
float half_by_definition(std::uint16_t bits) {
  const int e = bits >> 10 & 31, f = bits & 1023;
  const double magnitude = e == 31  ? (f ? std::nan("") : HUGE_VAL)
                           : e == 0 ? std::ldexp(f, -24)
                                    : std::ldexp(1024 + f, e - 25);
  return static_cast<float>(bits & 0x8000 ? -magnitude : magnitude);
}

// The nearest of all finite halves (ties to even), by search over one sign.
std::uint16_t nearest_half(float v) {
  if (v != v) return 0x7e00;
  const std::uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const double x = std::fabs(static_cast<double>(v));
  if (x >= 65520) return sign | 0x7c00;
  std::uint16_t low = 0, high = 0x7bff;  // largest half <= x
  while (low < high) {
    const auto middle = static_cast<std::uint16_t>((low + high + 1) / 2);
    half_by_definition(middle) <= x ? low = middle : high = static_cast<std::uint16_t>(middle - 1);
  }
  if (low == 0x7bff) return sign | low;
  const double below = x - half_by_definition(low), above = half_by_definition(static_cast<std::uint16_t>(low + 1)) - x;
  if (above < below || (above == below && (low & 1))) ++low;
  return sign | low;
}

}  // namespace

// ---------------------------------------------------------------- dtypes

TEST_CASE("dtype: sizes, names, classes") {
  CHECK(size_of(f32) == 4);
  CHECK(size_of(f64) == 8);
  CHECK(size_of(bf16) == 2);
  CHECK(size_of(f16) == 2);
  CHECK(size_of(i64) == 8);
  CHECK(size_of(boolean) == 1);
  CHECK(to_string(bf16) == "bf16");
  CHECK(to_string(boolean) == "bool");
  CHECK(is_floating(f16));
  CHECK(is_half(bf16));
  CHECK_FALSE(is_half(f32));
  CHECK(is_integer(u8));
  CHECK_FALSE(is_integer(boolean));
}

TEST_CASE("f16: every bit pattern to f32 and back") {
  int wrong = 0;
  for (unsigned i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float v = to_f32(Half{bits});
    if (!same_float(v, half_by_definition(bits))) ++wrong;
    if (v == v && to_f16(v).bits != bits) ++wrong;
    if (v != v && (to_f16(v).bits & 0x7fff) <= 0x7c00) ++wrong;  // NaN stays NaN
  }
  CHECK(wrong == 0);
}

TEST_CASE("f16: rounding at and beside every midpoint") {
  int wrong = 0;
  const auto test = [&](float v) {
    for (const float s : {v, -v})
      if (to_f16(s).bits != nearest_half(s)) ++wrong;
  };
  for (unsigned i = 0; i < 0x7bff; ++i) {
    const float a = half_by_definition(static_cast<std::uint16_t>(i)),
                b = half_by_definition(static_cast<std::uint16_t>(i + 1));
    const float middle = a + (b - a) / 2;
    test(middle);
    test(std::nextafter(middle, 0.0f));
    test(std::nextafter(middle, 1e9f));
  }
  for (const float v : {65503.9f, 65519.99f, 65520.0f, 65536.0f, 1e30f, HUGE_VALF, 0.0f, 1e-8f, 2.98e-8f, 2.99e-8f})
    test(v);
  CHECK(wrong == 0);
}

TEST_CASE("bf16: every bit pattern, and rounding beside every midpoint") {
  int wrong = 0;
  for (unsigned i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const std::uint32_t wide = i << 16;
    float expected;
    std::memcpy(&expected, &wide, 4);
    const float v = to_f32(BFloat16{bits});
    if (!same_float(v, expected)) ++wrong;
    if (v != v) {
      const float back = to_f32(to_bf16(v));
      if (back == back) ++wrong;
      continue;
    }
    if (to_bf16(v).bits != bits) ++wrong;
    if ((bits & 0x7fff) >= 0x7f80) continue;  // above the infinities there is nothing
    for (const std::uint32_t low : {0x7fffu, 0x8000u, 0x8001u}) {
      const std::uint32_t u = wide | low;
      float x;
      std::memcpy(&x, &u, 4);
      const unsigned up = low > 0x8000u || (low == 0x8000u && (bits & 1)) ? 1 : 0;
      if (to_bf16(x).bits != bits + up) ++wrong;
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("cast kernels convert as engine/dtype.h does, on every instruction set") {
  const Tensor half = empty({65536}, f16), brain = empty({65536}, bf16);
  std::vector<float> midpoints;
  for (unsigned i = 0; i < 65536; ++i) {
    half.data<Half>()[i].bits = brain.data<BFloat16>()[i].bits = static_cast<std::uint16_t>(i);
    const float a = to_f32(Half{static_cast<std::uint16_t>(i)}), b = to_f32(Half{static_cast<std::uint16_t>(i ^ 1)});
    midpoints.push_back((a + b) / 2);
    midpoints.push_back(std::nextafter((a + b) / 2, 0.0f));
  }
  const Tensor wide = from_vector(midpoints, {static_cast<std::int64_t>(midpoints.size())});
  const IsaScope restore;
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    const Tensor from_half = cast(half, f32), from_brain = cast(brain, f32), to_half = cast(wide, f16),
                 to_brain = cast(wide, bf16);
    int wrong = 0;
    for (unsigned i = 0; i < 65536; ++i) {
      if (!same_float(from_half.data<float>()[i], to_f32(half.data<Half>()[i]))) ++wrong;
      if (!same_float(from_brain.data<float>()[i], to_f32(brain.data<BFloat16>()[i]))) ++wrong;
    }
    for (std::size_t i = 0; i < midpoints.size(); ++i) {
      if (midpoints[i] != midpoints[i]) continue;
      if (to_half.data<Half>()[i].bits != to_f16(midpoints[i]).bits) ++wrong;
      if (to_brain.data<BFloat16>()[i].bits != to_bf16(midpoints[i]).bits) ++wrong;
    }
    CHECK(wrong == 0);
  }
}

// ---------------------------------------------------------------- errors, devices, shapes

TEST_CASE("error: text is built from values") {
  CHECK(cat("a ", 1, ' ', true, ' ', 2.5, ' ', Shape{2, 3}, ' ', f16, ' ', kMeta, ' ', std::uint64_t{1} << 63) ==
        "a 1 true 2.5 [2, 3] f16 meta 9223372036854775808");
  CHECK(error_of([] { CAPO_CHECK(1 == 2, "op: rule, got ", 3); }) == "op: rule, got 3");
}

TEST_CASE("log: silent until a sink is set") {
  std::string heard;
  log(LogLevel::info, "lost");
  set_log([](LogLevel level, const char* text,
             void* user) { *static_cast<std::string*>(user) += cat(static_cast<int>(level), text); },
          &heard);
  log(LogLevel::warning, "kept");
  set_log(nullptr);
  log(LogLevel::warning, "lost");
  CHECK(heard == "1kept");
}

TEST_CASE("device: names both ways") {
  for (const Device d : {kCpu, kMeta, Device{DeviceType::cuda, 0}, Device{DeviceType::cuda, 3}})
    CHECK(parse_device(to_string(d)) == d);
  CHECK(parse_device("cuda") == Device{DeviceType::cuda, 0});
  CHECK(contains(error_of([] { parse_device("gpu"); }), "device: must be cpu, cuda, cuda:N or meta, got \"gpu\""));
  CHECK(contains(error_of([] { parse_device("cuda:x"); }), "device: "));
  const std::string text = error_of([] { allocator({DeviceType::cuda, 9}); });
  CHECK_MESSAGE(contains(text, backend() ? "CUDA device" : "this build has no CUDA"), text);
}

TEST_CASE("Dims") {
  Dims d{2, 3};
  d.push_back(4);
  d.insert(0, 9);
  d.insert(4, 7);
  CHECK(d == Dims{9, 2, 3, 4, 7});
  d.erase(1);
  d.pop_back();
  CHECK(d == Dims{9, 3, 4});
  CHECK(d != Dims{9, 3});
  CHECK(d.back() == 4);
  CHECK(to_string(d) == "[9, 3, 4]");
  CHECK(to_string(Dims{}) == "[]");
  CHECK(Dims::filled(3, -1) == Dims{-1, -1, -1});
  Dims full = Dims::filled(8, 1);
  CHECK(contains(error_of([&] { full.push_back(1); }), "at most 8 dimensions"));
  CHECK(contains(error_of([&] { full.insert(0, 1); }), "at most 8 dimensions"));
  CHECK(contains(error_of([] { Dims{1, 2, 3, 4, 5, 6, 7, 8, 9}; }), "at most 8 dimensions, got 9"));
}

TEST_CASE("shape functions") {
  CHECK(numel({}) == 1);
  CHECK(numel({3, 0, 5}) == 0);
  CHECK(contains(error_of([] { numel({2, -1}); }), "sizes must not be negative"));
  CHECK(contains(error_of([] { numel({std::int64_t{1} << 40, std::int64_t{1} << 40}); }), "too many elements"));
  CHECK(contains(error_of([] {
                   numel({0, std::int64_t{1} << 40, std::int64_t{1} << 40});
                 }),
                 "too many elements"));  // its strides
  CHECK(contiguous_strides({2, 3, 4}) == Dims{12, 4, 1});
  CHECK(contiguous_strides({2, 0, 4}) == Dims{4, 4, 1});
  CHECK(broadcast_shapes("op", {2, 1, 4}, {3, 1}) == Shape{2, 3, 4});
  CHECK(broadcast_shapes("op", {}, {2}) == Shape{2});
  CHECK(broadcast_shapes("op", {1, 3}, {0, 3}) == Shape{0, 3});
  CHECK(contains(error_of([] { broadcast_shapes("op", {2}, {3}); }), "op: shapes must broadcast, got [2] and [3]"));
  CHECK(normalize_axis("op", -1, 3) == 2);
  CHECK(contains(error_of([] { normalize_axis("op", 3, 3); }), "op: axis must be in [-3, 3), got 3"));
}

// ---------------------------------------------------------------- tensors

TEST_CASE("tensor: handles, metadata, values") {
  const Tensor t = from_vector<float>({1, 2, 3, 4, 5, 6}, {2, 3});
  CHECK(t.defined());
  CHECK(t.size(-1) == 3);
  CHECK(t.rank() == 2);
  CHECK(t.numel() == 6);
  CHECK(t.nbytes() == 24);
  CHECK(t.strides() == Dims{3, 1});
  CHECK(t.is_contiguous());
  CHECK(to_vector<std::int32_t>(t) == std::vector<std::int32_t>{1, 2, 3, 4, 5, 6});
  const Tensor u = t;
  CHECK(u.same(t));
  CHECK_FALSE(t.detach().same(t));
  CHECK(t.detach().storage() == t.storage());
  CHECK_FALSE(t.unique());
  CHECK(from_vector<float>({1}, {1}).unique());
  CHECK(describe(t) == "f32 [2, 3] cpu");
  CHECK(to_string(from_vector<double>({1.5, -2}, {2})) == "f64 [2] cpu\n[1.5, -2]");
  CHECK(describe(Tensor()) == "undefined");
  CHECK(from_vector<std::int64_t>({(std::int64_t{1} << 62) + 1}, {}).item() == 4611686018427387904.0);
  CHECK(to_vector<std::int64_t>(from_vector<std::int64_t>({(std::int64_t{1} << 62) + 1}, {}))[0] ==
        (std::int64_t{1} << 62) + 1);
  CHECK(reinterpret_cast<std::uintptr_t>(t.data()) % 64 == 0);
}

TEST_CASE("tensor: misuse throws") {
  const Tensor t = from_vector<float>({1, 2}, {2}), m = empty({2}, f32, kMeta);
  CHECK(contains(error_of([] { Tensor().shape(); }), "tensor: used while undefined"));
  CHECK(contains(error_of([&] { t.data<double>(); }), "data: tensor is f32, asked for f64"));
  CHECK(contains(error_of([&] { m.data(); }), "data: a meta tensor [2] has no values"));
  CHECK(contains(error_of([&] { t.item(); }), "item: needs exactly one element"));
  CHECK(contains(error_of([&] { empty({}, f32, kMeta).item(); }), "item: a meta tensor"));
  CHECK(contains(error_of([&] { to_vector<float>(m); }), "to_vector: a meta tensor"));
  CHECK(contains(error_of([] { from_vector<float>({1, 2}, {3}); }), "from_vector: [3] needs 3 values, got 2"));
  CHECK(contains(error_of([&] { t.size(1); }), "size: axis must be in"));
  CHECK(contains(error_of([] { empty({std::int64_t{1} << 61}, f64); }),
                 "of f64 has too many bytes"));  // 2^64: none, wrapped
}

TEST_CASE("strided_view: bounds") {
  const Tensor t = from_vector<float>({0, 1, 2, 3, 4, 5}, {6});
  CHECK(to_vector<float>(strided_view(t, {2, 2}, {3, 1}, 1)) == std::vector<float>{1, 2, 4, 5});
  CHECK(to_vector<float>(strided_view(t, {2, 3}, {1, 2}, 0)) == std::vector<float>{0, 2, 4, 1, 3, 5});
  CHECK(to_vector<float>(strided_view(t, {3}, {0}, 5)) == std::vector<float>{5, 5, 5});
  CHECK(contains(error_of([&] { strided_view(t, {2, 2}, {3, 1}, 2); }), "leaves the storage of 6 elements"));
  CHECK(contains(error_of([&] { strided_view(t, {1}, {1}, 6); }), "leaves the storage"));
  CHECK(contains(error_of([&] { strided_view(t, {1}, {1}, -1); }), "leaves the storage"));
  CHECK(contains(error_of([&] { strided_view(t, {2}, {-1}, 1); }), "strides must not be negative"));
  CHECK(contains(error_of([&] { strided_view(t, {2}, {1, 1}, 0); }), "differ in rank"));
  CHECK(strided_view(t, {0}, {1}, 6).numel() == 0);  // an empty view may start at the end
}

TEST_CASE("strided_view: contiguity") {
  const Tensor t = empty({24});
  CHECK(strided_view(t, {2, 3}, {3, 1}, 5).is_contiguous());
  CHECK(strided_view(t, {1, 3}, {99, 1}, 0).is_contiguous());  // the stride of a size-1 axis says nothing
  CHECK(strided_view(t, {}, {}, 3).is_contiguous());
  CHECK(strided_view(t, {0, 3}, {7, 2}, 0).is_contiguous());
  CHECK_FALSE(strided_view(t, {2, 3}, {4, 1}, 0).is_contiguous());
  CHECK_FALSE(strided_view(t, {3, 2}, {1, 3}, 0).is_contiguous());
  CHECK_FALSE(strided_view(t, {3}, {0}, 0).is_contiguous());
}

TEST_CASE("swap_storage") {
  Tensor a = from_vector<float>({1, 2}, {2}), b = from_vector<float>({3, 4}, {2});
  const Tensor handle = a;
  a.swap_storage(b);
  CHECK(to_vector<float>(handle) == std::vector<float>{3, 4});
  CHECK(to_vector<float>(b) == std::vector<float>{1, 2});
  Tensor c = from_vector<float>({1}, {1});
  CHECK(contains(error_of([&] { a.swap_storage(c); }), "swap_storage: shapes, dtypes and strides must be equal"));
  Tensor m = empty({2}, f32, kMeta);
  CHECK(contains(error_of([&] { a.swap_storage(m); }), "swap_storage: "));
}

TEST_CASE("storage: versions and the last writer") {
  const Tensor t = zeros({2});
  CHECK(std::string(empty({1}).storage()->last_writer()).empty());
  const auto before = t.storage()->version();
  t.storage()->bump_version("me");
  CHECK(t.detach().storage()->version() == before + 1);
  CHECK(std::string(t.storage()->last_writer()) == "me");
}

// ---------------------------------------------------------------- threads

namespace {

std::set<std::pair<std::int64_t, std::int64_t>> chunks_of(std::int64_t n, std::int64_t grain) {
  std::mutex mutex;
  std::set<std::pair<std::int64_t, std::int64_t>> chunks;
  std::int64_t calls = 0;
  parallel_for(n, grain, [&](std::int64_t begin, std::int64_t end) {
    const std::lock_guard lock(mutex);
    chunks.emplace(begin, end);
    ++calls;
  });
  CHECK(calls == static_cast<std::int64_t>(chunks.size()));
  return chunks;
}

}  // namespace

TEST_CASE("parallel_for: the chunks do not depend on the number of threads") {
  for (const std::int64_t n : {0, 1, 7, 64, 1000})
    for (const std::int64_t grain : {1, 3, 64, 5000}) {
      std::set<std::pair<std::int64_t, std::int64_t>> expected;
      for (std::int64_t b = 0; b < n; b += grain) expected.emplace(b, std::min(n, b + grain));
      for (const int threads : {1, 2, 5}) {
        const ThreadsScope with(threads);
        CHECK(chunks_of(n, grain) == expected);
      }
    }
}

TEST_CASE("parallel_for: the first exception comes back, the pool works on") {
  for (const int threads : {1, 3}) {
    const ThreadsScope with(threads);
    std::atomic<int> ran{0};
    CHECK(error_of([&] {
            parallel_for(1000, 1, [&](std::int64_t begin, std::int64_t) {
              ++ran;
              if (begin == 5) throw Error("five");
            });
          }) == "five");
    if (threads == 1)
      CHECK(ran == 6);  // chunks not yet started are not run; with more threads others may be done already
    CHECK(chunks_of(10, 1).size() == 10);
  }
  CHECK(contains(error_of([] { parallel_for(1, 0, [](std::int64_t, std::int64_t) {}); }), "grain must be at least 1"));
}

TEST_CASE("parallel_for: inside a chunk it runs inline, in the same chunks") {
  const ThreadsScope with(3);
  std::atomic<std::int64_t> sum{0};
  std::atomic<int> other_thread{0}, wide{0};
  parallel_for(8, 1, [&](std::int64_t, std::int64_t) {
    const auto me = std::this_thread::get_id();
    parallel_for(100, 7, [&](std::int64_t begin, std::int64_t end) {
      if (std::this_thread::get_id() != me) ++other_thread;
      if (end - begin > 7) ++wide;
      for (auto i = begin; i < end; ++i) sum += i;
    });
  });
  CHECK(sum == 8 * 4950);
  CHECK(other_thread == 0);
  CHECK(wide == 0);
  CHECK(error_of([] {
          parallel_for(4, 1, [](std::int64_t, std::int64_t) {
            parallel_for(4, 1, [](std::int64_t, std::int64_t) { throw Error("deep"); });
          });
        }) == "deep");
}

TEST_CASE("parallel_for: several callers at once") {
  const ThreadsScope with(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t)
    callers.emplace_back([&] {
      for (int k = 0; k < 50; ++k) {
        std::atomic<std::int64_t> sum{0};
        parallel_for(1000, 10, [&](std::int64_t begin, std::int64_t end) {
          for (auto i = begin; i < end; ++i) sum += i;
        });
        if (sum != 499500) ++wrong;
      }
    });
  for (auto& c : callers) c.join();
  CHECK(wrong == 0);
}

TEST_CASE("set_num_threads: limits") {
  const ThreadsScope with(2);
  CHECK(num_threads() == 2);
  CHECK(contains(error_of([] { set_num_threads(0); }), "set_num_threads: must be 1..1024, got 0"));
  CHECK(contains(error_of([] { parallel_for(2, 1, [](std::int64_t, std::int64_t) { set_num_threads(1); }); }),
                 "must not be called from inside"));
  CHECK(num_threads() == 2);
}

TEST_CASE("cpu_quota: the tightest of the cgroups above, rounded up; what cannot be read or understood is none") {
  const auto quota = [](const std::vector<std::pair<std::string, std::string>>& files) {
    const TempFolder t;
    for (const auto& [name, content] : files) t.file(name, content);
    return detail::cpu_quota(t.path().c_str());
  };
  const std::string self = "proc/self/cgroup", top = "sys/fs/cgroup/cpu.max";
  CHECK(quota({}) == 0);
  CHECK(quota({{self, "0::/\n"}}) == 0);
  CHECK(quota({{top, "200000 100000\n"}}) == 0);  // not known to be ours
  CHECK(quota({{self, "0::/\n"}, {top, "200000 100000\n"}}) == 2);
  CHECK(quota({{self, "0::/\n"}, {top, "200001 100000\n"}}) == 3);
  CHECK(quota({{self, "0::/\n"}, {top, "1000 100000\n"}}) == 1);
  CHECK(quota({{self, "0::/"}, {top, "9223372036854775807 1"}}) == 1024);
  for (const char* text : {"max 100000\n", "", "\n", "200000\n", "200000 \n", "200000 0\n", "-1 100000\n",
                           "0 100000\n", "200000  100000\n", "200000 100000 1\n", "200000 100000\n\n", "2e5 100000\n",
                           "+200000 100000\n", "99999999999999999999 100000\n"}) {
    CAPTURE(text);
    CHECK(quota({{self, "0::/\n"}, {top, text}}) == 0);
  }
  CHECK(quota({{self, "0::/\n"}, {top, std::string(70000, '1') + " 1\n"}}) == 0);
  // Groups above; a path that is not below the mount, as in a container.
  const std::string inner = "sys/fs/cgroup/a/b/cpu.max", outer = "sys/fs/cgroup/a/cpu.max";
  CHECK(quota({{self, "0::/a/b\n"}, {inner, "500000 100000\n"}, {outer, "300000 100000\n"}}) == 3);
  CHECK(quota({{self, "0::/a/b\n"}, {inner, "max 100000\n"}, {outer, "300000 100000\n"}, {top, "900000 100000\n"}}) ==
        3);
  CHECK(quota({{self, "0::/elsewhere/b\n"}, {top, "900000 100000\n"}}) == 9);
  CHECK(quota({{self, "0::/../b\n"}, {top, "900000 100000\n"}, {"sys/fs/b/cpu.max", "100000 100000\n"}}) == 9);
  CHECK(quota({{self, "0::nonsense\n"}, {top, "900000 100000\n"}}) == 9);
  // Version 1.
  const std::string us = "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", period = "sys/fs/cgroup/cpu/job/cpu.cfs_period_us";
  const std::string lines = "5:cpuset:/job\nnonsense\n4:cpu,cpuacct:/job\n0::/\n";
  CHECK(quota({{self, lines}, {us, "250000\n"}, {period, "100000\n"}}) == 3);
  CHECK(quota({{self, lines}, {us, "-1\n"}, {period, "100000\n"}}) == 0);
  CHECK(quota({{self, lines}, {us, "250000\n"}}) == 0);
  CHECK(quota({{self, "5:cpuset,cpuacct:/job\n"}, {us, "250000\n"}, {period, "100000\n"}}) == 0);
  CHECK(detail::default_threads() >= 1);
  CHECK(detail::default_threads() <= 1024);
}

#if defined(__GLIBC__)
TEST_CASE("parallel_for: workers have stacks of 8 MB, whatever the default") {
  pthread_attr_t before, small;
  REQUIRE(pthread_getattr_default_np(&before) == 0);
  REQUIRE(pthread_attr_init(&small) == 0);
  REQUIRE(pthread_attr_setstacksize(&small, 1 << 20) == 0);
  REQUIRE(pthread_setattr_default_np(&small) == 0);
  {
    const ThreadsScope with(2);
    const auto caller = std::this_thread::get_id();
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    std::atomic<std::size_t> stack{0};  // of the worker
    parallel_for(2, 1, [&](std::int64_t, std::int64_t) {
      pthread_attr_t mine;
      std::size_t size = 0;
      if (std::this_thread::get_id() != caller && pthread_getattr_np(pthread_self(), &mine) == 0) {
        pthread_attr_getstacksize(&mine, &size);
        pthread_attr_destroy(&mine);
        stack = size;
      }
      while (stack == 0 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();  // leave it a chunk
    });
    CHECK(stack > std::size_t{7} << 20);
  }
  pthread_setattr_default_np(&before);
  pthread_attr_destroy(&small);
  pthread_attr_destroy(&before);
}
#endif

#if !defined(__SANITIZE_THREAD__)  // it has no threads in the child of a process with threads
TEST_CASE("parallel_for: a forked child has a pool of its own") {
  const ThreadsScope with(2);
  const auto sum_is_right = [] {
    std::atomic<std::int64_t> sum{0};
    parallel_for(1000, 10, [&](std::int64_t begin, std::int64_t end) {
      for (auto i = begin; i < end; ++i) sum += i;
    });
    return sum == 499500;
  };
  CHECK(sum_is_right());
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::alarm(60);  // a pool that waits for ever is ended by a signal
    const bool ok = sum_is_right() && num_threads() == 2 && same_bits(full({100000}, 3), full({100000}, 3));
    set_num_threads(3);
    ::_exit(ok && sum_is_right() && num_threads() == 3 ? 0 : 1);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(status == 0);
  CHECK(sum_is_right());  // the parent keeps its pool
}
#endif

#if defined(__x86_64__) || defined(__aarch64__)
TEST_CASE("parallel_for: denormals are flushed on every thread") {
  constexpr int kThreads = 4;
  const ThreadsScope with(kThreads);
  std::atomic<int> inside{0}, kept{0};
  parallel_for(kThreads, 1, [&](std::int64_t, std::int64_t) {
    // A chunk ends when all have begun: each is on a thread of its own.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    for (++inside; inside < kThreads && std::chrono::steady_clock::now() < deadline;) std::this_thread::yield();
    volatile float tiny = std::numeric_limits<float>::min(), half = tiny * 0.5f, denormal = 1e-40f;
    if (half != 0 || denormal * 1e20f != 0) ++kept;
  });
  CHECK(inside == kThreads);
  CHECK(kept == 0);
}

TEST_CASE("parallel_for: denormals are flushed in every participant and the caller's mode comes back") {
  volatile float tiny = std::numeric_limits<float>::min();
  for (const int threads : {1, 3}) {
    const ThreadsScope with(threads);
    std::atomic<int> kept{0};
    parallel_for(64, 1, [&](std::int64_t, std::int64_t) {
      volatile float half = tiny * 0.5f;
      if (half != 0) ++kept;
    });
    CHECK(kept == 0);
    volatile float half = tiny * 0.5f;
    CHECK(half != 0);
    CHECK_THROWS(parallel_for(4, 1, [](std::int64_t, std::int64_t) { throw Error("x"); }));
    half = tiny * 0.5f;
    CHECK(half != 0);
  }
}
#endif

TEST_CASE("set_isa refuses what the processor lacks") {
  const IsaScope restore;
  set_isa(Isa::v2);
  CHECK(isa() == Isa::v2);
  if (best_isa() < Isa::v4)
    CHECK(contains(error_of([] { set_isa(Isa::v4); }), "set_isa: this processor and build have"));
}

// ---------------------------------------------------------------- random numbers

TEST_CASE("Philox: known answers of Random123 (kat_vectors, philox4x32-10)") {
  const auto is = [](const Philox4& p, std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
    return p.v[0] == a && p.v[1] == b && p.v[2] == c && p.v[3] == d;
  };
  // counter words 0, 1 are `counter`, 2, 3 are `stream`; the key is `seed`.
  CHECK(is(philox(0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  CHECK(is(philox(~0ull, ~0ull, ~0ull), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  CHECK(is(philox(0x299f31d0a4093822ull, 0x0370734413198a2eull, 0x85a308d3243f6a88ull), 0xd16cfe09, 0x94fdcceb,
           0x5001e420, 0x24126ea1));
}

TEST_CASE("the fill kernel draws engine/rng.h's numbers, on every instruction set") {
  const std::uint64_t seed = 0x123456789abcdef0ull, stream = stream_of("blocks.3.attn");
  const IsaScope restore;
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    Generator rng(seed, stream);
    rng.set_offset((std::uint64_t{1} << 32) - 2);  // the counter's upper word is reached
    const Tensor t = rand_uniform({4099}, rng, 0, 1, f64);
    int wrong = 0;
    for (std::int64_t i = 0; i < 4099; ++i) {
      const auto block = philox(seed, stream, (std::uint64_t{1} << 32) - 2 + static_cast<std::uint64_t>(i / 4));
      if (t.data<double>()[i] != (block.v[i % 4] + 0.5) * 0x1p-32) ++wrong;
    }
    CHECK(wrong == 0);
    CHECK(rng.offset() == (std::uint64_t{1} << 32) - 2 + 1025);
  }
}

TEST_CASE("draws look as they should") {
  Generator rng(1);
  double m = 0, v = 0, skew = 0;
  const auto x = to_vector<double>(rand_normal({1 << 18}, rng, 0, 1, f64));
  for (const double a : x) m += a;
  m /= static_cast<double>(x.size());
  for (const double a : x) v += (a - m) * (a - m), skew += a * a * a;
  CHECK(std::fabs(m) < 0.01);
  CHECK(std::fabs(v / static_cast<double>(x.size()) - 1) < 0.01);
  CHECK(std::fabs(skew / static_cast<double>(x.size())) < 0.03);
}

TEST_CASE("Generator: ranges, resume, logs") {
  Generator rng(7, 9);
  CHECK(rng.reserve(5).offset == 0);
  CHECK(rng.reserve(4).offset == 2);
  CHECK(rng.offset() == 3);
  const Tensor a = rand_uniform({6}, rng);
  rng.set_offset(3);
  CHECK(same_bits(rand_uniform({6}, rng), a));
  rng.reseed(8);
  CHECK(rng.seed() == 8);
  CHECK(rng.offset() == 0);
  Generator other(1);
  {
    const GeneratorLog outer;
    rng.reserve(4);
    {
      const GeneratorLog inner;
      rng.reserve(4);
      rng.reserve(4);
      other.reserve(4);
      REQUIRE(inner.entries().size() == 2);
      CHECK(inner.entries()[0].generator == &rng);
      CHECK(inner.entries()[0].offset == 1);  // its offset at the first use inside
    }
    REQUIRE(outer.entries().size() == 2);
    CHECK(outer.entries()[0].offset == 0);
    CHECK(outer.entries()[1].generator == &other);
  }
  rng.reserve(4);  // no log: nothing to note
}

TEST_CASE("stream_of: FNV-1a") {
  CHECK(stream_of("") == 0xcbf29ce484222325ull);
  CHECK(stream_of("a") == 0xaf63dc4c8601ec8cull);
  CHECK(stream_of("foobar") == 0x85944171f73967e8ull);
}
