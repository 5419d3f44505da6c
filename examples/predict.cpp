// Names what is in a picture, with a tuner that `tune` saved:
//   predict --tuner out/tune/tuner image.jpg
#include <capo/datasets/augment.h>
#include <capo/engine/backend.h>
#include <capo/examples/backbone.h>
#include <capo/examples/command_line.h>
#include <capo/examples/show_log.h>
#include <capo/ops/copy.h>
#include <capo/ops/softmax.h>
#include <capo/tuners/artifact.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

using namespace capo;

namespace {

// The tuned model's class probabilities.
template <class M>
Tensor probabilities(const tuners::TunerCard& card, const std::string& folder, const std::string& weights,
                     const Tensor& x) {
  using B = examples::Backbone<M>;
  const auto config = B::config_from_json(card.model, folder);
  const auto loaded = B::open(weights, config.classes, static_cast<int>(x.size(1)), {.device = x.device()});
  tuners::load_tuner(folder, *loaded.model);
  const NoGrad off;
  return softmax((*loaded.model)(x));
}

}  // namespace

int main(int argc, char** argv) try {
  std::string folder, picture, weights, device_name = "cpu";
  int top = 5;
  CLI::App app("Top classes of a picture under a saved tuner");
  app.option_defaults()->always_capture_default();
  app.add_option("--tuner", folder, "folder that tune wrote")->required();
  app.add_option("image", picture, "PNG or JPEG file")->required();
  app.add_option("--weights", weights, "base weights; default: the file that the tuner was trained on");
  app.add_option("--top", top, "how many classes to print")->check(CLI::Range(1, 1000));
  app.add_option("--device", device_name, "cpu, cuda or cuda:N");
  if (const int code = examples::read_command_line(app, argc, argv); code >= 0) return code;
  examples::show_log();
  const Device device = usable_device(device_name);

  const tuners::TunerCard card = tuners::read_tuner_card(folder);
  if (weights.empty() && card.notes.count("weights")) weights = card.notes.at("weights");
  const Preprocess preprocess = preprocess_from_json(card.preprocess, folder);
  const Image image = eval_image(load_image(picture), preprocess);
  const Tensor x = empty({1, preprocess.size, preprocess.size, 3});
  normalize_into(x.data<float>(), image, preprocess);

  const std::string family = card.notes.count("family") ? card.notes.at("family") : "vit";
  const std::vector<float> p = to_vector<float>(
      examples::with_family(family, [&]<class M>() { return probabilities<M>(card, folder, weights, to(x, device)); }));
  std::vector<std::size_t> order(p.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return p[a] > p[b]; });
  nlohmann::json result = nlohmann::json::array();
  for (std::size_t k = 0; k < order.size() && k < static_cast<std::size_t>(top); ++k) {
    const std::size_t c = order[k];
    const std::string name = c < card.classes.size() ? card.classes[c] : std::to_string(c);
    std::printf("%5.1f %%  %s\n", 100.0 * static_cast<double>(p[c]), name.c_str());
    result.push_back({{"class", name}, {"probability", p[c]}});
  }
  std::printf("RESULT %s\n", result.dump().c_str());
} catch (const std::exception& e) {
  std::fprintf(stderr, "predict: %s\n", e.what());
  return 1;
}
