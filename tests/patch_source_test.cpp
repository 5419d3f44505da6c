// Patches from labelled volumes: where they are taken, their layout, the same bits for any number of workers.
#include <capo/datasets/patch_source.h>
#include <capo/tests/support.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <set>

using namespace capo;
using namespace capo::testing;

namespace {

// Voxel values say where they lie: 1 + z * 10000 + y * 100 + x. A small box of class 1, one voxel of class 2.
SegmentationSetPtr positions(std::int64_t n, const Extent& e, int channels = 1) {
  SegmentationSet set{"positions", {"background", "box", "point"}, {}};
  for (std::int64_t i = 0; i < n; ++i) {
    SegmentationCase c{cat("case ", i), std::vector<Volume>(static_cast<std::size_t>(channels), Volume(e)),
                       LabelVolume(e)};
    for (std::int64_t z = 0; z < e.z; ++z)
      for (std::int64_t y = 0; y < e.y; ++y)
        for (std::int64_t x = 0; x < e.x; ++x) {
          for (int k = 0; k < channels; ++k)
            c.channels[static_cast<std::size_t>(k)].at(z, y, x) =
                static_cast<float>((1 + z * 10000 + y * 100 + x) * (k ? -1 : 1));
          c.label.at(z, y, x) = y >= 3 && y < 6 && x >= 4 && x < 8 ? 1 : 0;
        }
    c.label.at(e.z - 1, e.y - 1, e.x - 1) = 2;
    set.cases.push_back(std::move(c));
  }
  return std::make_shared<const SegmentationSet>(std::move(set));
}

bool same_batch(const train::Batch& a, const train::Batch& b) {
  return a.x.shape() == b.x.shape() && bytes_of(a.x) == bytes_of(b.x) && bytes_of(a.labels) == bytes_of(b.labels);
}

}  // namespace

TEST_CASE("patch sampler: nnU-Net's share of foreground, every case in turn") {
  const auto set = positions(5, {8, 20, 24});
  for (const auto& [share, n, first] :
       {std::tuple{1.0 / 3, 2, 1}, {1.0 / 3, 3, 2}, {0.0, 4, 4}, {1.0, 4, 0}, {0.5, 5, 3}, {1.0 / 3, 12, 8}}) {
    const PatchSampler sampler(set, {4, 8, 8}, share);
    std::set<std::int64_t> places;
    for (std::int64_t batch = 0; batch < 100; ++batch) {
      for (std::int64_t i = 0; i < n; ++i) {
        const auto p = sampler.place(1, batch, i, n);
        CHECK(p.foreground == (i >= first));
        CHECK(p.index >= 0);
        CHECK(p.index < 5);
        for (const auto& [s, length, wanted] : {std::tuple{p.start.z, 8, 4}, {p.start.y, 20, 8}, {p.start.x, 24, 8}}) {
          CHECK(s >= 0);
          CHECK(s <= length - wanted);
        }
        const auto q = sampler.place(1, batch, i, n);
        CHECK(q.start == p.start);
        places.insert((p.index * 8 + p.start.z) * 10000 + p.start.y * 100 + p.start.x);
        if (!p.foreground) continue;
        const LabelVolume& l = set->cases[static_cast<std::size_t>(p.index)].label;
        bool seen = false;
        for (std::int64_t z = 0; z < 4; ++z)
          for (std::int64_t y = 0; y < 8; ++y)
            for (std::int64_t x = 0; x < 8; ++x) seen = seen || l.at(p.start.z + z, p.start.y + y, p.start.x + x) > 0;
        CHECK(seen);
      }
    }
    CHECK(places.size() > 30);
  }
  // Classes are drawn alike, however few voxels they have: the point's patch is the last corner.
  const PatchSampler sampler(set, {4, 8, 8}, 1);
  int corners = 0;
  for (std::int64_t batch = 0; batch < 400; ++batch)
    corners += sampler.place(1, batch, 0, 1).start == Extent{4, 12, 16};
  CHECK(corners > 160);
  CHECK(corners < 240);
  // Each case once before one comes again.
  for (std::int64_t round = 0; round < 6; ++round) {
    std::set<std::int64_t> seen;
    for (std::int64_t i = 0; i < 5; ++i)
      seen.insert(sampler.place(3, (round * 5 + i) / 2, (round * 5 + i) % 2, 2).index);
    CHECK(seen.size() == 5);
  }
  int different = 0;
  for (std::int64_t batch = 0; batch < 50; ++batch)
    different += !(sampler.place(1, batch, 0, 2).start == sampler.place(2, batch, 0, 2).start);
  CHECK(different > 20);
}

