// How far predicted labels agree with the truth, class by class: Dice, IoU, pixel error. Label maps are integer tensors
// of one shape, of any rank and integer dtype, on any device (copied to the host).
#pragma once

#include <capo/engine/tensor.h>

#include <cstdint>
#include <vector>

namespace capo::segment {

struct Overlap {
  std::int64_t both = 0, predicted = 0, truth = 0;  // pixels

  // 2 both / (predicted + truth), and both / (predicted + truth - both). A class that neither map holds has no
  // value: NaN (nnU-Net's choice; 1 would reward it). One that only one of them holds has 0.
  double dice() const;
  double iou() const;
};
// One for each class. Throws on labels outside [0, classes).
std::vector<Overlap> overlap(const Tensor& prediction, const Tensor& truth, int classes);
// Sums of the counts: the Dice of a whole set of images is that of its sums.
Overlap operator+(const Overlap& a, const Overlap& b);

// The mean of the values that are not NaN; NaN when none is.
double mean_of_defined(const std::vector<double>& values);
// Share of the pixels whose labels differ; NaN for an empty map. On binary maps the pixel error of ISBI 2012.
double pixel_error(const Tensor& prediction, const Tensor& truth);

}  // namespace capo::segment
