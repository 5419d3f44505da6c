// Bugs planted in a kernel are found on the way that the samples of every op take: check "device" of tests/op_checks.h.
// Linked twice: with ASan and UBSan (planted_kernels_test), with the race checker (race_planted_kernels_test).
#include <capo/engine/tensor.h>
#include <capo/tests/op_test.h>
#include <capo/tests/shim/control.h>
#include <capo/tests/shim/planted.h>
#include <capo/tests/shim/report.h>
#include <capo/tests/support.h>

#include <doctest/doctest.h>


using namespace capo;
using namespace capo::test;
using capo::planted::Bug;
using capo::planted::kThreads;
using capo::testing::contains;
using capo::testing::report_of;

namespace {

const bool kRace = shim::orders().size() == 1;
constexpr std::int64_t kBlocks = 3;

template <class T>
void mirror_on_cpu(const T* x, T* y) {
  for (std::int64_t i = 0; i < kBlocks * kThreads; ++i) y[i] = x[i / kThreads * kThreads + kThreads - 1 - i % kThreads];
}

// An op like any other: y = x with every run of kThreads elements backwards.
template <Bug bug>
Tensor mirror(const Tensor& x) {
  const Tensor y = empty_like(x);
  if (x.device().is_cuda())
    planted::mirror(bug, x.data<float>(), y.data<float>(), kBlocks);
  else if (x.dtype() == f64)
    mirror_on_cpu(x.data<double>(), y.data<double>());
  else
    mirror_on_cpu(x.data<float>(), y.data<float>());
  return y;
}

// What check "device" says of the op with this bug: "" or its failures.
template <Bug bug>
std::string failures() {
  const Fn run = [](const Tensors& in) { return Tensors{mirror<bug>(in[0])}; };
  Sample sample{"sample", {normal({kBlocks, kThreads}, "x")}, run, run};
  sample.gradient = sample.half = false;
  std::string all;
  for (const std::string& text : check_case({"mirror", {sample}, {}}, "device")) all += text + "\n";
  return all;
}

void reported(const std::string& text, const char* part) {
  CAPTURE(text);
  CHECK(contains(text, "[device]"));
  CHECK(contains(text, part));
}

}  // namespace

TEST_CASE("a sound kernel passes check device") { CHECK(failures<Bug::none>() == ""); }

TEST_CASE("wrong shuffle mask") { reported(failures<Bug::wrong_mask>(), "which this lane is not in"); }

TEST_CASE("divergence, early exit") {
  reported(failures<Bug::divergent_shuffle>(), "no thread can run");
  reported(failures<Bug::divergent_barrier>(), "divergent __syncthreads");
  reported(failures<Bug::early_exit>(), "leaves while thread 0");
}

TEST_CASE("missing barrier, missing wait for cp.async") {
  reported(failures<Bug::no_barrier>(), kRace ? "tile" : "f32");
  reported(failures<Bug::no_wait>(), kRace ? "a cp.async into it has not been waited for" : "f32");
}

TEST_CASE("unwritten output") { reported(failures<Bug::unwritten>(), kRace ? "never written" : "nan"); }

TEST_CASE("wrong index") {
  if (kRace) return reported(failures<Bug::global_index>(), "outside of it");
  for (const std::string& text : {report_of(failures<Bug::global_index>), report_of(failures<Bug::shared_index>),
                                  report_of(failures<Bug::carved_index>)}) {
    CAPTURE(text);
    CHECK((contains(text, "AddressSanitizer") || contains(text, "out of bounds")));
    CHECK(contains(text, "planted.cu"));
  }
}

TEST_CASE("what only the race checker sees") {
  if (!kRace) return;
  reported(failures<Bug::no_syncwarp>(), "race with the");
  reported(failures<Bug::shared_word>(), "race with the");
  reported(failures<Bug::other_block>(), "another block");
}
