#include <capo/datasets/loader.h>
#include <capo/datasets/sample_rng.h>
#include <capo/engine/profile.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>

namespace capo {

using Order = std::shared_ptr<const std::vector<std::int64_t>>;

// Batches are numbered by ticket = epoch * batches_per_epoch + batch. Workers claim tickets in order, at most
// `prefetch` ahead of the one next() waits for, and lay finished batches into `done`.
struct Loader::Impl {
  DatasetPtr set;
  Preprocess pre;
  LoaderOptions opt;
  std::int64_t per_epoch = 0;

  std::mutex mutex;
  std::condition_variable work, ready;
  bool stop = false;
  std::uint64_t generation = 0;  // counts seeks: results of older generations are thrown away
  std::int64_t claimed = 0, wanted = 0;
  struct Result {
    HostBatch batch;
    std::exception_ptr error;
  };
  std::map<std::int64_t, Result> done;
  std::map<std::int64_t, Order> orders;  // of the epochs in work
  std::vector<HostBatch> spare;
  std::vector<std::thread> threads;

  // Which samples, in which order. Called with the mutex held; a shuffle costs about 10 ns a sample.
  Order order_of(std::int64_t epoch) {
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

  HostBatch take_spare() {
    if (spare.empty()) return {};
    HostBatch b = std::move(spare.back());
    spare.pop_back();
    return b;
  }

  // True: go on. Asked between samples so that a stop or seek need not wait for the rest of the batch.
  bool current(std::uint64_t of_generation) {
    std::lock_guard lock(mutex);
    return !stop && generation == of_generation;
  }

  // `b` brings memory only.
  HostBatch prepare(HostBatch b, std::int64_t ticket, const std::vector<std::int64_t>& order, std::uint64_t of_generation) {
    const ProfileScope scope("prepare a batch");
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
      if (i > 0 && !current(of_generation)) return {};
      const std::int64_t index = b.index[static_cast<std::size_t>(i)];
      const Image stored = set->image(index);
      const Image image = opt.augment ? augment_image(stored, pre, *opt.augment, opt.seed, b.epoch, index) : eval_image(stored, pre);
      if (i == 0) {
        b.c = image.channels;
        sample = static_cast<std::size_t>(b.h) * b.w * b.c;
        b.x.resize(static_cast<std::size_t>(b.n) * sample);
      }
      CAPO_CHECK(image.channels == b.c, set->name(), ": images of a batch must have one channel count, got ", image.channels,
                 " after ", b.c);
      float* x = b.x.data() + static_cast<std::size_t>(i) * sample;
      normalize_into(x, image, pre);
      if (opt.augment && opt.augment->erase > 0) erase_in(x, pre.size, b.c, *opt.augment, opt.seed, b.epoch, index);
      const std::int64_t label = set->label(index);
      CAPO_CHECK(label >= 0 && label < set->num_classes(), set->name(), ": label must be in [0, ", set->num_classes(), "), got ",
                 label, " for sample ", index);
      b.label[static_cast<std::size_t>(i)] = label;
    }
    if (opt.mixing.any()) {
      const MixDraw d = draw_mix(opt.mixing, b.n, b.h, b.w, opt.seed, b.epoch, b.batch);
      b.soft = apply_mix(d, opt.mixing, b.x, b.h, b.w, b.c, b.label, set->num_classes());
    }
    return b;
  }

  void run() {
    std::unique_lock lock(mutex);
    for (;;) {
      work.wait(lock, [&] { return stop || claimed < wanted + opt.prefetch; });
      if (stop) return;
      const std::int64_t ticket = claimed++;
      const std::uint64_t mine = generation;
      Result r;
      try {
        const Order order = order_of(ticket / per_epoch);
        HostBatch memory = take_spare();
        lock.unlock();
        r.batch = prepare(std::move(memory), ticket, *order, mine);
      } catch (...) {
        r.error = std::current_exception();
      }
      if (!lock.owns_lock()) lock.lock();
      if (stop) return;
      if (mine != generation) continue;
      done.emplace(ticket, std::move(r));
      if (ticket == wanted) ready.notify_one();
    }
  }

