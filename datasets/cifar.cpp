#include <capo/datasets/cifar.h>
#include <capo/engine/files.h>

#include <filesystem>

namespace capo {
namespace {

constexpr std::size_t kMaxFileBytes = std::size_t{2} << 30;

class PlanesDataset : public ImageDataset {
 public:
  PlanesDataset(std::string name, std::vector<std::string> class_names, const PlanesLayout& layout)
      : ImageDataset(std::move(name), std::move(class_names)), layout_(layout),
        record_(static_cast<std::size_t>(layout.label_bytes) + 3u * layout.side * layout.side) {}

  void add_file(const std::string& path) {
    std::string bytes = read_file(path, kMaxFileBytes);
    CAPO_CHECK(!bytes.empty() && bytes.size() % record_ == 0, path, ": size must be a multiple of the record's ",
               record_, " bytes, got ", bytes.size());
    const std::size_t records = bytes.size() / record_;
    CAPO_CHECK(layout_.records == 0 || size_ + static_cast<std::int64_t>(records) <= layout_.records, path,
               ": too many records, ", name(), " has ", layout_.records, ", got ",
               size_ + static_cast<std::int64_t>(records));
    for (std::size_t i = 0; i < records; ++i) {
      const int label = static_cast<unsigned char>(bytes[i * record_ + layout_.label_at]);
      CAPO_CHECK(label < num_classes(), path, ": label must be less than ", num_classes(), ", got ", label,
                 " in record ", i);
    }
    size_ += static_cast<std::int64_t>(records);
    files_.push_back({size_, std::move(bytes)});
  }

  std::int64_t size() const override { return size_; }

  std::int64_t label(std::int64_t i) const override { return record(i)[layout_.label_at]; }

  Image image(std::int64_t i) const override {
    const int plane = layout_.side * layout_.side;
    const std::uint8_t* p = record(i) + layout_.label_bytes;
    Image out(layout_.side, layout_.side, 3);
    for (int k = 0; k < plane; ++k) {
      for (int c = 0; c < 3; ++c) out.pixels[3 * k + c] = p[c * plane + k];
    }
    return out;
  }

 private:
  struct File {
    std::int64_t end;  // records up to and including this file
    std::string bytes;
  };

  const std::uint8_t* record(std::int64_t i) const {
    check_index(i);
    std::int64_t begin = 0;
    for (const auto& f : files_) {
      if (i < f.end)
        return reinterpret_cast<const std::uint8_t*>(f.bytes.data()) + static_cast<std::size_t>(i - begin) * record_;
      begin = f.end;
    }
    return nullptr;  // not reached: check_index
  }

  PlanesLayout layout_;
  std::size_t record_;
  std::int64_t size_ = 0;
  std::vector<File> files_;
};

// "train" or "test" -> the file; anything else throws.
std::string pick(const char* name, const std::string& split, const char* train, const char* test) {
  CAPO_CHECK(split == "train" || split == "test", name, ": split must be train or test, got ", split);
  return split == "train" ? train : test;
}

}  // namespace

std::vector<std::string> read_class_names(const std::string& path, int count) {
  const std::string text = read_file(path, std::size_t{1} << 20);
  std::vector<std::string> names;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    std::string line = text.substr(at, end - at);
    if (!line.empty() && line.back() == '\r') line.pop_back();
    names.push_back(std::move(line));
    at = end + 1;
  }
  while (!names.empty() && names.back().empty()) names.pop_back();
  for (const auto& n : names) CAPO_CHECK(!n.empty(), path, ": class names must not be blank lines");
  CAPO_CHECK(!names.empty() && (count == 0 || names.size() == static_cast<std::size_t>(count)), path, ": needs ",
             count, " class names, got ", names.size());
  return names;
}

DatasetPtr open_planes(const std::vector<std::string>& files, const PlanesLayout& layout, std::string name,
                       std::vector<std::string> class_names) {
  CAPO_CHECK(!files.empty() && layout.side > 0 && layout.side <= 4096 && layout.label_at >= 0 &&
                 layout.label_at < layout.label_bytes && !class_names.empty(),
             name, ": needs files, a side in [1, 4096], a label within the record and class names");
  auto set = std::make_shared<PlanesDataset>(std::move(name), std::move(class_names), layout);
  for (const auto& f : files) set->add_file(f);
  if (layout.records > 0 && set->size() < layout.records) {
    log(LogLevel::warning, cat(set->name(), ": only ", set->size(), " of ", layout.records, " records are there"));
  }
  return set;
}

DatasetPtr open_cifar10(const std::string& folder, const std::string& split) {
  auto names = read_class_names(folder + "/batches.meta.txt", 10);
  std::vector<std::string> files;
  if (pick("cifar10", split, "train", "test") == "test") {
    files = {folder + "/test_batch.bin"};
  } else {
    // A part of the set (the first files) is accepted with a warning.
    for (int i = 1; i <= 5; ++i) {
      const std::string path = cat(folder, "/data_batch_", i, ".bin");
      if (i > 1 && !std::filesystem::exists(path)) break;
      files.push_back(path);
    }
  }
  return open_planes(files, {32, 1, 0, split == "train" ? 50000 : 10000}, "cifar10 " + split, std::move(names));
}

DatasetPtr open_cifar100(const std::string& folder, const std::string& split, bool coarse) {
  const std::string file = pick("cifar100", split, "/train.bin", "/test.bin");
  auto names =
      read_class_names(folder + (coarse ? "/coarse_label_names.txt" : "/fine_label_names.txt"), coarse ? 20 : 100);
  return open_planes({folder + file}, {32, 2, coarse ? 0 : 1, split == "train" ? 50000 : 10000},
                     cat("cifar100", coarse ? "-coarse " : " ", split), std::move(names));
}

DatasetPtr open_tinyimagenet32(const std::string& folder, const std::string& split) {
  const std::string file = pick("tinyimagenet32", split == "val" ? "test" : split, "/train.bin", "/val.bin");
  auto names = read_class_names(folder + "/label_names.txt", 200);
  return open_planes({folder + file}, {32, 1, 0, split == "train" ? 100000 : 10000}, "tinyimagenet32 " + split,
                     std::move(names));
}

DatasetPtr open_flowers64(const std::string& folder, const std::string& split) {
  const std::string file = pick("flowers64", split, "/train.bin", "/test.bin");
  auto names = read_class_names(folder + "/label_names.txt", 89);
  return open_planes({folder + file}, {64, 1, 0, split == "train" ? 1778 : 890}, "flowers64 " + split,
                     std::move(names));
}

}  // namespace capo
