// datasets/: images, plots, readers, subsets, augmentation, loader.
#include <capo/datasets/augment.h>
#include <capo/datasets/cifar.h>
#include <capo/datasets/folder.h>
#include <capo/datasets/idx.h>
#include <capo/datasets/loader.h>
#include <capo/datasets/open.h>
#include <capo/datasets/plot.h>
#include <capo/datasets/png.h>
#include <capo/datasets/sample_rng.h>
#include <capo/datasets/subset.h>
#include <capo/tests/temp_folder.h>
#include <capo/tests/tiny_images.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <stdexcept>

using namespace capo;
using namespace capo::testing;

namespace {

// The picture whose Pillow results are written below.
Image pattern(int h, int w, int c = 3) {
  Image im(h, w, c);
  for (int y = 0; y < h; ++y) {
    for (int x = 0; x < w; ++x) {
      for (int k = 0; k < c; ++k) im.at(y, x)[k] = static_cast<std::uint8_t>((y * 37 + x * x * 11 + k * 50) % 256);
    }
  }
  return im;
}

long checksum(const Image& im) {
  long sum = 0;
  for (std::size_t i = 0; i < im.pixels.size(); ++i) sum += im.pixels[i] * static_cast<long>(i % 97 + 1);
  return sum;
}

long total(const Image& im) {
  long sum = 0;
  for (const auto v : im.pixels) sum += v;
  return sum;
}

std::vector<int> red(const Image& im) {
  std::vector<int> out;
  for (std::size_t i = 0; i < im.pixels.size(); i += 3) out.push_back(im.pixels[i]);
  return out;
}

class ToySet : public ImageDataset {
 public:
  ToySet(std::int64_t n, int side, int classes = 5, std::int64_t bad = -1)
      : ImageDataset("toy", names(classes)), n_(n), bad_(bad), side_(side) {}
  std::int64_t size() const override { return n_; }
  std::int64_t label(std::int64_t i) const override {
    check_index(i);
    return i % num_classes();
  }
  Image image(std::int64_t i) const override {
    check_index(i);
    if (i == bad_) throw std::runtime_error("sample is bad");
    Image im(side_, side_, 3);
    SampleRng rng(7, 99, 0, static_cast<std::uint64_t>(i));
    for (auto& v : im.pixels) v = static_cast<std::uint8_t>(rng.next());
    return im;
  }

 private:
  static std::vector<std::string> names(int n) {
    std::vector<std::string> out;
    for (int i = 0; i < n; ++i) out.push_back(cat("class", i));
    return out;
  }
  std::int64_t n_, bad_;
  int side_;
};

Augment strong() {
  Augment a;
  a.crop = Augment::Crop::random_resized;
  a.rand_ops = 2;
  a.rand_strength = 0.5f;
  a.erase = 0.5f;
  return a;
}

bool same_batch(const HostBatch& a, const HostBatch& b) {
  return a.n == b.n && a.h == b.h && a.w == b.w && a.c == b.c && a.epoch == b.epoch && a.batch == b.batch &&
         a.label == b.label && a.index == b.index && a.soft.size() == b.soft.size() && a.x.size() == b.x.size() &&
         std::memcmp(a.x.data(), b.x.data(), a.x.size() * sizeof(float)) == 0 &&
         (a.soft.empty() || std::memcmp(a.soft.data(), b.soft.data(), a.soft.size() * sizeof(float)) == 0);
}

std::string record(int label_bytes, int label_at, int label, int side, int base) {
  std::string r(static_cast<std::size_t>(label_bytes), '\0');
  r[static_cast<std::size_t>(label_at)] = static_cast<char>(label);
  for (int c = 0; c < 3; ++c) {
    for (int k = 0; k < side * side; ++k) r += static_cast<char>(base + c * 64 + k % 61);
  }
  return r;
}

std::string lines(int n) {
  std::string out;
  for (int i = 0; i < n; ++i) out += cat("name", i, "\n");
  return out;
}

}  // namespace

TEST_CASE("png: round trip, grey and RGB, odd sizes") {
  const int sizes[][2] = {{1, 1}, {3, 5}, {17, 2}, {40, 33}};
  for (const auto& s : sizes) {
    const Image rgb = pattern(s[0], s[1]), back = decode_image(encode_png(rgb), "mem");
    CHECK(back.height == s[0]);
    CHECK(back.width == s[1]);
    CHECK(back.pixels == rgb.pixels);
    const Image grey = pattern(s[0], s[1], 1), wide = decode_image(encode_png(grey), "mem");
    CHECK(red(wide) == std::vector<int>(grey.pixels.begin(), grey.pixels.end()));
  }
  const TempFolder t;
  write_png(t / "a.png", pattern(4, 4));
  CHECK(load_image(t / "a.png").pixels == pattern(4, 4).pixels);
  CHECK(starts_with(error_of([] { encode_png(Image(2, 2, 2)); }), "encode_png: image must be"));
  CHECK(starts_with(error_of([] { encode_png(Image()); }), "encode_png: image must be"));
}

