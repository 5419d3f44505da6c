// Neural dependencies: how well a category's logit is a combination of a few others', in one network and between two.
//   dependencies --model resnet20 --weights a.safetensors --other vit --other-weights b.safetensors --data cifar100
// Coefficients come from training images (CovLasso, then least squares on the categories it chose); what is kept is
// judged on test images: the recall of a category whose logit is replaced. Writes the graph and the curve as pictures.
#include <capo/datasets/open.h>
#include <capo/datasets/plot.h>
#include <capo/datasets/png.h>
#include <capo/datasets/subset.h>
#include <capo/examples/command_line.h>
#include <capo/examples/dependency_pictures.h>
#include <capo/examples/dependency_study.h>
#include <capo/examples/judge.h>
#include <capo/examples/show_log.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>

using namespace capo;

namespace {

examples::Table table_of(const DatasetPtr& set, const examples::Judge& a, const examples::Judge& b) {
  const examples::Judged left = a(set), right = b(set);
  return {to_vector<float>(concat({left.logits, right.logits}, 1)), to_vector<std::int64_t>(left.labels),
          set->num_classes()};
}

}  // namespace

int main(int argc, char** argv) try {
  std::string name = "resnet20", weights, other = "vit", other_weights, data = "cifar100", out = "out/dependencies";
  std::int64_t fit_images = 10000;
  int max_support = 20;
  CLI::App app("Categories as combinations of others: CovLasso on two networks' logits");
  app.option_defaults()->always_capture_default();
  app.add_option("--model", name, std::string("the first network: vit (any), or ") + examples::kModelNames);
  app.add_option("--weights", weights, "its safetensors")->required();
  app.add_option("--other", other, "the second network, trained independently");
  app.add_option("--other-weights", other_weights, "its safetensors")->required();
  app.add_option("--data", data, "cifar10, cifar100, tinyimagenet32, flowers64, fashion-mnist or an image folder");
  app.add_option("--fit-images", fit_images, "training images to fit on")->check(examples::at_least_one());
  app.add_option("--max-support", max_support, "categories a logit may be made of")->check(examples::at_least_one());
  app.add_option("--out", out, "folder of the pictures and the report");
  if (const int code = examples::read_command_line(app, argc, argv); code >= 0) return code;
  examples::show_log();
  std::filesystem::create_directories(out);
  const examples::Judge a({.model = name, .weights = weights, .workers = 2}),
      b({.model = other, .weights = other_weights, .workers = 2});
  const DatasetPtr test_set = open_dataset(data, "", "test");
  const examples::Table fit = table_of(balanced_subset(open_dataset(data, "", "train"), fit_images, 0), a, b),
                        test = table_of(test_set, a, b);
  const int k = test.categories;
  dependencies::Moments moments(2 * k);
  moments.add(fit.z.data(), static_cast<std::int64_t>(fit.label.size()));
  const dependencies::Matrix c = moments.covariance();

  const std::string inside_a = name + " from itself", inside_b = other + " from itself",
                    a_of_b = name + " from " + other, b_of_a = other + " from " + name;
  struct Case { std::string name; int first, candidates; };
  const Case cases[] = {{inside_a, 0, 0}, {inside_b, k, k}, {a_of_b, 0, k}, {b_of_a, k, 0}};
  std::vector<Series> curves;
  nlohmann::json result{{"example", "dependencies"}, {"data", data}, {"max_support", max_support}};
  std::string report = "case,category,recall kept,relative error,made of\n";
  std::printf("%-24s %10s %12s %14s %16s\n", "", "keep 90 %", "mean kept", "relative error", "least possible");
  for (const Case& one : cases) {
    const examples::Summary s = examples::analyse(c, moments.mean(), test, one.first, one.candidates, max_support);
    const double mean_kept = std::accumulate(s.kept.begin(), s.kept.end(), 0.0) / k;
    std::printf("%-24s %8.0f %% %10.1f %% %14.4f %16.4f\n", one.name.c_str(), 100 * s.keeping, 100 * mean_kept, s.error,
                s.floor);
    curves.push_back({.name = one.name, .y = s.curve});
    for (std::size_t i = 0; i < s.found.size(); ++i) {
      report += cat(one.name, ",", test_set->class_names()[i], ",", s.kept[i], ",", s.found[i].error);
      for (std::size_t j = 0; j < s.found[i].support.size(); ++j)
        report += cat(",", s.found[i].theta[j], " ",
                      test_set->class_names()[static_cast<std::size_t>(s.found[i].support[j] % k)]);
      report += "\n";
    }
    result[one.name] = {{"categories_keeping_90", s.keeping}, {"recall_kept", mean_kept},
                        {"relative_error", s.error}, {"least_error", s.floor}};
    if (one.first == one.candidates)
      write_png(out + (one.first == 0 ? "/graph.png" : "/graph_other.png"),
                examples::dependency_graph(s.found, test_set->class_names()));
  }
  write_png(out + "/kept.png", plot(curves, {.title = "Recall kept by a category made of others",
                                             .x_label = "categories it is made of",
                                             .y_label = "recall, share of before", .y_min = 0, .y_max = 1.1}));
  write_file_atomic(out + "/report.csv", report);
  std::printf("%s/graph.png, graph_other.png, kept.png, report.csv\nRESULT %s\n", out.c_str(), result.dump().c_str());
} catch (const std::exception& e) {
  std::fprintf(stderr, "dependencies: %s\n", e.what());
  return 1;
}
