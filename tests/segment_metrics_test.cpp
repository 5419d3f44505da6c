// Surfaces, partitions, components, distances and weight maps against brute force and by hand.
#include <doctest/doctest.h>

#include <capo/models/segment/boundary_weights.h>
#include <capo/models/segment/components.h>
#include <capo/models/segment/distance.h>
#include <capo/models/segment/overlap.h>
#include <capo/models/segment/partition.h>
#include <capo/models/segment/surface.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/tests/support.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

using namespace capo;
using capo::testing::contains;
using capo::testing::error_of;

namespace {

using Labels = std::vector<std::int64_t>;

Labels random_labels(std::size_t n, std::int64_t count, double density, std::uint64_t seed) {
  Generator rng(seed, 0);
  const auto pick = to_vector<double>(rand_uniform({static_cast<std::int64_t>(n), 2}, rng, 0, 1, f64));
  Labels v(n, 0);
  for (std::size_t i = 0; i < n; ++i)
    if (pick[2 * i] < density) v[i] = 1 + static_cast<std::int64_t>(pick[2 * i + 1] * static_cast<double>(count));
  return v;
}

std::array<std::int64_t, 3> place(std::int64_t i, const Shape& s) {
  const std::int64_t w = s[s.size() - 1], h = s[s.size() - 2];
  return {i / (w * h), i / w % h, i % w};
}

double distance(std::int64_t i, std::int64_t j, const Shape& s, const std::vector<double>& spacing) {
  const auto a = place(i, s), b = place(j, s);
  double sum = 0;
  for (int k = 0; k < 3; ++k) {
    const int axis = k - 3 + s.size();
    if (axis < 0) continue;
    const double d = static_cast<double>(a[k] - b[k]) * (spacing.empty() ? 1 : spacing[static_cast<std::size_t>(axis)]);
    sum += d * d;
  }
  return std::sqrt(sum);
}

bool touches(std::int64_t i, std::int64_t j, const Shape& s) { return distance(i, j, s, {}) == 1; }

std::vector<std::int64_t> surface_of(const Labels& v, const Shape& s, std::int64_t label) {
  std::vector<std::int64_t> on;
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(v.size()); ++i) {
    if (v[static_cast<std::size_t>(i)] != label) continue;
    int same = 0;
    for (std::int64_t j = 0; j < static_cast<std::int64_t>(v.size()); ++j)
      same += v[static_cast<std::size_t>(j)] == label && touches(i, j, s);
    if (same < 2 * s.size()) on.push_back(i);
  }
  return on;
}

std::vector<double> to_nearest(const std::vector<std::int64_t>& from, const std::vector<std::int64_t>& to,
                               const Shape& s, const std::vector<double>& spacing) {
  std::vector<double> d;
  for (auto i : from) {
    double best = HUGE_VAL;
    for (auto j : to) best = std::min(best, distance(i, j, s, spacing));
    d.push_back(best);
  }
  return d;
}

}  // namespace

TEST_CASE("distances: brute force, in 2D and 3D, with spacing") {
  struct Case {
    Shape shape;
    std::vector<double> spacing;
  };
  for (const Case& c : {Case{{9, 13}, {}}, Case{{7, 6}, {0.5, 2.25}}, Case{{4, 6, 5}, {3, 1, 0.7}}}) {
    const auto n = static_cast<std::size_t>(numel(c.shape));
    for (const double density : {0.02, 0.3}) {
      Labels mask = random_labels(n, 1, density, n);
      mask[n / 2] = 1;
      const auto got = to_vector<double>(segment::distance_to(from_vector(mask, c.shape), c.spacing));
      for (std::size_t i = 0; i < n; ++i) {
        double best = HUGE_VAL;
        for (std::size_t j = 0; j < n; ++j)
          if (mask[j])
            best = std::min(best,
                            distance(static_cast<std::int64_t>(i), static_cast<std::int64_t>(j), c.shape, c.spacing));
        REQUIRE(got[i] == doctest::Approx(best).epsilon(1e-12));
      }
    }
  }
  const auto far = to_vector<double>(segment::distance_to(zeros({2, 2}, i64)));
  CHECK(far == std::vector<double>(4, HUGE_VAL));
  CHECK(contains(error_of([] {
                   segment::distance_to(zeros({2, 2}, i64), {1});
                 }),
                 "spacing must have 2 entries, got 1"));
  CHECK(contains(error_of([] { segment::distance_to(zeros({2, 2}, i64), {1, 0}); }), "spacing must be positive"));
  CHECK(contains(error_of([] { segment::distance_to(zeros({2}, i64)); }), "needs [H, W] or [D, H, W]"));
}

