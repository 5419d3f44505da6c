// Residual networks: names and counts of the published families, configurations, files, taps, norms folded away.
// Values against PyTorch: conv_golden_test.cpp.
#include <doctest/doctest.h>

#include <capo/models/nn/batch_norms.h>
#include <capo/models/resnet/resnet.h>
#include <capo/models/train/ema.h>
#include <capo/models/train/precise_norms.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/tests/every_tap.h>
#include <capo/tests/golden_rule.h>
#include <capo/tests/op_test.h>
#include <capo/tests/temp_folder.h>

#include <algorithm>
#include <string>
#include <vector>

using namespace capo;
using namespace capo::testing;
using test::close;
using test::normal;
using test::same_bits;

namespace {

// One line "name [shape]" per tensor, sorted, file layout.
std::string listing(nn::Module& model) {
  std::vector<std::string> lines;
  for (nn::Parameter* p : model.parameters(true))
    lines.push_back(cat(p->path(), " ", nn::file_shape(p->value().shape(), p->layout()), "\n"));
  std::sort(lines.begin(), lines.end());
  std::string all;
  for (const auto& l : lines) all += l;
  return all;
}

std::vector<nn::NamedShape> names_of(nn::Module& model) {
  std::vector<nn::NamedShape> names;
  for (nn::Parameter* p : model.parameters(true))
    names.push_back({p->path(), nn::file_shape(p->value().shape(), p->layout())});
  return names;
}

// One of each kind, small.
std::vector<resnet::ResnetConfig> kinds() {
  using resnet::Shortcut, resnet::Stem;
  std::vector<resnet::ResnetConfig> all(6);
  for (auto& c : all) c.blocks = {1, 2}, c.width = 8, c.classes = 5;
  all[1].bottleneck = true;
  all[2].bottleneck = true, all[2].groups = 4, all[2].width_per_group = 16;
  all[3].squeeze = true;
  all[4].bottleneck = true, all[4].stem = Stem::deep, all[4].shortcut = Shortcut::pool;
  all[5].stem = Stem::cifar, all[5].shortcut = Shortcut::pad;
  return all;
}

// Statistics as if trained.
void move_statistics(nn::Module& model) {
  const NoGrad off;
  for (nn::BatchNorm* norm : nn::batch_norms(model)) {
    const Tensor mean = norm->running_mean.value();
    norm->running_mean.set(cast(normal(mean.shape(), norm->path()), mean.dtype()));
    norm->running_var.set(cast(normal(mean.shape(), norm->path() + "#") * 0.1 + 1.0, mean.dtype()));
    norm->weight.set(cast(normal(mean.shape(), norm->path() + "w"), mean.dtype()));
    norm->bias.set(cast(normal(mean.shape(), norm->path() + "b"), mean.dtype()));
  }
}

}  // namespace

TEST_CASE("names, shapes and parameter counts are torchvision's and timm's") {
  // torchvision 0.29.2, timm 1.0.31; the hash is golden::stream_of (FNV-1a) over listing().
  const struct {
    const char* name;
    std::int64_t parameters;
    std::uint64_t hash;
  } rows[] = {
      {"resnet18", 11689512, 0x18b056aa6aa6fea6ull},         {"resnet34", 21797672, 0xd3f20fb1a6ebec98ull},
      {"resnet50", 25557032, 0xd296b015caae1553ull},         {"resnet101", 44549160, 0x53debe4338494eaeull},
      {"resnet152", 60192808, 0x0ccbb95c5a956870ull},        {"wide_resnet50_2", 68883240, 0xb99d26688c0662c7ull},
      {"wide_resnet101_2", 126886696, 0x1a33094f5506400eull}, {"resnext50_32x4d", 25028904, 0x738d0374af5a481aull},
      {"resnext101_32x8d", 88791336, 0xc67f73db84086a41ull}, {"resnext101_64x4d", 83455272, 0x8a00119e7cd88864ull},
      {"seresnet18", 11779624, 0xd2935e6555c2d1b8ull},       {"seresnet34", 21960416, 0x7cfef4f655920b33ull},
      {"seresnet50", 28088024, 0x17197a2d29a81512ull},       {"resnet18d", 11708744, 0x4c2a1f959543284aull},
      {"resnet50d", 25576264, 0xa22b6400a0f9417eull},        {"resnet101d", 44568392, 0x313386fd747f6b4full},
      {"seresnext50_32x4d", 27559896, 0x4f576648c304549bull}, {"seresnet152d", 66841080, 0xc7a8aeaab392efbaull},
  };
  for (const auto& row : rows) {
    CAPTURE(row.name);
    resnet::Resnet model(resnet::config(row.name, 1000), {.device = kMeta});
    CHECK(nn::parameter_count(model) == row.parameters);
    CHECK(stream_of(listing(model)) == row.hash);
    CHECK(model(Tensor(empty({2, 224, 224, 3}, f32, kMeta))).shape() == Shape{2, 1000});
  }
  // akamaster's, whose weights are read by name in examples/evaluate: He et al. state 0.27 to 1.7 million.
  const std::pair<const char*, std::int64_t> cifar[] = {
      {"resnet20", 269722}, {"resnet32", 464154}, {"resnet44", 658586}, {"resnet56", 853018}, {"resnet110", 1727962}};
  for (const auto& [name, parameters] : cifar) {
    resnet::Resnet model(resnet::config(name, 10), {.device = kMeta});
    CHECK_MESSAGE(nn::parameter_count(model) == parameters, name);
  }
}