TEST_CASE("image: JPEG, progressive JPEG, PNG with alpha") {
  const Image im = decode_image(view(kJpeg), "mem");
  REQUIRE(im.height == 8);
  REQUIRE(im.width == 8);
  REQUIRE(im.channels == 3);
  CHECK(std::abs(im.at(1, 3)[0] - 200) < 12);
  CHECK(std::abs(im.at(1, 3)[2] - 30) < 12);
  CHECK(std::abs(im.at(6, 3)[0] - 30) < 12);
  CHECK(std::abs(im.at(6, 3)[2] - 200) < 12);
  const Image grey = decode_image(view(kProgressiveJpeg), "mem");
  CHECK(grey.channels == 3);
  CHECK(grey.at(2, 2)[0] == grey.at(2, 2)[2]);
  CHECK(std::abs(grey.at(1, 1)[0] - 81) < 6);
  CHECK(red(decode_image(view(kPngRgba), "mem")) == std::vector<int>{10, 50});
  CHECK(decode_image(view(kJpeg420), "mem").width == 37);
  CHECK(std::abs(decode_image(view(kJpeg420), "mem").at(9, 20)[1] - 120) < 16);
  CHECK(decode_image(view(kPngPalette), "mem").width == 9);
  // An empty first IDAT, which PNG allows.
  const std::string png = encode_png(pattern(9, 7));
  const std::size_t at = png.find("IDAT") - 4;
  const std::string empty("\0\0\0\0IDAT\x35\xaf\x06\x1e", 12);
  CHECK(decode_image(png.substr(0, at) + empty + png.substr(at), "mem").pixels == pattern(9, 7).pixels);
}

TEST_CASE("resize: equal to Pillow 11 in every byte") {
  const Image im = pattern(7, 9);
  CHECK(red(resize_image(im, 3, 4)) == std::vector<int>{33, 126, 124, 121, 125, 166, 142, 112, 194, 113, 146, 160});
  CHECK(red(resize_image(im, 7, 4)) == std::vector<int>{7,   97,  91,  111, 44,  134, 128, 148, 81,  171,
                                                        173, 82,  126, 144, 147, 127, 163, 190, 104, 114,
                                                        203, 115, 137, 151, 190, 72,  182, 188});
  CHECK(red(resize_image(im, 3, 4, Interpolation::bilinear)) ==
        std::vector<int>{46, 125, 120, 122, 125, 158, 139, 118, 186, 119, 149, 155});
  CHECK(total(resize_image(im, 5, 9)) == 17199);
  CHECK(total(resize_image(im, 5, 9, Interpolation::bilinear)) == 17167);
  CHECK(total(resize_image(im, 16, 20)) == 122121);
  CHECK(total(resize_image(im, 16, 20, Interpolation::bilinear)) == 122120);
  CHECK(resize_image(im, 7, 9).pixels == im.pixels);
  const Image flat(13, 5, 3, 200);
  for (const auto v : resize_image(flat, 32, 17).pixels) CHECK(v == 200);
}

TEST_CASE("image: short side, crops, flip, errors") {
  CHECK(resize_short_side(pattern(20, 31), 10).width == 15);
  CHECK(resize_short_side(pattern(31, 20), 10).height == 15);
  const Image im = pattern(9, 8);
  CHECK(center_crop(im, 4, 5).at(0, 0)[0] == im.at(2, 2)[0]);  // 2.5 and 1.5 both round to 2
  CHECK(center_crop(im, 9, 8).pixels == im.pixels);
  CHECK(flip_horizontal(flip_horizontal(im)).pixels == im.pixels);
  CHECK(flip_horizontal(im).at(3, 0)[1] == im.at(3, 7)[1]);
  CHECK(starts_with(error_of([&] { crop(im, 0, 4, 2, 5); }), "crop: window must lie inside"));
  CHECK(starts_with(error_of([&] { crop(im, -1, 0, 2, 2); }), "crop: window must lie inside"));
  CHECK(starts_with(error_of([&] { center_crop(im, 10, 2); }), "center_crop: image must be at least"));
  CHECK(starts_with(error_of([&] { resize_image(im, 0, 2); }), "resize_image: new sides"));
  CHECK(starts_with(error_of([&] { resize_image(Image(), 2, 2); }), "resize_image: image must have"));
  CHECK(starts_with(error_of([&] { interpolation_of("nearest"); }), "interpolation: must be"));
}

