// Augmentation of labelled volumes: against SciPy and PyTorch, identities, mirrors, labels, seeds.
#include <capo/datasets/volume_augment.h>
#include <capo/datasets/voxel_ops.h>
#include <capo/tests/support.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

using namespace capo;
using namespace capo::testing;

namespace {

// i^2 * 7 mod 101, row by row: what the numbers below were made with (SciPy 1.17.1, PyTorch 2.15).
Volume pattern(const Extent& e) {
  Volume v(e);
  for (std::size_t i = 0; i < v.voxels.size(); ++i) v.voxels[i] = static_cast<float>(i * i * 7 % 101);
  return v;
}

SegmentationCase labelled(const Extent& e, int channels = 1) {
  SegmentationCase c{"case", {}, LabelVolume(e)};
  for (int k = 0; k < channels; ++k) {
    c.channels.push_back(pattern(e));
    for (float& v : c.channels.back().voxels) v = v / 50 - 1 + static_cast<float>(k);
  }
  for (std::size_t i = 0; i < c.label.voxels.size(); ++i)
    c.label.voxels[i] = static_cast<std::uint8_t>(i % 3 == 0 ? 5 : i % 7 == 0);
  return c;
}

void check_values(const std::vector<float>& v, const std::array<double, 5>& expected,
                  const std::array<std::size_t, 5>& at, double tolerance = 2e-5) {
  for (std::size_t i = 0; i < 5; ++i)
    CHECK_MESSAGE(std::fabs(static_cast<double>(v[at[i]]) - expected[i]) < tolerance, "value ", at[i], " is ",
                  v[at[i]]);
}
constexpr std::array<std::size_t, 5> kAt{0, 7, 23, 38, 59};

VolumeAugment everything() {
  VolumeAugment a = nnunet_augment(false);
  for (Draw* d : {&a.rotate, &a.scale, &a.noise, &a.blur, &a.brightness, &a.contrast, &a.low_resolution,
                  &a.gamma_inverted, &a.gamma})
    d->probability = 0.7f;
  a.translate = {0.7f, 0, 0.2f};
  a.elastic = {0.7f, 0, 3};
  a.elastic_spacing = 4;
  return a;
}

}  // namespace

TEST_CASE("voxel ops: the values of SciPy, PyTorch and the definitions") {
  const Extent e{3, 4, 5};
  const Volume v = pattern(e);
  auto w = v.voxels;
  blur(w.data(), e, 0.8f);  // scipy.ndimage.gaussian_filter(v, 0.8, mode='mirror', truncate=4)
  check_values(w, {47.08921, 53.74687, 47.9208, 42.40698, 30.86805}, kAt);
  w = v.voxels;
  lower_resolution(w.data(), e, 0.6f);  // interpolate to (2, 2, 3) by nearest-exact, back by trilinear
  check_values(w, {74.0, 30.75, 40.9, 12.6, 26.0}, kAt);
  w = v.voxels;
  change_gamma(w.data(), e, 1.4f, false);
  check_values(w, {9.7243, 36.7161, 65.2958, 12.5601, 24.4919}, kAt, 2e-4);
  w = v.voxels;
  change_gamma(w.data(), e, 1.4f, true);
  check_values(w, {-6.1824, 42.8402, 69.351, 4.3995, 26.8385}, kAt, 2e-4);
  w = v.voxels;
  change_contrast(w.data(), e, 1.25f);
  check_values(w, {0.0, 38.2, 71.95, 0.0, 20.7}, kAt);
  w = v.voxels;
  change_brightness(w.data(), e, 0.5f);
  for (std::size_t i = 0; i < w.size(); ++i) CHECK(w[i] == v.voxels[i] / 2);

  std::vector<float> noise(40000);
  SampleRng rng(1, 2, 3, 4);
  add_noise(noise.data(), {1, 200, 200}, 0.5f, rng);
  const double mean = std::accumulate(noise.begin(), noise.end(), 0.0) / 40000,
               squares = std::inner_product(noise.begin(), noise.end(), noise.begin(), 0.0) / 40000;
  CHECK(std::fabs(mean) < 0.01);
  CHECK(std::sqrt(squares) == doctest::Approx(0.5).epsilon(0.02));
}

