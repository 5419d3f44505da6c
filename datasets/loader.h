// Batches in host memory, prepared ahead by worker threads.
#pragma once

#include <capo/datasets/augment.h>
#include <capo/datasets/dataset.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace capo {

struct HostBatch {
  std::int64_t n = 0;
  int h = 0, w = 0, c = 0;
  std::vector<float> x;             // [n, h, w, c], normalised
  std::vector<std::int64_t> label;  // [n]; of the sample itself, also when it was mixed
  std::vector<float> soft;          // [n, classes]; empty when the loader does not mix
  std::vector<std::int64_t> index;  // [n]; positions in the data set
  std::int64_t epoch = 0, batch = 0;
};

struct LoaderOptions {
  std::int64_t batch_size = 128;
  bool shuffle = false;   // order from (seed, epoch)
  bool drop_last = false; // leave out an incomplete last batch
  std::uint64_t seed = 0;
  std::optional<Augment> augment = {};  // none: evaluation transform
  Mixing mixing = {};
  int workers = 2;   // threads; 0 prepares each batch inside next()
  int prefetch = 4;  // batches ready or in work at most, at least 1
};

// Batches leave in order: (0, 0), (0, 1), ..., the last of epoch 0, (1, 0), ... without end. Their bits depend on the
// data set, the options and (epoch, batch) alone, never on `workers` or `prefetch`. Resuming is seek(epoch, batch).
// next, seek and recycle are for one thread at a time.
class Loader {
 public:
  // Throws when there is nothing to load or an option is out of range.
  Loader(DatasetPtr set, const Preprocess& preprocess, const LoaderOptions& options);
  // Stops at any moment; waits only for the samples in work.
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  std::int64_t batches_per_epoch() const;
  int num_classes() const;
  const ImageDataset& dataset() const;

  // The next batch. An exception met while preparing it is rethrown here, at its place in the order, and again at each
  // further call until seek().
  HostBatch next();
  // next() goes on with this batch; 0 <= epoch, 0 <= batch < batches_per_epoch().
  void seek(std::int64_t epoch, std::int64_t batch);
  // Gives a batch's memory back for reuse: spares page faults on large batches. Optional.
  void recycle(HostBatch&& batch);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace capo