TEST_CASE("configurations go through JSON and through names") {
  for (const auto& c : kinds()) {
    const std::string text = resnet::to_json(c);
    CAPTURE(text);
    CHECK(resnet::to_json(resnet::config_from_json(text, "here")) == text);
    resnet::Resnet model(c, {.device = kMeta});
    CHECK(resnet::to_json(resnet::config_from_names(names_of(model))) == text);
  }
  const auto error = [](const char* text) {
    return error_of([&] { resnet::Resnet(resnet::config_from_json(text, "here"), {.device = kMeta}); });
  };
  CHECK(error(R"({"depth": 3})") == "here: unknown key \"depth\"");
  CHECK(error(R"({"blocks": 3})") == "here: blocks must be a list of 1 to 64 whole numbers, got 3");
  CHECK(error(R"({"blocks": [3, 0]})") == "here: blocks must be a whole number in [1, 1000], got 0");
  CHECK(error(R"({"width": 0})") == "here: width must be a whole number in [1, 65536], got 0");
  CHECK(error(R"({"stem": "large"})") == "here: stem must be one of conv7, deep, cifar, got \"large\"");
  CHECK(error(R"({"squeeze": 1})") == "here: squeeze must be true or false, got 1");
  CHECK(contains(error(R"({"groups": 2})"), "groups and width_per_group need bottleneck blocks"));
  CHECK(contains(error(R"({"shortcut": "pad", "bottleneck": true})"), "padded shortcuts need basic blocks"));
  CHECK(contains(error(R"({"bottleneck": true, "width_per_group": 65536, "groups": 65536, "width": 65536})"),
                 "1 to 1048576 channels"));
  CHECK(contains(error_of([] { resnet::config("resnet19", 10); }), "resnet: name must be one of resnet20"));
  CHECK(contains(error_of([] { resnet::config_from_names({{"conv1.weight", {8, 3}}}); }), "conv1.weight of rank 4"));
}

TEST_CASE("any size of image; other channels are refused") {
  for (auto c : kinds()) {
    resnet::Resnet model(c, {.seed = 3});
    for (std::int64_t side : {1, 7, 33})
      CHECK(model(cast(normal({2, side, side + 2, 3}, "x"), f32)).shape() == Shape{2, 5});
    const auto maps = model.maps(zeros({1, 33, 33, 3}));
    REQUIRE(maps.size() == 3);
    CHECK(maps[2].shape() == Shape{1, c.stem == resnet::Stem::cifar ? 17 : 5, c.stem == resnet::Stem::cifar ? 17 : 5,
                                   c.bottleneck ? 64 : 16});
    CHECK(error_of([&] { model(zeros({2, 32, 32, 4})); }) == "resnet: image must be [B, H, W, 3], got [2, 32, 32, 4]");
  }
}

