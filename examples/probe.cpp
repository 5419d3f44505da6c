// A linear probe: what a frozen network's outputs tell about other classes.
//   probe --model mobilenet_v2 --weights mobilenetv2-imagenet-int8.safetensors --data flowers64 --image 160
// The recipe: images resized (bicubic) to --image pixels and taken through the network once; each of its outputs
// standardised by the training images' mean and deviation; multinomial logistic regression with the penalty P/2 |W|^2
// on the mean loss, from zeros, by full-batch gradient steps with Nesterov's momentum 0.9 and the rate 1 / (L/2 + P), L
// the greatest eigenvalue of the outputs' correlation matrix (power iteration). P, unless told: the best of kPenalties
// on a fifth of each class's training images by the other four fifths. The test images are looked at once.
#include <capo/datasets/open.h>
#include <capo/datasets/subset.h>
#include <capo/engine/threads.h>
#include <capo/examples/judge.h>
#include <capo/examples/show_log.h>
#include <capo/models/train/metrics.h>
#include <capo/ops/binary.h>
#include <capo/ops/cross_entropy.h>
#include <capo/ops/matmul.h>
#include <capo/ops/reduce.h>
#include <capo/ops/stats.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

using namespace capo;

namespace {

constexpr double kPenalties[] = {0.3, 0.1, 0.03, 0.01, 0.003};

struct Probe : nn::Layer<Probe> {
  Probe(std::int64_t dim, int classes)
      : Layer(nn::Build{}), head(this, "head", dim, classes, nn::Init::zero(), nn::Init::zero()) {}
  Tensor forward(const Tensor& x) { return head(x); }
  nn::Head head;
};

// Of x^T x / n.
double greatest_eigenvalue(const Tensor& x) {
  const NoGrad off;
  Tensor v = full({x.size(1), 1}, 1.0 / static_cast<double>(x.size(1)), f32);
  double length = 0;
  for (int i = 0; i < 50; ++i) {
    v = matmul(transpose(x, 0, 1), matmul(x, v)) * (1.0 / static_cast<double>(x.size(0)));
    length = std::sqrt(sum(square(v)).item());
    v = v * (1 / length);
  }
  return length;
}

// The mean loss of the last step, before it.
double fit(Probe& probe, const Tensor& x, const Tensor& y, double penalty, int steps) {
  train::Sgd optimizer(probe,
                       {.momentum = 0.9, .nesterov = true, .weight_decay = penalty, .rules = {{"head.bias", 1, 0}}});
  const double rate = 1 / (greatest_eigenvalue(x) / 2 + penalty);
  double last = 0;
  for (int i = 0; i < steps; ++i) {
    const Tensor loss = cross_entropy(probe(x), y);
    last = loss.item();
    backward(loss);
    optimizer.step(rate);
    optimizer.zero_grad();
  }
  return last;
}

struct Outputs {
  Tensor x, y;
};

struct Accuracy {
  double top1, top5, loss;
};

// Of a probe trained on `seen`, by whose mean and deviation both are standardised, on `asked`.
Accuracy probe_accuracy(const Outputs& seen, const Outputs& asked, int classes, double penalty, int steps) {
  const Tensor centre = mean(seen.x, {0}, true), scale = rsqrt(var(seen.x, {0}, true, 0) + 1e-12);
  Probe probe(seen.x.size(1), classes);
  const double loss = fit(probe, (seen.x - centre) * scale, seen.y, penalty, steps);
  const NoGrad off;
  const Tensor z = probe((asked.x - centre) * scale);
  return {100 * train::top_k_accuracy(z, asked.y, 1), 100 * train::top_k_accuracy(z, asked.y, 5), loss};
}

// Where two are as good, the greater.
double best_penalty(const Outputs& seen, const Outputs& held_out, int classes, int steps) {
  double best = 0, best_top1 = -1;
  for (double penalty : kPenalties) {
    const double top1 = probe_accuracy(seen, held_out, classes, penalty, steps).top1;
    std::printf("penalty %g: %.2f %% of %lld held-out training images\n", penalty, top1,
                static_cast<long long>(held_out.y.size(0)));
    if (top1 > best_top1) best = penalty, best_top1 = top1;
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) try {
  examples::JudgeOptions o{.model = "mobilenet_v2", .image = 160, .batch = 50};
  std::string data = "flowers64";
  int threads = 0, steps = 300;
  double penalty = 0;
  CLI::App app("A linear probe on a frozen network's outputs");
  app.option_defaults()->always_capture_default();
  examples::add_options(app, o);
  app.get_option("--image")->description("images are resized to this side, whole; 0: as the preprocessing says");
  app.add_option("--data", data, "flowers64, cifar10, cifar100, tinyimagenet32 or an image folder");
  app.add_option("--penalty", penalty, "P; 0: chosen on held-out training images")->check(CLI::NonNegativeNumber);
  app.add_option("--steps", steps)->check(examples::at_least_one());
  app.add_option("--threads", threads, "0: all processors, or CAPO_THREADS")->check(CLI::NonNegativeNumber);
  if (const int code = examples::read_command_line(app, argc, argv); code >= 0) return code;
  examples::show_log();
  if (threads > 0) set_num_threads(threads);

  const auto begin = std::chrono::steady_clock::now();
  const DatasetPtr train_set = open_dataset(data, "", "train"), test_set = open_dataset(data, "", "test");
  examples::Judge judge(o);
  if (o.image > 0) judge.preprocess.crop_pct = 1;
  const auto outputs = [&](const DatasetPtr& set) {
    const examples::Judged judged = judge(set);
    return Outputs{judged.logits, judged.labels};
  };
  const auto [most, rest] = split_dataset(train_set, 0.2, 1);
  const Outputs of_most = outputs(most), of_rest = outputs(rest), test = outputs(test_set);
  const int classes = train_set->num_classes();
  if (penalty == 0) penalty = best_penalty(of_most, of_rest, classes, steps);
  const Outputs all{concat({of_most.x, of_rest.x}, 0), concat({of_most.y, of_rest.y}, 0)};
  const auto [top1, top5, loss] = probe_accuracy(all, test, classes, penalty, steps);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf(
      "%s on %s at %d px: %lld outputs, %lld training images, loss %.4f; test top-1 %.2f %%, top-5 %.2f %% of %lld "
      "(%.0f s)\n",
      o.model.c_str(), data.c_str(), judge.preprocess.size, static_cast<long long>(all.x.size(1)),
      static_cast<long long>(all.x.size(0)), loss, top1, top5, static_cast<long long>(test_set->size()), seconds);
  const nlohmann::json line{{"example", "probe"}, {"model", o.model}, {"data", data}, {"image", judge.preprocess.size},
                            {"penalty", penalty}, {"steps", steps}, {"top1", top1}, {"top5", top5}};
  std::printf("RESULT %s\n", line.dump().c_str());
} catch (const std::exception& e) {
  std::fprintf(stderr, "probe: %s\n", e.what());
  return 1;
}
