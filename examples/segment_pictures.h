// Contours of predicted and true classes on the image: the slice of a flat case, three orthogonal slices of a volume.
#pragma once

#include <capo/datasets/plot.h>
#include <capo/datasets/segmentation.h>

#include <algorithm>
#include <string>
#include <vector>

namespace capo::examples {

inline Color class_color(int k) {
  constexpr Color kColors[] = {{255, 140, 0}, {0, 190, 255}, {255, 70, 180}, {150, 220, 0}};
  return kColors[(k - 1) % 4];
}

// Height and width of the slice across an axis.
inline std::pair<std::int64_t, std::int64_t> slice_size(const Extent& e, int axis) {
  return axis == 0 ? std::pair{e.y, e.x} : axis == 1 ? std::pair{e.z, e.x} : std::pair{e.z, e.y};
}
template <class T>
T slice_voxel(const VolumeOf<T>& v, int axis, std::int64_t at, std::int64_t row, std::int64_t column) {
  return axis == 0 ? v.at(at, row, column) : axis == 1 ? v.at(row, at, column) : v.at(row, column, at);
}

// One slice, each voxel `scale` pixels wide, in grey from the volume's smallest to its greatest value; the truth's
// contours in white, the prediction's in its class's colour over them. Contours run inside the class they belong to.
inline Image contour_picture(const Volume& image, const LabelVolume& truth, const LabelVolume& predicted, int axis,
                             std::int64_t at, int scale) {
  const auto [h, w] = slice_size(image.extent, axis);
  const auto [low, high] = std::minmax_element(image.voxels.begin(), image.voxels.end());
  const float grey = *high > *low ? 255 / (*high - *low) : 0;
  Canvas canvas(static_cast<int>(h) * scale, static_cast<int>(w) * scale);
  for (int y = 0; y < canvas.height(); ++y) {
    for (int x = 0; x < canvas.width(); ++x) {
      const auto g = static_cast<std::uint8_t>((slice_voxel(image, axis, at, y / scale, x / scale) - *low) * grey);
      canvas.blend(y, x, {g, g, g}, 1);
    }
  }
  for (const LabelVolume* map : {&truth, &predicted}) {
    const auto label = [&](int y, int x) { return slice_voxel(*map, axis, at, y / scale, x / scale); };
    for (int y = 0; y < canvas.height(); ++y) {
      for (int x = 0; x < canvas.width(); ++x) {
        const int k = label(y, x);
        const bool edge = (y > 0 && label(y - 1, x) != k) || (y + 1 < canvas.height() && label(y + 1, x) != k) ||
                          (x > 0 && label(y, x - 1) != k) || (x + 1 < canvas.width() && label(y, x + 1) != k);
        if (k > 0 && edge)
          canvas.blend(y, x, map == &truth ? Color{255, 255, 255} : class_color(k), map == &truth ? 0.9f : 1);
      }
    }
  }
  return canvas.image();
}

// The slice of each axis that holds most labelled voxels.
inline std::int64_t fullest_slice(const LabelVolume& truth, int axis) {
  const Extent& e = truth.extent;
  std::vector<std::int64_t> count(static_cast<std::size_t>(axis == 0 ? e.z : axis == 1 ? e.y : e.x));
  for (std::int64_t z = 0; z < e.z; ++z)
    for (std::int64_t y = 0; y < e.y; ++y)
      for (std::int64_t x = 0; x < e.x; ++x)
        count[static_cast<std::size_t>(axis == 0 ? z : axis == 1 ? y : x)] += truth.at(z, y, x) > 0;
  return std::max_element(count.begin(), count.end()) - count.begin();
}

// What is shown of a case: the pictures, and a caption below the first.
inline void add_pictures(std::vector<Image>& pictures, std::vector<Caption>& captions, const SegmentationCase& c,
                         const LabelVolume& predicted, const std::string& caption) {
  const bool flat = c.label.extent.z == 1;
  const int scale = flat ? 1 : 6;
  const char* names[] = {"across z", "across y", "across x"};
  for (int axis = 0; axis < (flat ? 1 : 3); ++axis) {
    pictures.push_back(contour_picture(c.channels[0], c.label, predicted, axis, fullest_slice(c.label, axis), scale));
    captions.push_back({axis == 0 ? cat(c.name, flat ? "" : ", across z", "\n", caption) : names[axis]});
  }
}

}  // namespace capo::examples
