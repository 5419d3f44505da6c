// Training augmentation, mixup and cutmix.
#include <capo/datasets/augment.h>
#include <capo/datasets/sample_rng.h>

#include <algorithm>
#include <cmath>

namespace capo {
namespace {

// torchvision's RandomResizedCrop: ten tries, then the largest centred window of an allowed shape.
Image random_resized_crop(const Image& im, const Preprocess& p, const Augment& a, SampleRng& rng) {
  const float area = static_cast<float>(im.height) * static_cast<float>(im.width);
  const float log_lo = std::log(a.ratio_min), log_hi = std::log(a.ratio_max);
  for (int tries = 0; tries < 10; ++tries) {
    const float target = area * rng.uniform(a.scale_min, a.scale_max), ratio = std::exp(rng.uniform(log_lo, log_hi));
    const auto w = static_cast<int>(std::lround(std::sqrt(target * ratio)));
    const auto h = static_cast<int>(std::lround(std::sqrt(target / ratio)));
    if (w < 1 || h < 1 || w > im.width || h > im.height) continue;
    const auto top = static_cast<int>(rng.below(im.height - h + 1)),
               left = static_cast<int>(rng.below(im.width - w + 1));
    return resize_image(crop(im, top, left, h, w), p.size, p.size, p.interpolation);
  }
  int h = im.height, w = im.width;
  const float ratio = static_cast<float>(w) / static_cast<float>(h);
  if (ratio < a.ratio_min) h = std::clamp(static_cast<int>(std::lround(static_cast<float>(w) / a.ratio_min)), 1, h);
  if (ratio > a.ratio_max) w = std::clamp(static_cast<int>(std::lround(static_cast<float>(h) * a.ratio_max)), 1, w);
  return resize_image(center_crop(im, h, w), p.size, p.size, p.interpolation);
}

Image padded_crop(const Image& im, int pad, SampleRng& rng) {
  const auto dy = static_cast<int>(rng.below(2 * pad + 1)) - pad, dx = static_cast<int>(rng.below(2 * pad + 1)) - pad;
  Image out(im.height, im.width, im.channels);
  const int x0 = std::max(0, -dx), x1 = std::min(im.width, im.width - dx);
  for (int y = std::max(0, -dy); y < std::min(im.height, im.height - dy) && x0 < x1; ++y) {
    std::copy_n(im.at(y + dy, x0 + dx), static_cast<std::ptrdiff_t>(x1 - x0) * im.channels, out.at(y, x0));
  }
  return out;
}

}  // namespace

void check_augment(const Augment& a) {
  CAPO_CHECK(a.pad >= 0 && a.pad <= 1024, "augment: pad must be in [0, 1024], got ", a.pad);
  CAPO_CHECK(a.scale_min > 0 && a.scale_min <= a.scale_max && a.scale_max <= 1,
             "augment: 0 < scale_min <= scale_max <= 1 is needed, got ", a.scale_min, " and ", a.scale_max);
  CAPO_CHECK(a.ratio_min > 0 && a.ratio_min <= a.ratio_max && a.ratio_max <= 100,
             "augment: 0 < ratio_min <= ratio_max <= 100 is needed, got ", a.ratio_min, " and ", a.ratio_max);
  CAPO_CHECK(a.flip >= 0 && a.flip <= 1, "augment: flip must be in [0, 1], got ", a.flip);
  CAPO_CHECK(a.rand_ops >= 0 && a.rand_ops <= 16, "augment: rand_ops must be in [0, 16], got ", a.rand_ops);
  CAPO_CHECK(a.rand_strength >= 0 && a.rand_strength <= 1, "augment: rand_strength must be in [0, 1], got ",
             a.rand_strength);
  CAPO_CHECK(a.erase >= 0 && a.erase <= 1 && a.erase_min > 0 && a.erase_min <= a.erase_max && a.erase_max <= 1,
             "augment: erase must be a probability and 0 < erase_min <= erase_max <= 1, got ", a.erase, ", ",
             a.erase_min, ", ", a.erase_max);
}

Image augment_image(const Image& image, const Preprocess& p, const Augment& a, std::uint64_t seed, std::int64_t epoch,
                    std::int64_t index) {
  SampleRng rng(seed, kStreamAugment, static_cast<std::uint64_t>(epoch), static_cast<std::uint64_t>(index));
  Image out = a.crop == Augment::Crop::random_resized ? random_resized_crop(image, p, a, rng) : eval_image(image, p);
  if (a.crop == Augment::Crop::pad && a.pad > 0) out = padded_crop(out, a.pad, rng);
  if (rng.chance(a.flip)) out = flip_horizontal(out);
  for (int i = 0; i < a.rand_ops; ++i) {
    const auto op = static_cast<RandOp>(rng.below(kRandOps));
    const float sign = rng.chance(0.5f) ? -1.0f : 1.0f;
    out = apply_rand_op(out, op, sign * a.rand_strength);
  }
  return out;
}

void erase_in(float* x, int size, int channels, const Augment& a, std::uint64_t seed, std::int64_t epoch,
              std::int64_t index) {
  SampleRng rng(seed, kStreamErase, static_cast<std::uint64_t>(epoch), static_cast<std::uint64_t>(index));
  if (!rng.chance(a.erase)) return;
  const float area = static_cast<float>(size) * static_cast<float>(size);
  for (int tries = 0; tries < 10; ++tries) {
    const float target = area * rng.uniform(a.erase_min, a.erase_max);
    const float ratio = std::exp(rng.uniform(std::log(0.3f), std::log(1 / 0.3f)));
    const auto h = static_cast<int>(std::lround(std::sqrt(target / ratio)));
    const auto w = static_cast<int>(std::lround(std::sqrt(target * ratio)));
    if (h < 1 || w < 1 || h > size || w > size) continue;
    const auto top = static_cast<int>(rng.below(size - h + 1)), left = static_cast<int>(rng.below(size - w + 1));
    for (int y = top; y < top + h; ++y) {
      std::fill_n(x + (static_cast<std::ptrdiff_t>(y) * size + left) * channels,
                  static_cast<std::ptrdiff_t>(w) * channels, 0.0f);
    }
    return;
  }
}

MixDraw draw_mix(const Mixing& m, std::int64_t n, int height, int width, std::uint64_t seed, std::int64_t epoch,
                 std::int64_t batch) {
  CAPO_CHECK(m.mixup_alpha >= 0 && m.cutmix_alpha >= 0 && m.mixup_alpha <= 100 && m.cutmix_alpha <= 100 &&
                 m.probability >= 0 && m.probability <= 1 && m.label_smoothing >= 0 && m.label_smoothing < 1,
             "mixing: alphas must be in [0, 100], probability in [0, 1], label_smoothing in [0, 1)");
  MixDraw d;
  if (!m.any() || n < 1) return d;
  SampleRng rng(seed, kStreamMix, static_cast<std::uint64_t>(epoch), static_cast<std::uint64_t>(batch));
  if (!rng.chance(m.probability)) return d;
  const bool both = m.mixup_alpha > 0 && m.cutmix_alpha > 0;
  const bool cut = both ? rng.chance(0.5f) : m.cutmix_alpha > 0;
  d.kind = cut ? MixDraw::Kind::cutmix : MixDraw::Kind::mixup;
  d.partner.resize(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) d.partner[static_cast<std::size_t>(i)] = i;
  rng.shuffle(d.partner);
  d.lambda = static_cast<float>(rng.beta(static_cast<double>(cut ? m.cutmix_alpha : m.mixup_alpha)));
  if (!cut) return d;
  // A window of share 1 - lambda around a random centre, clipped; lambda then is what is really kept.
  const float side = std::sqrt(1 - d.lambda);
  const auto h = static_cast<int>(static_cast<float>(height) * side),
             w = static_cast<int>(static_cast<float>(width) * side);
  const auto cy = static_cast<int>(rng.below(height)), cx = static_cast<int>(rng.below(width));
  d.top = std::clamp(cy - h / 2, 0, height);
  d.bottom = std::clamp(cy - h / 2 + h, 0, height);
  d.left = std::clamp(cx - w / 2, 0, width);
  d.right = std::clamp(cx - w / 2 + w, 0, width);
  const auto cut_pixels = static_cast<float>((d.bottom - d.top) * (d.right - d.left));
  d.lambda = 1 - cut_pixels / (static_cast<float>(height) * static_cast<float>(width));
  return d;
}

std::vector<float> apply_mix(const MixDraw& d, const Mixing& m, std::vector<float>& x, int height, int width,
                             int channels, const std::vector<std::int64_t>& label, int classes) {
  const std::size_t n = label.size(), row = static_cast<std::size_t>(width) * channels, sample = row * height;
  CAPO_CHECK(classes > 0 && x.size() == n * sample, "apply_mix: x must be [", n, ", ", height, ", ", width, ", ",
             channels, "], got ", x.size(), " values");
  if (d.kind != MixDraw::Kind::none) {
    CAPO_CHECK(d.partner.size() == n, "apply_mix: one partner per sample is needed, got ", d.partner.size(), " for ",
               n);
    const std::vector<float> before = x;
    for (std::size_t i = 0; i < n; ++i) {
      const float* other = before.data() + static_cast<std::size_t>(d.partner[i]) * sample;
      float* own = x.data() + i * sample;
      if (d.kind == MixDraw::Kind::mixup) {
        for (std::size_t k = 0; k < sample; ++k) own[k] = d.lambda * own[k] + (1 - d.lambda) * other[k];
      } else {
        for (int y = d.top; y < d.bottom; ++y) {
          const std::size_t at = static_cast<std::size_t>(y) * row + static_cast<std::size_t>(d.left) * channels;
          std::copy_n(other + at, static_cast<std::size_t>(d.right - d.left) * channels, own + at);
        }
      }
    }
  }
  const float base = m.label_smoothing / static_cast<float>(classes), peak = 1 - m.label_smoothing;
  std::vector<float> soft(n * static_cast<std::size_t>(classes), base);
  for (std::size_t i = 0; i < n; ++i) {
    float* s = soft.data() + i * static_cast<std::size_t>(classes);
    s[label[i]] += peak * d.lambda;
    if (d.kind != MixDraw::Kind::none) s[label[static_cast<std::size_t>(d.partner[i])]] += peak * (1 - d.lambda);
  }
  return soft;
}

}  // namespace capo
