#include <capo/datasets/image.h>
#include <capo/datasets/stb.h>
#include <capo/engine/files.h>

#include <zlib.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace capo {
namespace {

constexpr int kMaxSide = 16384;
constexpr std::int64_t kMaxSamples = std::int64_t{64} << 20;
constexpr std::size_t kMaxEncodedBytes = std::size_t{64} << 20;

std::uint32_t big_endian(std::string_view bytes, std::size_t at) {
  std::uint32_t v = 0;
  for (int i = 0; i < 4; ++i) v = v << 8 | static_cast<unsigned char>(bytes[at + i]);
  return v;
}

// stb checks no checksums and would decode damaged pixels without a word.
void check_png_chunks(std::string_view bytes, const std::string& name) {
  std::size_t at = 8;
  for (;;) {
    CAPO_CHECK(bytes.size() - at >= 12, name, ": PNG is truncated, the IEND chunk is missing");
    const std::uint64_t length = big_endian(bytes, at);
    CAPO_CHECK(length <= bytes.size() - at - 12, name, ": PNG is truncated, a chunk needs ", length, " bytes, got ",
               bytes.size() - at - 12);
    const auto n = static_cast<std::size_t>(length);
    const std::string_view type = bytes.substr(at + 4, 4);
    const bool critical = (type[0] & 0x20) == 0;  // damaged comments do not matter
    if (critical) {
      const auto* data = reinterpret_cast<const Bytef*>(bytes.data() + at + 4);
      CAPO_CHECK(crc32(0, data, static_cast<uInt>(n + 4)) == big_endian(bytes, at + 8 + n), name,
                 ": PNG is damaged, wrong checksum at byte ", at);
    }
    if (type == "IEND") return;
    at += n + 12;
  }
}

// A Huffman table's 16 counts may not add up to more than 256 symbols: stb 2.27 writes beyond its table then.
void check_huffman(std::string_view segment, const std::string& name) {
  while (!segment.empty()) {
    CAPO_CHECK(segment.size() >= 17, name, ": JPEG is damaged, a Huffman table is cut off");
    std::size_t sum = 0;
    for (std::size_t i = 1; i <= 16; ++i) sum += static_cast<unsigned char>(segment[i]);
    CAPO_CHECK(sum <= 256 && sum <= segment.size() - 17, name, ": JPEG is damaged, a Huffman table has ", sum,
               " symbols");
    segment.remove_prefix(17 + sum);
  }
}

// What stb leaves unchecked: Huffman tables, and the end (what is missing of a file it fills with grey).
void check_jpeg(std::string_view bytes, const std::string& name) {
  const auto segment_at = [&](std::size_t at) {  // at: the marker's second byte
    CAPO_CHECK(bytes.size() - at >= 3, name, ": JPEG is truncated in a header segment");
    const std::size_t length =
        static_cast<unsigned char>(bytes[at + 1]) * 256u + static_cast<unsigned char>(bytes[at + 2]);
    CAPO_CHECK(length >= 2 && length <= bytes.size() - at - 1, name, ": JPEG is truncated in a header segment of ",
               length, " bytes");
    return bytes.substr(at + 3, length - 2);
  };
  // Segments up to the first scan; like stb, skip padding between them.
  std::size_t at = 2;
  for (;;) {
    at = bytes.find('\xff', at);
    if (at != bytes.npos) at = bytes.find_first_not_of('\xff', at);
    CAPO_CHECK(at != bytes.npos, name, ": JPEG is truncated, it has no image data");
    if (bytes[at] == '\xda') break;
    const std::string_view segment = segment_at(at);
    if (bytes[at] == '\xc4') check_huffman(segment, name);
    at += 3 + segment.size();
  }
  // From there on, entropy-coded data: 0xFF is followed by 0x00 or a marker. Any further table is checked wherever it
  // may be, and the last scan must be followed by an end-of-image.
  for (std::size_t t = at; (t = bytes.find("\xff\xc4", t)) != bytes.npos; t += 2)
    check_huffman(segment_at(t + 1), name);
  const auto scan = bytes.rfind("\xff\xda"), end = bytes.rfind("\xff\xd9");
  CAPO_CHECK(end != bytes.npos && end > scan, name, ": JPEG is truncated, its end marker is missing");
}

void check_image(const char* op, const Image& im) {
  CAPO_CHECK(im.height > 0 && im.width > 0 && im.channels > 0 &&
                 im.pixels.size() == static_cast<std::size_t>(im.height) * im.width * im.channels,
             op, ": image must have height x width x channels pixels, got ", im.height, " x ", im.width, " x ",
             im.channels, " with ", im.pixels.size());
}

// ---- resize: the arithmetic of Pillow's Resample.c, so that pipelines built on Pillow see the same bytes.

constexpr int kPrecisionBits = 32 - 8 - 2;

double triangle(double x) { return std::max(0.0, 1.0 - std::abs(x)); }

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// For each output position: the first input position, how many, and their fixed-point weights.
struct Taps {
  int stride = 0;
  std::vector<int> first, count;
  std::vector<std::int32_t> weight;
};

Taps make_taps(int in, int out, Interpolation mode) {
  const double scale = static_cast<double>(in) / out, filter_scale = std::max(scale, 1.0);
  const double support = (mode == Interpolation::bicubic ? 2.0 : 1.0) * filter_scale;
  Taps t;
  t.stride = static_cast<int>(std::ceil(support)) * 2 + 1;
  t.first.resize(out);
  t.count.resize(out);
  t.weight.assign(static_cast<std::size_t>(out) * t.stride, 0);
  std::vector<double> w(t.stride);
  for (int i = 0; i < out; ++i) {
    const double center = (i + 0.5) * scale;
    const int lo = std::max(0, static_cast<int>(center - support + 0.5));
    const int n = std::min(in, static_cast<int>(center + support + 0.5)) - lo;
    double sum = 0;
    for (int k = 0; k < n; ++k) {
      const double x = (k + lo - center + 0.5) * (1.0 / filter_scale);
      w[k] = mode == Interpolation::bicubic ? cubic(x) : triangle(x);
      sum += w[k];
    }
    t.first[i] = lo;
    t.count[i] = n;
    for (int k = 0; k < n; ++k) {
      const double v = (sum != 0 ? w[k] / sum : w[k]) * (1 << kPrecisionBits);
      t.weight[static_cast<std::size_t>(i) * t.stride + k] = static_cast<std::int32_t>(v < 0 ? v - 0.5 : v + 0.5);
    }
  }
  return t;
}

std::uint8_t clip8(std::int32_t sum) { return static_cast<std::uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255)); }

