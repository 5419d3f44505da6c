// The U-Nets: shapes, names, configurations, bad input. Against PyTorch: unet_golden_test.cpp.
#include <doctest/doctest.h>

#include <capo/autograd/autograd.h>
#include <capo/models/nn/state.h>
#include <capo/models/unet/classic.h>
#include <capo/models/unet/plain.h>
#include <capo/models/unet/resnet_unet.h>
#include <capo/models/unet/unetr.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/reduce.h>
#include <capo/tests/support.h>

#include <algorithm>
#include <memory>

using namespace capo;
using capo::testing::bytes_of;
using capo::testing::contains;
using capo::testing::error_of;

namespace {

Tensor noise(const Shape& shape, std::uint64_t seed = 1, DType dtype = f32) {
  Generator rng(seed, 0);
  return rand_normal(shape, rng, 0, 1, dtype);
}

struct Counter : nn::Tap {
  int calls = 0;
  Tensor apply(const nn::Site& site) override {
    ++calls;
    return site.y;
  }
};

// Every module that runs taps fires one, and the result keeps its bits but where two fused ops come apart.
template <class Model, class Run>
void check_taps(Model& model, const Run& run, const std::string& but = "") {
  const NoGrad off;
  const Tensor before = run(model);
  std::vector<std::unique_ptr<Counter>> counters;
  std::vector<std::string> paths;
  for (nn::Module* m : model.modules())
    if (m->runs_taps() && m != &model && m->path() != but) {
      counters.push_back(std::make_unique<Counter>());
      paths.push_back(m->path());
      m->attach_observer(counters.back().get());
    }
  const Tensor after = run(model);
  for (std::size_t i = 0; i < counters.size(); ++i) CHECK_MESSAGE(counters[i]->calls == 1, paths[i]);
  CHECK(bytes_of(before) == bytes_of(after));
  for (nn::Module* m : model.modules())
    if (m->tapped()) m->detach_observers();
}

unet::PlainConfig small3d() {
  unet::PlainConfig c;
  c.channels = 2;
  c.classes = 3;
  c.stages = {{4, {1, 3, 3}, {1, 1, 1}, 2, 2}, {6, {3, 3, 3}, {1, 2, 2}, 1, 2}, {8, {3, 3, 3}, {2, 2, 2}, 2, 1}};
  return c;
}

}  // namespace

TEST_CASE("the plain U-Net in 3D: sizes, deep supervision, names") {
  unet::PlainUnet model(small3d());
  CHECK(model.config.divisor() == Dims{2, 4, 4});
  const Tensor x = noise({1, 4, 8, 12, 2});
  const auto all = model.outputs(x);
  REQUIRE(all.size() == 2);
  CHECK(all[0].shape() == Shape{1, 4, 8, 12, 3});
  CHECK(all[1].shape() == Shape{1, 4, 4, 6, 3});
  CHECK(bytes_of(model(x)) == bytes_of(all[0]));
  std::string names;
  for (nn::Parameter* p : model.parameters()) names += p->path() + " ";
  for (const char* name :
       {"encoder.stages.0.0.convs.0.conv.weight", "encoder.stages.1.0.convs.0.norm.bias",
        "decoder.stages.0.convs.1.conv.bias", "decoder.transpconvs.1.weight", "decoder.seg_layers.1.bias"})
    CHECK_MESSAGE(contains(names, name), name);
  check_taps(model, [&](unet::PlainUnet& m) { return m.outputs(x)[1]; });
}

TEST_CASE("nnU-Net's topology follows the patch") {
  const auto c = unet::plain_config({32, 48, 48}, 1, 3, 16);
  REQUIRE(c.stages.size() == 4);
  CHECK(c.divisor() == Dims{8, 8, 8});  // 32 16 8 4, 48 24 12 6
  CHECK(c.stages[3].features == 128);
  CHECK(unet::plain_config({256, 256}, 1, 2, 32).stages.back().features == 512);
  CHECK(unet::plain_config({64, 64, 64}, 1, 2, 32).stages.back().features == 320);
}

