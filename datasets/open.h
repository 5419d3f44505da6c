// Opens a data set by name.
#pragma once

#include <capo/datasets/dataset.h>

namespace capo {

// $CAPO_DATA, or ~/.cache/capo where it is not set.
std::string data_root();

// name: cifar10, cifar100, cifar100-coarse, tinyimagenet32, flowers64 (each in <root>/<name>; cifar100-coarse in
// cifar100), fashion-mnist, mnist (in <root>/<name>, fashion-mnist also where Debian's dataset-fashion-mnist puts it;
// as 32 x 32 RGB), or the path of an image folder (has a '/', or exists): <path>/<split>, or <path> itself when split
// is empty. split: "train" or "test" (tinyimagenet32 also "val"). root: empty means data_root().
// Where a file is missing, the Error names it and tells how to get the data.
DatasetPtr open_dataset(const std::string& name, const std::string& root, const std::string& split);

}  // namespace capo
