#include <capo/datasets/volume_augment.h>
#include <capo/datasets/voxel_ops.h>

#include <algorithm>

namespace capo {
namespace {

constexpr double kRadians = 3.14159265358979323846 / 180;

float within(const Draw& d, SampleRng& rng) { return rng.uniform(d.low, d.high); }

// Below 1 as often as above, where the range allows both.
float around_one(const Draw& d, SampleRng& rng) {
  const bool below = rng.chance(0.5f);
  if (d.low >= 1 || d.high <= 1) return within(d, rng);
  return below ? rng.uniform(d.low, 1) : rng.uniform(1, d.high);
}

float either_side(const Draw& d, SampleRng& rng) {
  const float sign = rng.chance(0.5f) ? 1.0f : -1.0f;
  return sign * within(d, rng);
}

SpatialMap draw_map(const Extent& patch, const Extent& start, const VolumeAugment& a, SampleRng& rng) {
  SpatialMap m = plain_map(patch, start);
  const std::array<std::int64_t, 3> size{patch.z, patch.y, patch.x};
  std::array<double, 3> radians{};
  double scale = 1;
  if (rng.chance(a.rotate.probability)) {
    for (std::size_t i = 0; i < 3; ++i) {
      const double angle = static_cast<double>(either_side(a.rotate, rng)) * kRadians;
      if (a.rotate_about[i] && (i == 0 || patch.z > 1)) radians[i] = angle;
    }
  }
  if (rng.chance(a.scale.probability)) scale = static_cast<double>(around_one(a.scale, rng));
  m.matrix = turn_and_scale(radians, scale);
  if (rng.chance(a.translate.probability)) {
    for (std::size_t i = 0; i < 3; ++i) {
      const double share = static_cast<double>(either_side(a.translate, rng));
      if (size[i] > 1) m.centre[i] += share * static_cast<double>(size[i]);
    }
  }
  if (rng.chance(a.elastic.probability))
    m.warp =
        elastic_warp(patch, static_cast<double>(a.elastic_spacing), static_cast<double>(within(a.elastic, rng)), rng);
  for (std::size_t i = 0; i < 3; ++i) m.flip[i] = rng.chance(a.mirror[i]);
  return m;
}

// Calls f(channel) for those that a change meets.
template <class F>
void change(LabelledPatch& p, const Draw& d, float per_channel, SampleRng& rng, F&& f) {
  if (!rng.chance(d.probability)) return;
  for (auto& channel : p.channels)
    if (rng.chance(per_channel)) f(channel.data());
}

void check(const char* what, const Draw& d, float low, float high) {
  CAPO_CHECK(d.probability >= 0 && d.probability <= 1, "augment: ", what, " must have a probability in [0, 1], got ",
             d.probability);
  CAPO_CHECK(d.probability == 0 || (d.low >= low && d.low <= d.high && d.high <= high), "augment: ", what,
             " must have ", low, " <= low <= high <= ", high, ", got ", d.low, " and ", d.high);
}

}  // namespace

VolumeAugment nnunet_augment(bool flat) {
  VolumeAugment a;
  a.rotate = {0.2f, 0, flat ? 180.0f : 30.0f};
  a.scale = {0.2f, 0.7f, 1.4f};
  a.mirror = {flat ? 0.0f : 0.5f, 0.5f, 0.5f};
  a.noise = {0.1f, 0, 0.1f};
  a.blur = {0.2f, 0.5f, 1};
  a.brightness = {0.15f, 0.75f, 1.25f};
  a.contrast = {0.15f, 0.75f, 1.25f};
  a.low_resolution = {0.25f, 0.5f, 1};
  a.gamma_inverted = {0.1f, 0.7f, 1.5f};
  a.gamma = {0.3f, 0.7f, 1.5f};
  a.per_channel = 0.5f;
  return a;
}

void check_augment(const VolumeAugment& a) {
  check("rotate", a.rotate, 0, 180);
  check("scale", a.scale, 0.1f, 10);
  check("translate", a.translate, 0, 1);
  check("elastic", a.elastic, 0, 1000);
  check("noise", a.noise, 0, 100);
  check("blur", a.blur, 0, 100);
  check("brightness", a.brightness, 0, 100);
  check("contrast", a.contrast, 0, 100);
  check("low_resolution", a.low_resolution, 0.01f, 1);
  check("gamma_inverted", a.gamma_inverted, 0.01f, 100);
  check("gamma", a.gamma, 0.01f, 100);
  CAPO_CHECK(a.elastic_spacing >= 2 && a.elastic_spacing <= 4096, "augment: elastic_spacing must be in [2, 4096], got ",
             a.elastic_spacing);
  CAPO_CHECK(a.per_channel >= 0 && a.per_channel <= 1, "augment: per_channel must be in [0, 1], got ", a.per_channel);
  for (const float p : a.mirror)
    CAPO_CHECK(p >= 0 && p <= 1, "augment: mirror must be probabilities in [0, 1], got ", p);
}

LabelledPatch augmented_patch(const SegmentationCase& c, const Extent& patch, const Extent& start,
                              const VolumeAugment& a, SampleRng& rng) {
  const SpatialMap map = draw_map(patch, start, a, rng);
  LabelledPatch p;
  for (const auto& v : c.channels) p.channels.push_back(resample(v, map, a.sampling, a.border));
  p.label = resample(c.label, map, a.border);
  change(p, a.noise, 1, rng, [&](float* v) { add_noise(v, patch, within(a.noise, rng), rng); });
  change(p, a.blur, a.per_channel, rng, [&](float* v) { blur(v, patch, within(a.blur, rng)); });
  change(p, a.brightness, 1, rng, [&](float* v) { change_brightness(v, patch, within(a.brightness, rng)); });
  change(p, a.contrast, 1, rng, [&](float* v) { change_contrast(v, patch, around_one(a.contrast, rng)); });
  change(p, a.low_resolution, a.per_channel, rng,
         [&](float* v) { lower_resolution(v, patch, within(a.low_resolution, rng)); });
  change(p, a.gamma_inverted, 1, rng,
         [&](float* v) { change_gamma(v, patch, around_one(a.gamma_inverted, rng), true); });
  change(p, a.gamma, 1, rng, [&](float* v) { change_gamma(v, patch, around_one(a.gamma, rng), false); });
  return p;
}

}  // namespace capo
