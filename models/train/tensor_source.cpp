#include <capo/autograd/autograd.h>
#include <capo/engine/rng.h>
#include <capo/models/train/tensor_source.h>
#include <capo/ops/copy.h>
#include <capo/ops/index.h>
#include <capo/ops/view.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace capo::train {

TensorSource::TensorSource(const Tensor& x, const Tensor& labels, std::int64_t batch_size, std::uint64_t shuffle_seed)
    : x_(x), labels_(labels), batch_size_(batch_size), seed_(shuffle_seed) {
  CAPO_CHECK(x.rank() >= 1 && labels.rank() == 1 && labels.dtype() == i64 && labels.size(0) == x.size(0) &&
                 x.size(0) > 0 && labels.device() == x.device(),
             "tensor_source: needs x [N, ...] and labels i64 [N] on one device, got ", describe(x), " and ",
             describe(labels));
  CAPO_CHECK(batch_size > 0, "tensor_source: batch_size must be positive, got ", batch_size);
  order_epoch();
}

std::int64_t TensorSource::batches_per_epoch() const { return (x_.size(0) + batch_size_ - 1) / batch_size_; }

void TensorSource::order_epoch() {
  std::vector<std::pair<std::uint64_t, std::int64_t>> keyed(static_cast<std::size_t>(x_.size(0)));
  for (std::size_t i = 0; i < keyed.size(); ++i) {
    const Philox4 r = philox(seed_, static_cast<std::uint64_t>(epoch_), i);
    keyed[i] = {seed_ == 0 ? i : (std::uint64_t{r.v[0]} << 32 | r.v[1]), static_cast<std::int64_t>(i)};
  }
  std::sort(keyed.begin(), keyed.end());
  std::vector<std::int64_t> order;
  for (const auto& k : keyed) order.push_back(k.second);
  order_ = to(from_vector(order, {x_.size(0)}), x_.device());
}

Batch TensorSource::next() {
  const NoGrad off;
  const std::int64_t begin = batch_ * batch_size_, end = std::min(begin + batch_size_, x_.size(0));
  const Tensor rows = slice(order_, 0, begin, end);
  Batch out{index_select(x_, 0, rows), index_select(labels_, 0, rows), {}};
  if (++batch_ == batches_per_epoch()) {
    batch_ = 0;
    ++epoch_;
    if (seed_ != 0) order_epoch();
  }
  return out;
}

void TensorSource::seek(std::int64_t epoch, std::int64_t batch) {
  CAPO_CHECK(epoch >= 0 && batch >= 0 && batch < batches_per_epoch(), "tensor_source: no batch ", batch, " of epoch ",
             epoch);
  epoch_ = epoch;
  batch_ = batch;
  order_epoch();
}

}  // namespace capo::train