TEST_CASE("patch sampler: an empty mask, more voxels than are remembered, volumes smaller than the patch") {
  SegmentationSet empty = *positions(1, {1, 10, 10});
  std::fill(empty.cases[0].label.voxels.begin(), empty.cases[0].label.voxels.end(), std::uint8_t{0});
  const PatchSampler nothing(std::make_shared<const SegmentationSet>(empty), {1, 4, 4}, 1);
  CHECK(!nothing.place(1, 0, 0, 1).foreground);
  SegmentationSet full{"full", {"a", "b"}, {{"big", {Volume({1, 300, 300})}, LabelVolume({1, 300, 300}, 1)}}};
  const PatchSampler big(std::make_shared<const SegmentationSet>(full), {1, 1, 1}, 1);
  std::set<std::int64_t> rows;
  for (std::int64_t b = 0; b < 3000; ++b) rows.insert(big.place(1, b, 0, 1).start.y);
  CHECK(rows.size() > 290);

  const auto set = positions(1, {3, 5, 30});
  PatchOptions o;
  o.patch = {6, 8, 8};
  o.batch_size = 3;
  o.workers = 0;
  PatchSource source(set, o);
  const train::Batch b = source.next();
  CHECK(b.x.shape() == Shape{3, 6, 8, 8, 1});
  CHECK(b.labels.shape() == Shape{3, 6, 8, 8});
  const float* x = b.x.data<float>();
  const auto at = [&](int n, int z, int y, int k) { return x[((n * 6 + z) * 8 + y) * 8 + k]; };
  for (int n = 0; n < 3; ++n) {
    CHECK(at(n, 0, 3, 3) == 0);  // centred: 1 before and 2 after along z, 1 before and 2 after along y
    CHECK(at(n, 1, 0, 3) == 0);
    CHECK(at(n, 1, 6, 3) == 0);
    CHECK(at(n, 4, 3, 3) == 0);
    CHECK(at(n, 1, 1, 0) >= 1);
    CHECK(at(n, 1, 1, 0) < 100);
    CHECK(at(n, 3, 5, 7) == at(n, 1, 1, 0) + 20407);
  }
  o.augment.border = Border::mirror;
  PatchSource mirrored(set, o);
  const train::Batch m = mirrored.next();
  CHECK(m.x.data<float>()[((0 * 8) + 1) * 8] == m.x.data<float>()[((2 * 8) + 1) * 8]);  // z = -1 shows z = 1
}

TEST_CASE("patch source: layout, labels beside their voxels, channels last") {
  const auto set = positions(2, {1, 20, 24}, 2);
  PatchOptions o;
  o.patch = {1, 6, 7};
  o.batch_size = 4;
  o.batches_per_epoch = 3;
  o.workers = 0;
  PatchSource source(set, o);
  CHECK(source.batches_per_epoch() == 3);
  for (int k = 0; k < 5; ++k) {
    const train::Batch b = source.next();
    CHECK(b.x.shape() == Shape{4, 6, 7, 2});
    CHECK(b.x.dtype() == f32);
    CHECK(b.labels.shape() == Shape{4, 6, 7});
    CHECK(b.labels.dtype() == i64);
    CHECK(b.size() == 4);
    for (std::int64_t i = 0; i < 4 * 6 * 7; ++i) {
      const auto v = static_cast<std::int64_t>(b.x.data<float>()[2 * i]) - 1;
      CHECK(b.x.data<float>()[2 * i + 1] == -b.x.data<float>()[2 * i]);
      CHECK(b.labels.data<std::int64_t>()[i] == set->cases[0].label.at(0, v / 100, v % 100));
    }
  }
}