// C: the channel count at compile time, or 0.
template <int C>
void resize_row(const std::uint8_t* in, std::uint8_t* out, int width, int channels, const Taps& t) {
  const int n = C > 0 ? C : channels;
  constexpr int kBlock = C > 0 ? C : 1;  // channels summed at once
  for (int x = 0; x < width; ++x, out += n) {
    const std::int32_t* w = t.weight.data() + static_cast<std::size_t>(x) * t.stride;
    const std::uint8_t* p = in + static_cast<std::ptrdiff_t>(t.first[x]) * n;
    const int count = t.count[x];
    for (int j = 0; j < n; j += kBlock) {
      std::int32_t sum[kBlock];
      for (auto& s : sum) s = 1 << (kPrecisionBits - 1);
      for (int k = 0; k < count; ++k) {
        for (int c = 0; c < kBlock; ++c) sum[c] += p[k * n + j + c] * w[k];
      }
      for (int c = 0; c < kBlock; ++c) out[j + c] = clip8(sum[c]);
    }
  }
}

Image resize_rows(const Image& in, int width, Interpolation mode) {
  const Taps t = make_taps(in.width, width, mode);
  Image out(in.height, width, in.channels);
  const auto row = in.channels == 3 ? resize_row<3> : in.channels == 1 ? resize_row<1> : resize_row<0>;
  for (int y = 0; y < in.height; ++y) row(in.at(y, 0), out.at(y, 0), width, in.channels, t);
  return out;
}

Image resize_columns(const Image& in, int height, Interpolation mode) {
  const Taps t = make_taps(in.height, height, mode);
  Image out(height, in.width, in.channels);
  const int row = in.width * in.channels;
  std::vector<std::int32_t> sum(row);
  for (int y = 0; y < height; ++y) {
    std::fill(sum.begin(), sum.end(), 1 << (kPrecisionBits - 1));
    for (int k = 0; k < t.count[y]; ++k) {
      const std::int32_t w = t.weight[static_cast<std::size_t>(y) * t.stride + k];
      const std::uint8_t* p = in.at(t.first[y] + k, 0);
      for (int i = 0; i < row; ++i) sum[i] += p[i] * w;
    }
    std::transform(sum.begin(), sum.end(), out.at(y, 0), clip8);
  }
  return out;
}

int round_half_even(int twice) {
  const int q = twice / 2;
  return twice % 2 ? q + (q & 1) : q;
}

}  // namespace

const char* to_string(Interpolation i) { return i == Interpolation::bicubic ? "bicubic" : "bilinear"; }

Interpolation interpolation_of(std::string_view name) {
  CAPO_CHECK(name == "bilinear" || name == "bicubic", "interpolation: must be bilinear or bicubic, got ",
             name.substr(0, 40));
  return name == "bicubic" ? Interpolation::bicubic : Interpolation::bilinear;
}