TEST_CASE("plot: draws, deterministic, accepts odd data") {
  Series s;
  s.name = "loss";
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  s.y = {3, 2, nan, 1, inf, 0.5};
  PlotOptions o;
  o.title = "Title \x01 \xff";
  o.x_label = "x";
  o.y_label = "y";
  const Image a = plot({s}, o), b = plot({s}, o);
  CHECK(a.width == 900);
  CHECK(a.height == 600);
  CHECK(a.pixels == b.pixels);
  CHECK(a.pixels != plot({}, o).pixels);
  o.log_y = true;
  s.y = {100, 0, -1, 1e-9};
  CHECK(plot({s}, o).pixels.size() == a.pixels.size());
  o.log_y = false;
  for (const std::vector<double>& y : {std::vector<double>{}, {0}, {5, 5, 5}, {1e300, -1e300}, {1e-300}, {nan}}) {
    s.y = y;
    CHECK(plot({s}, o).width == 900);
  }
  o.y_min = 0;
  o.y_max = 1;
  s.y = {-5, 0.5, 7};
  CHECK(plot({s}, o).width == 900);
  s.x = {1};
  CHECK(starts_with(error_of([&] { plot({s}, o); }), "plot: series \"loss\" must have one x per y"));
}

TEST_CASE("contact_sheet and heat_overlay") {
  const std::vector<Image> images(5, pattern(8, 8));
  const Image bare = contact_sheet(images, {}, 3, 2);
  CHECK(bare.width == 3 * (16 + 4 + 8) + 8);
  CHECK(bare.at(8 + 2, 8 + 2)[0] == images[0].at(0, 0)[0]);
  const std::vector<Caption> captions(5, Caption{"cat\n0.9", {200, 0, 0}});
  const Image sheet = contact_sheet(images, captions, 3, 2);
  CHECK(sheet.height > bare.height);
  CHECK(sheet.at(8, 8)[0] == 200);  // the frame
  CHECK(starts_with(error_of([&] { contact_sheet(images, {Caption{}}, 3); }), "contact_sheet: captions must be"));
  CHECK(starts_with(error_of([&] { contact_sheet({}, {}, 3); }), "contact_sheet: needs images"));

  const float map[4] = {0, 0, 0, 1};
  const Image im(16, 16, 3, 100), hot = heat_overlay(im, map, 2, 2, 1.0f, ColorMap::viridis);
  const Color lo = map_color(0, ColorMap::viridis), hi = map_color(1, ColorMap::viridis);
  CHECK(hot.at(0, 0)[1] == lo.g);
  CHECK(hot.at(15, 15)[0] == hi.r);
  CHECK(heat_overlay(im, map, 2, 2, 0.0f).pixels == im.pixels);
  const float odd[4] = {std::numeric_limits<float>::quiet_NaN(), 3, 3, 3};
  CHECK(heat_overlay(im, odd, 2, 2).pixels.size() == im.pixels.size());
  CHECK(starts_with(error_of([&] { heat_overlay(im, nullptr, 2, 2); }), "heat_overlay: needs a map"));
}

TEST_CASE("cifar: layouts, labels, names") {
  const TempFolder t;
  t.file("cifar100/fine_label_names.txt", lines(100) + "\n");
  t.file("cifar100/coarse_label_names.txt", lines(20));
  std::string two = record(2, 1, 42, 32, 0) + record(2, 1, 99, 32, 5);
  two[0] = 19;
  t.file("cifar100/train.bin", two);
  auto set = open_dataset("cifar100", t.path(), "train");
  CHECK(set->size() == 2);
  CHECK(set->name() == "cifar100 train");
  CHECK(set->num_classes() == 100);
  CHECK(set->label(0) == 42);
  CHECK(set->label(1) == 99);
  const Image im = set->image(1);
  CHECK(im.height == 32);
  CHECK(im.at(1, 3)[0] == 5 + 35);
  CHECK(im.at(1, 3)[2] == 5 + 128 + 35);
  CHECK(open_dataset("cifar100-coarse", t.path(), "train")->label(0) == 19);
  CHECK(contains(error_of([&] { set->image(2); }), "index must be in [0, 2), got 2"));
  CHECK(contains(error_of([&] { set->label(-1); }), "got -1"));
  CHECK(contains(error_of([&] { open_cifar100(t / "cifar100", "valid"); }), "split must be train or test, got valid"));

  t.file("cifar10/batches.meta.txt", lines(10) + "\n");
  for (int i = 1; i <= 3; ++i)
    t.file(cat("cifar10/data_batch_", i, ".bin"), record(1, 0, i, 32, i) + record(1, 0, 9, 32, i));
  set = open_dataset("cifar10", t.path(), "train");
  REQUIRE(set->size() == 6);
  CHECK(set->label(4) == 3);
  CHECK(set->image(4).at(0, 0)[0] == 3);
  t.file("flowers64/label_names.txt", lines(89));
  t.file("flowers64/test.bin", record(1, 0, 88, 64, 1));
  CHECK(open_dataset("flowers64", t.path(), "test")->image(0).width == 64);
  t.file("tinyimagenet32/label_names.txt", lines(200));
  t.file("tinyimagenet32/val.bin", record(1, 0, 199, 32, 1));
  CHECK(open_dataset("tinyimagenet32", t.path(), "val")->label(0) == 199);
}

