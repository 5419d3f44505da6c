#include <capo/datasets/sample_rng.h>
#include <capo/datasets/subset.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace capo {
namespace {

class SubsetDataset : public ImageDataset {
 public:
  SubsetDataset(DatasetPtr set, std::vector<std::int64_t> indices, const std::string& name)
      : ImageDataset(name, set->class_names()), set_(std::move(set)), indices_(std::move(indices)) {}

  std::int64_t size() const override { return static_cast<std::int64_t>(indices_.size()); }
  Image image(std::int64_t i) const override { return set_->image(at(i)); }
  std::int64_t label(std::int64_t i) const override { return set_->label(at(i)); }

 private:
  std::int64_t at(std::int64_t i) const {
    check_index(i);
    return indices_[static_cast<std::size_t>(i)];
  }

  DatasetPtr set_;
  std::vector<std::int64_t> indices_;
};

// Per class, its samples in an order drawn by (seed, class).
std::vector<std::vector<std::int64_t>> shuffled_classes(const ImageDataset& set, std::uint64_t seed) {
  std::vector<std::vector<std::int64_t>> classes(static_cast<std::size_t>(set.num_classes()));
  for (std::int64_t i = 0; i < set.size(); ++i) classes[static_cast<std::size_t>(set.label(i))].push_back(i);
  for (std::size_t c = 0; c < classes.size(); ++c) SampleRng(seed, kStreamSubset, c, 0).shuffle(classes[c]);
  return classes;
}

DatasetPtr take_first(DatasetPtr set, const std::vector<std::int64_t>& counts, std::uint64_t seed,
                      const std::string& name) {
  const auto classes = shuffled_classes(*set, seed);
  std::vector<std::int64_t> indices;
  for (std::size_t c = 0; c < classes.size(); ++c) {
    const auto have = static_cast<std::int64_t>(classes[c].size());
    CAPO_CHECK(counts[c] <= have, name, ": class \"", set->class_names()[c], "\" has only ", have,
               " samples, got a wish for ", counts[c]);
    indices.insert(indices.end(), classes[c].begin(), classes[c].begin() + counts[c]);
  }
  std::sort(indices.begin(), indices.end());
  return subset(std::move(set), std::move(indices), name);
}

}  // namespace

DatasetPtr subset(DatasetPtr set, std::vector<std::int64_t> indices, const std::string& name) {
  CAPO_CHECK(set, name, ": subset of no data set");
  for (const auto i : indices) {
    CAPO_CHECK(i >= 0 && i < set->size(), name, ": subset indices must be in [0, ", set->size(), "), got ", i);
  }
  return std::make_shared<SubsetDataset>(std::move(set), std::move(indices), name);
}

DatasetPtr few_shot(DatasetPtr set, std::int64_t per_class, std::uint64_t seed) {
  CAPO_CHECK(set && per_class > 0, "few_shot: needs a data set and per_class > 0, got ", per_class);
  const std::vector<std::int64_t> counts(static_cast<std::size_t>(set->num_classes()), per_class);
  const std::string name = cat(set->name(), " ", per_class, "-shot");
  return take_first(std::move(set), counts, seed, name);
}

DatasetPtr balanced_subset(DatasetPtr set, std::int64_t total, std::uint64_t seed) {
  CAPO_CHECK(set && total > 0 && total <= set->size(), "balanced_subset: total must be in [1, size of the set], got ",
             total);
  const auto classes = static_cast<std::size_t>(set->num_classes());
  std::vector<std::int64_t> left(classes), counts(classes);
  for (std::int64_t i = 0; i < set->size(); ++i) ++left[static_cast<std::size_t>(set->label(i))];
  std::vector<std::size_t> order(classes);
  std::iota(order.begin(), order.end(), std::size_t{0});
  SampleRng(seed, kStreamSubset, ~std::uint64_t{0}, 1).shuffle(order);
  for (std::int64_t wanted = total; wanted > 0;) {  // again while small classes leave some to the others
    const auto open =
        static_cast<std::int64_t>(std::count_if(left.begin(), left.end(), [](std::int64_t n) { return n > 0; }));
    const std::int64_t share = std::max<std::int64_t>(wanted / open, 1);
    for (const std::size_t c : order) {
      const std::int64_t take = std::min({share, left[c], wanted});
      counts[c] += take;
      left[c] -= take;
      wanted -= take;
    }
  }
  const std::string name = cat(set->name(), " ", total, " of ", set->size());
  return take_first(std::move(set), counts, seed, name);
}

std::pair<DatasetPtr, DatasetPtr> split_dataset(DatasetPtr set, double validation_fraction, std::uint64_t seed) {
  CAPO_CHECK(set && validation_fraction > 0 && validation_fraction < 1,
             "split_dataset: validation_fraction must be in (0, 1), got ", validation_fraction);
  std::vector<std::int64_t> train, validation;
  for (const auto& members : shuffled_classes(*set, seed)) {
    const auto n = static_cast<std::ptrdiff_t>(std::lround(validation_fraction * static_cast<double>(members.size())));
    validation.insert(validation.end(), members.begin(), members.begin() + n);
    train.insert(train.end(), members.begin() + n, members.end());
  }
  std::sort(train.begin(), train.end());
  std::sort(validation.begin(), validation.end());
  return {subset(set, std::move(train), set->name() + " (training part)"),
          subset(set, std::move(validation), set->name() + " (validation part)")};
}

}  // namespace capo
