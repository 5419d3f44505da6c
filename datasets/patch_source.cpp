#include <capo/datasets/patch_source.h>
#include <capo/datasets/prefetch_internal.h>
#include <capo/datasets/sample_rng.h>
#include <capo/engine/profile.h>

#include <algorithm>
#include <cmath>

namespace capo {
namespace {

constexpr std::size_t kMaxPlaces = 10000;  // remembered per class and case

// Places of each class above 0 that the case has, spread evenly over them.
std::vector<std::vector<std::int32_t>> places_of(const LabelVolume& label, int classes) {
  std::vector<std::size_t> count(static_cast<std::size_t>(classes)), seen(count.size());
  for (const auto l : label.voxels) ++count[l];
  std::vector<std::vector<std::int32_t>> places(count.size());
  for (std::size_t at = 0; at < label.voxels.size(); ++at) {
    const std::size_t l = label.voxels[at];
    if (l == 0) continue;
    const std::size_t kept = std::min(count[l], kMaxPlaces), k = seen[l]++;
    if (k * kept / count[l] != (k + 1) * kept / count[l]) places[l].push_back(static_cast<std::int32_t>(at));
  }
  places.erase(std::remove_if(places.begin(), places.end(), [](const auto& p) { return p.empty(); }), places.end());
  return places;
}

struct HostPatches {
  std::vector<float> x;
  std::vector<std::int64_t> labels;
};

// n patches or cases of one extent.
train::Batch to_batch(const HostPatches& host, std::int64_t n, const Extent& e) {
  Dims space{n};
  if (e.z > 1) space.push_back(e.z);
  space.push_back(e.y);
  space.push_back(e.x);
  Dims image = space;
  image.push_back(static_cast<std::int64_t>(host.x.size() / host.labels.size()));
  train::Batch b;
  b.x = from_vector(host.x, image);
  b.labels = from_vector(host.labels, space);
  return b;
}

}  // namespace

PatchSampler::PatchSampler(SegmentationSetPtr set, const Extent& patch, double foreground)
    : set_(std::move(set)), patch_(patch), foreground_(foreground) {
  CAPO_CHECK(set_ != nullptr, "PatchSampler: needs a segmentation set");
  check_segmentation_set(*set_);
  CAPO_CHECK(patch.z >= 1 && patch.y >= 1 && patch.x >= 1 && patch.z <= 4096 && patch.y <= 4096 && patch.x <= 4096,
             set_->name, ": patch sizes must be in [1, 4096], got ", patch);
  CAPO_CHECK(foreground >= 0 && foreground <= 1, set_->name, ": foreground must be a share in [0, 1], got ",
             foreground);
  for (const auto& c : set_->cases) {
    CAPO_CHECK(c.label.extent.voxels() <= INT32_MAX, set_->name, ", ", c.name, ": at most 2^31 - 1 voxels, got ",
               c.label.extent);
    voxels_.push_back(foreground > 0 ? places_of(c.label, set_->num_classes())
                                     : std::vector<std::vector<std::int32_t>>{});
  }
}

PatchSampler::Place PatchSampler::place(std::uint64_t seed, std::int64_t batch, std::int64_t i, std::int64_t n) const {
  const auto cases = static_cast<std::int64_t>(set_->cases.size());
  const std::int64_t draw = batch * n + i;
  Place p;
  p.index = shuffled_order(cases, seed, draw / cases)[static_cast<std::size_t>(draw % cases)];
  const auto& found = voxels_[static_cast<std::size_t>(p.index)];
  p.foreground = i >= std::llround(static_cast<double>(n) * (1 - foreground_)) && !found.empty();
  SampleRng rng(seed, kStreamPatch, static_cast<std::uint64_t>(batch), static_cast<std::uint64_t>(i));
  const Extent& size = set_->cases[static_cast<std::size_t>(p.index)].label.extent;
  Extent centre;
  if (p.foreground) {
    const auto& of_class = found[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(found.size())))];
    const std::int64_t at = of_class[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(of_class.size())))];
    centre = {at / (size.y * size.x), at / size.x % size.y, at % size.x};
  }
  const auto start = [&](std::int64_t length, std::int64_t wanted, std::int64_t middle) {
    if (length <= wanted) return -((wanted - length) / 2);
    const std::int64_t last = length - wanted;
    return p.foreground ? std::clamp<std::int64_t>(middle - wanted / 2, 0, last) : rng.below(last + 1);
  };
  p.start.z = start(size.z, patch_.z, centre.z);
  p.start.y = start(size.y, patch_.y, centre.y);
  p.start.x = start(size.x, patch_.x, centre.x);
  return p;
}

