// The operations of RandAugment on 8-bit images, with Pillow's definitions and torchvision's ranges.
#include <capo/datasets/augment.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace capo {
namespace {

std::uint8_t to_u8(float v) { return static_cast<std::uint8_t>(std::clamp(v, 0.0f, 255.0f)); }  // truncates, as Pillow

// out(y, x) = in(A (y, x)), about the centre, bilinear; black outside. m = {yy, yx, y0, xy, xx, x0}.
Image warp(const Image& in, const float m[6]) {
  Image out(in.height, in.width, in.channels);
  const float cy = static_cast<float>(in.height) / 2, cx = static_cast<float>(in.width) / 2;
  for (int y = 0; y < in.height; ++y) {
    for (int x = 0; x < in.width; ++x) {
      const float dy = static_cast<float>(y) + 0.5f - cy, dx = static_cast<float>(x) + 0.5f - cx;
      const float sy = m[0] * dy + m[1] * dx + m[2] + cy - 0.5f, sx = m[3] * dy + m[4] * dx + m[5] + cx - 0.5f;
      const float fy = std::floor(sy), fx = std::floor(sx);
      if (fy < -1 || fx < -1 || fy >= static_cast<float>(in.height) || fx >= static_cast<float>(in.width)) continue;
      const int y0 = static_cast<int>(fy), x0 = static_cast<int>(fx);
      const float wy = sy - fy, wx = sx - fx;
      for (int c = 0; c < in.channels; ++c) {
        const auto at = [&](int yy, int xx) {
          return yy >= 0 && xx >= 0 && yy < in.height && xx < in.width ? static_cast<float>(in.at(yy, xx)[c]) : 0.0f;
        };
        const float top = at(y0, x0) * (1 - wx) + at(y0, x0 + 1) * wx;
        const float bottom = at(y0 + 1, x0) * (1 - wx) + at(y0 + 1, x0 + 1) * wx;
        out.at(y, x)[c] = to_u8(top * (1 - wy) + bottom * wy + 0.5f);
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

// 3 x 3 smoothing (1, 5, 1 ...) / 13; the border keeps its values.
Image smooth(const Image& im) {
  Image out = im;
  for (int y = 1; y + 1 < im.height; ++y) {
    for (int x = 1; x + 1 < im.width; ++x) {
      for (int c = 0; c < im.channels; ++c) {
        int sum = 4 * im.at(y, x)[c];
        for (int dy = -1; dy <= 1; ++dy) {
          for (int dx = -1; dx <= 1; ++dx) sum += im.at(y + dy, x + dx)[c];
        }
        out.at(y, x)[c] = static_cast<std::uint8_t>((sum + 6) / 13);
      }
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
      return enhance(im, factor, [&](std::size_t pixel, std::size_t c) { return static_cast<float>(base.pixels[pixel * step + c]); });
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
