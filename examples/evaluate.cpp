// Judges a classifier with given weights on a data set's test images:
//   evaluate --model resnet20 --weights resnet20-cifar10.safetensors --data cifar10
//   evaluate --model vit --weights weights/vit_ti_p8_32.safetensors --data tinyimagenet32
// Prints top-1, top-5, log loss, calibration and what is mistaken for what.
#include <capo/datasets/open.h>
#include <capo/engine/threads.h>
#include <capo/examples/judge.h>
#include <capo/examples/show_log.h>
#include <capo/models/train/metrics.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

using namespace capo;

namespace {

void print_calibration(const train::Calibration& c) {
  std::printf("calibration error (15 bins): expected %.2f %%, greatest %.2f %%\n  confidence  accuracy   images\n",
              100 * c.ece, 100 * c.mce);
  for (const auto& bin : c.bins)
    if (bin.count > 0)
      std::printf("    %6.2f %%  %6.2f %%  %7lld\n", 100 * bin.confidence, 100 * bin.accuracy,
                  static_cast<long long>(bin.count));
}

void print_confusion(const Tensor& matrix, const std::vector<std::string>& names) {
  const auto m = to_vector<std::int64_t>(matrix);
  const std::size_t k = names.size();
  if (k <= 20) {
    std::printf("rows: the truth, columns: taken for\n");
    for (std::size_t i = 0; i < k; ++i) {
      std::printf("%12.12s", names[i].c_str());
      for (std::size_t j = 0; j < k; ++j) std::printf(" %5lld", static_cast<long long>(m[i * k + j]));
      std::printf("\n");
    }
  }
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < k * k; ++i)
    if (i / k != i % k && m[i] > 0) order.push_back(i);
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return m[a] > m[b]; });
  for (std::size_t i = 0; i < order.size() && i < 5; ++i)
    std::printf("%s taken for %s: %lld times\n", names[order[i] / k].c_str(), names[order[i] % k].c_str(),
                static_cast<long long>(m[order[i]]));
}

}  // namespace

int main(int argc, char** argv) try {
  examples::JudgeOptions o{.model = "resnet20"};
  std::string data = "cifar10", split = "test";
  int threads = 0;
  CLI::App app("Judges a classifier on test images");
  app.option_defaults()->always_capture_default();
  examples::add_options(app, o);
  app.add_option("--data", data, "cifar10, cifar100, tinyimagenet32, flowers64, fashion-mnist or an image folder");
  app.add_option("--split", split, "test or train");
  app.add_option("--threads", threads, "0: all processors, or CAPO_THREADS")->check(CLI::NonNegativeNumber);
  if (const int code = examples::read_command_line(app, argc, argv); code >= 0) return code;
  examples::show_log();
  if (threads > 0) set_num_threads(threads);

  const DatasetPtr set = open_dataset(data, "", split);
  const examples::Judge judge(o);
  const auto [z, y] = judge(set);
  CAPO_CHECK(z.size(1) == set->num_classes(), o.weights, ": gives ", z.size(1), " classes, ", set->name(), " has ",
             set->num_classes());
  const double top1 = train::top_k_accuracy(z, y, 1), top5 = train::top_k_accuracy(z, y, 5),
               loss = train::mean_log_loss(z, y);
  const train::Calibration calibrated = train::calibration(z, y);
  std::printf("%s on %s: %lld images, top-1 %.2f %%, top-5 %.2f %%, log loss %.4f\n", o.model.c_str(),
              set->name().c_str(), static_cast<long long>(set->size()), 100 * top1, 100 * top5, loss);
  print_calibration(calibrated);
  print_confusion(train::confusion_matrix(z, y), set->class_names());
  // Shares of ten thousand images are whole hundredths: printed as such.
  const auto percent = [](double share) { return std::round(share * 1e6) / 1e4; };
  const nlohmann::json line{{"example", "evaluate"}, {"model", o.model}, {"data", data},
                            {"images", set->size()}, {"top1", percent(top1)}, {"top5", percent(top5)},
                            {"log_loss", loss}, {"ece", percent(calibrated.ece)}, {"device", to_string(judge.device)}};
  std::printf("RESULT %s\n", line.dump().c_str());
} catch (const std::exception& e) {
  std::fprintf(stderr, "evaluate: %s\n", e.what());
  return 1;
}