TEST_CASE("idx: plain, padded, RGB") {
  const TempFolder t;
  std::string images("\0\0\x08\x03\0\0\0\x02\0\0\0\x1c\0\0\0\x1c", 16), labels("\0\0\x08\x01\0\0\0\x02\x07\x09", 10);
  for (int i = 0; i < 2 * 28 * 28; ++i) images += static_cast<char>(i % 251);
  t.file("mnist/t10k-images-idx3-ubyte", images);
  t.file("mnist/t10k-labels-idx1-ubyte", labels);
  const auto set = open_dataset("mnist", t.path(), "test");
  CHECK(set->size() == 2);
  CHECK(set->label(1) == 9);
  const Image im = set->image(1);
  CHECK(im.width == 32);
  CHECK(im.channels == 3);
  CHECK(im.at(1, 5)[0] == 0);
  CHECK(im.at(2, 2)[2] == 784 % 251);
  const Image raw = open_mnist(t / "mnist", "test", {false, false})->image(0);
  CHECK(raw.width == 28);
  CHECK(raw.channels == 1);
  CHECK(raw.at(1, 0)[0] == 28);
}

TEST_CASE("folder: classes, order, formats") {
  const TempFolder t;
  t.file("train/b/2.PNG", encode_png(pattern(5, 4)));
  t.file("train/b/10.jpeg", std::string(view(kJpeg)));
  t.file("train/a/x.jpg", std::string(view(kJpeg)));
  t.file("train/a/notes.txt", "x");
  t.file("train/.hidden/y.png", "x");
  const auto set = open_dataset(t.path(), "", "train");
  CHECK(set->class_names() == std::vector<std::string>{"a", "b"});
  REQUIRE(set->size() == 3);
  CHECK(set->label(0) == 0);
  CHECK(set->label(1) == 1);
  CHECK(set->image(1).height == 8);
  CHECK(set->image(2).pixels == pattern(5, 4).pixels);
  CHECK(open_dataset(t / "train", "", "")->size() == 3);
}

TEST_CASE("open: what is missing is named, and how to get it") {
  const TempFolder t;
  for (const char* name : {"cifar10", "cifar100", "cifar100-coarse", "tinyimagenet32", "flowers64", "mnist"}) {
    for (const char* split : {"train", "test"}) {
      const std::string text = error_of([&] { open_dataset(name, t.path(), split); });
      CHECK_MESSAGE(starts_with(text, t.path() + "/"), text);
      CHECK_MESSAGE(contains(text, "CAPO_DATA"), text);
    }
  }
  CHECK(contains(error_of([&] { open_dataset("cifar10", t.path(), "train"); }), "scripts/get-data cifar10"));
  CHECK(contains(error_of([&] { open_dataset("imagenet", t.path(), "train"); }), "imagenet: unknown data set"));
  CHECK(contains(error_of([&] { open_dataset(t / "none", "", "train"); }), "none/train: cannot list the folder"));
}

TEST_CASE("subset: few-shot draws are balanced, nested and follow the seed") {
  const auto set = std::make_shared<ToySet>(100, 4);
  const auto count = [](const ImageDataset& s) {
    std::vector<int> n(static_cast<std::size_t>(s.num_classes()));
    for (std::int64_t i = 0; i < s.size(); ++i) ++n[static_cast<std::size_t>(s.label(i))];
    return n;
  };
  const auto pixels = [](const ImageDataset& s) {
    std::set<std::string> out;  // of strings: GCC 12 warns wrongly about comparing vectors of bytes
    for (std::int64_t i = 0; i < s.size(); ++i) {
      const auto image = s.image(i);
      out.emplace(image.pixels.begin(), image.pixels.end());
    }
    return out;
  };
  const auto two = few_shot(set, 2, 5), four = few_shot(set, 4, 5), other = few_shot(set, 4, 6);
  CHECK(count(*two) == std::vector<int>(5, 2));
  CHECK(count(*four) == std::vector<int>(5, 4));
  CHECK(four->name() == "toy 4-shot");
  const auto large = pixels(*four);
  for (const auto& p : pixels(*two)) CHECK(large.count(p) == 1);
  CHECK(pixels(*other) != large);
  CHECK(pixels(*few_shot(set, 4, 5)) == large);
  auto n = count(*balanced_subset(set, 13, 1));
  std::sort(n.begin(), n.end());
  CHECK(n == std::vector<int>{2, 2, 3, 3, 3});
  const int have[] = {20, 1, 0, 7, 3};  // classes of uneven size: small ones give all, the others as evenly as they can
  std::vector<std::int64_t> some;
  int taken[5] = {};
  for (std::int64_t i = 0; i < set->size(); ++i)
    if (const std::int64_t c = set->label(i); taken[c] < have[c]) ++taken[c], some.push_back(i);
  const auto uneven = subset(set, some, "uneven");
  CHECK(count(*balanced_subset(uneven, 20, 1)) == std::vector<int>{9, 1, 0, 7, 3});
  CHECK(count(*balanced_subset(uneven, 31, 1)) == std::vector<int>{20, 1, 0, 7, 3});
  for (const std::uint64_t seed : {1, 2, 3}) {
    n = count(*balanced_subset(uneven, 13, seed));
    CHECK((n == std::vector<int>{4, 1, 0, 5, 3} || n == std::vector<int>{5, 1, 0, 4, 3}));
  }
  CHECK(contains(error_of([&] { few_shot(set, 21, 0); }), "has only 20 samples"));
  CHECK(contains(error_of([&] { balanced_subset(set, 101, 0); }), "total must be in"));
  CHECK(contains(error_of([&] { subset(set, {100}, "s"); }), "s: subset indices must be in [0, 100), got 100"));

  const auto [train, validation] = split_dataset(set, 0.1, 3);
  CHECK(count(*train) == std::vector<int>(5, 18));
  CHECK(count(*validation) == std::vector<int>(5, 2));
  auto both = pixels(*train);
  both.merge(pixels(*validation));
  CHECK(both.size() == 100);
}