TEST_CASE("the classic U-Net: sizes and the public names") {
  unet::ClassicUnet model({.channels = 3, .classes = 2, .base = 4, .depth = 2, .batch_norm = true});
  const Tensor x = noise({2, 8, 12, 3});
  CHECK(model(x).shape() == Shape{2, 8, 12, 2});
  std::vector<std::string> names;
  for (const auto& t : nn::state_dict(model)) names.push_back(t.name);
  for (const char* name :
       {"inc.double_conv.0.weight", "inc.double_conv.4.running_var", "down2.maxpool_conv.1.double_conv.3.weight",
        "up1.up.bias", "up2.conv.double_conv.1.weight", "outc.conv.bias"})
    CHECK_MESSAGE(std::count(names.begin(), names.end(), name) == 1, name);
  unet::ClassicUnet big({.channels = 3, .classes = 2, .batch_norm = true}, {.device = kMeta});
  CHECK(nn::parameter_count(big) == 31037698);  // PyTorch-UNet(3, 2)
  check_taps(model, [&](unet::ClassicUnet& m) { return m(x); });
}

TEST_CASE("sizes and channels that do not fit are named") {
  unet::PlainUnet plain(small3d());
  CHECK(error_of([&] {
          plain(noise({1, 4, 8, 10, 2}));
        }) == "unet: axis 3 of x must be a multiple of 4, got 10 in [1, 4, 8, 10, 2] (sliding_window takes any size)");
  CHECK(error_of([&] { plain(noise({1, 4, 8, 8, 1})); }) == "unet: x must be [B, D, H, W, 2], got [1, 4, 8, 8, 1]");
  CHECK(error_of([&] { plain(noise({1, 8, 8, 2})); }) == "unet: x must be [B, D, H, W, 2], got [1, 8, 8, 2]");
  unet::ClassicUnet classic({.base = 2, .depth = 3});
  CHECK(error_of([&] {
          classic(noise({1, 12, 8, 1}));
        }) == "unet: axis 1 of x must be a multiple of 8, got 12 in [1, 12, 8, 1] (sliding_window takes any size)");
  CHECK(error_of([&] {
          unet::PlainUnet({.stages = {{4, {3, 3}, {1, 1}}}});
        }) == "unet: needs two stages or more, got 1");
  CHECK(error_of([&] {
          unet::PlainUnet({.stages = {{4, {3, 2}, {1, 1}}, {4, {3, 3}, {2, 2}}}});
        }) == "unet: kernels must be odd, got [3, 2] in stage 0");
  CHECK(error_of([&] {
          unet::PlainUnet({.stages = {{4, {3, 3}, {2, 1}}, {4, {3, 3}, {2, 2}}}});
        }) == "unet: strides must be positive, and 1 in the first stage, got [2, 1] in stage 0");
  CHECK(error_of([&] {
          unet::plain_config({7, 9}, 1, 2);
        }) == "unet: a patch needs an even size of 8 or more, got [7, 9]");
}

TEST_CASE("configurations survive JSON, and strangers are named") {
  const auto c = small3d();
  const std::string text = unet::to_json(c);
  const auto back = unet::plain_config_from_json(text, "file");
  CHECK(unet::to_json(back) == text);
  CHECK(back.stages[2].kernel == Dims{3, 3, 3});
  CHECK(back.stages[1].stride == Dims{1, 2, 2});
  CHECK(back.stages[2].decoder_convs == 1);
  const unet::ClassicConfig classic{.channels = 3, .classes = 5, .base = 8, .depth = 2, .batch_norm = true};
  CHECK(unet::to_json(unet::classic_config_from_json(unet::to_json(classic), "file")) == unet::to_json(classic));
  const auto error = [](const char* json) { return error_of([&] { unet::plain_config_from_json(json, "net.json"); }); };
  CHECK(error("{\"width\": 3}") == "net.json: unknown key \"width\"");
  CHECK(error("{\"features\": [4]}") == "net.json: features must name 2 to 16 stages, got 1");
  CHECK(error("{\"features\": [4, 8], \"kernels\": [3, 3, 3], \"strides\": [1, 1, 2, 2]}") ==
        "net.json: kernels must have 4 entries for 2 stages of 2 axes, got 3");
  CHECK(contains(error("{\"features\": [4, \"8\"]}"), "net.json: features must be a whole number"));
  CHECK(error_of([] { unet::classic_config_from_json("{\"depth\": 0}", "net.json"); }) ==
        "net.json: depth must be a whole number in [1, 15], got 0");
}

