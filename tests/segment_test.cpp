// Losses of segmentation, overlap metrics, sliding windows.
#include <doctest/doctest.h>

#include <capo/autograd/autograd.h>
#include <capo/models/segment/losses.h>
#include <capo/models/segment/overlap.h>
#include <capo/models/segment/sliding_window.h>
#include <capo/ops/binary.h>
#include <capo/ops/conv.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>
#include <capo/ops/reduce.h>
#include <capo/ops/view.h>
#include <capo/tests/support.h>

#include <cmath>

using namespace capo;
using capo::testing::bytes_of;
using capo::testing::contains;
using capo::testing::error_of;
using capo::testing::relative_error;
using capo::testing::ThreadsScope;

namespace {

Tensor noise(const Shape& shape, std::uint64_t seed = 1, DType dtype = f64) {
  Generator rng(seed, 0);
  return rand_normal(shape, rng, 0, 1, dtype);
}
Tensor labels(const Shape& shape, std::int64_t classes, std::uint64_t seed = 2) {
  Generator rng(seed, 0);
  return cast(rand_uniform(shape, rng, 0, static_cast<double>(classes), f64), i64);
}

// |analytic - central difference| of the directional derivatives along random directions.
template <class Loss>
void check_gradient(const Tensor& z, const Loss& loss) {
  set_requires_grad(z, true);
  const Tensor g = grad({loss(z)}, {z})[0];
  set_requires_grad(z, false);
  REQUIRE(g.defined());
  for (std::uint64_t k = 0; k < 4; ++k) {
    const Tensor d = noise(z.shape(), 100 + k);
    const double h = 1e-6, up = loss(z + d * h).item(), down = loss(z - d * h).item();
    const double want = (up - down) / (2 * h), got = sum(g * d).item();
    CHECK_MESSAGE(std::abs(got - want) <= 1e-7 * (1 + std::abs(want)), got << " " << want);
  }
}

}  // namespace

TEST_CASE("gradients of the losses") {
  const Tensor z = noise({2, 3, 4, 3}), y = labels({2, 3, 4}, 3);
  const Tensor w = cast(labels({2, 3, 4}, 5, 9), f64) + 0.5;
  check_gradient(z, [&](const Tensor& t) { return segment::dice_loss(t, y); });
  check_gradient(
      z, [&](const Tensor& t) { return segment::dice_loss(t, y, {.batch = true, .background = true, .smooth = 1}); });
  check_gradient(z, [&](const Tensor& t) { return segment::dice_loss(t, y, {.ignore = 1}); });
  check_gradient(z, [&](const Tensor& t) { return segment::dice_ce_loss(t, y); });
  check_gradient(z, [&](const Tensor& t) { return segment::focal_loss(t, y, {.alpha = {0.2, 1, 3}}); });
  check_gradient(z, [&](const Tensor& t) { return segment::weighted_cross_entropy(t, y, w); });
}

TEST_CASE("Dice by hand") {
  // Two pixels, two classes: p(1) = 3/4 and 1/4, labels 1 and 0.
  const double a = std::log(3.0);
  const Tensor z = from_vector<double>({0, a, a, 0}, {1, 2, 2}), y = from_vector<std::int64_t>({1, 0}, {1, 2});
  const auto d = to_vector<double>(segment::soft_dice(z, y, {.background = true, .smooth = 0}));
  CHECK(d[0] == doctest::Approx(2 * 0.75 / 2));
  CHECK(d[1] == doctest::Approx(2 * 0.75 / 2));
  CHECK(segment::dice_loss(z, y, {.smooth = 1}).item() == doctest::Approx(1 - 2.5 / 3));
  // The second pixel ignored: p(1) = 3/4 against 1.
  CHECK(segment::dice_loss(z, y, {.smooth = 0, .ignore = 0}).item() == doctest::Approx(1 - 1.5 / 1.75));
  CHECK(segment::dice_ce_loss(z, y, {.dice = {.smooth = 0}, .dice_weight = 2, .ce_weight = 3}).item() ==
        doctest::Approx(2 * 0.25 - 3 * std::log(0.75)));
  CHECK(segment::focal_loss(z, y).item() == doctest::Approx(-0.0625 * std::log(0.75)));
  CHECK(relative_error(segment::focal_loss(z, y, {.gamma = 0}), cross_entropy(z, y)) < 1e-15);
}