TEST_CASE("sample_rng: streams differ, ranges hold, moments are right") {
  std::set<std::uint64_t> seen;
  for (std::uint64_t a = 0; a < 10; ++a) {
    for (std::uint64_t b = 0; b < 10; ++b) {
      for (std::uint64_t purpose = 1; purpose < 4; ++purpose) seen.insert(SampleRng(1, purpose, a, b).next());
    }
  }
  CHECK(seen.size() == 300);
  SampleRng rng(1, 2, 3, 4);
  int count[7] = {};
  double mean = 0, square = 0, beta = 0, beta2 = 0;
  const int n = 70000;
  for (int i = 0; i < n; ++i) {
    ++count[rng.below(7)];
    const double z = rng.normal(), b = rng.beta(0.4);
    mean += z / n, square += z * z / n, beta += b / n, beta2 += b * b / n;
    const float u = rng.uniform();
    if (!(u >= 0 && u < 1) || !(b >= 0 && b <= 1)) FAIL("out of range");
  }
  for (const int c : count) CHECK(std::abs(c - 10000) < 400);
  CHECK(std::abs(mean) < 0.02);
  CHECK(std::abs(square - 1) < 0.03);
  CHECK(std::abs(beta - 0.5) < 0.01);
  CHECK(std::abs(beta2 - 0.25 - 1 / (4 * 1.8)) < 0.01);  // variance of Beta(a, a) = 1 / (4 (2a + 1))
  CHECK(SampleRng(1, 1, 1, 1).below(1) == 0);
  const auto order = shuffled_order(50, 9, 2);
  CHECK(std::set<std::int64_t>(order.begin(), order.end()).size() == 50);
  CHECK(order == shuffled_order(50, 9, 2));
  CHECK(order != shuffled_order(50, 9, 3));
  CHECK(order != shuffled_order(50, 8, 2));
}

TEST_CASE("preprocess: JSON round trip, evaluation transform, normalisation") {
  Preprocess p;
  p.size = 224;
  p.mean[0] = 0.1f + 0.2f;
  p.mean[1] = 1.0f / 3;
  p.std[2] = 1e-7f;
  p.crop_pct = 0.9f;
  p.interpolation = Interpolation::bilinear;
  const Preprocess q = preprocess_from_json(to_json(p));
  CHECK(q.size == p.size);
  CHECK(std::memcmp(q.mean, p.mean, sizeof p.mean) == 0);
  CHECK(std::memcmp(q.std, p.std, sizeof p.std) == 0);
  CHECK(q.crop_pct == p.crop_pct);
  CHECK(q.interpolation == p.interpolation);
  CHECK(to_json(q) == to_json(p));
  CHECK(to_json(Preprocess{}) ==
        R"({"size":32,"mean":[0.5,0.5,0.5],"std":[0.5,0.5,0.5],"crop_pct":1,"interpolation":"bicubic"})");

  Preprocess small;
  small.size = 8;
  CHECK(eval_image(pattern(8, 8), small).pixels == pattern(8, 8).pixels);
  small.crop_pct = 0.875f;
  CHECK(eval_image(pattern(20, 30), small).pixels == center_crop(resize_image(pattern(20, 30), 9, 13), 8, 8).pixels);
  std::vector<float> x(8 * 8 * 3);
  small.mean[1] = 0.25f;
  small.std[1] = 0.125f;
  const Image im = pattern(8, 8);
  normalize_into(x.data(), im, small);
  CHECK(x[4] == (static_cast<float>(im.pixels[4]) / 255.0f - 0.25f) / 0.125f);
  CHECK(contains(error_of([&] { normalize_into(x.data(), pattern(8, 9), small); }), "image must be 8 x 8"));

  const ToySet set(3, 4);
  const Preprocess m = measure_preprocess(set, 4);
  double sum = 0;
  for (int i = 0; i < 3; ++i) {
    const Image each = set.image(i);
    for (std::size_t k = 0; k < each.pixels.size(); k += 3) sum += each.pixels[k];
  }
  CHECK(m.mean[0] == doctest::Approx(sum / 48 / 255));
}

