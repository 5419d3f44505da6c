// examples/segment by its parts: recipes are strict, a tiny net learns, a stopped run goes on to the same bits,
// pictures.
#include <capo/examples/segment_fold.h>
#include <capo/tests/temp_folder.h>

#include <doctest/doctest.h>

using namespace capo;
using namespace capo::testing;
using namespace capo::examples;

namespace {

// Balls of class 1 (bright) and 2 (dark) in noise; flat cases have class 1 alone.
SegmentationSetPtr balls(std::int64_t n, const Extent& e, std::uint64_t seed) {
  const int classes = e.z == 1 ? 2 : 3;
  SegmentationSet set{"balls", {"background", "bright"}, {}};
  if (classes == 3) set.class_names.push_back("dark");
  for (std::int64_t i = 0; i < n; ++i) {
    SampleRng rng(seed, 0, static_cast<std::uint64_t>(i), 0);
    SegmentationCase c{cat("case ", i), {Volume(e)}, LabelVolume(e)};
    for (int k = 1; k < classes; ++k) {
      const std::int64_t cz = rng.below(e.z), cy = rng.below(e.y), cx = rng.below(e.x);
      for (std::int64_t z = 0; z < e.z; ++z)
        for (std::int64_t y = 0; y < e.y; ++y)
          for (std::int64_t x = 0; x < e.x; ++x)
            if ((z - cz) * (z - cz) + (y - cy) * (y - cy) + (x - cx) * (x - cx) < 20)
              c.label.at(z, y, x) = static_cast<std::uint8_t>(k);
    }
    for (std::size_t v = 0; v < c.label.voxels.size(); ++v)
      c.channels[0].voxels[v] = 0.3f * static_cast<float>(rng.normal()) + (c.label.voxels[v] == 1   ? 2.0f
                                                                           : c.label.voxels[v] == 2 ? -2.0f
                                                                                                    : 0.0f);
    set.cases.push_back(std::move(c));
  }
  return std::make_shared<const SegmentationSet>(std::move(set));
}

SegmentRecipe tiny(std::vector<int> patch) {
  SegmentRecipe r;
  r.patch = std::move(patch);
  r.base = 4;
  r.epochs = 3;
  r.batches_per_epoch = 40;
  r.lr = 1e-2;
  r.warmup = 0;
  r.foreground = 0.5;
  return r;
}

}  // namespace

TEST_CASE("recipes: the shipped ones, and strictness") {
  const std::string folder = std::string(CAPO_SOURCE_DIR) + "/recipes/";
  const SegmentRecipe flat = read_segment_recipe(folder + "isbi2012_unet.json"),
                      deep = read_segment_recipe(folder + "hippocampus_unet.json");
  CHECK(flat.flat());
  CHECK(flat.folds == 5);
  CHECK(patch_dims(flat) == Dims{256, 256});
  CHECK(windows(flat, true).mirror == Dims{0, 1});
  CHECK(windows(flat, false).mirror.empty());
  CHECK(patch_dims(deep).size() == 3);
  CHECK(deep.folds == 0);
  CHECK(patch_options(flat, 1).augment.border == Border::mirror);
  CHECK(patch_options(flat, 1).augment.elastic.probability == 0.3f);
  for (const auto* r : {&flat, &deep}) {
    check_augment(patch_options(*r, 1).augment);
    const auto c = model_config(*r, 1, 3);
    for (int a = 0; a < c.axes(); ++a) CHECK(patch_dims(*r)[a] % c.divisor()[a] == 0);
  }
  const TempFolder t;
  const auto bad = [&](const char* text, const char* rule) {
    const std::string p = t.file("r.json", text), error = error_of([&] { read_segment_recipe(p); });
    CHECK_MESSAGE(starts_with(error, p + ": "), error);
    CHECK_MESSAGE(contains(error, rule), std::string(rule), " gave: ", error);
  };
  bad("{\"epoch\": 3}", "epoch");
  bad("{\"epochs\": 0}", "epochs must be");
  bad("{\"epochs\": \"3\"}", "epochs must be");
  bad("{\"patch\": [256, 256]}", "patch and mirror must be lists of 3");
  bad("{\"mirror\": [0, 1, 2]}", "mirror must be");
  bad("{\"augment\": \"strong\"}", "augment must be");
  bad("{\"decay\": \"poly\"}", "decay must be cosine, linear or constant, got poly");
  bad("{\"lr\": 1, \"lr\": 2}", "duplicate key");
  bad("[]", "JSON");
}