TEST_CASE("voxel ops: identities and edges") {
  for (const Extent e : {Extent{3, 4, 5}, Extent{1, 6, 2}, Extent{1, 1, 1}}) {
    const Volume v = pattern(e);
    SampleRng rng(0, 0, 0, 0);
    auto w = v.voxels;
    add_noise(w.data(), e, 0, rng);
    blur(w.data(), e, 0);
    blur(w.data(), e, 0.1f);  // nothing within 4 sigma
    change_brightness(w.data(), e, 1);
    lower_resolution(w.data(), e, 1);
    CHECK(w == v.voxels);
    change_contrast(w.data(), e, 1);
    change_gamma(w.data(), e, 1, false);
    change_gamma(w.data(), e, 1, true);
    for (std::size_t i = 0; i < w.size(); ++i) CHECK(w[i] == doctest::Approx(v.voxels[i]).epsilon(1e-5));
    std::vector<float> flat(w.size(), 3.0f);
    blur(flat.data(), e, 2.5f);
    lower_resolution(flat.data(), e, 0.3f);
    change_gamma(flat.data(), e, 0.5f, true);
    change_contrast(flat.data(), e, 2);
    for (const float f : flat) CHECK(f == doctest::Approx(3).epsilon(1e-6));
  }
  float one = 1;
  CHECK(contains(error_of([&] { blur(&one, {1, 1, 1}, -1); }), "blur: sigma must be in [0, 100], got -1"));
  CHECK(contains(error_of([&] { lower_resolution(&one, {1, 1, 1}, 0); }), "zoom must be in (0, 1]"));
  CHECK(contains(error_of([&] { change_gamma(&one, {1, 1, 1}, 0, false); }), "exponent must be positive"));
}

TEST_CASE("resample: SciPy's values, both borders") {
  const Volume v = pattern({1, 6, 7});
  SpatialMap m = plain_map({1, 6, 7}, {0, 0, 0});
  m.matrix = turn_and_scale({20 * 3.14159265358979323846 / 180, 0, 0}, 1.3);
  const std::array<std::size_t, 5> at{0, 8, 20, 33, 41};
  m.centre[1] += 1.7;  // scipy.ndimage.map_coordinates(order=1)
  const auto cut = resample(v, m, Sampling::linear, Border::constant),
             mirrored = resample(v, m, Sampling::linear, Border::mirror);
  check_values(cut, {52.3675, 39.91863, 82.90085, 75.96032, 45.19112}, at, 1e-4);
  check_values(mirrored, {52.3675, 39.91863, 82.90085, 75.96032, 49.16748}, at, 1e-4);
  CHECK(std::accumulate(cut.begin(), cut.end(), 0.0) == doctest::Approx(1851.2036).epsilon(1e-6));
  CHECK(std::accumulate(mirrored.begin(), mirrored.end(), 0.0) == doctest::Approx(2331.8251).epsilon(1e-6));
}

TEST_CASE("resample: a plain map copies to the bit; mirrors and quarter turns are exact") {
  for (const Extent e : {Extent{5, 6, 7}, Extent{1, 6, 7}}) {
    const SegmentationCase c = labelled(e);
    const Volume& v = c.channels[0];
    for (const Sampling s : {Sampling::linear, Sampling::cubic}) {
      CHECK(resample(v, plain_map(e, {0, 0, 0}), s, Border::constant) == v.voxels);
      const Extent patch{e.z == 1 ? 1 : 2, 3, 4};
      const auto inner = resample(v, plain_map(patch, {e.z / 2, 2, 1}), s, Border::mirror);
      const auto labels = resample(c.label, plain_map(patch, {e.z / 2, 2, 1}), Border::mirror);
      for (int k = 0; k < 8; ++k) {
        SpatialMap m = plain_map(patch, {e.z / 2, 2, 1});
        m.flip = {(k & 1) != 0, (k & 2) != 0, (k & 4) != 0};
        const auto flipped = resample(v, m, s, Border::mirror);
        const auto flipped_labels = resample(c.label, m, Border::mirror);
        std::size_t at = 0;
        for (std::int64_t z = 0; z < patch.z; ++z) {
          for (std::int64_t y = 0; y < 3; ++y) {
            for (std::int64_t x = 0; x < 4; ++x, ++at) {
              const std::int64_t fz = m.flip[0] ? patch.z - 1 - z : z, fy = m.flip[1] ? 2 - y : y,
                                 fx = m.flip[2] ? 3 - x : x;
              const auto from = static_cast<std::size_t>((fz * 3 + fy) * 4 + fx);
              CHECK(inner[from] == v.at(e.z / 2 + fz, 2 + fy, 1 + fx));
              CHECK(flipped[at] == inner[from]);
              CHECK(flipped_labels[at] == labels[from]);
            }
          }
        }
      }
    }
  }
  // Outside: zeros, or the volume mirrored.
  const Volume v = pattern({1, 3, 3});
  const auto zeros = resample(v, plain_map({1, 5, 5}, {0, -1, -1}), Sampling::cubic, Border::constant);
  const auto mirror = resample(v, plain_map({1, 5, 5}, {0, -1, -1}), Sampling::cubic, Border::mirror);
  CHECK(zeros[0] == 0);
  CHECK(zeros[6] == v.voxels[0]);
  CHECK(mirror[0] == v.voxels[4]);
  CHECK(mirror[24] == v.voxels[4]);
  CHECK(mirror[1] == v.voxels[3]);
  // A half turn mirrors two axes.
  SpatialMap half = plain_map({1, 3, 3}, {0, 0, 0}), both = half;
  half.matrix = turn_and_scale({3.14159265358979323846, 0, 0}, 1);
  both.flip = {false, true, true};
  const auto a = resample(v, half, Sampling::linear, Border::mirror),
             b = resample(v, both, Sampling::linear, Border::mirror);
  for (std::size_t i = 0; i < 9; ++i) CHECK(a[i] == doctest::Approx(b[i]).epsilon(1e-6));
  // Cubic sampling follows a parabola, linear does not; twice the size shows half as much.
  Volume parabola({1, 1, 20});
  for (std::size_t i = 0; i < 20; ++i) parabola.voxels[i] = static_cast<float>(i * i);
  SpatialMap zoom = plain_map({1, 1, 8}, {0, 0, 6});
  zoom.matrix = turn_and_scale({0, 0, 0}, 2);
  const auto cubic = resample(parabola, zoom, Sampling::cubic, Border::constant);
  for (std::size_t i = 0; i < 8; ++i) {
    const double x = 9.5 + (static_cast<double>(i) - 3.5) / 2;
    CHECK(static_cast<double>(cubic[i]) == doctest::Approx(x * x).epsilon(1e-5));
  }
  CHECK(contains(error_of([] { turn_and_scale({0, 0, 0}, 0); }), "scale must be positive"));
  zoom.warp.resize(3);
  CHECK(contains(error_of([&] { resample(parabola, zoom, Sampling::linear, Border::mirror); }),
                 "warp must have 3 values per voxel, got 3 for [1, 1, 8]"));
}

