// The shipped weights load by themselves and know their preprocessing and classes.
#include <capo/datasets/augment.h>
#include <capo/models/vit/load.h>
#include <capo/ops/copy.h>

#include <algorithm>
#include <doctest/doctest.h>

using namespace capo;

TEST_CASE("the shipped backbone loads, with a new head and at another image size") {
  const std::string path = CAPO_SOURCE_DIR "/weights/vit_ti_p8_32.safetensors";
  const vit::LoadedVit own = vit::load_vit(path);
  CHECK(own.model->config.classes == 200);
  CHECK(std::count(own.classes.begin(), own.classes.end(), '\n') == 200);
  CHECK(preprocess_from_json(own.preprocess, path).size == 32);
  const NoGrad off;
  CHECK((*own.model)(zeros({2, 32, 32, 3})).shape() == Shape{2, 200});
  const vit::LoadedVit other = vit::load_vit(path, {.classes = 10, .image = 64});
  CHECK((*other.model)(zeros({1, 64, 64, 3})).shape() == Shape{1, 10});
}
