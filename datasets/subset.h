// Parts of a data set: chosen indices, few-shot samples, training and validation parts.
#pragma once

#include <capo/datasets/dataset.h>

#include <utility>

namespace capo {

// Sample k of the result is sample indices[k] of `set`, which is kept alive. Classes stay as they are.
DatasetPtr subset(DatasetPtr set, std::vector<std::int64_t> indices, const std::string& name);

// per_class samples of each class, drawn by seed, in the set's order. With one seed, smaller draws are contained in
// larger ones. Throws when a class has fewer.
DatasetPtr few_shot(DatasetPtr set, std::int64_t per_class, std::uint64_t seed);
// `total` samples spread over the classes as evenly as possible: a class with fewer gives all it has, and which classes
// give one more is drawn by seed.
DatasetPtr balanced_subset(DatasetPtr set, std::int64_t total, std::uint64_t seed);

// Training and validation parts, in the set's order: of each class round(fraction x count) samples, drawn by seed, go
// to validation. 0 < fraction < 1.
std::pair<DatasetPtr, DatasetPtr> split_dataset(DatasetPtr set, double validation_fraction, std::uint64_t seed);

}  // namespace capo
