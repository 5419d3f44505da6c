#include <capo/datasets/idx.h>
#include <capo/engine/files.h>

#include <algorithm>
#include <filesystem>

namespace capo {
namespace {

constexpr std::size_t kMaxBytes = std::size_t{1} << 30;

class IdxDataset : public ImageDataset {
 public:
  IdxDataset(std::string name, std::vector<std::string> class_names, IdxArray images, std::string labels,
             const IdxOptions& options)
      : ImageDataset(std::move(name), std::move(class_names)), images_(std::move(images)), labels_(std::move(labels)),
        options_(options) {}

  std::int64_t size() const override { return images_.shape[0]; }

  std::int64_t label(std::int64_t i) const override {
    check_index(i);
    return static_cast<unsigned char>(labels_[static_cast<std::size_t>(i)]);
  }

  Image image(std::int64_t i) const override {
    check_index(i);
    const int h = static_cast<int>(images_.shape[1]), w = static_cast<int>(images_.shape[2]);
    const int border = options_.pad32 && h == 28 && w == 28 ? 2 : 0, c = options_.rgb ? 3 : 1;
    const char* p = images_.bytes.data() + static_cast<std::size_t>(i) * h * w;
    Image out(h + 2 * border, w + 2 * border, c);
    for (int y = 0; y < h; ++y) {
      for (int x = 0; x < w; ++x) {
        std::fill_n(out.at(y + border, x + border), c, static_cast<std::uint8_t>(p[y * w + x]));
      }
    }
    return out;
  }

 private:
  IdxArray images_;
  std::string labels_;
  IdxOptions options_;
};

std::string plain_or_gz(const std::string& path) {
  return !std::filesystem::exists(path) && std::filesystem::exists(path + ".gz") ? path + ".gz" : path;
}

DatasetPtr open_mnist_like(const char* name, const std::string& folder, const std::string& split,
                           std::vector<std::string> class_names, const IdxOptions& options) {
  CAPO_CHECK(split == "train" || split == "test", name, ": split must be train or test, got ", split);
  const std::string prefix = folder + (split == "train" ? "/train" : "/t10k");
  return open_idx(plain_or_gz(prefix + "-images-idx3-ubyte"), plain_or_gz(prefix + "-labels-idx1-ubyte"),
                  cat(name, " ", split), std::move(class_names), options);
}

}  // namespace

IdxArray parse_idx(std::string_view bytes, const std::string& name) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
  CAPO_CHECK(bytes.size() >= 4, name, ": IDX file is truncated, the header needs 4 bytes, got ", bytes.size());
  CAPO_CHECK(byte(0) == 0 && byte(1) == 0, name, ": not an IDX file, the magic number must start with two zero bytes");
  CAPO_CHECK(byte(2) == 8, name, ": IDX element type must be u8 (8), got ", static_cast<int>(byte(2)));
  const int rank = byte(3);
  CAPO_CHECK(rank >= 1 && rank <= 4, name, ": IDX rank must be in [1, 4], got ", rank);
  const std::size_t header = 4 + 4 * static_cast<std::size_t>(rank);
  CAPO_CHECK(bytes.size() >= header, name, ": IDX file is truncated, the header needs ", header, " bytes, got ",
             bytes.size());
  IdxArray out;
  std::uint64_t need = 1;
  for (std::size_t at = 4; at < header; at += 4) {
    const std::uint64_t n = std::uint64_t{byte(at)} << 24 | std::uint64_t{byte(at + 1)} << 16 |
                            std::uint64_t{byte(at + 2)} << 8 | byte(at + 3);
    out.shape.push_back(static_cast<std::int64_t>(n));
    CAPO_CHECK(!__builtin_mul_overflow(need, n, &need), name, ": IDX shape overflows, got ", out.shape);
  }
  CAPO_CHECK(need == bytes.size() - header, name, ": IDX shape ", out.shape, " needs ", need,
             " bytes after the header, got ", bytes.size() - header);
  out.bytes = bytes.substr(header);
  return out;
}

IdxArray read_idx(const std::string& path) {
  const std::string bytes = read_file(path, kMaxBytes);
  return parse_idx(is_gzip(bytes) ? gunzip(bytes, kMaxBytes, path) : bytes, path);
}

DatasetPtr open_idx(const std::string& images, const std::string& labels, std::string name,
                    std::vector<std::string> class_names, const IdxOptions& options) {
  IdxArray x = read_idx(images);
  CAPO_CHECK(x.shape.size() == 3 && x.shape[0] > 0 && x.shape[1] > 0 && x.shape[2] > 0 && x.shape[1] <= 4096 &&
                 x.shape[2] <= 4096,
             images, ": images must be [n, h, w] with sides in [1, 4096], got ", x.shape);
  IdxArray y = read_idx(labels);
  CAPO_CHECK(y.shape.size() == 1 && y.shape[0] == x.shape[0], labels, ": labels must be [", x.shape[0],
             "] to match the images, got ", y.shape);
  for (std::size_t i = 0; i < y.bytes.size(); ++i) {
    const auto label = static_cast<unsigned char>(y.bytes[i]);
    CAPO_CHECK(label < class_names.size(), labels, ": label must be less than ", class_names.size(), ", got ",
               static_cast<int>(label), " at ", i);
  }
  return std::make_shared<IdxDataset>(std::move(name), std::move(class_names), std::move(x), std::move(y.bytes),
                                      options);
}

DatasetPtr open_fashion_mnist(const std::string& folder, const std::string& split, const IdxOptions& options) {
  return open_mnist_like(
      "fashion-mnist", folder, split,
      {"T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"},
      options);
}

DatasetPtr open_mnist(const std::string& folder, const std::string& split, const IdxOptions& options) {
  return open_mnist_like("mnist", folder, split, {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"}, options);
}

}  // namespace capo