TEST_CASE("augment: follows (seed, epoch, index) and nothing else") {
  Preprocess p;
  p.size = 16;
  const Image im = pattern(20, 24);
  const Augment a = strong();
  const Image x = augment_image(im, p, a, 1, 2, 3);
  CHECK(x.height == 16);
  CHECK(x.width == 16);
  CHECK(x.pixels == augment_image(im, p, a, 1, 2, 3).pixels);
  CHECK(x.pixels != augment_image(im, p, a, 2, 2, 3).pixels);
  CHECK(x.pixels != augment_image(im, p, a, 1, 3, 3).pixels);
  CHECK(x.pixels != augment_image(im, p, a, 1, 2, 4).pixels);
  Augment off;
  off.flip = 0;
  CHECK(augment_image(im, p, off, 1, 2, 3).pixels == eval_image(im, p).pixels);
  off.flip = 1;
  CHECK(augment_image(im, p, off, 1, 2, 3).pixels == flip_horizontal(eval_image(im, p)).pixels);

  // Every offset of the padded crop occurs: a lone bright pixel lands everywhere within reach, or outside.
  Augment shift;
  shift.crop = Augment::Crop::pad;
  shift.pad = 2;
  shift.flip = 0;
  Image dot(16, 16, 3);
  dot.at(1, 8)[0] = 255;
  std::set<int> places;
  for (int i = 0; i < 600; ++i) {
    const Image y = augment_image(dot, p, shift, 1, 0, i);
    int at = -1;
    for (int k = 0; k < 256; ++k) at = y.pixels[static_cast<std::size_t>(3 * k)] == 255 ? k : at;
    places.insert(at);
  }
  CHECK(places.size() == 4 * 5 + 1);  // rows 0..3, columns 6..10; row -1 is outside

  Augment bad;
  bad.scale_min = 0;
  CHECK(starts_with(error_of([&] { check_augment(bad); }), "augment: 0 < scale_min"));
  // A window of an allowed shape exists for any image, also for very thin ones.
  Augment narrow = strong();
  narrow.scale_min = narrow.scale_max = 1;
  for (int i = 0; i < 20; ++i) CHECK(augment_image(pattern(3, 200), p, narrow, 1, 0, i).width == 16);
  for (int i = 0; i < 20; ++i) CHECK(augment_image(pattern(200, 1), p, narrow, 1, 0, i).width == 16);
}

TEST_CASE("augment: erasing covers the asked share") {
  Augment a;
  a.erase = 1;
  a.erase_min = 0.1f;
  a.erase_max = 0.2f;
  for (int i = 0; i < 50; ++i) {
    std::vector<float> x(32 * 32 * 3, 1.0f);
    erase_in(x.data(), 32, 3, a, 1, 0, i);
    const auto gone = static_cast<double>(std::count(x.begin(), x.end(), 0.0f)) / static_cast<double>(x.size());
    CHECK(gone > 0.07);
    CHECK(gone < 0.24);
  }
  a.erase = 0;
  std::vector<float> x(12, 1.0f);
  erase_in(x.data(), 2, 3, a, 1, 0, 0);
  CHECK(x == std::vector<float>(12, 1.0f));
}

TEST_CASE("rand ops: Pillow's values where the definition is Pillow's, the identity at strength 0") {
  const Image im = pattern(7, 9);
  CHECK(checksum(im) == 1156928);
  CHECK(checksum(apply_rand_op(im, RandOp::brightness, 0.5f)) == 1511333);
  CHECK(checksum(apply_rand_op(im, RandOp::contrast, -0.5f)) == 1147974);
  CHECK(checksum(apply_rand_op(im, RandOp::color, 0.5f)) == 1164434);
  CHECK(checksum(apply_rand_op(im, RandOp::sharpness, 0.5f)) == 1155585);
  CHECK(checksum(apply_rand_op(im, RandOp::posterize, 0.5f)) == 1143592);
  CHECK(checksum(apply_rand_op(im, RandOp::solarize, 0.5f)) == 576191);
  Image dim = im;
  for (auto& v : dim.pixels) v = static_cast<std::uint8_t>(v / 2 + 20);
  CHECK(checksum(apply_rand_op(dim, RandOp::auto_contrast, 1)) == 1150117);
  Image third = pattern(40, 60);
  for (auto& v : third.pixels) v = static_cast<std::uint8_t>(v / 3);
  CHECK(checksum(apply_rand_op(third, RandOp::equalize, 1)) == 45774997);

  for (int op = 0; op < kRandOps; ++op) {
    const auto kind = static_cast<RandOp>(op);
    if (kind != RandOp::auto_contrast && kind != RandOp::equalize && kind != RandOp::solarize) {
      CHECK_MESSAGE(apply_rand_op(im, kind, 0).pixels == im.pixels, "op ", op);
    }
    for (const float s : {-1.0f, -0.3f, 1.0f}) {
      const Image one = apply_rand_op(pattern(1, 1), kind, s), grey = apply_rand_op(pattern(6, 5, 1), kind, s);
      CHECK(one.pixels.size() == 3);
      CHECK(grey.pixels.size() == 30);
    }
  }
  // Directions: a positive shift takes from the right.
  const Image moved = apply_rand_op(im, RandOp::translate_x, 0.5f);  // 2 pixels
  CHECK(moved.at(3, 1)[1] == im.at(3, 3)[1]);
  CHECK(moved.at(3, 8)[1] == 0);
  CHECK(contains(error_of([&] { apply_rand_op(im, RandOp::rotate, 1.5f); }), "strength must be in"));
}

