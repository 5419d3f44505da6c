#include <capo/datasets/cifar.h>
#include <capo/datasets/folder.h>
#include <capo/datasets/idx.h>
#include <capo/datasets/open.h>

#include <cstdlib>
#include <filesystem>

namespace capo {
namespace {

bool exists(const std::string& path) {
  std::error_code code;
  return std::filesystem::exists(path, code);
}

// The file each split cannot do without; what is missing beyond it is told by the reader itself.
void check_present(const std::string& file, const std::string& name, const std::string& how) {
  CAPO_CHECK(exists(file), file,
             ": not found; data sets lie in the folder CAPO_DATA names, or else in ~/.cache/capo; get ", name, " with ",
             how);
}

}  // namespace

std::string data_root() {
  if (const char* root = std::getenv("CAPO_DATA"); root && *root) return root;
  const char* home = std::getenv("HOME");
  return std::string(home ? home : ".") + "/.cache/capo";
}

DatasetPtr open_dataset(const std::string& name, const std::string& root_or_empty, const std::string& split) {
  const std::string root = root_or_empty.empty() ? data_root() : root_or_empty;
  const auto get = "scripts/get-data " + name;
  if (name == "cifar10") {
    const std::string folder = root + "/cifar10";
    check_present(folder + (split == "test" ? "/test_batch.bin" : "/data_batch_1.bin"), name, get);
    return open_cifar10(folder, split);
  }
  if (name == "cifar100" || name == "cifar100-coarse") {
    const std::string folder = root + "/cifar100";
    check_present(folder + (split == "test" ? "/test.bin" : "/train.bin"), name, "scripts/get-data cifar100");
    return open_cifar100(folder, split, name == "cifar100-coarse");
  }
  if (name == "tinyimagenet32") {
    const std::string folder = root + "/tinyimagenet32";
    check_present(folder + (split == "train" ? "/train.bin" : "/val.bin"), name, get + " --from FOLDER");
    return open_tinyimagenet32(folder, split);
  }
  if (name == "flowers64") {
    const std::string folder = root + "/flowers64";
    check_present(folder + (split == "test" ? "/test.bin" : "/train.bin"), name, get + " --from FOLDER");
    return open_flowers64(folder, split);
  }
  if (name == "fashion-mnist" || name == "mnist") {
    std::string folder = root + "/" + name;
    const std::string file = split == "test" ? "/t10k-images-idx3-ubyte" : "/train-images-idx3-ubyte";
    const auto holds = [&](const std::string& f) { return exists(f + file) || exists(f + file + ".gz"); };
    const std::string debian = "/usr/share/datasets/fashion-mnist";
    if (name == "fashion-mnist" && !holds(folder) && holds(debian)) folder = debian;
    if (!holds(folder)) {
      check_present(folder + file, name,
                    name == "mnist" ? "its four IDX files there" : get + " or Debian's package dataset-fashion-mnist");
    }
    return name == "mnist" ? open_mnist(folder, split) : open_fashion_mnist(folder, split);
  }
  CAPO_CHECK(name.find('/') != name.npos || exists(name), name,
             ": unknown data set; known are cifar10, cifar100, cifar100-coarse, tinyimagenet32, flowers64, "
             "fashion-mnist, mnist "
             "and paths of image folders");
  return open_image_folder(split.empty() ? name : name + "/" + split);
}

}  // namespace capo