TEST_CASE("a U-Net on a ResNet: sizes, names, the encoder's own weights") {
  resnet::ResnetConfig encoder;
  encoder.blocks.assign(4, 1);
  encoder.width = 8, encoder.channels = 2, encoder.classes = 10;
  unet::ResnetUnetConfig config;
  config.encoder = encoder;
  config.widths.assign({16, 12, 8, 6, 4});
  config.classes = 3;
  for (const bool plusplus : {false, true}) {
    config.plusplus = plusplus;
    unet::ResnetUnet model(config);
    const Tensor x = noise({1, 32, 64, 2});
    CHECK(model(x).shape() == Shape{1, 32, 64, 3});
    Counter whole;
    model.encoder.attach_observer(&whole);
    CHECK(contains(error_of([&] { model(x); }), "a tap on the whole encoder would never run"));
    model.encoder.detach_observers();
    check_taps(
        model, [&](unet::ResnetUnet& m) { return m(x); }, "encoder");
    CHECK(error_of([&] {
            model(noise({1, 32, 48, 2}));
          }) == "unet: axis 2 of x must be a multiple of 32, got 48 in [1, 32, 48, 2] (sliding_window takes any size)");
    std::vector<std::string> names;
    for (const auto& t : nn::state_dict(model)) names.push_back(t.name);
    for (const char* name :
         {"encoder.layer2.0.downsample.0.weight", "segmentation_head.0.bias",
          plusplus ? "decoder.blocks.x_1_3.conv2.1.running_mean" : "decoder.blocks.4.conv1.0.weight"})
      CHECK_MESSAGE(std::count(names.begin(), names.end(), name) == 1, name);
    resnet::Resnet alone(encoder, {.seed = 3});
    model.load_encoder(nn::state_dict(alone));
    CHECK(bytes_of(model.encoder.maps(x)[4]) == bytes_of(alone.maps(x)[4]));
    CHECK(unet::to_json(unet::resnet_unet_config_from_json(unet::to_json(model.config), "file")) ==
          unet::to_json(model.config));
  }
  config.encoder = resnet::config("resnet20", 10);
  CHECK(contains(error_of([&] { unet::ResnetUnet model(config); }), "the encoder's stem must pool"));
  CHECK(contains(error_of([] { unet::resnet_unet_config_from_json("{\"encoder\": \"{\\\"a\\\": 1}\"}", "f"); }),
                 "f: encoder: unknown key"));
}

TEST_CASE("a frozen ViT as the encoder") {
  vit::VitConfig c = vit::config("vit_ti", 32, 8, 0);
  c.dim = 24, c.depth = 5, c.registers = 2;
  vit::Vit encoder(c);
  encoder.set_trainable(false);
  unet::Unetr model(encoder, {.classes = 3, .base = 4});
  CHECK(model.config.blocks == std::vector<int>{0, 2, 4});
  const Tensor x = noise({2, 32, 32, 3});
  const Tensor y = model(x);
  CHECK(y.shape() == Shape{2, 32, 32, 3});
  backward(sum(y * y));
  for (nn::Parameter* p : model.parameters()) CHECK_MESSAGE(grad_of(p->value()).defined(), p->path());
  for (nn::Parameter* p : encoder.parameters()) CHECK_MESSAGE(!grad_of(p->value()).defined(), p->path());
  check_taps(model, [&](unet::Unetr& m) { return m(x); });
  CHECK(unet::to_json(unet::unetr_config_from_json(unet::to_json(model.config), "file")) ==
        unet::to_json(model.config));

  const auto tokens = encoder.block_tokens(x, {1, 4});
  CHECK(tokens[0].shape() == Shape{2, 3 + 16, 24});
  CHECK(bytes_of((*encoder.norm)(tokens[1])) == bytes_of(encoder.tokens(x)));
  CHECK(bytes_of(encoder.block_tokens(x, {1})[0]) == bytes_of(tokens[0]));
  CHECK(error_of([&] { encoder.block_tokens(x, {5}); }) ==
        "vit: blocks must be chosen in [0, 5) and ascending, got 5 at place 0");
  CHECK(contains(error_of([&] { encoder.block_tokens(x, {2, 2}); }), "ascending, got 2 at place 1"));
  CHECK(error_of([&] { unet::Unetr(encoder, {.blocks = {1}}); }) == "unetr: patch 8 needs 3 blocks, got 1");
  vit::VitConfig odd = c;
  odd.image = 28, odd.patch = 14;
  vit::Vit uneven(odd);
  CHECK(error_of([&] { unet::Unetr(uneven, {}); }) ==
        "unetr: the encoder's patch must be a power of two, 2 or more, got 14");
}