TEST_CASE("mixing: draws, labels, pixels") {
  Mixing m;
  CHECK(draw_mix(m, 4, 8, 8, 1, 0, 0).kind == MixDraw::Kind::none);
  m.mixup_alpha = 0.8f;
  m.cutmix_alpha = 1.0f;
  m.label_smoothing = 0.1f;
  int cuts = 0;
  for (int b = 0; b < 200; ++b) {
    const MixDraw d = draw_mix(m, 4, 8, 8, 1, 0, b);
    const std::vector<std::int64_t> label = {0, 1, 2, 2};
    std::vector<float> x(4 * 64 * 3);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i / (64 * 3));  // sample i is all i
    const auto soft = apply_mix(d, m, x, 8, 8, 3, label, 3);
    REQUIRE(soft.size() == 12);
    CHECK(d.lambda >= 0);
    CHECK(d.lambda <= 1);
    for (std::size_t i = 0; i < 4; ++i) {
      const auto j = static_cast<std::size_t>(d.partner[i]);
      float mean = 0, sum = 0;
      for (std::size_t k = 0; k < 192; ++k) mean += x[i * 192 + k] / 192;
      CHECK(mean ==
            doctest::Approx(d.lambda * static_cast<float>(i) + (1 - d.lambda) * static_cast<float>(j)).epsilon(1e-4));
      for (std::size_t c = 0; c < 3; ++c) sum += soft[i * 3 + c];
      CHECK(sum == doctest::Approx(1));
      if (label[i] != label[j]) {
        CHECK(soft[i * 3 + static_cast<std::size_t>(label[i])] == doctest::Approx(0.9f * d.lambda + 0.1f / 3));
      }
    }
    cuts += d.kind == MixDraw::Kind::cutmix;
    CHECK(draw_mix(m, 4, 8, 8, 1, 0, b).lambda == d.lambda);
  }
  CHECK(cuts > 60);
  CHECK(cuts < 140);
  m.label_smoothing = 1;
  CHECK(starts_with(error_of([&] { draw_mix(m, 4, 8, 8, 1, 0, 0); }), "mixing: "));
}

TEST_CASE("loader: the same bits for any number of workers") {
  const auto set = std::make_shared<ToySet>(53, 10);
  Preprocess p;
  p.size = 8;
  LoaderOptions o;
  o.batch_size = 8;
  o.shuffle = true;
  o.seed = 11;
  o.augment = strong();
  o.mixing.mixup_alpha = 0.4f;
  o.workers = 0;
  Loader inline_loader(set, p, o);
  CHECK(inline_loader.batches_per_epoch() == 7);
  CHECK(inline_loader.num_classes() == 5);
  std::vector<HostBatch> want;
  for (int i = 0; i < 20; ++i) want.push_back(inline_loader.next());
  CHECK(want[6].n == 5);
  CHECK(want[6].x.size() == 5 * 8 * 8 * 3);
  CHECK(want[7].epoch == 1);
  CHECK(want[7].batch == 0);
  for (int epoch = 0; epoch < 2; ++epoch) {
    std::set<std::int64_t> seen;
    for (int b = 0; b < 7; ++b) seen.insert(want[static_cast<std::size_t>(7 * epoch + b)].index.begin(),
                                            want[static_cast<std::size_t>(7 * epoch + b)].index.end());
    CHECK(seen.size() == 53);
  }
  CHECK(want[0].index != want[7].index);
  for (const int workers : {1, 2, 3, 5}) {
    for (const int prefetch : {1, 2, 9}) {
      o.workers = workers;
      o.prefetch = prefetch;
      Loader loader(set, p, o);
      for (std::size_t i = 0; i < want.size(); ++i) {
        HostBatch b = loader.next();
        CHECK(same_batch(b, want[i]));
        if (i % 2) loader.recycle(std::move(b));
      }
      loader.seek(0, 3);  // back again
      CHECK(same_batch(loader.next(), want[3]));
      loader.seek(1, 5);
      CHECK(same_batch(loader.next(), want[12]));
      CHECK(same_batch(loader.next(), want[13]));
      CHECK(same_batch(loader.next(), want[14]));
    }
  }
  inline_loader.seek(1, 6);
  CHECK(same_batch(inline_loader.next(), want[13]));
  CHECK(starts_with(error_of([&] { inline_loader.seek(0, 7); }), "Loader: seek needs"));
}

