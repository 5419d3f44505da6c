// The operations of RandAugment on 8-bit images, with Pillow's definitions and torchvision's ranges.
#include <capo/datasets/augment.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace capo {
namespace {

std::uint8_t to_u8(float v) { return static_cast<std::uint8_t>(std::clamp(v, 0.0f, 255.0f)); }  // truncates, as Pillow

int floor_int(float v) {  // std::floor is a function call on plain x86-64
  const int t = static_cast<int>(v);
  return t - (static_cast<float>(t) > v);
}

// out(y, x) = in(A (y, x)), about the centre, bilinear; black outside. m = {yy, yx, y0, xy, xx, x0}.
Image warp(const Image& in, const float m[6]) {
  Image out(in.height, in.width, in.channels);
  const int channels = in.channels;
  const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(in.width) * channels;
  const float cy = static_cast<float>(in.height) / 2, cx = static_cast<float>(in.width) / 2;
  const std::vector<std::uint8_t> black(static_cast<std::size_t>(channels));
  const auto at = [&](int y, int x) {
    return y >= 0 && x >= 0 && y < in.height && x < in.width ? in.at(y, x) : black.data();
  };
  for (int y = 0; y < in.height; ++y) {
    std::uint8_t* o = out.at(y, 0);
    for (int x = 0; x < in.width; ++x, o += channels) {
      const float dy = static_cast<float>(y) + 0.5f - cy, dx = static_cast<float>(x) + 0.5f - cx;
      const float sy = m[0] * dy + m[1] * dx + m[2] + cy - 0.5f, sx = m[3] * dy + m[4] * dx + m[5] + cx - 0.5f;
      const int y0 = floor_int(sy), x0 = floor_int(sx);
      if (y0 < -1 || x0 < -1 || y0 >= in.height || x0 >= in.width) continue;
      const float wy = sy - static_cast<float>(y0), wx = sx - static_cast<float>(x0);
      const bool inside = y0 >= 0 && x0 >= 0 && y0 + 1 < in.height && x0 + 1 < in.width;
      const std::uint8_t* p00 = inside ? in.at(y0, x0) : at(y0, x0);
      const std::uint8_t* p01 = inside ? p00 + channels : at(y0, x0 + 1);
      const std::uint8_t* p10 = inside ? p00 + row : at(y0 + 1, x0);
      const std::uint8_t* p11 = inside ? p10 + channels : at(y0 + 1, x0 + 1);
      for (int c = 0; c < channels; ++c) {
        const float top = static_cast<float>(p00[c]) * (1 - wx) + static_cast<float>(p01[c]) * wx;
        const float bottom = static_cast<float>(p10[c]) * (1 - wx) + static_cast<float>(p11[c]) * wx;
        o[c] = static_cast<std::uint8_t>(top * (1 - wy) + bottom * wy + 0.5f);
      }
    }
  }
  return out;
}

// base + (image - base) * factor: the family of Pillow's ImageEnhance.
template <class Base>
Image enhance(const Image& in, float factor, Base base) {
  Image out = in;
  const std::size_t pixels = in.pixels.size() / static_cast<std::size_t>(in.channels);
  for (std::size_t i = 0; i < pixels; ++i) {
    for (std::size_t c = 0; c < static_cast<std::size_t>(in.channels); ++c) {
      const std::size_t k = i * static_cast<std::size_t>(in.channels) + c;
      const float b = base(i, c);
      out.pixels[k] = to_u8(b + (static_cast<float>(in.pixels[k]) - b) * factor);
    }
  }
  return out;
}

// Luma of a pixel in Pillow's integer form (ITU-R 601).
float luma(const Image& im, std::size_t pixel) {
  if (im.channels != 3) return static_cast<float>(im.pixels[pixel * static_cast<std::size_t>(im.channels)]);
  const std::uint8_t* p = im.pixels.data() + 3 * pixel;
  return static_cast<float>((p[0] * 19595u + p[1] * 38470u + p[2] * 7471u + 0x8000u) >> 16);
}

Image contrast(const Image& im, float factor) {
  const std::size_t n = im.pixels.size() / static_cast<std::size_t>(im.channels);
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(luma(im, i));
  const float mean = std::floor(static_cast<float>(sum / static_cast<double>(n)) + 0.5f);
  return enhance(im, factor, [mean](std::size_t, std::size_t) { return mean; });
}

// 3 x 3 smoothing with weights 1 and, in the middle, 5, over 13; the border keeps its values.
Image smooth(const Image& im) {
  Image out = im;
  const int step = im.channels, inner = (im.width - 2) * step;
  for (int y = 1; y + 1 < im.height && inner > 0; ++y) {
    const std::uint8_t *up = im.at(y - 1, 1), *mid = im.at(y, 1), *down = im.at(y + 1, 1);
    std::uint8_t* o = out.at(y, 1);
    for (int i = 0; i < inner; ++i) {
      const int sum = up[i - step] + up[i] + up[i + step] + mid[i - step] + 5 * mid[i] + mid[i + step] +
                      down[i - step] + down[i] + down[i + step];
      o[i] = static_cast<std::uint8_t>((sum + 6) / 13);
    }
  }
  return out;
}

// A table per channel, from that channel's histogram.
template <class MakeTable>
Image by_histogram(const Image& im, MakeTable make_table) {
  Image out = im;
  const auto step = static_cast<std::size_t>(im.channels);
  for (std::size_t c = 0; c < step; ++c) {
    int histogram[256] = {};
    for (std::size_t i = c; i < im.pixels.size(); i += step) ++histogram[im.pixels[i]];
    std::uint8_t table[256];
    for (int v = 0; v < 256; ++v) table[v] = static_cast<std::uint8_t>(v);
    make_table(histogram, table);
    for (std::size_t i = c; i < im.pixels.size(); i += step) out.pixels[i] = table[im.pixels[i]];
  }
  return out;
}

void auto_contrast_table(const int* histogram, std::uint8_t* table) {
  int lo = 0, hi = 255;
  while (lo < 255 && histogram[lo] == 0) ++lo;
  while (hi > 0 && histogram[hi] == 0) --hi;
  if (hi <= lo) return;
  for (int v = 0; v < 256; ++v) table[v] = to_u8(static_cast<float>(v - lo) * 255.0f / static_cast<float>(hi - lo));
}

void equalize_table(const int* histogram, std::uint8_t* table) {
  int total = 0, used = 0, last = 0;
  for (int v = 0; v < 256; ++v) {
    total += histogram[v];
    used += histogram[v] > 0;
    if (histogram[v] > 0) last = histogram[v];
  }
  const int step = (total - last) / 255;
  if (used <= 1 || step == 0) return;
  int n = step / 2;
  for (int v = 0; v < 256; ++v) {
    table[v] = static_cast<std::uint8_t>(std::min(n / step, 255));
    n += histogram[v];
  }
}

}  // namespace