struct PatchSource::Impl final : Maker<HostPatches> {
  PatchSampler sampler;
  PatchOptions opt;
  std::size_t channels;
  std::optional<Prefetch<HostPatches>> results;  // last: its threads end before the rest goes

  Impl(SegmentationSetPtr set, const PatchOptions& o)
      : sampler(std::move(set), o.patch, o.foreground), opt(o), channels(sampler.set().cases[0].channels.size()) {}

  HostPatches make(HostPatches b, std::int64_t ticket, const StillWanted& wanted) override {
    const ProfileScope scope("prepare a batch");
    const auto voxels = static_cast<std::size_t>(opt.patch.voxels()), n = static_cast<std::size_t>(opt.batch_size);
    b.x.resize(n * voxels * channels);
    b.labels.resize(n * voxels);
    for (std::size_t i = 0; i < n; ++i) {
      if (i > 0 && !wanted()) return {};
      const auto p = sampler.place(opt.seed, ticket, static_cast<std::int64_t>(i), opt.batch_size);
      SampleRng rng(opt.seed, kStreamVolume, static_cast<std::uint64_t>(ticket), i);
      const LabelledPatch patch =
          augmented_patch(sampler.set().cases[static_cast<std::size_t>(p.index)], opt.patch, p.start, opt.augment, rng);
      for (std::size_t c = 0; c < channels; ++c)
        for (std::size_t k = 0; k < voxels; ++k) b.x[(i * voxels + k) * channels + c] = patch.channels[c][k];
      std::copy(patch.label.begin(), patch.label.end(), b.labels.begin() + static_cast<std::ptrdiff_t>(i * voxels));
    }
    return b;
  }
};

PatchSource::PatchSource(SegmentationSetPtr set, const PatchOptions& options) {
  CAPO_CHECK(options.batch_size >= 1 && options.batch_size <= 65536,
             "PatchSource: batch_size must be in [1, 65536], got ", options.batch_size);
  CAPO_CHECK(options.batches_per_epoch >= 1 && options.batches_per_epoch <= 1 << 20,
             "PatchSource: batches_per_epoch must be in [1, 2^20], got ", options.batches_per_epoch);
  CAPO_CHECK(options.workers >= 0 && options.workers <= 1024, "PatchSource: workers must be in [0, 1024], got ",
             options.workers);
  CAPO_CHECK(options.prefetch >= 1 && options.prefetch <= 4096, "PatchSource: prefetch must be in [1, 4096], got ",
             options.prefetch);
  check_augment(options.augment);
  impl_ = std::make_unique<Impl>(std::move(set), options);
  impl_->results.emplace(*impl_, options.workers, options.prefetch);
}

PatchSource::~PatchSource() = default;

std::int64_t PatchSource::batches_per_epoch() const { return impl_->opt.batches_per_epoch; }

train::Batch PatchSource::next() {
  HostPatches host = impl_->results->next();
  const train::Batch b = to_batch(host, impl_->opt.batch_size, impl_->opt.patch);
  impl_->results->recycle(std::move(host));
  return b;
}

void PatchSource::seek(std::int64_t epoch, std::int64_t batch) {
  const std::int64_t per_epoch = impl_->opt.batches_per_epoch;
  CAPO_CHECK(epoch >= 0 && epoch < (std::int64_t{1} << 40) && batch >= 0 && batch < per_epoch,
             "PatchSource: seek needs epoch in [0, 2^40) and batch in [0, ", per_epoch, "), got ", epoch, " and ",
             batch);
  impl_->results->seek(epoch * per_epoch + batch);
}

CaseSource::CaseSource(SegmentationSetPtr set) : set_(std::move(set)) {
  CAPO_CHECK(set_ != nullptr, "CaseSource: needs a segmentation set");
  check_segmentation_set(*set_);
}

train::Batch CaseSource::next() {
  const SegmentationCase& c = set_->cases[static_cast<std::size_t>(at_++ % batches_per_epoch())];
  HostPatches host;
  for (std::size_t k = 0; k < c.label.voxels.size(); ++k) {
    for (const auto& v : c.channels) host.x.push_back(v.voxels[k]);
    host.labels.push_back(c.label.voxels[k]);
  }
  return to_batch(host, 1, c.label.extent);
}

void CaseSource::seek(std::int64_t epoch, std::int64_t batch) {
  CAPO_CHECK(epoch >= 0 && batch >= 0 && batch < batches_per_epoch(), "CaseSource: seek needs batch in [0, ",
             batches_per_epoch(), "), got ", batch);
  at_ = batch;
}

}  // namespace capo