TEST_CASE("files: strict but for batch counters and a new head") {
  const TempFolder folder;
  const std::string path = folder.path() + "/model.safetensors";
  for (const auto& c : kinds()) {
    resnet::Resnet model(c, {.seed = 1});
    move_statistics(model);
    nn::save_model(model, path, f32, {resnet::to_json(c), "{}", "a\nb\n", {}});
    const auto loaded = resnet::load_resnet(path);
    CHECK(loaded.preprocess == "{}");
    CHECK(loaded.classes == "a\nb\n");
    const Tensor x = cast(normal({2, 32, 32, 3}, "x"), f32);
    const NoGrad off;
    CHECK(same_bits((*loaded.model)(x), model(x)));
    CHECK((*resnet::load_resnet(path, {.classes = 7}).model)(x).shape() == Shape{2, 7});
    CHECK(same_bits((*resnet::load_resnet(path, {.classes = 0}).model)(x), model.features(x)));

    auto dict = nn::state_dict(model);  // as PyTorch would have written it: no configuration, counters
    dict.push_back({"bn1.num_batches_tracked", zeros({1}, i64)});
    nn::save_tensors(path, dict);
    CHECK(same_bits((*resnet::load_resnet(path).model)(x), model(x)));
    dict.push_back({"layer1.0.bn4.weight", zeros({8})});
    nn::save_tensors(path, dict);
    CHECK(contains(error_of([&] { resnet::load_resnet(path); }), "layer1.0.bn4.weight"));
  }
}

TEST_CASE("taps fire on every module, with the same result") {
  for (const auto& c : kinds()) {
    resnet::Resnet model(c, {.seed = 2, .dtype = f64});
    move_statistics(model);
    check_every_tap(model, normal({2, 16, 16, 3}, "x"), 1e-13);
  }
}

TEST_CASE("norms folded into convolutions: the same function, without the norms") {
  for (const auto& c : kinds())
    for (const DType t : {f64, f32}) {
      resnet::Resnet model(c, {.seed = 4, .dtype = t});
      move_statistics(model);
      const NoGrad off;
      const Tensor x = cast(normal({2, 32, 32, 3}, "x"), t), before = model(x);
      const auto norms = nn::batch_norms(model);
      CHECK(nn::fold_batch_norms(model) == static_cast<int>(norms.size()));
      for (nn::BatchNorm* norm : norms)
        norm->running_mean.set(zeros(norm->running_mean.value().shape(), t));  // read no more
      CHECK(relative_error(model(x), before) <= (t == f64 ? 1e-12 : 2e-5));
      CHECK(nn::fold_batch_norms(model) == 0);
      check_every_tap(model, x, t == f64 ? 1e-13 : 1e-5);
      model.train();
      CHECK(contains(error_of([&] { model(x); }), "is folded into its convolution"));
    }
  resnet::Resnet model(kinds()[0]);
  model.train();
  CHECK(error_of([&] { nn::fold_batch_norms(model); }) ==
        "fold_batch_norms: bn1 must be in eval mode: call train(false)");
  model.train(false);
  nn::Tap tap;
  model.stages[1]->operator[](1).conv2.attach_observer(&tap);
  const auto before = bytes_of(model.conv1->weight.value());
  CHECK(contains(error_of([&] { nn::fold_batch_norms(model); }), "must carry no tap"));
  CHECK(bytes_of(model.conv1->weight.value()) == before);
}

TEST_CASE("training the norms alone moves their statistics; frozen ones stay") {
  resnet::Resnet model(kinds()[0], {.seed = 5});
  nn::freeze(model, "**");
  nn::unfreeze(model, "layer2.*.bn*");
  model.train();
  model(cast(normal({4, 32, 32, 3}, "x"), f32));
  for (nn::BatchNorm* norm : nn::batch_norms(model)) {
    const auto mean = to_vector<double>(norm->running_mean.value());
    const bool moved = std::any_of(mean.begin(), mean.end(), [](double v) { return v != 0; });
    CHECK_MESSAGE(moved == nn::matches("layer2.*.bn*", norm->path()), norm->path());
  }
}

