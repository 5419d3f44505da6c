// Preprocess: JSON text and evaluation.
#include <capo/datasets/augment.h>
#include <capo/engine/json.h>

#include <nlohmann/json.hpp>

#include <charconv>
#include <cmath>

namespace capo {
namespace {

using Json = nlohmann::json;

std::string shortest(float v) {
  char text[32];
  const auto r = std::to_chars(text, text + sizeof text, v);
  return std::string(text, r.ptr);
}

float number_of(const Json& v, const char* what, const std::string& name) {
  CAPO_CHECK(v.is_number(), name, ": ", what, " must be a number, got ", v.type_name());
  const double d = v.get<double>();
  CAPO_CHECK(std::abs(d) <= 1e6, name, ": ", what, " must be a moderate number, got ", d);
  return static_cast<float>(d) + 0.0f;  // -0 becomes 0: JSON would not keep the difference
}

void three_of(const Json& v, const char* what, const std::string& name, float out[3]) {
  CAPO_CHECK(v.is_array() && v.size() == 3, name, ": ", what, " must be a list of 3 numbers");
  for (std::size_t i = 0; i < 3; ++i) out[i] = number_of(v[i], what, name);
}

}  // namespace

std::string to_json(const Preprocess& p) {
  const auto list = [](const float v[3]) {
    return cat("[", shortest(v[0]), ",", shortest(v[1]), ",", shortest(v[2]), "]");
  };
  return cat("{\"size\":", p.size, ",\"mean\":", list(p.mean), ",\"std\":", list(p.std),
             ",\"crop_pct\":", shortest(p.crop_pct), ",\"interpolation\":\"", to_string(p.interpolation), "\"}");
}

Preprocess preprocess_from_json(const std::string& text, const std::string& name) {
  CAPO_CHECK(text.size() <= 4096, name, ": JSON too long, at most 4096 bytes are accepted, got ", text.size());
  check_json_object(text, name, 2);
  const Json j = Json::parse(text);
  const char* const known[] = {"size", "mean", "std", "crop_pct", "interpolation"};
  for (const char* k : known) CAPO_CHECK(j.contains(k), name, ": missing key \"", k, "\"");
  CAPO_CHECK(j.size() == std::size(known), name,
             ": unknown key, known are size, mean, std, crop_pct and interpolation");
  Preprocess p;
  const Json& size = j["size"];
  CAPO_CHECK(size.is_number_unsigned() && size.get<std::uint64_t>() >= 1 && size.get<std::uint64_t>() <= 4096, name,
             ": size must be an integer in [1, 4096]");
  p.size = size.get<int>();
  three_of(j["mean"], "mean", name, p.mean);
  three_of(j["std"], "std", name, p.std);
  for (const float v : p.std) CAPO_CHECK(v > 0, name, ": std must be positive, got ", v);
  p.crop_pct = number_of(j["crop_pct"], "crop_pct", name);
  CAPO_CHECK(p.crop_pct >= 0.01f && p.crop_pct <= 1, name, ": crop_pct must be in [0.01, 1], got ", p.crop_pct);
  const Json& mode = j["interpolation"];
  const bool known_mode = mode.is_string() && (mode == "bilinear" || mode == "bicubic");
  CAPO_CHECK(known_mode, name, ": interpolation must be \"bilinear\" or \"bicubic\"");
  p.interpolation = interpolation_of(mode.get<std::string>());
  return p;
}

Preprocess measure_preprocess(const ImageDataset& set, int size) {
  CAPO_CHECK(set.size() > 0, set.name(), ": no images to measure");
  std::uint64_t sum[3] = {}, squares[3] = {}, count = 0;
  for (std::int64_t i = 0; i < set.size(); ++i) {
    const Image im = set.image(i);
    for (std::size_t k = 0; k < im.pixels.size(); k += static_cast<std::size_t>(im.channels), ++count) {
      for (std::size_t c = 0; c < 3; ++c) {
        const std::uint64_t v = im.pixels[im.channels == 3 ? k + c : k];
        sum[c] += v;
        squares[c] += v * v;
      }
    }
  }
  Preprocess p;
  p.size = size;
  for (int c = 0; c < 3; ++c) {
    const double n = static_cast<double>(count), mean = static_cast<double>(sum[c]) / n;
    const double variance = static_cast<double>(squares[c]) / n - mean * mean;
    p.mean[c] = static_cast<float>(mean / 255);
    p.std[c] = static_cast<float>(std::max(std::sqrt(std::max(variance, 0.0)) / 255, 1e-3));
  }
  return p;
}

Image eval_image(const Image& image, const Preprocess& p) {
  // A hair above the quotient: float 0.875 and friends are exact, 0.9 is not, and 32 / 1 must stay 32.
  const int side = static_cast<int>(static_cast<double>(p.size) / static_cast<double>(p.crop_pct) + 1e-4);
  if (image.height == p.size && image.width == p.size && side == p.size) return image;
  return center_crop(resize_short_side(image, side, p.interpolation), p.size, p.size);
}

void normalize_into(float* dst, const Image& image, const Preprocess& p) {
  CAPO_CHECK(image.height == p.size && image.width == p.size && (image.channels == 1 || image.channels == 3),
             "normalize_into: image must be ", p.size, " x ", p.size, " with 1 or 3 channels, got ", image.height,
             " x ", image.width, " x ", image.channels);
  // One table per channel: 256 divisions instead of one per pixel.
  float table[3][256];
  for (int c = 0; c < image.channels; ++c) {
    for (int v = 0; v < 256; ++v) table[c][v] = (static_cast<float>(v) / 255.0f - p.mean[c]) / p.std[c];
  }
  const std::uint8_t* s = image.pixels.data();
  const std::size_t n = image.pixels.size();
  if (image.channels == 1) {
    for (std::size_t i = 0; i < n; ++i) dst[i] = table[0][s[i]];
  } else {
    for (std::size_t i = 0; i < n; i += 3) {
      dst[i] = table[0][s[i]];
      dst[i + 1] = table[1][s[i + 1]];
      dst[i + 2] = table[2][s[i + 2]];
    }
  }
}

}  // namespace capo