TEST_CASE("an empty class: smooth decides") {
  const Tensor z = from_vector<double>({50, -50, 50, -50}, {1, 2, 2}), y = from_vector<std::int64_t>({0, 0}, {1, 2});
  CHECK(segment::dice_loss(z, y).item() == doctest::Approx(0).epsilon(1e-12));
  CHECK(segment::dice_loss(z, y, {.smooth = 0}).item() == doctest::Approx(1));
}

TEST_CASE("deep supervision: weights and targets") {
  const auto w = segment::deep_supervision_weights(4);
  CHECK(w[0] == doctest::Approx(4.0 / 7));
  CHECK(w[2] == doctest::Approx(1.0 / 7));
  CHECK(w[3] == 0);
  CHECK(segment::deep_supervision_weights(1) == std::vector<double>{1});
  const Tensor y = from_vector<std::int64_t>({0, 1, 2, 3, 4, 5, 6}, {1, 7});
  CHECK(to_vector<std::int64_t>(segment::resize_labels(y, {3})) == std::vector<std::int64_t>{1, 3, 5});
  const Tensor even = from_vector<std::int64_t>({0, 1, 2, 3, 4, 5, 6, 7}, {1, 8});
  CHECK(to_vector<std::int64_t>(segment::resize_labels(even, {4})) == std::vector<std::int64_t>{1, 3, 5, 7});
  const Tensor fine = noise({1, 4, 4, 2}), coarse = noise({1, 2, 2, 2}), coarsest = noise({1, 1, 1, 2});
  const Tensor target = labels({1, 4, 4}, 2);
  const auto ce = [](const Tensor& z, const Tensor& t) { return cross_entropy(z, t); };
  const double want = (2 * cross_entropy(fine, target).item() +
                       cross_entropy(coarse, slice(slice(target, 1, 1, 4, 2), 2, 1, 4, 2)).item()) /
                      3;
  CHECK(segment::deep_supervision_loss({fine, coarse, coarsest}, target, ce).item() ==
        doctest::Approx(want).epsilon(1e-12));
}

TEST_CASE("labels and shapes that do not fit are named") {
  const Tensor z = noise({1, 2, 2, 3});
  CHECK(contains(error_of([&] {
                   segment::dice_loss(z, from_vector<std::int64_t>({0, 1, 2, 3}, {1, 2, 2}));
                 }),
                 "[0, 3), got 3"));
  CHECK(error_of([&] {
          segment::dice_loss(z, labels({1, 2, 3}, 3));
        }) == "soft_dice: labels must be i64 [1, 2, 2] beside logits [1, 2, 2, 3], got i64 [1, 2, 3]");
  CHECK(contains(error_of([&] {
                   segment::focal_loss(z, labels({1, 2, 2}, 3), {.alpha = {1}});
                 }),
                 "an entry for each of 3 classes"));
  CHECK(contains(error_of([&] {
                   segment::weighted_cross_entropy(z, labels({1, 2, 2}, 3), noise({1, 2}));
                 }),
                 "weights must be f64"));
}

TEST_CASE("overlap: by hand, empty classes, wrong labels") {
  const Tensor p = from_vector<std::int64_t>({0, 1, 1, 1}, {2, 2}), t = from_vector<std::int64_t>({0, 0, 1, 2}, {2, 2});
  const auto o = segment::overlap(p, t, 4);
  CHECK(o[0].dice() == doctest::Approx(2.0 / 3));
  CHECK(o[1].dice() == doctest::Approx(2.0 / 4));
  CHECK(o[1].iou() == doctest::Approx(1.0 / 3));
  CHECK(o[2].dice() == 0);
  CHECK(std::isnan(o[3].dice()));
  CHECK(segment::mean_of_defined({1, std::nan(""), 0}) == 0.5);
  CHECK(std::isnan(segment::mean_of_defined({})));
  CHECK(segment::pixel_error(p, t) == 0.5);
  CHECK((o[0] + o[1]).both == 2);
  CHECK(error_of([&] { segment::overlap(p, t, 2); }) ==
        "overlap: labels must be in [0, 2), got 2 at pixel 3 of the truth");
  CHECK(contains(error_of([&] { segment::pixel_error(p, noise({2, 2})); }), "integer dtype"));
}

