// From stored images to network input: preprocessing, training augmentation, mixup and cutmix.
// Everything random depends only on (seed, epoch, index) or (seed, epoch, batch).
#pragma once

#include <capo/datasets/dataset.h>

#include <cstdint>
#include <string>
#include <vector>

namespace capo {

// What a network was trained to see; stored beside its weights.
struct Preprocess {
  int size = 32;                                  // input is size x size
  float mean[3] = {0.5f, 0.5f, 0.5f};             // of values / 255, per channel
  float std[3] = {0.5f, 0.5f, 0.5f};
  float crop_pct = 1.0f;                          // evaluation: resize the short side to size / crop_pct, then crop
  Interpolation interpolation = Interpolation::bicubic;
};
// {"size":32,"mean":[..],"std":[..],"crop_pct":1,"interpolation":"bicubic"}; floats survive the round trip exactly.
std::string to_json(const Preprocess& p);
// All five keys and no others; size in [1, 4096], finite means, std > 0, crop_pct in (0, 1]. `name` starts errors.
Preprocess preprocess_from_json(const std::string& text, const std::string& name = "preprocess");
// Mean and standard deviation over every pixel of a set, for an input of size x size.
Preprocess measure_preprocess(const ImageDataset& set, int size);

// What happens to training images, in this order: crop, flip, RandAugment, normalise, erase.
struct Augment {
  enum class Crop {
    none,           // as in evaluation
    pad,            // as in evaluation, then a window of the image with `pad` black pixels around it
    random_resized  // a window of random area and shape, resized
  };
  Crop crop = Crop::none;
  int pad = 4;
  float scale_min = 0.08f, scale_max = 1.0f;              // random_resized: share of the area
  float ratio_min = 3.0f / 4.0f, ratio_max = 4.0f / 3.0f; // and width / height
  float flip = 0.5f;                                      // probability of a horizontal flip
  int rand_ops = 0;                                       // RandAugment: how many of its 14 operations
  float rand_strength = 0.3f;                             // and their strength, in [0, 1] of each one's range
  float erase = 0.0f;                                     // probability of erasing a rectangle (set to the mean)
  float erase_min = 0.02f, erase_max = 0.33f;             // share of the area
};
// Throws when a setting is out of its range.
void check_augment(const Augment& a);

// Evaluation: short side to floor(size / crop_pct), centre crop. An image that is size x size already, with crop_pct 1,
// stays as it is.
Image eval_image(const Image& image, const Preprocess& p);
// Training: crop, flip, RandAugment.
Image augment_image(const Image& image, const Preprocess& p, const Augment& a, std::uint64_t seed, std::int64_t epoch,
                    std::int64_t index);
// (value / 255 - mean) / std into dst [size, size, channels], HWC. The image must be size x size with 1 or 3 channels.
void normalize_into(float* dst, const Image& image, const Preprocess& p);
// Random erasing of a normalised sample [size, size, channels].
void erase_in(float* x, int size, int channels, const Augment& a, std::uint64_t seed, std::int64_t epoch,
              std::int64_t index);

// The 14 operations of RandAugment on an RGB image (grey images come back unchanged where a colour is needed).
enum class RandOp {
  identity, shear_x, shear_y, translate_x, translate_y, rotate, brightness, color, contrast, sharpness, posterize,
  solarize, auto_contrast, equalize
};
inline constexpr int kRandOps = 14;
// strength in [-1, 1]: the sign gives direction (geometry) or less and more (brightness, color, contrast, sharpness);
// posterize and solarize use its size, identity, auto_contrast and equalize ignore it. Ranges as in torchvision.
Image apply_rand_op(const Image& image, RandOp op, float strength);

// Mixing samples of a batch with each other. Both may be on: then each batch takes one of the two by chance.
struct Mixing {
  float mixup_alpha = 0, cutmix_alpha = 0;  // 0 = off
  float probability = 1;                    // of mixing a batch at all
  float label_smoothing = 0;                // of the soft labels
  bool any() const { return mixup_alpha > 0 || cutmix_alpha > 0; }
};

// One batch's draw: sample i keeps `lambda` of itself and takes the rest from sample partner[i]. cutmix: the rest is
// the window [top, bottom) x [left, right), and lambda is the exact share of pixels kept.
struct MixDraw {
  enum class Kind { none, mixup, cutmix };
  Kind kind = Kind::none;
  float lambda = 1;
  int top = 0, left = 0, bottom = 0, right = 0;
  std::vector<std::int64_t> partner;
};
MixDraw draw_mix(const Mixing& m, std::int64_t n, int height, int width, std::uint64_t seed, std::int64_t epoch,
                 std::int64_t batch);
// x [n, height, width, channels] in place; returns soft labels [n, classes], smoothed, also for Kind::none.
std::vector<float> apply_mix(const MixDraw& d, const Mixing& m, std::vector<float>& x, int height, int width,
                             int channels, const std::vector<std::int64_t>& label, int classes);

}  // namespace capo