  void join() {
    {
      std::lock_guard lock(mutex);
      stop = true;
    }
    work.notify_all();
    for (auto& t : threads) t.join();
    threads.clear();
  }
};

Loader::Loader(DatasetPtr set, const Preprocess& preprocess, const LoaderOptions& options) : impl_(std::make_unique<Impl>()) {
  CAPO_CHECK(set && set->size() > 0 && set->num_classes() > 0, set ? set->name() : "Loader", ": nothing to load");
  CAPO_CHECK(options.batch_size > 0, "Loader: batch_size must be positive, got ", options.batch_size);
  CAPO_CHECK(options.workers >= 0 && options.workers <= 1024, "Loader: workers must be in [0, 1024], got ", options.workers);
  CAPO_CHECK(options.prefetch >= 1 && options.prefetch <= 4096, "Loader: prefetch must be in [1, 4096], got ", options.prefetch);
  CAPO_CHECK(preprocess.size >= 1 && preprocess.size <= 4096, "Loader: preprocess size must be in [1, 4096], got ", preprocess.size);
  if (options.augment) check_augment(*options.augment);
  draw_mix(options.mixing, 0, 1, 1, 0, 0, 0);  // checks the settings
  Impl& m = *impl_;
  const std::int64_t full = set->size() / options.batch_size;
  m.per_epoch = options.drop_last ? full : full + (set->size() % options.batch_size != 0);
  CAPO_CHECK(m.per_epoch > 0, set->name(), ": not even one batch of ", options.batch_size, " with drop_last, got ", set->size(),
             " samples");
  m.set = std::move(set);
  m.pre = preprocess;
  m.opt = options;
  try {
    for (int i = 0; i < options.workers; ++i) m.threads.emplace_back([&m] { m.run(); });
  } catch (...) {
    m.join();
    throw;
  }
}

Loader::~Loader() { impl_->join(); }

std::int64_t Loader::batches_per_epoch() const { return impl_->per_epoch; }
int Loader::num_classes() const { return impl_->set->num_classes(); }
const ImageDataset& Loader::dataset() const { return *impl_->set; }

HostBatch Loader::next() {
  Impl& m = *impl_;
  std::unique_lock lock(m.mutex);
  if (m.threads.empty()) {
    const Order order = m.order_of(m.wanted / m.per_epoch);
    HostBatch memory = m.take_spare();
    lock.unlock();
    HostBatch b = m.prepare(std::move(memory), m.wanted, *order, m.generation);
    ++m.wanted;
    return b;
  }
  m.ready.wait(lock, [&] { return m.done.count(m.wanted) > 0; });
  const auto it = m.done.find(m.wanted);
  if (it->second.error) std::rethrow_exception(it->second.error);
  HostBatch b = std::move(it->second.batch);
  m.done.erase(it);
  ++m.wanted;
  lock.unlock();
  m.work.notify_one();
  return b;
}

void Loader::seek(std::int64_t epoch, std::int64_t batch) {
  Impl& m = *impl_;
  CAPO_CHECK(epoch >= 0 && epoch < (std::int64_t{1} << 40) && batch >= 0 && batch < m.per_epoch, "Loader: seek needs epoch in [0, 2^40) and batch in [0, ", m.per_epoch,
             "), got ", epoch, " and ", batch);
  {
    std::lock_guard lock(m.mutex);
    ++m.generation;
    m.done.clear();
    m.orders.clear();
    m.wanted = m.claimed = epoch * m.per_epoch + batch;
  }
  m.work.notify_all();
}

void Loader::recycle(HostBatch&& batch) {
  Impl& m = *impl_;
  std::lock_guard lock(m.mutex);
  if (m.spare.size() < static_cast<std::size_t>(m.opt.prefetch)) m.spare.push_back(std::move(batch));
}

}  // namespace capo