TEST_CASE("loader: order, evaluation, drop_last, option errors") {
  const auto set = std::make_shared<ToySet>(10, 8);
  Preprocess p;
  p.size = 8;
  LoaderOptions o;
  o.batch_size = 4;
  Loader loader(set, p, o);
  CHECK(loader.batches_per_epoch() == 3);
  CHECK(loader.next().index == std::vector<std::int64_t>{0, 1, 2, 3});
  const HostBatch b = loader.next();
  CHECK(b.label == std::vector<std::int64_t>{4, 0, 1, 2});
  CHECK(b.soft.empty());
  std::vector<float> x(8 * 8 * 3);
  normalize_into(x.data(), set->image(5), p);
  CHECK(std::equal(x.begin(), x.end(), b.x.begin() + 192));
  CHECK(loader.next().n == 2);
  o.drop_last = true;
  CHECK(Loader(set, p, o).batches_per_epoch() == 2);
  const auto fails = [&](const LoaderOptions& wrong, const char* rule) {
    const std::string text = error_of([&] { Loader l(set, p, wrong); });
    CHECK_MESSAGE(contains(text, rule), text);
  };
  o.batch_size = 11;
  fails(o, "not even one batch");
  o.batch_size = 0;
  fails(o, "batch_size must be positive");
  o = {};
  o.workers = -1;
  fails(o, "workers must be in");
  o = {};
  o.prefetch = 0;
  fails(o, "prefetch must be in");
  CHECK(contains(error_of([&] { Loader l(nullptr, p, LoaderOptions()); }), "nothing to load"));
}

TEST_CASE("loader: exceptions come at their place, again until seek, and shutdown is clean at any moment") {
  const auto set = std::make_shared<ToySet>(40, 8, 5, 17);
  Preprocess p;
  p.size = 8;
  for (const int workers : {0, 1, 4}) {
    LoaderOptions o;
    o.batch_size = 4;
    o.workers = workers;
    Loader loader(set, p, o);
    for (int i = 0; i < 4; ++i) CHECK(loader.next().batch == i);
    CHECK_THROWS_WITH(loader.next(), "sample is bad");
    CHECK_THROWS_WITH(loader.next(), "sample is bad");
    loader.seek(0, 5);
    CHECK(loader.next().batch == 5);
    loader.seek(0, 4);
    CHECK_THROWS_WITH(loader.next(), "sample is bad");
  }
  const auto big = std::make_shared<ToySet>(1000, 32);
  p.size = 32;
  for (int i = 0; i < 30; ++i) {
    LoaderOptions o;
    o.batch_size = 200;
    o.workers = 1 + i % 4;
    o.augment = strong();
    Loader loader(big, p, o);
    if (i % 3 == 1) loader.seek(3, 2);
    if (i % 5 == 2) loader.next();
  }
}

TEST_CASE("real data: sizes, class names, published statistics") {
  const auto open = [](const char* name, const char* split) -> DatasetPtr {
    const std::string text = error_of([&] { open_dataset(name, "", split); });
    if (text == "no error") return open_dataset(name, "", split);
    MESSAGE("SKIPPED " << std::string(name) << ": " << text);
    return nullptr;
  };
  if (const auto set = open("cifar100", "train"); set && set->size() == 50000) {
    const Preprocess p = measure_preprocess(*set, 32);
    CHECK(p.mean[0] == doctest::Approx(0.50707516).epsilon(1e-3));
    CHECK(p.mean[2] == doctest::Approx(0.44091784).epsilon(1e-3));
    CHECK(p.std[1] == doctest::Approx(0.25643846).epsilon(2e-3));
    CHECK(set->class_names()[0] == "apple");
    CHECK(few_shot(set, 10, 0)->size() == 1000);
  }
  if (const auto set = open("cifar10", "test")) CHECK(set->size() == 10000);
  if (const auto set = open("tinyimagenet32", "val")) CHECK(set->num_classes() == 200);
  if (const auto set = open("flowers64", "test")) CHECK(set->image(0).width == 64);
  if (const auto set = open("fashion-mnist", "train")) {
    CHECK(set->size() == 60000);
    CHECK(set->label(0) == 9);  // the first training image is an ankle boot
    CHECK(measure_preprocess(*open_dataset("fashion-mnist", "", "test"), 32).mean[0] ==
          doctest::Approx(0.2868 * 784 / 1024).epsilon(1e-3));
  }
}
