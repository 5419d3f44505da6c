// Binary records of label bytes and colour planes: CIFAR-10, CIFAR-100 and sets stored the same way.
#pragma once

#include <capo/datasets/dataset.h>

namespace capo {

// A record: label_bytes bytes, of which number label_at is the class, then side x side bytes of red, green, blue.
struct PlanesLayout {
  int side = 32, label_bytes = 1, label_at = 0;
  std::int64_t records = 0;  // the full set's; fewer are accepted with a logged warning, more are not. 0: any number
};

// Reads the files whole. Each must be a non-zero multiple of the record's length; labels must be < class_names.size().
// Error texts start with the file's path.
DatasetPtr open_planes(const std::vector<std::string>& files, const PlanesLayout& layout, std::string name,
                       std::vector<std::string> class_names);

// `folder` holds the unpacked files; split is "train" or "test".
DatasetPtr open_cifar10(const std::string& folder, const std::string& split);   // data_batch_{1..5}.bin, test_batch.bin
DatasetPtr open_cifar100(const std::string& folder, const std::string& split, bool coarse = false);
DatasetPtr open_tinyimagenet32(const std::string& folder, const std::string& split);  // test = its validation set
DatasetPtr open_flowers64(const std::string& folder, const std::string& split);

}  // namespace capo