TEST_CASE("elastic warp: smooth, of the stated size, still on flat axes") {
  const Extent e{1, 64, 80};
  SampleRng rng(1, 0, 0, 0);
  double squares = 0, steepest = 0;
  constexpr int kFields = 40;
  for (int f = 0; f < kFields; ++f) {
    const auto w = elastic_warp(e, 16, 2, rng);
    REQUIRE(w.size() == 3u * 64 * 80);
    for (std::size_t i = 0; i < w.size(); i += 3) {
      CHECK(w[i] == 0);
      squares += static_cast<double>(w[i + 1] * w[i + 1] + w[i + 2] * w[i + 2]);
      if (i >= 3 && (i / 3) % 80 != 0)
        steepest = std::max(steepest, static_cast<double>(std::fabs(w[i + 1] - w[i - 2])));
    }
  }
  // A sum of independent components: its variance is theirs times the mean of the squared weights, axis by axis.
  double mean_square = 0;
  for (int i = 0; i < 1000; ++i) {
    const double t = (i + 0.5) / 1000;
    const double b[4] = {(1 - t) * (1 - t) * (1 - t) / 6, (3 * t * t * t - 6 * t * t + 4) / 6,
                         (-3 * t * t * t + 3 * t * t + 3 * t + 1) / 6, t * t * t / 6};
    for (const double k : b) mean_square += k * k / 1000;
  }
  // Along z, where the patch is one voxel, the weights are 1/6, 4/6, 1/6.
  const double expected = 4 * mean_square * mean_square * (1 + 16 + 1) / 36;
  CHECK(squares / (2.0 * kFields * 64 * 80) == doctest::Approx(expected).epsilon(0.1));
  CHECK(steepest < 1);  // no folds
  CHECK(contains(error_of([&] { elastic_warp(e, 1, 2, rng); }), "spacing must be at least 2 voxels"));
  SampleRng other(1, 0, 0, 0);
  const auto none = elastic_warp(e, 16, 0, other);
  CHECK(std::all_of(none.begin(), none.end(), [](float v) { return v == 0; }));
}

