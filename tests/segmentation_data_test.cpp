// Segmentation sets: the readers, their refusals, normalisation, folds; the real sets where they are.
#include <capo/datasets/open.h>
#include <capo/datasets/segmentation.h>
#include <capo/engine/sha256.h>
#include <capo/tests/temp_folder.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <set>

using namespace capo;
using namespace capo::testing;

namespace {

// Two volumes of 1 x 2 x 3: image bytes 0..5 and 12..17, labels 6..11 and 18..23.
std::string tiny_bin() {
  std::string bytes;
  for (int v = 0; v < 2; ++v) {
    for (int i = 0; i < 6; ++i) bytes += static_cast<char>(40 * i + v);
    for (int i = 0; i < 6; ++i) bytes += static_cast<char>((i + v) % 3);
  }
  return bytes;
}

std::string tiny_volume(const char* name, const char* split, int at) {
  return cat("{\"name\":\"", name, "\",\"split\":\"", split, "\",\"shape_zyx\":[1,2,3],\"image_offset\":", at,
             ",\"label_offset\":", at + 6, ",\"unit_per_step\":2.5,\"voxel_mm\":[1.5,1,0.5],\"label_counts\":[2,2,2]}");
}

std::string tiny_json(const std::string& bin) {
  return cat("{\"bytes\":", bin.size(), ",\"sha256\":\"", sha256_hex(bin), "\",\"volumes\":[",
             tiny_volume("one", "train", 0), ",", tiny_volume("two", "test", 12), "]}");
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const auto at = text.find(from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

SegmentationSet tiny_set(std::int64_t n) {
  SegmentationSet set{"tiny", {"background", "thing"}, {}};
  for (std::int64_t i = 0; i < n; ++i) {
    SegmentationCase c{cat("case ", i), {Volume({2, 3, 4})}, LabelVolume({2, 3, 4})};
    for (std::size_t k = 0; k < 24; ++k)
      c.channels[0].voxels[k] = static_cast<float>(100 * i + static_cast<std::int64_t>(k * k));
    c.label.voxels[5] = 1;
    set.cases.push_back(std::move(c));
  }
  return set;
}

}  // namespace

TEST_CASE("hippocampus: values, geometry, splits") {
  const TempFolder t;
  const std::string bin = tiny_bin();
  t.file("hippocampus/hippocampus-u8.bin", bin);
  t.file("hippocampus/hippocampus-u8.json", tiny_json(bin));
  const SegmentationSet train = open_segmentation("hippocampus", t.path(), "train"),
                        test = open_segmentation("hippocampus", t.path(), "test");
  check_segmentation_set(train);
  REQUIRE(train.cases.size() == 1);
  REQUIRE(test.cases.size() == 1);
  CHECK(train.class_names == std::vector<std::string>{"background", "anterior", "posterior"});
  CHECK(train.cases[0].name == "one");
  CHECK(train.cases[0].channels[0].extent == Extent{1, 2, 3});
  CHECK(train.cases[0].channels[0].geometry.spacing == std::array<float, 3>{1.5f, 1, 0.5f});
  CHECK(train.cases[0].channels[0].at(0, 1, 2) == 200 * 2.5f);
  CHECK(test.cases[0].channels[0].at(0, 0, 1) == 41 * 2.5f);
  CHECK(test.cases[0].label.voxels == std::vector<std::uint8_t>{1, 2, 0, 1, 2, 0});
  CHECK(contains(error_of([&] { open_segmentation("hippocampus", t.path(), "val"); }),
                 "split must be train or test, got val"));
  CHECK(contains(error_of([&] { open_segmentation("hippocampus", t / "none", "train"); }),
                 "get hippocampus with scripts/get-data hippocampus"));
  CHECK(contains(error_of([&] { open_segmentation("isbi2012", t.path(), "train"); }), "images.bin: not found"));
  CHECK(contains(error_of([&] { open_segmentation("brain", t.path(), "train"); }), "unknown segmentation set"));
}

TEST_CASE("hippocampus: bad files") {
  const std::string bin = tiny_bin(), good = tiny_json(bin);
  const auto bad = [&](const std::string& json, const std::string& data, const char* rule,
                       const char* file = "hippocampus-u8.json") {
    const TempFolder t;
    t.file("hippocampus-u8.bin", data);
    t.file("hippocampus-u8.json", json);
    const std::string text = error_of([&] { read_hippocampus(t.path(), "train"); });
    CHECK_MESSAGE(starts_with(text, t / file), std::string(rule), " gave: ", text);
    CHECK_MESSAGE(contains(text, rule), std::string(rule), " gave: ", text);
  };
  bad("", bin, "JSON");
  bad("[]", bin, "JSON");
  bad("{}", bin, "missing key \"sha256\"");
  bad(replaced(good, "\"volumes\"", "\"volume\""), bin, "missing key \"volumes\"");
  bad(good, bin.substr(0, 20), "SHA-256 must be", "hippocampus-u8.bin");
  bad(replaced(good, "\"sha256\":\"", "\"sha256\":\"0"), bin, "SHA-256 must be", "hippocampus-u8.bin");
  bad(replaced(good, "\"train\"", "\"test\""), bin, "no volume of split train");
  bad(replaced(good, "\"train\"", "\"both\""), bin, "\"split\" must be train or test");
  for (const char* name : {"", ".", "../one", "a/b", "a\\\\b"})
    bad(replaced(good, "\"one\"", cat("\"", name, "\"")), bin, "a volume's name must");
  bad(replaced(good, "[1,2,3]", "[1,2]"), bin, "one: \"shape_zyx\" must be a list of 3");
  bad(replaced(good, "[1,2,3]", "[1,2,-3]"), bin, "shape_zyx must be a whole number");
  bad(replaced(good, "[1,2,3]", "[1,2,3.0]"), bin, "shape_zyx must be a whole number");
  bad(replaced(good, "[1,2,3]", "[1,0,3]"), bin, "sizes must be in [1, 1024], got [1, 0, 3]");
  bad(replaced(good, "[1,2,3]", "[1024,1024,1024]"), bin, "must lie in the 24 bytes");
  bad(replaced(good, "\"image_offset\":0", "\"image_offset\":19"), bin, "must lie in the 24 bytes");
  bad(replaced(good, "\"image_offset\":0", "\"image_offset\":4294967296"), bin, "must lie in the 24 bytes");
  bad(replaced(good, "\"label_offset\":6", "\"label_offset\":0"), bin, "labels must be 0, 1 or 2, got 40 at voxel 1");
  bad(replaced(good, "\"unit_per_step\":2.5", "\"unit_per_step\":0"), bin, "unit_per_step must be a positive number");
  bad(replaced(good, "[1.5,1,0.5]", "[1.5,1,\"x\"]"), bin, "voxel_mm must be a positive number");
  bad(replaced(good, "\"name\":\"one\",", "\"name\":\"one\",\"name\":\"two\","), bin, "duplicate key");
}

TEST_CASE("isbi: size and labels are checked") {
  const TempFolder t;
  t.file("isbi2012/images.bin", "short");
  t.file("isbi2012/labels.bin", std::string(30 * 512 * 512, '\1'));
  CHECK(contains(error_of([&] { open_segmentation("isbi2012", t.path(), "train"); }),
                 "images.bin: must have 30 x 512 x 512 bytes, got 5"));
  t.file("isbi2012/images.bin", std::string(30 * 512 * 512, '\7'));
  CHECK(open_segmentation("isbi2012", t.path(), "train").cases.size() == 30);
  CHECK(contains(error_of([&] { open_segmentation("isbi2012", t.path(), "test"); }), "split must be train"));
  std::string labels(30 * 512 * 512, '\0');
  labels[512 * 512 + 3] = '\2';
  t.file("isbi2012/labels.bin", labels);
  CHECK(contains(error_of([&] { open_segmentation("isbi2012", t.path(), "train"); }),
                 "labels must be 0 or 1, got 2 at byte 262147"));
  t.file("isbi2012/labels.bin", labels + "x");
  CHECK(contains(error_of([&] { open_segmentation("isbi2012", t.path(), "train"); }), "labels.bin: "));
}

TEST_CASE("sets: normalisation, checks, folds") {
  SegmentationSet set = tiny_set(3);
  check_segmentation_set(set);
  normalize_zscore(set);
  for (const auto& c : set.cases) {
    double sum = 0, squares = 0;
    for (const float v : c.channels[0].voxels) {
      sum += static_cast<double>(v);
      squares += static_cast<double>(v) * static_cast<double>(v);
    }
    CHECK(std::fabs(sum) < 1e-5);
    CHECK(squares / 24 == doctest::Approx(1).epsilon(1e-6));
  }
  Volume flat({1, 2, 2}, 7);
  normalize_zscore(flat, "flat");
  CHECK(flat.voxels == std::vector<float>(4, 0.0f));
  flat.voxels[2] = std::numeric_limits<float>::infinity();
  CHECK(error_of([&] { normalize_zscore(flat, "flat"); }) == "flat: intensities must be finite to be normalised");

  const auto broken = [&](auto change, const char* rule) {
    SegmentationSet s = tiny_set(2);
    change(s);
    CHECK_MESSAGE(contains(error_of([&] { check_segmentation_set(s); }), rule), std::string(rule));
  };
  broken([](SegmentationSet& s) { s.cases.clear(); }, "tiny: a segmentation set must have cases");
  broken([](SegmentationSet& s) { s.class_names.resize(1); }, "needs 2 to 256 classes, got 1");
  broken([](SegmentationSet& s) { s.cases[1].channels.clear(); },
         "tiny, case 1: every case must have the same number of channels");
  broken(
      [](SegmentationSet& s) {
        s.cases[1].channels[0] = Volume({2, 3, 5});
      },
      "image must be [2, 3, 4] to match its labels, got [2, 3, 5]");
  broken([](SegmentationSet& s) { s.cases[1].label.voxels.pop_back(); }, "labels must fill a volume, got 23");
  broken([](SegmentationSet& s) { s.cases[1].label.voxels[2] = 2; }, "labels must be less than 2, got 2");

  const SegmentationSet two = select_cases(set, {2, 0});
  CHECK(two.cases[0].name == "case 2");
  CHECK(two.cases[1].name == "case 0");
  CHECK(contains(error_of([&] { select_cases(set, {3}); }), "case must be in [0, 3), got 3"));
  for (const auto& [n, folds] : {std::pair{30, 5}, {7, 3}, {4, 4}}) {
    std::set<std::int64_t> seen;
    for (int k = 0; k < folds; ++k) {
      const auto fold = held_out(n, folds, k);
      CHECK(!fold.empty());
      CHECK(fold.back() - fold.front() + 1 == static_cast<std::int64_t>(fold.size()));
      for (const auto i : fold) CHECK(seen.insert(i).second);
    }
    CHECK(seen.size() == static_cast<std::size_t>(n));
  }
  CHECK(contains(error_of([] { held_out(3, 4, 0); }), "2 <= folds <= n"));
  CHECK(contains(error_of([] { held_out(30, 5, 5); }), "fold 5 of 5"));
}

TEST_CASE("real segmentation data: counts") {
  const auto open = [](const char* name, const char* split) {
    SegmentationSet set;
    const std::string text = error_of([&] { set = open_segmentation(name, "", split); });
    if (text != "no error") MESSAGE("SKIPPED " << std::string(name) << ": " << text);
    return set;
  };
  if (const auto set = open("isbi2012", "train"); !set.cases.empty()) {
    check_segmentation_set(set);
    std::int64_t cell = 0;
    for (const auto& c : set.cases) cell += std::count(c.label.voxels.begin(), c.label.voxels.end(), 1);
    CHECK(static_cast<double>(cell) / (30 * 512 * 512) == doctest::Approx(0.78).epsilon(0.03));
  }
  for (const auto& [split, n] : {std::pair{"train", 80u}, {"test", 20u}}) {
    if (const auto set = open("hippocampus", split); !set.cases.empty()) {
      check_segmentation_set(set);
      CHECK(set.cases.size() == n);
      for (const auto& c : set.cases)
        for (const std::uint8_t k : {1, 2}) CHECK(std::count(c.label.voxels.begin(), c.label.voxels.end(), k) > 100);
    }
  }
}