Image apply_rand_op(const Image& im, RandOp op, float s) {
  CAPO_CHECK(s >= -1 && s <= 1, "apply_rand_op: strength must be in [-1, 1], got ", s);
  CAPO_CHECK(!im.pixels.empty(), "apply_rand_op: image must not be empty");
  const float size = std::abs(s), w = static_cast<float>(im.width), h = static_cast<float>(im.height);
  const float factor = 1 + 0.9f * s;
  switch (op) {
    case RandOp::identity:
      return im;
    case RandOp::shear_x: {
      const float m[6] = {1, 0, 0, 0.3f * s, 1, 0};
      return warp(im, m);
    }
    case RandOp::shear_y: {
      const float m[6] = {1, 0.3f * s, 0, 0, 1, 0};
      return warp(im, m);
    }
    case RandOp::translate_x: {
      const float m[6] = {1, 0, 0, 0, 1, std::trunc(150.0f / 331.0f * w * s)};
      return warp(im, m);
    }
    case RandOp::translate_y: {
      const float m[6] = {1, 0, std::trunc(150.0f / 331.0f * h * s), 0, 1, 0};
      return warp(im, m);
    }
    case RandOp::rotate: {
      const float a = s * 30.0f * 0.017453293f, m[6] = {std::cos(a), -std::sin(a), 0, std::sin(a), std::cos(a), 0};
      return warp(im, m);
    }
    case RandOp::brightness:
      return enhance(im, factor, [](std::size_t, std::size_t) { return 0.0f; });
    case RandOp::color:
      return enhance(im, factor, [&](std::size_t pixel, std::size_t) { return luma(im, pixel); });
    case RandOp::contrast:
      return contrast(im, factor);
    case RandOp::sharpness: {
      const Image base = smooth(im);
      const auto step = static_cast<std::size_t>(im.channels);
      return enhance(im, factor, [&](std::size_t pixel, std::size_t c) {
        return static_cast<float>(base.pixels[pixel * step + c]);
      });
    }
    case RandOp::posterize: {
      const int bits = 8 - static_cast<int>(std::lround(4 * size));
      Image out = im;
      for (auto& v : out.pixels) v = static_cast<std::uint8_t>(v & (0xff << (8 - bits)));
      return out;
    }
    case RandOp::solarize: {
      const int threshold = static_cast<int>(255.0f * (1 - size));
      Image out = im;
      for (auto& v : out.pixels) v = static_cast<std::uint8_t>(v >= threshold ? 255 - v : v);
      return out;
    }
    case RandOp::auto_contrast:
      return by_histogram(im, auto_contrast_table);
    case RandOp::equalize:
      return by_histogram(im, equalize_table);
  }
  return im;
}

}  // namespace capo