TEST_CASE("surface distances: brute force") {
  for (const Shape& s : {Shape{8, 9}, Shape{4, 5, 6}}) {
    const std::vector<double> spacing = s.size() == 2 ? std::vector<double>{1.5, 0.4} : std::vector<double>{2, 1, 0.5};
    const auto n = static_cast<std::size_t>(numel(s));
    const Labels p = random_labels(n, 2, 0.8, 3), t = random_labels(n, 2, 0.7, 4);
    const auto d = segment::surface_distances(from_vector(p, s), from_vector(t, s), 2, spacing);
    const auto on_p = surface_of(p, s, 2), on_t = surface_of(t, s, 2);
    const auto there = to_nearest(on_p, on_t, s, spacing), back = to_nearest(on_t, on_p, s, spacing);
    REQUIRE(d.prediction.size() == there.size());
    for (std::size_t i = 0; i < there.size(); ++i) CHECK(d.prediction[i] == doctest::Approx(there[i]).epsilon(1e-12));
    REQUIRE(d.truth.size() == back.size());
    for (std::size_t i = 0; i < back.size(); ++i) CHECK(d.truth[i] == doctest::Approx(back[i]).epsilon(1e-12));
    CHECK(d.hausdorff(100) == std::max(*std::max_element(d.prediction.begin(), d.prediction.end()),
                                       *std::max_element(d.truth.begin(), d.truth.end())));
  }
}

TEST_CASE("surface scores by hand") {
  segment::SurfaceDistances d{{0, 1, 2, 3}, {0, 0, 5}};
  CHECK(d.hausdorff(100) == 5);
  CHECK(d.hausdorff(50) == 1.5);                 // 1.5 and 0
  CHECK(d.hausdorff() == doctest::Approx(4.5));  // rank 1.9 of {0, 0, 5}; the other 2.85
  CHECK(d.dice(1) == doctest::Approx(4.0 / 7));
  CHECK(d.mean() == doctest::Approx(11.0 / 7));
  // Two 3x3 squares, one column apart, spacing 2 along the columns.
  Labels p(30, 0), t(30, 0);
  for (int y = 1; y < 4; ++y)
    for (int x = 1; x < 4; ++x) p[static_cast<std::size_t>(y * 6 + x)] = t[static_cast<std::size_t>(y * 6 + x + 1)] = 1;
  const auto s = segment::surface_distances(from_vector(p, {5, 6}), from_vector(t, {5, 6}), 1, {1, 2});
  CHECK(s.prediction.size() == 8);
  CHECK(s.hausdorff(100) == 2);
  CHECK(s.dice(1) == doctest::Approx(10.0 / 16));  // p's columns 1 and 3 are 2 and 0 away, its middle 0, 0; so for t
}

TEST_CASE("what reaches the volume's border has its surface there") {
  CHECK(segment::surface_distances(ones({4, 4}, i64), ones({4, 4}, i64), 1).truth.size() == 12);
  CHECK(segment::surface_distances(ones({3, 4, 4}, i64), ones({3, 4, 4}, i64), 1).truth.size() == 44);
}

