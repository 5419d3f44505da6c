// References: interpolation between neighbours, pixel by pixel, from the definition. The "PyTorch 2.x" samples hold
// that library's own numbers.
#include <capo/tests/op_test.h>

#include <capo/ops/resize.h>

#include <algorithm>
#include <cmath>

namespace capo::test {
namespace {

// 4 x 5 values, as one image of one channel.
Tensor image() {
  std::vector<double> v;
  for (int i = 0; i < 20; ++i) v.push_back(i * 37 % 23 - 11 + 0.25 * i);
  return values(v, {1, 4, 5, 1});
}

Sample pytorch(const Dims& size, ResizeMode mode, bool antialias, bool align_corners,
               const std::vector<double>& expected) {
  const char* names[] = {"nearest", "bilinear", "bicubic"};
  Sample s{std::string("PyTorch 2.x: ") + names[static_cast<int>(mode)] + (antialias ? ", antialias" : "") +
               (align_corners ? ", corners " : " ") + to_string(size),
           {image()},
           [=](const Tensors& t) { return Tensors{resize(t[0], size, mode, antialias, align_corners)}; },
           [=](const Tensors&) {
             return Tensors{values(expected, {1, size[0], size[1], 1})};
           }};
  s.tol = 1e-8;
  s.second_order = true;
  return s;
}

// Interpolation between the two neighbours on every axis, straight from the definition (half-pixel centres).
Tensor linear_reference(const Tensor& x, const Dims& size) {
  const int space = size.size();
  Shape shape = x.shape();
  for (int i = 0; i < space; ++i) shape[1 + i] = size[i];
  const auto v = to_vector<double>(x);
  std::vector<double> out;
  const std::int64_t n = numel(shape);
  for (std::int64_t k = 0; k < n; ++k) {
    std::int64_t at[5] = {}, rest = k;
    for (int i = shape.size() - 1; i >= 0; --i) {
      at[i] = rest % shape[i];
      rest /= shape[i];
    }
    double sum = 0;
    for (int corner = 0; corner < 1 << space; ++corner) {
      double weight = 1;
      std::int64_t from = at[0];
      for (int i = 0; i < space; ++i) {
        const std::int64_t in = x.shape()[1 + i];
        const double place = std::clamp(
            (static_cast<double>(at[1 + i]) + 0.5) * static_cast<double>(in) / static_cast<double>(size[i]) - 0.5, 0.0,
            static_cast<double>(in - 1));
        const double low = std::floor(place);
        const bool high = corner >> i & 1;
        weight *= high ? place - low : 1 - (place - low);
        from = from * in + std::min(static_cast<std::int64_t>(low) + high, in - 1);
      }
      sum += weight * v[static_cast<std::size_t>(from * shape.back() + at[1 + space])];
    }
    out.push_back(sum);
  }
  return values(out, shape);
}

Tensor nearest_reference(const Tensor& x, const Dims& size) {
  const int space = size.size();
  Shape shape = x.shape();
  for (int i = 0; i < space; ++i) shape[1 + i] = size[i];
  const auto v = to_vector<double>(x);
  std::vector<double> out;
  const std::int64_t n = numel(shape);
  for (std::int64_t k = 0; k < n; ++k) {
    std::int64_t at[5] = {}, rest = k;
    for (int i = shape.size() - 1; i >= 0; --i) {
      at[i] = rest % shape[i];
      rest /= shape[i];
    }
    std::int64_t from = at[0];
    for (int i = 0; i < space; ++i) from = from * x.shape()[1 + i] + at[1 + i] * x.shape()[1 + i] / size[i];
    out.push_back(v[static_cast<std::size_t>(from * shape.back() + at[1 + space])]);
  }
  return values(out, shape);
}

}  // namespace

std::vector<OpCase> op_cases() {
  const auto one = [](const std::string& label, const Tensor& x, Dims size, ResizeMode mode) {
    Sample s{
        label,
        {x},
        [=](const Tensors& t) { return Tensors{resize(t[0], size, mode)}; },
        [=](const Tensors& t) {
          return Tensors{mode == ResizeMode::nearest ? nearest_reference(t[0], size) : linear_reference(t[0], size)};
        }};
    s.second_order = true;
    return s;
  };
  OpCase c{"resize", {}, {}};
  c.samples = {
      one("bilinear, up and down", normal({2, 7, 5, 3}, "a"), {4, 9}, ResizeMode::bilinear),
      one("bilinear, wide", normal({1, 3, 3, 70}, "a", 5), {6, 6}, ResizeMode::bilinear),
      one("one axis", normal({2, 5, 2}, "a"), {8}, ResizeMode::bilinear),
      one("trilinear", normal({1, 3, 4, 2, 3}, "a"), {2, 7, 5}, ResizeMode::bilinear),
      one("nearest, twice", normal({2, 3, 5, 3}, "a"), {6, 10}, ResizeMode::nearest),
      one("nearest, down", normal({1, 9, 7, 2}, "a"), {4, 3}, ResizeMode::nearest),
      one("nearest volume", normal({1, 2, 3, 2, 2}, "a"), {4, 2, 5}, ResizeMode::nearest),
      one("same size", normal({2, 3, 5, 3}, "a"), {3, 5}, ResizeMode::bilinear),
      one("from one pixel", normal({1, 1, 1, 3}, "a"), {2, 3}, ResizeMode::bilinear),
      one("empty", normal({0, 4, 4, 3}, "a"), {2, 6}, ResizeMode::bilinear),
      pytorch({3, 7}, ResizeMode::nearest, false, false,
              {-11,   -11, 3.25, -5.5, -5.5, 8.75, 0,  -8.75, -8.75, 5.5, -3.25,
               -3.25, 11,  2.25, -6.5, -6.5, 7.75, -1, -1,    13.25, 4.5}),
      pytorch({6, 2}, ResizeMode::nearest, false, false,
              {-11, -5.5, -11, -5.5, -8.75, -3.25, -6.5, -1, -6.5, -1, -4.25, 1.25}),
      pytorch({3, 7}, ResizeMode::bilinear, false, false,
              {-10.625,    -2.48214286, 1.125, -5.125, 5.05357143, 5.375, 0.375, -7.625,     0.517857143, 4.125, -2.125,
               8.05357143, 8.375,       3.375, -4.625, 3.51785714, 7.125, 0.875, 11.0535714, 11.375,      6.375}),
      pytorch({6, 2}, ResizeMode::bilinear, false, false,
              {-0.3125, 6.5625, 0.8125, 7.6875, 2.3125, 9.1875, 3.8125, 10.6875, 5.3125, 12.1875, 6.4375, 13.3125}),
      pytorch({3, 7}, ResizeMode::bilinear, false, true,
              {-11,   -1.5,       0.333333333, -5.5,  4,    5.83333333, 0,    -7.625, 1.875,      3.70833333, -2.125,
               7.375, 9.20833333, 3.375,       -4.25, 5.25, 7.08333333, 1.25, 10.75,  12.5833333, 6.75}),
      pytorch({6, 2}, ResizeMode::bilinear, false, true,
              {-11, 0, -9.65, 1.35, -8.3, 2.7, -6.95, 4.05, -5.6, 5.4, -4.25, 6.75}),
      pytorch({3, 7}, ResizeMode::bicubic, false, false,
              {-11.8378659, -1.53028578, 2.15994746, -5.21614583, 5.84799411, 6.8560116,  -0.404921344,
               -8.74672012, 1.56086006,  5.25109329, -2.125,      8.93913994, 9.94715743, 2.68622449,
               -5.65557428, 4.65200589,  8.34223913, 0.966145833, 12.0302858, 13.0383033, 5.77737032}),
      pytorch({6, 2}, ResizeMode::bicubic, false, false,
              {0.749023438, 8.07519531, 1.85839844, 9.18457031, 3.6735026, 10.9996745, 4.96516927, 12.2913411,
               6.78027344, 14.1064453, 7.88964844, 15.2158203}),
      pytorch(
          {3, 7}, ResizeMode::bicubic, false, true,
          {-11,   -0.263888889, 1.28703704, -5.5,  4.75,       7.5787037,  0,    -7.625, 3.11111111, 4.66203704, -2.125,
           8.125, 10.9537037,   3.375,      -4.25, 6.48611111, 8.03703704, 1.25, 11.5,   14.3287037, 6.75}),
      pytorch({6, 2}, ResizeMode::bicubic, false, true,
              {-11, 0, -9.866, 1.134, -8.192, 2.808, -7.058, 3.942, -5.384, 5.616, -4.25, 6.75}),
      pytorch({3, 7}, ResizeMode::bilinear, true, false,
              {-10.325,    -2.18214286, 1.425, -4.825, 5.35357143, 5.675, 0.675, -7.625,     0.517857143, 4.125, -2.125,
               8.05357143, 8.375,       3.375, -4.925, 3.21785714, 6.825, 0.575, 10.7535714, 11.075,      6.075}),
      pytorch({6, 2}, ResizeMode::bilinear, true, false,
              {-3.02272727, 2.47727273, -1.89772727, 3.60227273, -0.397727273, 5.10227273, 1.10227273, 6.60227273,
               2.60227273, 8.10227273, 3.72727273, 9.22727273}),
      pytorch({3, 7}, ResizeMode::bicubic, true, false,
              {-11.4027515, -2.0172528,  2.18317644, -5.07265446, 6.11174787, 6.27083584, -0.0823632001,
               -8.45509709, 0.930401662, 5.1308309,  -2.125,      9.05940233, 9.2184903,  2.86529126,
               -5.50744263, 3.87805612,  8.07848537, 0.822654462, 12.0070568, 12.1661448, 5.81294572}),
      pytorch({6, 2}, ResizeMode::bicubic, true, false,
              {-3.67696864, 2.61075215, -2.60247174, 3.68524905, -0.903942328, 5.38377846, 0.596057672, 6.88377846,
               2.29458708, 8.58230788, 3.36908399, 9.65680478}),
      pytorch({3, 7}, ResizeMode::bilinear, true, true,
              {-10.15625, -3.03125, 2.63541667, -3.19791667,   2.46875, 8.13541667, 2.30208333,
               -7,        0.125,    5.79166667, -0.0416666667, 5.625,   11.2916667, 5.45833333,
               -4.625,    2.5,      8.16666667, 2.33333333,    8,       13.6666667, 7.83333333}),
      pytorch({6, 2}, ResizeMode::bilinear, true, true,
              {-1, 2.30555556, -0.1, 3.20555556, 1.25, 4.55555556, 2.6, 5.90555556, 3.95, 7.25555556, 5.3, 8.60555556}),
      pytorch({3, 7}, ResizeMode::bicubic, true, true,
              {-11.2894417, -3.13135351, 3.50453973, -4.45842323, 2.27305825, 9.0719713,  1.79958998,
               -7.8875,     0.270588235, 6.90648148, -1.05648148, 5.675,      12.473913,  5.20153173,
               -5.20301724, 2.95507099,  9.59096424, 1.62800128,  8.35948276, 15.1583958, 7.88601449}),
      pytorch({6, 2}, ResizeMode::bicubic, true, true,
              {-1.17861277, 3.10557053, -0.320368614, 3.96381469, 1.24119855, 5.52538185, 2.59119855, 6.87538185,
               4.00497808, 8.28916138, 5.45360457, 9.73778787}),
  };
  c.errors = {
      {"size",
       [] {
         resize(normal({1, 4, 4, 2}, "a"), {0, 2}, ResizeMode::bilinear);
       },
       "positive"},
      {"axes",
       [] {
         resize(normal({1, 4, 4, 2}, "a"), {2}, ResizeMode::bilinear);
       },
       "spatial axes"},
      {"nearest, antialias",
       [] {
         resize(normal({1, 4, 4, 2}, "a"), {2, 2}, ResizeMode::nearest, true);
       },
       "antialias"},
      {"dtype",
       [] {
         resize(integers({1, 4, 4, 1}, "a", 0, 3), {2, 2}, ResizeMode::bilinear);
       },
       "floating"},
  };
  return {c};
}

}  // namespace capo::test
