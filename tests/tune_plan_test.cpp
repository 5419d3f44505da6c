// The plan of examples/tune: an evaluation never sets the peak; what convolutional tuners hold beside full fine-tuning.
#include <doctest/doctest.h>

#include <capo/examples/tune_plan.h>
#include <capo/models/mobilenet/mobilenet.h>
#include <capo/models/resnet/resnet.h>
#include <capo/tests/support.h>
#include <capo/tuners/presets.h>

#include <string>
#include <vector>

using namespace capo;

namespace {

constexpr std::int64_t kBatch = 16;

std::string spec_of(const char* method) { return tuners::find_method(method)->spec; }

// Every tuner of docs/results.md.
template <class M, class Config>
void check_table(const Config& config, int side, const std::vector<const char*>& methods) {
  const examples::TunePlan full = examples::plan_steps<M>(config, side, spec_of("full"), kBatch, 10000);
  for (const char* method : methods) {
    CAPTURE(method);
    CHECK(examples::plan_steps<M>(config, side, spec_of(method), kBatch, 10000).memory.peak < full.memory.peak);
  }
  const examples::TunePlan linear =
      examples::plan_heads<M>(config, side, spec_of("linear"), kBatch, 10000, {5000, 1000});
  CHECK(linear.memory.peak < full.memory.peak);
  CHECK(linear.at_once > kBatch / 2);
}

}  // namespace

TEST_CASE("an evaluation holds no more than a step does") {
  const resnet::ResnetConfig config = resnet::config("resnet20", 10);
  for (const char* method : {"conv-lora", "residual-adapter", "bitfit", "full"}) {
    CAPTURE(method);
    const std::string spec = spec_of(method);
    const auto model = [&](const nn::Build& build) { return examples::planned<resnet::Resnet>(config, spec, build); };
    const std::int64_t step = train::plan_memory(model, {kBatch, 32, 32, 3}).peak;
    const examples::TunePlan plan = examples::plan_steps<resnet::Resnet>(config, 32, spec, kBatch, 10000);
    CHECK(plan.at_once >= kBatch);
    CHECK(plan.memory.peak == step);
    CHECK(train::plan_memory(model, {kBatch, 32, 32, 3}, {.evaluation_batch = 250}).peak >
          step);  // or this shows nothing
    CHECK(train::plan_memory(model, {kBatch, 32, 32, 3}, {.evaluation_batch = plan.at_once, .device = kCpu}).peak <=
          step + 64);  // a number's block
  }
  CHECK(examples::plan_steps<resnet::Resnet>(config, 32, spec_of("full"), kBatch, 7).at_once == 7);
  const auto of_features = [&](std::int64_t images) {
    return examples::plan_heads<resnet::Resnet>(config, 32, spec_of("linear"), kBatch, 10000, {images});
  };
  CHECK(of_features(1000).at_once > of_features(60000).at_once);
  CHECK(of_features(10000000).at_once == kBatch);
  CHECK(examples::plan_steps<resnet::Resnet>(config, 224, spec_of("full"), kBatch, 10000).at_once == 8);
}

TEST_CASE("a convolutional tuner holds less than full fine-tuning") {
  check_table<resnet::Resnet>(resnet::config("resnet56", 100), 32, {"bitfit", "norm", "conv-lora", "residual-adapter"});
  mobilenet::MobilenetConfig v2{.classes = 100, .norms = false, .pad_after_only = true};
  check_table<mobilenet::Mobilenet>(v2, 96, {"bitfit", "conv-lora", "residual-adapter"});
  check_table<mobilenet::Mobilenet>(v2, 128, {"bitfit", "conv-lora", "residual-adapter"});
}