TEST_CASE("patch source: the same bits for any number of workers, seek, seeds") {
  const auto set = positions(3, {6, 20, 24});
  PatchOptions o;
  o.patch = {4, 8, 8};
  o.batch_size = 3;
  o.batches_per_epoch = 4;
  o.augment = nnunet_augment(false);
  o.augment.elastic = {0.5f, 0, 2};
  o.seed = 5;
  o.workers = 0;
  PatchSource plain(set, o);
  std::vector<train::Batch> want;
  for (int i = 0; i < 10; ++i) want.push_back(plain.next());
  CHECK(!same_batch(want[0], want[4]));
  for (const int workers : {1, 2, 5}) {
    for (const int prefetch : {1, 6}) {
      o.workers = workers;
      o.prefetch = prefetch;
      PatchSource source(set, o);
      for (const auto& w : want) CHECK(same_batch(source.next(), w));
      source.seek(1, 2);
      CHECK(same_batch(source.next(), want[6]));
      CHECK(same_batch(source.next(), want[7]));
      CHECK(same_batch(source.next(), want[8]));
      source.seek(0, 0);
      CHECK(same_batch(source.next(), want[0]));
    }
  }
  plain.seek(0, 3);
  CHECK(same_batch(plain.next(), want[3]));
  o.seed = 6;
  PatchSource other(set, o);
  CHECK(!same_batch(other.next(), want[0]));
}

TEST_CASE("case source: whole cases in order") {
  SegmentationSet two = *positions(1, {1, 5, 6}, 2);
  two.cases.push_back(positions(1, {2, 10, 9}, 2)->cases[0]);
  CaseSource source(std::make_shared<const SegmentationSet>(two));
  CHECK(source.batches_per_epoch() == 2);
  for (int k = 0; k < 2; ++k) {
    const train::Batch flat = source.next(), deep = source.next();
    CHECK(flat.x.shape() == Shape{1, 5, 6, 2});
    CHECK(flat.labels.shape() == Shape{1, 5, 6});
    CHECK(deep.x.shape() == Shape{1, 2, 10, 9, 2});
    CHECK(deep.labels.data<std::int64_t>()[179] == 2);
    CHECK(deep.x.data<float>()[2 * 90 + 3] == -10002);
  }
  source.seek(0, 1);
  CHECK(source.next().x.shape().size() == 5);
  CHECK(contains(error_of([&] { source.seek(0, 2); }), "CaseSource: seek needs batch in [0, 2), got 2"));
}

TEST_CASE("patch source: settings out of range, unsound sets") {
  const auto set = positions(2, {1, 10, 12});
  const auto fails = [&](auto change, const char* rule) {
    PatchOptions o;
    o.patch = {1, 4, 4};
    change(o);
    CHECK_MESSAGE(contains(error_of([&] { PatchSource s(set, o); }), rule), std::string(rule));
  };
  fails([](PatchOptions& o) { o.batch_size = 0; }, "PatchSource: batch_size must be in [1, 65536], got 0");
  fails([](PatchOptions& o) { o.batches_per_epoch = 0; }, "batches_per_epoch must be in");
  fails([](PatchOptions& o) { o.workers = -1; }, "workers must be in");
  fails([](PatchOptions& o) { o.prefetch = 0; }, "prefetch must be in");
  fails([](PatchOptions& o) { o.patch.y = 0; }, "positions: patch sizes must be in [1, 4096], got [1, 0, 4]");
  fails([](PatchOptions& o) { o.foreground = 1.5; }, "foreground must be a share in [0, 1], got 1.5");
  fails([](PatchOptions& o) { o.augment.scale = {1, 0, 1}; }, "augment: scale must have");
  CHECK(contains(error_of([&] { PatchSource s(nullptr, {}); }), "needs a segmentation set"));
  SegmentationSet bad = *set;
  bad.cases[1].label.voxels[0] = 3;
  CHECK(contains(error_of([&] { PatchSource s(std::make_shared<const SegmentationSet>(bad), {}); }),
                 "positions, case 1: labels must be less than 3, got 3"));
  PatchSource s(set, {.patch = {1, 4, 4}, .workers = 0});
  CHECK(contains(error_of([&] { s.seek(0, 250); }), "PatchSource: seek needs"));
}