TEST_CASE("segment: volumes are learnt; a stopped run goes on to the same bits") {
  const SegmentationSetPtr train = balls(6, {12, 16, 14}, 1), test = balls(3, {14, 12, 18}, 2);
  SegmentRecipe recipe = tiny({8, 8, 8});
  recipe.mirror = {1, 1, 1};
  const TempFolder t;
  const auto whole = train_and_judge(recipe, train, test, {.out = t / "a", .recipe_text = "r"});
  REQUIRE(whole.size() == 3);
  std::vector<double> mean;
  for (const auto& c : whole) mean.insert(mean.end(), c.dice.begin() + 1, c.dice.end());
  CHECK(segment::mean_of_defined(mean) > 0.6);
  CHECK(whole[0].partition.empty());
  CHECK(whole[0].hausdorff95.size() == 3);
  for (const auto& c : whole) {
    const LabelVolume p = read_nifti_labels(t / "a/predictions/" + c.name + ".nii.gz", 3);
    const auto& truth = test->cases[static_cast<std::size_t>(&c - whole.data())].label;
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < p.voxels.size(); ++i) wrong += p.voxels[i] != truth.voxels[i];
    CHECK(c.pixel_error == doctest::Approx(static_cast<double>(wrong) / static_cast<double>(p.voxels.size())));
  }
  for (const char* file : {"model.safetensors", "validation.csv", "log.csv", "curve.png", "overlays.png"})
    CHECK(std::filesystem::exists(t / "a" + "/" + file));
  CHECK(load_image(t / "a/overlays.png").channels == 3);

  for (const int workers : {0, 2}) {
    const SegmentRun part{.out = t / cat("b", workers), .recipe_text = "r", .workers = workers, .stop_after = 57};
    CHECK(train_and_judge(recipe, train, test, part).empty());
    const auto rest =
        train_and_judge(recipe, train, test, {.out = part.out, .recipe_text = "r", .workers = 2 - workers});
    CHECK(read_file(part.out + "/model.safetensors", 1 << 24) == read_file(t / "a/model.safetensors", 1 << 24));
    REQUIRE(rest.size() == 3);
    CHECK(rest[1].dice == whole[1].dice);
    CHECK(read_file(part.out + "/validation.csv", 1 << 20) == read_file(t / "a/validation.csv", 1 << 20));
  }
  const auto again =
      train_and_judge(recipe, train, test, {.out = t / "a", .recipe_text = "r"});  // finished: judged once more
  CHECK(again[2].dice == whole[2].dice);
  CHECK(contains(error_of([&] { train_and_judge(recipe, train, test, {.out = t / "a", .recipe_text = "other"}); }),
                 "settings"));
}

TEST_CASE("segment: flat cases get the membrane scores") {
  const SegmentationSetPtr train = balls(6, {1, 32, 40}, 3), test = balls(2, {1, 40, 37}, 4);
  SegmentRecipe recipe = tiny({1, 16, 16});
  recipe.batch = 4;
  recipe.deep_supervision = false;
  recipe.ema = 0.5;
  const TempFolder t;
  const auto scores = train_and_judge(recipe, train, test, {.out = t / "a", .recipe_text = "r"});
  REQUIRE(scores.size() == 2);
  for (const auto& c : scores) {
    CHECK(c.dice.size() == 2);
    CHECK(c.dice[1] > 0.6);
    REQUIRE(c.partition.size() == kThresholds);
    CHECK(c.partition[5].rand > 0.7);
    CHECK(c.partition[5].rand <= 1);
  }
}

TEST_CASE("contours: inside their class, the prediction over the truth") {
  Volume v({1, 8, 8});
  v.at(0, 0, 0) = 1;
  LabelVolume truth({1, 8, 8}), predicted({1, 8, 8});
  for (std::int64_t y = 2; y < 6; ++y)
    for (std::int64_t x = 2; x < 6; ++x) truth.at(0, y, x) = 1;
  predicted.at(0, 5, 5) = 1;
  const Image im = contour_picture(v, truth, predicted, 0, 0, 2);
  CHECK(im.height == 16);
  CHECK(im.at(4, 4)[0] > 200);   // the truth's corner
  CHECK(im.at(7, 7)[0] == 0);    // inside: no contour
  CHECK(im.at(3, 4)[0] == 0);    // outside
  CHECK(im.at(11, 11)[2] == 0);  // the prediction's colour, orange
  CHECK(im.at(11, 11)[0] == 255);
  CHECK(fullest_slice(truth, 1) == 2);
}
