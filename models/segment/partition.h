// How far two partitions of an image agree: the foreground-restricted Rand and information scores of ISBI 2012 and
// SNEMI3D.
//
// Source: Arganda-Carreras et al. 2015, "Crowdsourcing the creation of image segmentation algorithms for connectomics",
// and the public evaluation, Fiji's Trainable_Segmentation (metrics/RandError.java, VariationOfInformation.java), whose
// rules for pixels without a segment are taken over.
//
// p_ij is the share of the pixels with truth i and prediction j among the n pixels that have a truth; pixels whose
// truth is 0 (membranes) do not count. A pixel with a truth whose prediction is 0 is a segment of its own: it adds 1 /
// n^2 to sum_ij p_ij^2 and to sum_j t_j^2, and log(n) / n to the entropies. With s_i = sum_j p_ij and t_j = sum_i p_ij:
//
//   V_Rand = sum_ij p_ij^2 / (1/2 sum_i s_i^2 + 1/2 sum_j t_j^2)
//   V_Info = I(S; T) / (1/2 H(S) + 1/2 H(T))
//
// Both are F-scores of a split and a merge score, 1 for equal partitions (V_Info also when both are one segment), and
// NaN when no pixel has a truth.
#pragma once

#include <capo/engine/tensor.h>

namespace capo::segment {

struct PartitionScores {
  double rand = 0, info = 0;
  double rand_split = 0, rand_merge = 0;  // sum p_ij^2 over sum s_i^2 (low: splits), over sum t_j^2 (low: merges)
};
// Two label maps of one shape, of any rank and integer dtype, on any device; 0: no segment.
PartitionScores partition_scores(const Tensor& prediction, const Tensor& truth);

// The scores of one slice of the membrane challenge: masks [H, W], bool or integer, of what is inside a cell. The
// truth's segments are its components(), the prediction's its grown_components(), whose membranes are so thin that
// their thickness costs nothing ("after thinning"). The challenge takes the best of the probability's thresholds 0,
// 0.1, .. 0.9, and the mean over slices.
PartitionScores membrane_scores(const Tensor& prediction, const Tensor& truth);

}  // namespace capo::segment
