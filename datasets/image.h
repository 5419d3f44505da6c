// 8-bit images in host memory: decoding (PNG, JPEG), antialiased resize, crops.
#pragma once

#include <capo/engine/error.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace capo {

// Pixels in HWC order, row by row: pixels[(y * width + x) * channels + c].
struct Image {
  int height = 0, width = 0, channels = 0;
  std::vector<std::uint8_t> pixels;

  Image() = default;
  Image(int h, int w, int c, std::uint8_t value = 0)
      : height(h), width(w), channels(c), pixels(static_cast<std::size_t>(h) * w * c, value) {}
  std::uint8_t* at(int y, int x) { return pixels.data() + (static_cast<std::size_t>(y) * width + x) * channels; }
  const std::uint8_t* at(int y, int x) const {
    return pixels.data() + (static_cast<std::size_t>(y) * width + x) * channels;
  }
};

enum class Interpolation { bilinear, bicubic };
const char* to_string(Interpolation i);
// "bilinear" or "bicubic"; throws otherwise.
Interpolation interpolation_of(std::string_view name);

// An encoded PNG or JPEG as an RGB image (grey is replicated, alpha dropped, EXIF orientation ignored).
// `name` starts the text of errors. Refused: other formats, 16-bit PNG, sides over 16,384, more than 64 Mi samples,
// files over 64 MiB, PNG with a wrong checksum or missing end, JPEG without its end marker.
Image decode_image(std::string_view bytes, const std::string& name);
// Reads and decodes a file.
Image load_image(const std::string& path);

// Resize with antialiasing, bit-equal to BILINEAR and BICUBIC (a = -0.5) of Pillow 11: two passes in fixed point, rows
// first. (Pillow 13 takes the cheaper pass first, which rounds differently.)
Image resize_image(const Image& image, int height, int width, Interpolation mode = Interpolation::bicubic);
// The shorter side becomes `side`, the other int(side * long / short), as torchvision's Resize(side).
Image resize_short_side(const Image& image, int side, Interpolation mode = Interpolation::bicubic);

// The window must lie inside the image.
Image crop(const Image& image, int top, int left, int height, int width);
// Offsets as torchvision: round((H - height) / 2), halves to even. The image must be at least that large.
Image center_crop(const Image& image, int height, int width);
Image flip_horizontal(const Image& image);

}  // namespace capo
