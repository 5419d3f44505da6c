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

}  // namespace capo::segment
