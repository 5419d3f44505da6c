// The image decoder, on the input as it is and, for PNG, with its checksums put right (else few mutations get past
// them).
#include <capo/datasets/png.h>
#include <capo/tests/fuzz/fuzz.h>
#include <capo/tests/tiny_images.h>

#include <zlib.h>

namespace {

void try_decode(std::string_view bytes) {
  try {
    const capo::Image im = capo::decode_image(bytes, "mem");
    capo::fuzz::require(im.height > 0 && im.width > 0 && im.channels == 3);
    capo::fuzz::require(im.pixels.size() == static_cast<std::size_t>(im.height) * im.width * 3);
    if (im.pixels.size() > 100000) return;
    capo::fuzz::require(capo::decode_image(capo::encode_png(im), "mem").pixels == im.pixels);
    capo::resize_image(im, 7, 5);
    capo::resize_image(im, 5, 7, capo::Interpolation::bilinear);
  } catch (const capo::Error&) {
  }
}

void repair_checksums(std::string& png) {
  for (std::size_t at = 8; png.size() >= at + 12;) {
    std::uint32_t n = 0;
    for (std::size_t i = 0; i < 4; ++i) n = n << 8 | static_cast<unsigned char>(png[at + i]);
    if (n > png.size() - at - 12) return;
    const auto crc = crc32(0, reinterpret_cast<const Bytef*>(png.data() + at + 4), n + 4);
    for (std::size_t i = 0; i < 4; ++i) png[at + 8 + n + i] = static_cast<char>(crc >> (24 - 8 * i));
    at += n + 12;
  }
}

}  // namespace

std::vector<std::string> capo::fuzz::seeds() {
  Image rgb(9, 7, 3), grey(5, 6, 1);
  for (std::size_t i = 0; i < rgb.pixels.size(); ++i) rgb.pixels[i] = static_cast<std::uint8_t>(i * i);
  for (std::size_t i = 0; i < grey.pixels.size(); ++i) grey.pixels[i] = static_cast<std::uint8_t>(i * 8);
  std::string empty_part = encode_png(rgb);  // an empty IDAT first
  empty_part.insert(empty_part.find("IDAT") - 4, std::string("\0\0\0\0IDAT\x35\xaf\x06\x1e", 12));
  return {encode_png(rgb), encode_png(grey), empty_part, std::string(testing::view(testing::kJpeg)),
          std::string(testing::view(testing::kProgressiveJpeg)), std::string(testing::view(testing::kPng16)),
          std::string(testing::view(testing::kPngRgba)),
          std::string(testing::view(testing::kJpeg420)), std::string(testing::view(testing::kPngPalette))};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string bytes(reinterpret_cast<const char*>(data), size);
  try_decode(bytes);
  if (bytes.compare(0, 4, "\x89PNG") == 0) {
    repair_checksums(bytes);
    try_decode(bytes);
  }
  return 0;
}