Image decode_image(std::string_view bytes, const std::string& name) {
  CAPO_CHECK(bytes.size() <= kMaxEncodedBytes, name, ": image file too long, at most ", kMaxEncodedBytes,
             " bytes are accepted, got ", bytes.size());
  const bool png = bytes.substr(0, 8) == std::string_view("\x89PNG\r\n\x1a\n", 8);
  const bool jpeg = bytes.substr(0, 3) == "\xff\xd8\xff";
  CAPO_CHECK(png || jpeg, name, ": must be a PNG or JPEG image, got ",
             bytes.empty() ? "an empty file" : "other content");
  if (jpeg) check_jpeg(bytes, name);  // before stb sees any of it
  const auto* data = reinterpret_cast<const unsigned char*>(bytes.data());
  const int size = static_cast<int>(bytes.size());
  const char* reason = "";
  detail::StbInfo info{};
  CAPO_CHECK(detail::stb_info(data, size, &info, &reason), name, ": image header is not readable, ", reason);
  CAPO_CHECK(info.width > 0 && info.height > 0 && info.width <= kMaxSide && info.height <= kMaxSide, name,
             ": image sides must be in [1, ", kMaxSide, "], got ", info.height, " x ", info.width);
  const std::int64_t samples = std::int64_t{info.width} * info.height * std::max(info.channels, 3);
  CAPO_CHECK(samples <= kMaxSamples, name, ": image too large, at most ", kMaxSamples, " samples, got ", info.height,
             " x ", info.width, " x ", info.channels);
  CAPO_CHECK(!info.sixteen_bit, name, ": 16-bit images are not supported, convert to 8 bits per channel");
  if (png) check_png_chunks(bytes, name);

  // Room for the decoder's largest honest buffer: the doubled inflate buffer, JPEG planes padded to whole blocks.
  const std::size_t max_alloc =
      2 * bytes.size() + 16 * static_cast<std::size_t>(info.width + 32) * (info.height + 32) + 65536;
  Image out;
  const auto take = [](void* user, const unsigned char* rgb, int w, int h) {
    Image& im = *static_cast<Image*>(user);
    im = Image(h, w, 3);
    std::memcpy(im.pixels.data(), rgb, im.pixels.size());
  };
  CAPO_CHECK(detail::stb_load_rgb(data, size, max_alloc, take, &out, &reason), name, ": image is damaged, ", reason);
  CAPO_CHECK(out.width == info.width && out.height == info.height, name, ": image is damaged, its header says ",
             info.height, " x ", info.width, ", got ", out.height, " x ", out.width);
  return out;
}

Image load_image(const std::string& path) { return decode_image(read_file(path, kMaxEncodedBytes), path); }

Image resize_image(const Image& image, int height, int width, Interpolation mode) {
  check_image("resize_image", image);
  CAPO_CHECK(height > 0 && width > 0 && height <= kMaxSide && width <= kMaxSide,
             "resize_image: new sides must be in [1, ", kMaxSide, "], got ", height, " x ", width);
  if (width == image.width) return height == image.height ? image : resize_columns(image, height, mode);
  const Image wide = resize_rows(image, width, mode);
  return height == image.height ? wide : resize_columns(wide, height, mode);
}

Image resize_short_side(const Image& image, int side, Interpolation mode) {
  check_image("resize_short_side", image);
  const int h = image.height, w = image.width;
  const auto longer = [&](int l, int s) { return static_cast<int>(std::int64_t{side} * l / s); };
  return h <= w ? resize_image(image, side, longer(w, h), mode) : resize_image(image, longer(h, w), side, mode);
}

Image crop(const Image& image, int top, int left, int height, int width) {
  check_image("crop", image);
  CAPO_CHECK(
      height > 0 && width > 0 && top >= 0 && left >= 0 && top <= image.height - height && left <= image.width - width,
      "crop: window must lie inside the image ", image.height, " x ", image.width, ", got ", height, " x ", width,
      " at (", top, ", ", left, ")");
  Image out(height, width, image.channels);
  for (int y = 0; y < height; ++y) {
    std::memcpy(out.at(y, 0), image.at(top + y, left), static_cast<std::size_t>(width) * image.channels);
  }
  return out;
}

Image center_crop(const Image& image, int height, int width) {
  CAPO_CHECK(height <= image.height && width <= image.width, "center_crop: image must be at least ", height, " x ",
             width, ", got ", image.height, " x ", image.width);
  return crop(image, round_half_even(image.height - height), round_half_even(image.width - width), height, width);
}

Image flip_horizontal(const Image& image) {
  Image out = image;
  for (int y = 0; y < image.height; ++y) {
    const std::uint8_t* s = image.at(y, image.width - 1);
    std::uint8_t* d = out.at(y, 0);
    for (int x = 0; x < image.width; ++x, s -= image.channels, d += image.channels) {
      for (int c = 0; c < image.channels; ++c) d[c] = s[c];
    }
  }
  return out;
}

}  // namespace capo
