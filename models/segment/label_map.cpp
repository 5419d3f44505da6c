#include <capo/models/segment/label_map_internal.h>

namespace capo::segment {

std::vector<std::int64_t> labels_of(const char* op, const Tensor& map) {
  CAPO_CHECK(!is_floating(map.dtype()), op, ": label maps must be of an integer dtype or bool, got ", map.dtype(), " ",
             map.shape());
  return to_vector<std::int64_t>(map);
}

std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>> label_pair(const char* op, const Tensor& prediction,
                                                                           const Tensor& truth) {
  CAPO_CHECK(prediction.shape() == truth.shape(), op, ": prediction and truth must have one shape, got ",
             prediction.shape(), " and ", truth.shape());
  return {labels_of(op, prediction), labels_of(op, truth)};
}

}  // namespace capo::segment
