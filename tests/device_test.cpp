// Devices: names and refusals, and, on the shim, several devices, callers' streams, uploads
// ahead of their use, running out of memory and giving everything back.
#include <capo/autograd/autograd.h>
#include <capo/engine/backend.h>
#include <capo/engine/stream.h>
#include <capo/models/train/to_device.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/matmul.h>
#include <capo/ops/view.h>
#include <capo/tests/fake_device.h>
#include <capo/tests/tiny_model.h>

#include <doctest/doctest.h>

#include <cmath>

#if defined(CAPO_TEST_SHIM)
#include <capo/tests/shim/device.h>
#endif

using namespace capo;
using namespace capo::testing;

TEST_CASE("a device's name is checked before anything else") {
  CHECK(usable_device("cpu") == kCpu);
  CHECK(parse_device("cuda:1") == Device{DeviceType::cuda, 1});
  for (const char* rubbish : {"", "gpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "cuda:10", "cuda 0", "cpu:0", " cpu"})
    CHECK_MESSAGE(
        starts_with(error_of([&] { usable_device(rubbish); }), "device: must be cpu, cuda, cuda:N or meta, got \""),
        rubbish);
  CHECK(starts_with(error_of([] { usable_device("meta"); }), "device: must be cpu, cuda or cuda:N to compute on"));
  if (!backend())
    CHECK(error_of([] { usable_device("cuda:1"); }) ==
          "device: this build has no CUDA (configure with -DCAPO_CUDA=ON), asked for cuda:1");
}

TEST_CASE("an architecture that is too old is named with what is needed") {
  CHECK(architecture_problem(1, 7, 5) == "cuda:1 is sm_75, this build needs sm_80 or newer");
  CHECK(architecture_problem(0, 8, 0).empty());
  CHECK(architecture_problem(0, 12, 0).empty());
}

TEST_CASE("an OutOfMemory under SavedBytes names who keeps most") {
  FakeDevice source;
  source.limit = 64;
  CachingAllocator memory(source);
  const Tensor x = ones({64, 64});
  set_requires_grad(x, true);
  const std::string path = "blocks.1.mlp";
  const SavedBytes saved;
  Tensor y;
  {
    const ModuleScope scope(&path);
    y = x * x;
  }
  const std::string text = error_of([&] { memory.allocate(4096); });
  CHECK_MESSAGE(contains(text, "; kept for the backward pass so far: 0.0 MiB, 0.0 in blocks.1.mlp"), text);
}

TEST_CASE("batches on the CPU come from the source itself") {
  SyntheticSource source(3, 4), same(3, 4);
  train::ToDevice there(source, kCpu);
  there.seek(1, 2);
  same.seek(1, 2);
  CHECK(bytes_of(there.next().x) == bytes_of(same.next().x));
  CHECK(starts_with(error_of([&] { train::ToDevice(source, kCpu, 0); }),
                    "to_device: prefetch must be in [1, 16], got 0"));
  CHECK(starts_with(error_of([&] { train::ToDevice(source, kMeta); }), "to_device: meta"));
}

namespace {

// Counts, and fails at one batch.
class Failing final : public train::BatchSource {
 public:
  explicit Failing(std::int64_t at) : at_(at) {}
  std::int64_t batches_per_epoch() const override { return 4; }
  void seek(std::int64_t epoch, std::int64_t batch) override { next_ = epoch * 4 + batch; }
  train::Batch next() override {
    ++taken;
    CAPO_CHECK(next_ != at_, "no batch ", next_);
    const auto v = static_cast<double>(next_++);
    return {full({2, 3}, v), full({2}, v, i64), full({2, 4}, v + 0.5)};
  }
  int taken = 0;

 private:
  std::int64_t at_, next_ = 0;
};

void check_batch(train::BatchSource& source, double v) {
  const train::Batch b = source.next();
  CHECK(b.x.device().is_cuda());
  CHECK(to_vector<double>(b.x * 1.0) == std::vector<double>(6, v));
  CHECK(to_vector<double>(b.labels) == std::vector<double>(2, v));
  CHECK(to_vector<double>(b.soft * 2.0) == std::vector<double>(8, 2 * v + 1));
}

}  // namespace

TEST_CASE("batches come to a device in order, ahead of their use, over seeks and errors") {
  if (device_count() == 0) return;
  for (const int prefetch : {1, 3}) {
    Failing source(6);
    train::ToDevice there(source, {DeviceType::cuda, 0}, prefetch);
    for (int i = 0; i < 4; ++i) check_batch(there, i);
    CHECK(source.taken == 4);  // never beyond the epoch
    there.seek(0, 2);
    check_batch(there, 2);
    there.seek(1, 0);
    check_batch(there, 4);
    check_batch(there, 5);
    for (int i = 0; i < 2; ++i) CHECK(error_of([&] { there.next(); }) == "no batch 6");
    there.seek(1, 3);
    check_batch(there, 7);
    there.seek(1, 1);
    check_batch(there, 5);
  }
}

#if defined(CAPO_TEST_SHIM)

namespace {
constexpr Device kFirst{DeviceType::cuda, 0}, kSecond{DeviceType::cuda, 1};
}

TEST_CASE("shim: a machine without a usable device says why") {
  const shim::DeviceSettingsScope scope;
  shim::device_settings().devices = 0;
  shim::device_settings().why_none = "no CUDA-capable device is detected";
  CHECK(error_of([] { usable_device("cuda"); }) ==
        "device: no usable CUDA device, asked for cuda:0: no CUDA-capable device is detected");
  shim::device_settings().devices = 1;
  CHECK(error_of([] { usable_device("cuda:1"); }) == "device: there are 1 CUDA devices, asked for cuda:1");
}

TEST_CASE("shim: work goes to the tensors' device, and tensors between devices") {
  const shim::DeviceSettingsScope scope;
  shim::device_settings().devices = 2;
  const std::int64_t first = device_memory(kFirst).blocks.live_bytes, second = device_memory(kSecond).blocks.live_bytes;
  const Tensor a = to(from_vector<float>({1, 2, 3, 4}, {2, 2}), kSecond);
  const Tensor b = matmul(a, a) + a;
  CHECK(shim::current_device() == 1);
  CHECK(b.device() == kSecond);
  CHECK(device_memory(kSecond).blocks.live_bytes == second + 128);
  CHECK(device_memory(kFirst).blocks.live_bytes == first);
  const Tensor c = to(b, kFirst) * 2.0;
  CHECK(shim::current_device() == 0);
  CHECK(to_vector<float>(c) == std::vector<float>{16, 24, 36, 52});
  const std::string text = error_of([&] { c + b; });
  CHECK(contains(text, "cuda:0"));
  CHECK(contains(text, "cuda:1"));
}

TEST_CASE("shim: a caller's stream has the work and the memory of its scope, in order") {
  const shim::DeviceSettingsScope settings;
  shim::device_settings().caching = true;
  DeviceBackend& b = *backend();
  void* const own = b.stream(0);
  char name = 0;
  void* kept = nullptr;
  Tensor y;
  {
    const StreamScope scope(kFirst, &name);
    CHECK(b.stream(0) == &name);
    {
      const StreamScope inner(kFirst, nullptr);
      CHECK(b.stream(0) == own);
    }
    CHECK(b.stream(0) == &name);
    const Tensor x = full({3}, 2.0, f32, kFirst);
    y = x + x;
    kept = x.data();
  }
  CHECK(b.stream(0) == own);
  CHECK(to_vector<float>(y) == std::vector<float>{4, 4, 4});
  CHECK(empty({3}, f32, kFirst).data() == kept);  // the scope's memory is the library's again
  const StreamScope nothing(kCpu, &name);         // no streams there
  y = Tensor();
  release_memory(kFirst);
}

TEST_CASE("shim: an upload that nobody waits for has not arrived") {
  DeviceBackend& b = *backend();
  const Tensor there = empty({4}, f32, kFirst);
  auto* from = static_cast<float*>(b.pinned().allocate(16));
  for (int i = 0; i < 4; ++i) from[i] = static_cast<float>(i);
  b.copy_async(0, b.copy_stream(0), there.data(), from, 16);
  CHECK(shim::waiting_copies() == 1);
  CHECK(std::isnan(to_vector<float>(there * 1.0)[1]));
  const StreamMark arrived(kFirst, b.copy_stream(0));
  CHECK(std::isnan(to_vector<float>(there * 1.0)[1]));
  arrived.wait();
  CHECK(to_vector<float>(there * 1.0) == std::vector<float>{0, 1, 2, 3});
  CHECK(shim::waiting_copies() == 0);
  b.pinned().release(from, 16);
  CHECK(device_memory(kFirst).pinned > 0);
  release_memory(kFirst);
  CHECK(device_memory(kFirst).pinned == 0);
}

TEST_CASE("shim: with little memory the cache goes first, then the error counts; all but live tensors goes back") {
  const shim::DeviceSettingsScope scope;
  shim::device_settings().caching = true;
  release_memory(kFirst);
  const std::size_t before = shim::used_bytes(0);
  shim::device_settings().limit = before + (1 << 20);
  Tensor a = full({1 << 17}, 1.0, f32, kFirst);       // half of it
  a = Tensor();
  CHECK(device_memory(kFirst).blocks.cached_bytes == 1 << 19);
  Tensor b = full({3 << 16}, 1.0, f32, kFirst);       // three quarters: needs the cached half
  CHECK(device_memory(kFirst).blocks.cached_bytes == 0);
  const std::string text = error_of([&] { full({1 << 17}, 1.0, f32, kFirst); });
  CHECK_MESSAGE(
      starts_with(text,
                  "cuda:0 allocator: 524288 bytes asked (0.5 MiB), the system has no room, 786432 bytes are in use"),
      text);
  CHECK_MESSAGE(contains(text, "; 262144 bytes of the device are free"), text);
  CHECK(device_memory(kFirst).free == 262144);
  const void* const scratch = backend()->workspace(0, backend()->stream(0), 65536);
  CHECK(backend()->workspace(0, backend()->stream(0), 1000) == scratch);
  CHECK(device_memory(kFirst).workspace == 65536);
  CHECK(device_memory(kFirst).blocks.live_bytes == 786432);
  b = Tensor();
  CHECK(shim::used_bytes(0) == before + 786432 + 65536);
  release_memory(kFirst);
  CHECK(shim::used_bytes(0) == before);
  CHECK(to_vector<float>(full({2}, 3.0, f32, kFirst)) == std::vector<float>{3, 3});  // and on it goes
  release_memory(kFirst);
}

TEST_CASE("shim: a training step without room names what it holds, by module, and the plan") {
  const shim::DeviceSettingsScope scope;
  shim::device_settings().caching = true;
  release_memory(kFirst);
  TinyMlp model({.seed = 1, .device = kFirst});
  train::ClassifierOf classifier(model);
  train::ClassificationTask task(classifier);
  SyntheticSource host(2, 64);
  train::ToDevice data(host, kFirst);
  train::TrainOptions o;
  o.memory_plan = "the plan of the run\n";
  train::Trainer trainer(task, data, nullptr, o);
  data.next();
  release_memory(kFirst);
  shim::device_settings().limit = shim::used_bytes(0) + 12000;
  const std::string text = error_of([&] { trainer.run(); });
  INFO(text);
  CHECK(starts_with(text, "cuda:0 allocator: "));
  CHECK(contains(
      text, "\ntrain: no memory in step 0 (epoch 0, batch 0)\nheld on cuda:0: weights 0.0 MiB, optimizer 0.0 MiB"));
  CHECK(contains(text, "\nkept for the backward pass when the forward ran out of memory: "));
  CHECK(contains(text, "\n  fc1 "));
  CHECK(contains(text, "\nplanned:\nthe plan of the run\n"));
}

#endif
