// The recipe files and what examples make of them.
#include <doctest/doctest.h>

#include <capo/examples/named_model.h>
#include <capo/examples/recipe.h>
#include <capo/ops/copy.h>
#include <capo/tests/op_test.h>
#include <capo/tests/temp_folder.h>

#include <filesystem>
#include <string>
#include <vector>

using namespace capo;
using namespace capo::testing;

namespace {
examples::Recipe read_text(const std::string& text) {
  const TempFolder folder;
  const std::string path = folder.path() + "/r.json";
  write_file_atomic(path, text);
  examples::Recipe r;
  try {
    examples::read_recipe(r, path);
  } catch (const Error& e) {
    throw Error(std::string(e.what()).substr(path.size() + 2));
  }
  return r;
}
}  // namespace

TEST_CASE("every recipe of the repository reads and names a model that there is") {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(std::string(CAPO_SOURCE_DIR) + "/recipes")) {
    const std::string name = entry.path().filename().string();
    if (!name.ends_with(".json") || name.ends_with("_unet.json")) continue;  // those are examples/segment's
    ++count;
    CAPTURE(entry.path().string());
    examples::Recipe r;
    examples::read_recipe(r, entry.path().string());
    examples::train_options(r);
    check_augment(examples::augment_of(r));
    CHECK(nn::parameter_count(
              *examples::open_model(r.model, {.classes = 10, .image = r.image}, {.device = kMeta}).module) > 1000);
  }
  CHECK(count >= 3);
}

TEST_CASE("recipes are strict, and survive the round trip") {
  examples::Recipe r;
  r.lr = 0.1 + 0.2;
  r.nesterov = true;
  CHECK(examples::to_json(read_text(examples::to_json(r))) == examples::to_json(r));
  CHECK(read_text(R"({"epochs": 3})").epochs == 3);
  const auto error = [](const char* text) { return error_of([&] { read_text(text); }); };
  CHECK(error(R"({"learning_rate": 1})") == "unknown key \"learning_rate\"");
  CHECK(error(R"({"epochs": 0})") == "epochs must be a whole number in [1, 1000000], got 0");
  CHECK(error(R"({"epochs": 1.5})") == "epochs must be a whole number in [1, 1000000], got 1.5");
  CHECK(error(R"({"lr": "fast"})") == "lr must be a number in [0, 1000000], got \"fast\"");
  CHECK(error(R"({"nesterov": 1})") == "nesterov must be true or false, got 1");
  CHECK(error(R"({"model": 18})") == "model must be a text, got 18");
  CHECK(error(R"({"lr": 1, "lr": 2})") == "duplicate key, got \"lr\" twice");
  CHECK(error_of([] { examples::train_options(read_text(R"({"decay": "step"})")); }) ==
        "--decay: must be cosine, linear or constant, got step");
}

TEST_CASE("a weight file serves another number of classes with a new head alone") {
  const TempFolder folder;
  const std::string path = folder.path() + "/model.safetensors";
  for (const std::string name : {"resnet20", "mobilenet_v2", "cct_2_3x2", "vit_ti/8"}) {
    CAPTURE(name);
    const examples::NamedModel ten = examples::open_model(name, {.classes = 10, .image = 32}, {.seed = 1});
    nn::save_model(*ten.module, path, f32, ten.texts);
    CHECK(contains(error_of([&] { examples::open_model(name, {.weights = path, .classes = 7}, {}); }),
                   "must have 7 classes, got 10"));
    const examples::NamedModel seven =
        examples::open_model(name, {.weights = path, .classes = 7, .new_head = true}, {.seed = 2});
    const auto before = nn::state_dict(*ten.module), after = nn::state_dict(*seven.module);
    REQUIRE(before.size() == after.size());
    int changed = 0;
    for (std::size_t i = 0; i < before.size(); ++i)
      changed += before[i].value.shape() != after[i].value.shape() || !test::same_bits(before[i].value, after[i].value);
    CHECK(changed == 2);  // the head's weight and bias
    CHECK(seven.classifier->forward(zeros({2, 32, 32, 3})).shape() == Shape{2, 7});
  }
}

TEST_CASE("a ResNet's width: new, kept in the file, refused elsewhere") {
  const TempFolder folder;
  const std::string path = folder.path() + "/model.safetensors";
  const examples::NamedModel thin = examples::open_model("resnet20", {.classes = 10, .width = 6}, {.seed = 1});
  CHECK(nn::parameter_count(*thin.module) <
        nn::parameter_count(*examples::open_model("resnet20", {.classes = 10}, {}).module) / 6);
  nn::save_model(*thin.module, path, f32, thin.texts);
  CHECK(nn::parameter_count(*examples::open_model("resnet20", {.weights = path}, {}).module) ==
        nn::parameter_count(*thin.module));
  CHECK(contains(error_of([&] { examples::open_model("resnet20", {.weights = path, .width = 8}, {}); }),
                 "must have width 8, got 6"));
  CHECK(contains(error_of([&] { examples::open_model("resnet32", {.weights = path}, {}); }), "holds another model"));
  CHECK(contains(error_of([] { examples::open_model("vit_ti/8", {.classes = 10, .width = 8, .image = 32}, {}); }),
                 "--width: belongs to ResNets"));
  CHECK(contains(error_of([] { examples::open_model("resnet20", {.classes = 10, .new_head = true}, {}); }),
                 "--new-head: needs --weights"));
}

TEST_CASE("the command line goes before the file") {
  const std::string file = std::string(CAPO_SOURCE_DIR) + "/recipes/resnet20_cifar10_short.json";
  std::vector<std::string> words{"train", "--recipe", file, "--model", "resnet56",
                                 "--no-nesterov", "--weight-decay", "0.25"};
  std::vector<char*> argv;
  for (auto& w : words) argv.push_back(w.data());
  examples::Recipe r, plain;
  examples::read_recipe(plain, file);
  CLI::App app;
  examples::add_recipe(app, r, static_cast<int>(argv.size()), argv.data());
  app.parse(static_cast<int>(argv.size()), argv.data());
  CHECK(plain.nesterov);
  CHECK(r.model == "resnet56");
  CHECK_FALSE(r.nesterov);
  CHECK(r.weight_decay == 0.25);
  plain.model = r.model, plain.nesterov = false, plain.weight_decay = 0.25;
  CHECK(examples::to_json(r) == examples::to_json(plain));
}
