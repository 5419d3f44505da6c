// Label maps on the host: what the metrics work on.
#pragma once

#include <capo/engine/tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace capo::segment {

// The labels of an integer or bool tensor, row-major. Throws on a floating one; op names the caller.
std::vector<std::int64_t> labels_of(const char* op, const Tensor& map);
// Of two maps of equal shape.
std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>> label_pair(const char* op, const Tensor& prediction,
                                                                           const Tensor& truth);

// Pixels of a plane or a volume by their row-major number.
class Grid {
 public:
  // [H, W] or [D, H, W]; throws on others.
  Grid(const char* op, const Shape& shape) {
    CAPO_CHECK(shape.size() == 2 || shape.size() == 3, op, ": needs [H, W] or [D, H, W], got ", shape);
    for (int a = 0; a < 3; ++a) size_[a] = a < 3 - shape.size() ? 1 : shape[a - 3 + shape.size()];
  }
  std::int64_t size(int axis) const { return size_[axis]; }  // of three axes; a plane's first is 1
  std::int64_t step(int axis) const { return axis == 2 ? 1 : axis == 1 ? size_[2] : size_[1] * size_[2]; }
  std::int64_t place(int axis, std::int64_t at) const { return at / step(axis) % size_[axis]; }

  // The pixels that share a side with `at`.
  template <class F>
  void for_each_neighbour(std::int64_t at, F&& f) const {
    for (int a = 0; a < 3; ++a) {
      const std::int64_t i = place(a, at);
      if (i > 0) f(at - step(a));
      if (i + 1 < size_[a]) f(at + step(a));
    }
  }
  // On the border of a plane or volume; the first axis of a plane has none.
  bool at_border(std::int64_t at, int axes) const {
    for (int a = 3 - axes; a < 3; ++a)
      if (place(a, at) == 0 || place(a, at) + 1 == size_[a]) return true;
    return false;
  }

 private:
  std::int64_t size_[3];
};

}  // namespace capo::segment
