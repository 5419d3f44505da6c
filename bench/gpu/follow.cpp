// The same training on two devices: 100 steps of a ViT-Ti from one seed on the same images, losses side by side.
//   bench_gpu_follow [--device cuda] [--steps 100] [--dtype f32]; --device cpu --tiny compares the CPU with itself
// The CPU always runs in f32. f32 on the device must stay within 1 % of the CPU's loss (of 0.1, below that) at every
// step.
#include <capo/autograd/autograd.h>
#include <capo/bench/gpu/harness.h>
#include <capo/models/train/optim.h>
#include <capo/models/vit/vit.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>

using namespace capo;
using namespace capo::bench;

namespace {

constexpr std::int64_t kClasses = 20;

// Batches that can be learned: one fixed pattern a class, under noise.
struct Images {
  std::vector<Tensor> x, labels;
};
Images make_images(int batches, std::int64_t batch) {
  Generator rng(7);
  const Tensor patterns = rand_normal({kClasses, 32 * 32 * 3}, rng);
  const auto pattern = to_vector<float>(patterns);
  Images images;
  for (int i = 0; i < batches; ++i) {
    auto x = to_vector<float>(rand_normal({batch, 32 * 32 * 3}, rng));
    std::vector<std::int64_t> labels;
    for (std::int64_t n = 0; n < batch; ++n) {
      labels.push_back((n * 7 + i) % kClasses);
      for (std::int64_t j = 0; j < 32 * 32 * 3; ++j)
        x[static_cast<std::size_t>(n * 3072 + j)] += 0.2f * pattern[static_cast<std::size_t>(labels.back() * 3072 + j)];
    }
    images.x.push_back(from_vector(x, {batch, 32, 32, 3}));
    images.labels.push_back(from_vector(labels, {batch}));
  }
  return images;
}

std::vector<double> losses(const Images& images, const vit::VitConfig& config, DType dtype, Device device, int steps) {
  vit::Vit model(config, {.seed = 3, .dtype = dtype, .device = device});
  model.train();
  train::AdamW optimizer(model);
  std::vector<Tensor> x, labels, each;
  for (std::size_t i = 0; i < images.x.size(); ++i) {
    x.push_back(to(cast(images.x[i], dtype), device));
    labels.push_back(to(images.labels[i], device));
  }
  for (int i = 0; i < steps; ++i) {
    const std::size_t at = static_cast<std::size_t>(i) % x.size();
    const Tensor loss = cross_entropy(cast(model(x[at]), f32), labels[at]);
    backward(loss);
    optimizer.step(1e-3 * std::min(1.0, (i + 1) / 20.0));
    optimizer.zero_grad();
    each.push_back(loss.detach());
  }
  std::vector<double> values;
  for (const Tensor& l : each) values.push_back(l.item());
  return values;
}

void body(Options o) {
  const DType dtype = o.device.is_cuda() ? (o.value("--dtype", "f32") == "f32" ? f32 : bf16) : f32;
  const int steps = std::atoi(o.value("--steps", o.tiny ? "3" : "100").c_str());
  o.no_more();
  vit::VitConfig config = vit::config("vit_ti", 32, 8, static_cast<int>(kClasses));
  if (o.tiny) config.depth = 2;
  const Images images = make_images(o.tiny ? 1 : 8, o.tiny ? 4 : 64);
  const auto there = losses(images, config, dtype, o.device, steps), here = losses(images, config, f32, kCpu, steps);
  double worst = 0;
  int at = 0;
  for (int i = 0; i < steps; ++i) {
    const std::size_t n = static_cast<std::size_t>(i);
    const double difference = std::isfinite(there[n]) ? std::fabs(there[n] - here[n]) / std::max(here[n], 0.1) : 1e9;
    if (difference > worst) worst = difference, at = i;
  }
  std::printf("loss %.4f to %.4f on the CPU, %.4f to %.4f on %s in %s; apart by at most %.3f %% (step %d)\n",
              here.front(), here.back(), there.front(), there.back(), to_string(o.device).c_str(),
              to_string(dtype).c_str(), 100 * worst, at);
  print_result({{"bench", "follow"}, {"device", to_string(o.device)}, {"dtype", to_string(dtype)}, {"tiny", o.tiny},
                {"steps", steps}, {"worst", worst}, {"worst_step", at}, {"cpu", here}, {"losses", there}});
  CAPO_CHECK(dtype != f32 || worst <= 0.01, "follow: the losses part by ", 100 * worst, " % in step ", at);
}

}  // namespace

int main(int argc, char** argv) { return guarded(argc, argv, body); }