TEST_CASE(
    "augmented patches: off is the identity, seeds decide, labels stay in the set, image and label move together") {
  for (const Extent patch : {Extent{6, 7, 8}, Extent{1, 7, 8}}) {
    const SegmentationCase c = labelled({patch.z == 1 ? 1 : 9, 12, 11}, 2);
    SampleRng rng(3, 0, 0, 0);
    const LabelledPatch plain = augmented_patch(c, patch, {0, 2, 1}, VolumeAugment{}, rng);
    REQUIRE(plain.channels.size() == 2);
    for (std::int64_t z = 0; z < patch.z; ++z)
      for (std::int64_t y = 0; y < 7; ++y)
        for (std::int64_t x = 0; x < 8; ++x) {
          const auto at = static_cast<std::size_t>((z * 7 + y) * 8 + x);
          CHECK(plain.channels[1][at] == c.channels[1].at(z, y + 2, x + 1));
          CHECK(plain.label[at] == c.label.at(z, y + 2, x + 1));
        }
    const VolumeAugment all = everything();
    std::set<std::vector<float>> seen;
    for (std::uint64_t i = 0; i < 60; ++i) {
      SampleRng a(7, 1, i, 2), b(7, 1, i, 2);
      const LabelledPatch p = augmented_patch(c, patch, {0, 2, 1}, all, a),
                          q = augmented_patch(c, patch, {0, 2, 1}, all, b);
      CHECK(p.channels == q.channels);
      CHECK(p.label == q.label);
      for (const auto l : p.label) CHECK((l == 0 || l == 1 || l == 5));
      for (const float v : p.channels[0]) CHECK(std::isfinite(v));
      seen.insert(p.channels[0]);
    }
    CHECK(seen.size() == 60);

    // An image that is its own label map: wherever linear sampling gives a whole number on a region, the label says
    // the same.
    SegmentationCase blocks{"blocks", {Volume(c.label.extent)}, LabelVolume(c.label.extent)};
    for (std::int64_t z = 0; z < c.label.extent.z; ++z)
      for (std::int64_t y = 0; y < 12; ++y)
        for (std::int64_t x = 0; x < 11; ++x) {
          blocks.label.at(z, y, x) = static_cast<std::uint8_t>(y >= 6);
          blocks.channels[0].at(z, y, x) = y >= 6 ? 1.0f : 0.0f;
        }
    VolumeAugment moving = all;
    for (Draw* d : {&moving.noise, &moving.blur, &moving.brightness, &moving.contrast, &moving.low_resolution,
                    &moving.gamma_inverted, &moving.gamma})
      d->probability = 0;
    moving.border = Border::mirror;
    for (std::uint64_t i = 0; i < 40; ++i) {
      SampleRng r(9, 1, i, 2);
      const LabelledPatch p = augmented_patch(blocks, patch, {0, 2, 1}, moving, r);
      for (std::size_t k = 0; k < p.label.size(); ++k) {
        if (p.channels[0][k] < 0.3f) CHECK(p.label[k] == 0);
        if (p.channels[0][k] > 0.7f) CHECK(p.label[k] == 1);
      }
    }
  }
}

TEST_CASE("augment: nnU-Net's probabilities, and settings out of range") {
  for (const bool flat : {false, true}) {
    const VolumeAugment a = nnunet_augment(flat);
    check_augment(a);
    CHECK(a.rotate.probability == 0.2f);
    CHECK(a.rotate.high == (flat ? 180 : 30));
    CHECK(a.mirror[0] == (flat ? 0.0f : 0.5f));
    CHECK(a.elastic.probability == 0);
  }
  // How often a change happens: brightness alone, over 2000 draws.
  SegmentationCase one{"one", {Volume({1, 1, 1}, 1)}, LabelVolume({1, 1, 1})};
  VolumeAugment bright;
  bright.brightness = {0.15f, 0.75f, 1.25f};
  int changed = 0;
  for (std::uint64_t i = 0; i < 2000; ++i) {
    SampleRng rng(5, 1, i, 0);
    const float v = augmented_patch(one, {1, 1, 1}, {0, 0, 0}, bright, rng).channels[0][0];
    changed += v != 1;
    CHECK((v >= 0.75f && v <= 1.25f));
  }
  CHECK(changed > 240);
  CHECK(changed < 360);
  const auto fails = [](auto change, const char* rule) {
    VolumeAugment a;
    change(a);
    CHECK_MESSAGE(contains(error_of([&] { check_augment(a); }), rule), std::string(rule));
  };
  fails(
      [](VolumeAugment& a) {
        a.rotate = {1.5f, 0, 1};
      },
      "augment: rotate must have a probability in [0, 1], got 1.5");
  fails(
      [](VolumeAugment& a) {
        a.rotate = {1, 0, 200};
      },
      "augment: rotate must have 0 <= low <= high <= 180, got 0 and 200");
  fails([](VolumeAugment& a) { a.scale = {1, 0, 1}; }, "augment: scale must have");
  fails([](VolumeAugment& a) { a.gamma = {1, 2, 1}; }, "augment: gamma must have");
  fails([](VolumeAugment& a) { a.elastic_spacing = 1; }, "elastic_spacing must be in");
  fails([](VolumeAugment& a) { a.mirror[1] = -0.1f; }, "mirror must be probabilities");
  fails([](VolumeAugment& a) { a.per_channel = std::nanf(""); }, "per_channel must be in");
}
