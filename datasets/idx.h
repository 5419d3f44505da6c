// IDX files (MNIST and its relatives), plain or gzip-compressed.
#pragma once

#include <capo/datasets/dataset.h>
#include <capo/datasets/gzip.h>
#include <capo/engine/shape.h>

#include <string_view>

namespace capo {

struct IdxArray {
  Shape shape;
  std::string bytes;  // row major, one byte an element
};

// Element type u8 and rank 1 to 4 only; the size must match the header exactly. `name` starts the text of errors.
IdxArray parse_idx(std::string_view bytes, const std::string& name);
// Reads a plain or .gz file (told by its content), at most 1 GiB unpacked.
IdxArray read_idx(const std::string& path);

struct IdxOptions {
  bool pad32 = true;  // 28 x 28 images get a black border of 2 pixels
  bool rgb = true;    // three equal channels instead of one
};

// Images [n, h, w] and labels [n], each label < class_names.size().
DatasetPtr open_idx(const std::string& images, const std::string& labels, std::string name,
                    std::vector<std::string> class_names, const IdxOptions& options = {});
// {train,t10k}-{images-idx3,labels-idx1}-ubyte, each plain or .gz; split is "train" or "test".
DatasetPtr open_fashion_mnist(const std::string& folder, const std::string& split, const IdxOptions& options = {});
DatasetPtr open_mnist(const std::string& folder, const std::string& split, const IdxOptions& options = {});

}  // namespace capo
