#include <capo/datasets/batch_source.h>
#include <capo/models/train/named.h>
#include <capo/ops/copy.h>

namespace capo {

LoaderSource::LoaderSource(DatasetPtr set, const Preprocess& preprocess, const LoaderOptions& options, Device device,
                           DType dtype)
    : loader_(std::move(set), preprocess, options), device_(device), dtype_(dtype) {}

train::Batch LoaderSource::next() {
  HostBatch host = loader_.next();
  train::Batch b;
  b.x = train::to_device(cast(from_vector(host.x, {host.n, host.h, host.w, host.c}), dtype_), device_);
  b.labels = train::to_device(from_vector(host.label, {host.n}), device_);
  if (!host.soft.empty())
    b.soft =
        train::to_device(from_vector(host.soft, {host.n, static_cast<std::int64_t>(loader_.num_classes())}), device_);
  loader_.recycle(std::move(host));
  return b;
}

}  // namespace capo