TEST_CASE("averages take the running statistics of trained norms along") {
  resnet::Resnet model(kinds()[0], {.seed = 6, .dtype = f64});
  nn::freeze(model, "layer1.*.bn1");
  nn::BatchNorm &trained = model.bn1, &frozen = model.stages[0]->operator[](0).bn1;
  train::Ema ema(model, 0.75);
  const auto mean_of = [](const nn::BatchNorm& norm) { return to_vector<double>(norm.running_mean); };
  std::vector<double> want = mean_of(trained);
  model.train();
  for (int step = 0; step < 3; ++step) {
    model(normal({4, 16, 16, 3}, cat("x", step)));
    ema.update();
    const auto now = mean_of(trained);
    for (std::size_t i = 0; i < want.size(); ++i) want[i] = 0.75 * want[i] + 0.25 * now[i];
  }
  model.train(false);
  const NoGrad off;
  const Tensor x = normal({2, 16, 16, 3}, "x"), live = model(x);
  const auto own = mean_of(trained);
  for (const auto& t : ema.state()) CHECK(t.name.find("layer1.0.bn1") == std::string::npos);
  {
    const train::EmaScope averaged(ema);
    const auto got = mean_of(trained);
    for (std::size_t i = 0; i < want.size(); ++i) CHECK(got[i] == doctest::Approx(want[i]).epsilon(1e-13));
    CHECK(want[0] != own[0]);
    CHECK(mean_of(frozen) == std::vector<double>(8, 0.0));
    CHECK(!close(model(x), live, 1e-6));
  }
  CHECK(same_bits(model(x), live));
}

TEST_CASE("precise statistics: those of the next batches under the present weights") {
  class Drawn final : public train::BatchSource {
   public:
    std::int64_t batches_per_epoch() const override { return 8; }
    void seek(std::int64_t, std::int64_t batch) override { at = batch; }
    train::Batch next() override {
      const std::int64_t n = at == 1 ? 2 : 4;  // a smaller one weighs less
      const Tensor x = normal({n, 8, 8, 3}, cat("batch", at++));
      return {x, zeros({n}, i64), {}};
    }
    std::int64_t at = 0;
  } source;
  resnet::Resnet model(kinds()[5], {.seed = 7, .dtype = f64});
  nn::freeze(model, "layer1.0.bn2");
  move_statistics(model);
  model.train();
  train::ClassifierOf classifier(model);
  const auto frozen = to_vector<double>(model.stages[0]->operator[](0).bn2.running_mean);
  train::precise_batch_norms(classifier, source, 2);
  CHECK(source.at == 2);
  CHECK(model.training());
  CHECK(to_vector<double>(model.stages[0]->operator[](0).bn2.running_mean) == frozen);

  std::vector<double> mean(8, 0), second(8, 0);
  source.seek(0, 0);
  for (const double samples : {4.0, 2.0}) {
    const NoGrad off;
    const auto y = to_vector<double>((*model.conv1)(source.next().x));
    const std::size_t rows = y.size() / 8;
    for (std::size_t c = 0; c < 8; ++c) {
      double m = 0, v = 0;
      for (std::size_t i = 0; i < rows; ++i) m += y[i * 8 + c] / static_cast<double>(rows);
      for (std::size_t i = 0; i < rows; ++i)
        v += (y[i * 8 + c] - m) * (y[i * 8 + c] - m) / static_cast<double>(rows - 1);
      mean[c] += samples / 6 * m;
      second[c] += samples / 6 * (v + m * m);
    }
  }
  const auto got_mean = to_vector<double>(model.bn1.running_mean), got_var = to_vector<double>(model.bn1.running_var);
  for (std::size_t c = 0; c < 8; ++c) {
    CHECK(got_mean[c] == doctest::Approx(mean[c]).epsilon(1e-11));
    CHECK(got_var[c] == doctest::Approx(second[c] - mean[c] * mean[c]).epsilon(1e-11));
  }

  struct Fails final : train::Classifier {
    explicit Fails(resnet::Resnet& r) : model(r) {}
    Tensor forward(const Tensor& x) override {
      model(x);
      throw Error("no more");
    }
    nn::Module& module() override { return model; }
    resnet::Resnet& model;
  } fails(model);
  CHECK(error_of([&] { train::precise_batch_norms(fails, source, 1); }) == "no more");
  CHECK(to_vector<double>(model.bn1.running_mean) == got_mean);
  nn::freeze(model, "**");
  CHECK(contains(error_of([&] { train::precise_batch_norms(classifier, source, 1); }),
                 "no batch norm of the model trains"));
}
