#include <capo/datasets/loader.h>
#include <capo/datasets/prefetch_internal.h>
#include <capo/datasets/sample_rng.h>
#include <capo/engine/profile.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>

namespace capo {

using Order = std::shared_ptr<const std::vector<std::int64_t>>;

// Batches are numbered by ticket = epoch * batches_per_epoch + batch.
struct Loader::Impl final : Maker<HostBatch> {
  DatasetPtr set;
  Preprocess pre;
  LoaderOptions opt;
  std::int64_t per_epoch = 0;
  std::mutex mutex;  // of orders
  std::map<std::int64_t, Order> orders;  // of the epochs in work
  std::optional<Prefetch<HostBatch>> results;  // last: its threads end before the rest goes

  // Which samples, in which order. A shuffle costs about 10 ns a sample.
  Order order_of(std::int64_t epoch) {
    std::lock_guard lock(mutex);
    Order& order = orders[epoch];
    if (!order) {
      if (opt.shuffle) {
        order = std::make_shared<const std::vector<std::int64_t>>(shuffled_order(set->size(), opt.seed, epoch));
      } else {
        std::vector<std::int64_t> plain(static_cast<std::size_t>(set->size()));
        std::iota(plain.begin(), plain.end(), std::int64_t{0});
        order = std::make_shared<const std::vector<std::int64_t>>(std::move(plain));
      }
    }
    while (orders.size() > 2 && orders.begin()->first < epoch - 1) orders.erase(orders.begin());
    return orders[epoch];
  }

  // `b` brings memory only.
  HostBatch make(HostBatch b, std::int64_t ticket, const StillWanted& wanted) override {
    const ProfileScope scope("prepare a batch");
    const Order whole = order_of(ticket / per_epoch);
    const std::vector<std::int64_t>& order = *whole;
    b.epoch = ticket / per_epoch;
    b.batch = ticket % per_epoch;
    const std::int64_t first = b.batch * opt.batch_size, last = std::min(first + opt.batch_size, set->size());
    b.n = last - first;
    b.h = b.w = pre.size;
    b.index.assign(order.begin() + first, order.begin() + last);
    b.label.resize(static_cast<std::size_t>(b.n));
    b.soft.clear();
    std::size_t sample = 0;
    for (std::int64_t i = 0; i < b.n; ++i) {
      if (i > 0 && !wanted()) return {};
      const std::int64_t index = b.index[static_cast<std::size_t>(i)];
      const Image stored = set->image(index);
      const Image image =
          opt.augment ? augment_image(stored, pre, *opt.augment, opt.seed, b.epoch, index) : eval_image(stored, pre);
      if (i == 0) {
        b.c = image.channels;
        sample = static_cast<std::size_t>(b.h) * b.w * b.c;
        b.x.resize(static_cast<std::size_t>(b.n) * sample);
      }
      CAPO_CHECK(image.channels == b.c, set->name(), ": images of a batch must have one channel count, got ",
                 image.channels, " after ", b.c);
      float* x = b.x.data() + static_cast<std::size_t>(i) * sample;
      normalize_into(x, image, pre);
      if (opt.augment && opt.augment->erase > 0) erase_in(x, pre.size, b.c, *opt.augment, opt.seed, b.epoch, index);
      const std::int64_t label = set->label(index);
      CAPO_CHECK(label >= 0 && label < set->num_classes(), set->name(), ": label must be in [0, ", set->num_classes(),
                 "), got ", label, " for sample ", index);
      b.label[static_cast<std::size_t>(i)] = label;
    }
    if (opt.mixing.any()) {
      const MixDraw d = draw_mix(opt.mixing, b.n, b.h, b.w, opt.seed, b.epoch, b.batch);
      b.soft = apply_mix(d, opt.mixing, b.x, b.h, b.w, b.c, b.label, set->num_classes());
    }
    return b;
  }
};

Loader::Loader(DatasetPtr set, const Preprocess& preprocess, const LoaderOptions& options)
    : impl_(std::make_unique<Impl>()) {
  CAPO_CHECK(set && set->size() > 0 && set->num_classes() > 0, set ? set->name() : "Loader", ": nothing to load");
  CAPO_CHECK(options.batch_size > 0, "Loader: batch_size must be positive, got ", options.batch_size);
  CAPO_CHECK(options.workers >= 0 && options.workers <= 1024, "Loader: workers must be in [0, 1024], got ",
             options.workers);
  CAPO_CHECK(options.prefetch >= 1 && options.prefetch <= 4096, "Loader: prefetch must be in [1, 4096], got ",
             options.prefetch);
  CAPO_CHECK(preprocess.size >= 1 && preprocess.size <= 4096, "Loader: preprocess size must be in [1, 4096], got ",
             preprocess.size);
  if (options.augment) check_augment(*options.augment);
  draw_mix(options.mixing, 0, 1, 1, 0, 0, 0);  // checks the settings
  Impl& m = *impl_;
  const std::int64_t full = set->size() / options.batch_size;
  m.per_epoch = options.drop_last ? full : full + (set->size() % options.batch_size != 0);
  CAPO_CHECK(m.per_epoch > 0, set->name(), ": not even one batch of ", options.batch_size, " with drop_last, got ",
             set->size(), " samples");
  m.set = std::move(set);
  m.pre = preprocess;
  m.opt = options;
  m.results.emplace(m, options.workers, options.prefetch);
}

Loader::~Loader() = default;

std::int64_t Loader::batches_per_epoch() const { return impl_->per_epoch; }
int Loader::num_classes() const { return impl_->set->num_classes(); }
const ImageDataset& Loader::dataset() const { return *impl_->set; }

HostBatch Loader::next() { return impl_->results->next(); }

void Loader::seek(std::int64_t epoch, std::int64_t batch) {
  Impl& m = *impl_;
  CAPO_CHECK(epoch >= 0 && epoch < (std::int64_t{1} << 40) && batch >= 0 && batch < m.per_epoch,
             "Loader: seek needs epoch in [0, 2^40) and batch in [0, ", m.per_epoch, "), got ", epoch, " and ", batch);
  m.results->seek(epoch * m.per_epoch + batch);
}

void Loader::recycle(HostBatch&& batch) { impl_->results->recycle(std::move(batch)); }

}  // namespace capo