TEST_CASE("empty masks have defined scores") {
  const Tensor none = zeros({4, 4}, i64),
               some = from_vector<std::int64_t>({0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, {4, 4});
  const auto one = segment::surface_distances(none, some, 1);
  CHECK(one.hausdorff() == HUGE_VAL);
  CHECK(one.mean() == HUGE_VAL);
  CHECK(one.dice(1e9) == 0);
  const auto both = segment::surface_distances(none, none, 1);
  CHECK(std::isnan(both.hausdorff()));
  CHECK(std::isnan(both.mean()));
  CHECK(std::isnan(both.dice(1)));
  CHECK(std::isnan(segment::partition_scores(some, none).rand));
  CHECK(std::isnan(segment::membrane_scores(some, none).info));
  CHECK(segment::partition_scores(none, some).rand == 1);  // one pixel, alone
  CHECK(std::isnan(segment::pixel_error(zeros({0, 3}, i64), zeros({0, 3}, i64))));
  for (float w : to_vector<float>(segment::boundary_weights(none))) CHECK(w == 1);
}

TEST_CASE("components: sides connect, corners do not") {
  const Labels mask = {1, 1, 0, 7,  //
                       0, 0, 1, 0,  //
                       1, 0, 1, 1};
  const auto got = to_vector<std::int64_t>(segment::components(from_vector(mask, {3, 4})));
  CHECK(got == Labels{1, 1, 0, 2, 0, 0, 3, 0, 4, 0, 3, 3});
  const Labels deep = {1, 0, 0, 1, 1, 1, 0, 1};  // 2 x 2 x 2
  CHECK(to_vector<std::int64_t>(segment::components(from_vector(deep, {2, 2, 2}))) == Labels{1, 0, 0, 1, 1, 1, 0, 1});
}

TEST_CASE("components grow until they meet") {
  const Labels wide = {1, 0, 0, 0, 1, 0, 0, 1};
  CHECK(to_vector<std::int64_t>(segment::grown_components(from_vector(wide, {1, 8}))) ==
        Labels{1, 1, 0, 2, 2, 2, 3, 3});
  CHECK(to_vector<std::int64_t>(segment::grown_components(zeros({2, 2}, i64))) == Labels(4, 0));
  const Labels square = {1, 1, 1, 1, 1,  //
                         0, 0, 0, 0, 0,  //
                         1, 1, 1, 1, 1};
  CHECK(to_vector<std::int64_t>(segment::grown_components(from_vector(square, {3, 5}))) ==
        Labels{1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2});
}

TEST_CASE("partition scores: brute force over pairs of pixels") {
  for (std::uint64_t seed = 1; seed < 6; ++seed) {
    const Labels t = random_labels(60, 4, 0.8, seed);
    Labels p = random_labels(60, 5, 0.85, seed + 50);
    const auto got = segment::partition_scores(from_vector(p, {6, 10}), from_vector(t, {6, 10}));
    std::int64_t fresh = 1000;
    for (auto& label : p)
      if (label == 0) label = ++fresh;  // a segment of its own
    double n = 0, both = 0, in_t = 0, in_p = 0, hs = 0, ht = 0, hst = 0;
    for (std::size_t i = 0; i < 60; ++i) {
      if (!t[i]) continue;
      ++n;
      double a = 0, b = 0, ab = 0, all = 0;
      for (std::size_t j = 0; j < 60; ++j) {
        if (!t[j]) continue;
        ++all;
        a += t[i] == t[j], b += p[i] == p[j], ab += t[i] == t[j] && p[i] == p[j];
      }
      in_t += a, in_p += b, both += ab;
      hs -= std::log(a / all), ht -= std::log(b / all), hst -= std::log(ab / all);
    }
    CHECK(got.rand == doctest::Approx(2 * both / (in_t + in_p)).epsilon(1e-12));
    CHECK(got.rand_split == doctest::Approx(both / in_t).epsilon(1e-12));
    CHECK(got.rand_merge == doctest::Approx(both / in_p).epsilon(1e-12));
    CHECK(got.info == doctest::Approx(2 * (hs + ht - hst) / (hs + ht)).epsilon(1e-12));
  }
}

TEST_CASE("partition scores by hand") {
  const auto score = [](Labels p, Labels t) {
    const auto n = static_cast<std::int64_t>(p.size());
    return segment::partition_scores(from_vector(p, {n}), from_vector(t, {n}));
  };
  CHECK(score({1, 1, 2, 2}, {5, 5, 3, 3}).rand == 1);
  CHECK(score({1, 1, 2, 2}, {5, 5, 3, 3}).info == doctest::Approx(1));
  CHECK(score({1, 1, 1, 1}, {1, 1, 2, 2}).rand == doctest::Approx(0.5 / 0.75));  // a merge
  CHECK(score({1, 1, 1, 1}, {1, 1, 2, 2}).rand_merge == doctest::Approx(0.5));
  CHECK(score({1, 1, 1, 1}, {1, 1, 2, 2}).info == 0);
  CHECK(score({1, 1, 2, 2}, {1, 1, 1, 1}).rand_split == doctest::Approx(0.5));  // a split
  CHECK(score({1, 1, 1}, {4, 4, 4}).info == 1);                                 // one segment each
  CHECK(score({1, 1, 9, 2, 2}, {5, 5, 0, 3, 3}).rand == 1);                     // the truth's membrane does not count
}

TEST_CASE("thick membranes cost nothing, a hole does") {
  Labels truth(7 * 12, 1), thick = truth, hole = truth;
  for (std::size_t y = 0; y < 7; ++y) {
    truth[y * 12 + 6] = 0;
    for (std::size_t x = 5; x < 8; ++x) thick[y * 12 + x] = 0;
    hole[y * 12 + 6] = y == 3;
  }
  const auto of = [&](const Labels& p) {
    return segment::membrane_scores(from_vector(p, {7, 12}), from_vector(truth, {7, 12}));
  };
  CHECK(of(truth).rand == 1);
  CHECK(of(thick).rand == 1);
  CHECK(of(thick).info == doctest::Approx(1));
  CHECK(of(hole).rand_merge < 0.6);
  CHECK(of(hole).rand_split == 1);
}

TEST_CASE("boundary weights: the formula over all pairs of cells") {
  const Shape s{12, 14};
  Labels cells(12 * 14, 0);
  for (const auto& [label, y0, x0] : {std::array<std::size_t, 3>{1, 1, 1}, {2, 1, 6}, {5, 7, 3}, {9, 8, 11}})
    for (std::size_t y = y0; y < y0 + 3; ++y)
      for (std::size_t x = x0; x < x0 + 3 && x < 14; ++x) cells[y * 14 + x] = static_cast<std::int64_t>(label);
  const auto got = to_vector<float>(segment::boundary_weights(from_vector(cells, s), {.w0 = 7, .sigma = 2}));
  const auto inside = std::count_if(cells.begin(), cells.end(), [](auto c) { return c != 0; });
  for (std::size_t i = 0; i < cells.size(); ++i) {
    std::vector<double> d(10, HUGE_VAL);
    for (std::size_t j = 0; j < cells.size(); ++j)
      if (cells[j])
        d[static_cast<std::size_t>(cells[j])] =
            std::min(d[static_cast<std::size_t>(cells[j])],
                     distance(static_cast<std::int64_t>(i), static_cast<std::int64_t>(j), s, {}));
    std::sort(d.begin(), d.end());
    const double balance = 168.0 / (2.0 * static_cast<double>(cells[i] ? inside : 168 - inside));
    const double want = cells[i] ? balance : balance + 7 * std::exp(-(d[0] + d[1]) * (d[0] + d[1]) / 8);
    CHECK(got[i] == doctest::Approx(want).epsilon(1e-6));
  }
  CHECK(contains(error_of([&] { segment::boundary_weights(from_vector(cells, s), {.sigma = 0}); }), "sigma positive"));
}
