// Compact convolutional transformers: configurations, files, taps. Values: conv_golden_test.cpp.
#include <doctest/doctest.h>

#include <capo/models/vit/cct.h>
#include <capo/ops/copy.h>
#include <capo/tests/every_tap.h>
#include <capo/tests/op_test.h>
#include <capo/tests/temp_folder.h>
#include <capo/tuners/spec.h>

#include <string>
#include <vector>

using namespace capo;
using namespace capo::testing;
using test::close;
using test::normal;
using test::same_bits;

TEST_CASE("the published sizes") {
  // Hassani et al. 2021, table 1, in millions: CCT-2/3x2 0.28, CCT-7/3x1 3.76 for CIFAR-10. These lack their extra
  // norm, and the biases of q, k, v are there.
  const std::pair<const char*, double> rows[] = {
      {"cct_2_3x2", 0.28}, {"cct_4_3x2", 0.48}, {"cct_6_3x1", 3.23}, {"cct_7_3x1", 3.76}};
  for (const auto& [name, millions] : rows) {
    vit::Cct model(vit::cct_config(name, 32, 10), {.device = kMeta});
    CHECK_MESSAGE(static_cast<double>(nn::parameter_count(model)) / 1e6 == doctest::Approx(millions).epsilon(0.04),
                  name);
    CHECK(model(empty({2, 32, 32, 3}, f32, kMeta)).shape() == Shape{2, 10});
  }
  for (const char* name : {"cct_3_3x1", "cct_7_3", "cct_7_4x1", "cct_7_3x1x", "vit"})
    CHECK(contains(error_of([&] { vit::cct_config(name, 32, 10); }), "cct: name must be"));
  vit::CctConfig c;
  c.heads = 3;
  CHECK(contains(error_of([&] { vit::Cct(c, {.device = kMeta}); }), "dim must be a multiple of heads"));
}

TEST_CASE("files, tuners by ViT's patterns, taps") {
  const TempFolder folder;
  const std::string path = folder.path() + "/model.safetensors";
  vit::CctConfig c = vit::cct_config("cct_2_3x2", 17, 4);
  CHECK(vit::to_json(vit::cct_from_json(vit::to_json(c), "here")) == vit::to_json(c));
  CHECK(error_of([] { vit::cct_from_json(R"({"patch": 4})", "here"); }) == "here: unknown key \"patch\"");
  vit::Cct model(c, {.seed = 1});
  const NoGrad off;
  const Tensor x = cast(normal({2, 17, 17, 3}, "x"), f32);
  CHECK(contains(error_of([&] { model(zeros({1, 16, 16, 3})); }), "cct: image must be [B, 17, 17, 3]"));
  nn::save_model(model, path, f32, {vit::to_json(c), "", "", {}});
  CHECK(same_bits((*vit::load_cct(path).model)(x), model(x)));
  CHECK((*vit::load_cct(path, 9).model)(x).shape() == Shape{2, 9});
  CHECK(same_bits((*vit::load_cct(path, 0).model)(x), model.features(x)));
  nn::save_tensors(path, nn::state_dict(model));
  CHECK(contains(error_of([&] { vit::load_cct(path); }), "states no configuration"));

  check_every_tap(model, x, 1e-5, 2);
  CHECK(tuners::apply_spec(model, "blocks.*.attn: u_prefix(length=3); head: train").size() == 2);
  CHECK(model(x).shape() == Shape{2, 4});
}