TEST_CASE("windows cover from border to border") {
  CHECK(segment::window_steps(110, 64, 0.5) == std::vector<std::int64_t>{0, 23, 46});  // nnU-Net's own example
  CHECK(segment::window_steps(64, 64, 0.5) == std::vector<std::int64_t>{0});
  CHECK(segment::window_steps(65, 64, 0) == std::vector<std::int64_t>{0, 1});
  CHECK(contains(error_of([] { segment::window_steps(3, 4, 0.5); }), "size >= patch"));
}

TEST_CASE("a pointwise network comes through any window unchanged") {
  const auto twice = [](const Tensor& x) { return x * 2.0; };
  for (const Shape& shape : {Shape{2, 9, 13, 3}, Shape{1, 3, 4, 3}, Shape{1, 8, 8, 3}}) {
    const Tensor x = noise(shape);
    for (const bool gaussian : {true, false})
      CHECK(relative_error(segment::sliding_window(twice, x, {.patch = {6, 8}, .gaussian = gaussian, .mirror = {0, 1}}),
                           x * 2.0) < 1e-14);
  }
  const Tensor volume = noise({1, 5, 9, 7, 2}, 3, f32);
  CHECK(relative_error(segment::sliding_window(twice, volume, {.patch = {4, 4, 4}, .overlap = 0.25}), volume * 2.0) <
        1e-6);
}

TEST_CASE("overlapping windows: the weighted mean, written out") {
  // A network that answers with the sum of its patch: windows at 0 and 2 of a row of six.
  const auto total = [](const Tensor& x) { return expand(sum(x, {1, 2, 3}, true), {1, 4, 1, 1}) * 1.0; };
  const Tensor x = from_vector<double>({1, 2, 3, 4, 5, 6}, {1, 6, 1, 1});
  const auto y = to_vector<double>(segment::sliding_window(total, x, {.patch = {4, 1}, .overlap = 0.5}));
  const auto w = [](double i) { return std::exp(-(i - 2) * (i - 2) / (2 * 0.25)); };
  CHECK(y[0] == doctest::Approx(10));
  CHECK(y[2] == doctest::Approx((10 * w(2) + 18 * w(0)) / (w(2) + w(0))));
  CHECK(y[3] == doctest::Approx((10 * w(3) + 18 * w(1)) / (w(3) + w(1))));
  CHECK(y[5] == doctest::Approx(18));
  const auto flat = to_vector<double>(segment::sliding_window(total, x, {.patch = {4, 1}, .gaussian = false}));
  CHECK(flat[2] == doctest::Approx(14));
}

TEST_CASE("mirroring averages every flip") {
  const auto first = [](const Tensor& x) {
    return x * from_vector<double>({1, 0, 0, 0}, {1, 4, 1, 1});
  };  // keeps place 0
  const Tensor x = from_vector<double>({1, 2, 3, 4}, {1, 4, 1, 1});
  const auto y = to_vector<double>(segment::sliding_window(first, x, {.patch = {4, 1}, .mirror = {0}}));
  CHECK(y == std::vector<double>{0.5, 0, 0, 2});
}

TEST_CASE("sliding windows: the same bits for any number of threads, no graph, errors") {
  const Tensor x = noise({1, 20, 20, 4}, 5, f32), w = noise({4, 3, 3, 4}, 6, f32);
  set_requires_grad(w, true);
  const auto net = [&](const Tensor& t) { return conv2d(t, w, {}, {.pad_before = {1}}); };
  std::string bits;
  for (int n : {1, 2, 3, 5}) {
    const ThreadsScope threads(n);
    const Tensor y = segment::sliding_window(net, x, {.patch = {8, 8}, .mirror = {0, 1}});
    CHECK(!requires_grad(y));
    if (bits.empty()) bits = bytes_of(y);
    CHECK(bits == bytes_of(y));
  }
  CHECK(contains(error_of([&] { segment::sliding_window(net, x, {.patch = {8, 8, 8}}); }), "patch [8, 8, 8] needs x"));
  CHECK(contains(error_of([&] {
                   segment::sliding_window(net, x, {.patch = {8, 8}, .overlap = 1});
                 }),
                 "overlap must be in [0, 1)"));
  CHECK(contains(error_of([&] {
                   segment::sliding_window(net, x, {.patch = {8, 8}, .mirror = {2}});
                 }),
                 "mirror axes must be in [0, 2)"));
  const auto shrinks = [](const Tensor& t) { return slice(t, 1, 0, 4); };
  CHECK(contains(error_of([&] { segment::sliding_window(shrinks, x, {.patch = {8, 8}}); }), "must keep the patch"));
}
