// What a labelled image data set is.
#pragma once

#include <capo/datasets/image.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace capo {

// Images with one class label each. Immutable after opening: all members may be called from several threads.
class ImageDataset {
 public:
  virtual ~ImageDataset() = default;

  virtual std::int64_t size() const = 0;
  // 0 <= i < size(), otherwise an Error. Images of one data set have one channel count; sizes may vary (folders).
  virtual Image image(std::int64_t i) const = 0;
  virtual std::int64_t label(std::int64_t i) const = 0;  // in [0, num_classes())

  const std::string& name() const { return name_; }
  const std::vector<std::string>& class_names() const { return class_names_; }
  int num_classes() const { return static_cast<int>(class_names_.size()); }

 protected:
  ImageDataset(std::string name, std::vector<std::string> class_names)
      : name_(std::move(name)), class_names_(std::move(class_names)) {}
  void check_index(std::int64_t i) const {
    CAPO_CHECK(i >= 0 && i < size(), name_, ": index must be in [0, ", size(), "), got ", i);
  }

 private:
  std::string name_;
  std::vector<std::string> class_names_;
};

using DatasetPtr = std::shared_ptr<const ImageDataset>;

// One name per line; blank lines at the end are ignored. Exactly `count` names when count > 0.
std::vector<std::string> read_class_names(const std::string& path, int count = 0);

}  // namespace capo
