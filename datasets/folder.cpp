#include <capo/datasets/folder.h>

#include <algorithm>
#include <filesystem>

namespace capo {
namespace {

namespace fs = std::filesystem;

class FolderDataset : public ImageDataset {
 public:
  struct Item {
    std::string path;
    std::int64_t label;
  };
  FolderDataset(const std::string& folder, std::vector<std::string> class_names, std::vector<Item> items)
      : ImageDataset(folder, std::move(class_names)), items_(std::move(items)) {}

  std::int64_t size() const override { return static_cast<std::int64_t>(items_.size()); }
  std::int64_t label(std::int64_t i) const override {
    check_index(i);
    return items_[static_cast<std::size_t>(i)].label;
  }
  Image image(std::int64_t i) const override {
    check_index(i);
    return load_image(items_[static_cast<std::size_t>(i)].path);
  }

 private:
  std::vector<Item> items_;
};

bool is_image(const fs::path& p) {
  std::string ext = p.extension().string();
  for (auto& c : ext) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
  return ext == ".png" || ext == ".jpg" || ext == ".jpeg";
}

// Entries in byte order: the order of a directory is the file system's whim. Folder errors name the folder.
std::vector<fs::path> sorted_entries(const fs::path& folder) {
  std::vector<fs::path> out;
  std::error_code code;
  fs::directory_iterator it(folder, code);
  for (; !code && it != fs::directory_iterator(); it.increment(code)) {
    if (it->path().filename().string()[0] != '.') out.push_back(it->path());
  }
  CAPO_CHECK(!code, folder.string(), ": cannot list the folder, ", code.message(),
             "; an image folder is FOLDER/train/<class>/*.jpg and FOLDER/test/<class>/*.jpg, PNG or JPEG");
  std::sort(out.begin(), out.end(), [](const fs::path& a, const fs::path& b) { return a.native() < b.native(); });
  return out;
}

}  // namespace

DatasetPtr open_image_folder(const std::string& folder) {
  std::vector<std::string> names;
  std::vector<FolderDataset::Item> items;
  std::size_t left_out = 0;
  for (const auto& dir : sorted_entries(folder)) {
    std::error_code code;
    if (!fs::is_directory(dir, code)) continue;
    const std::size_t before = items.size();
    for (const auto& file : sorted_entries(dir)) {
      if (is_image(file)) {
        items.push_back({file.string(), static_cast<std::int64_t>(names.size())});
      } else {
        ++left_out;
      }
    }
    CAPO_CHECK(items.size() > before, dir.string(), ": class folder has no PNG or JPEG image");
    names.push_back(dir.filename().string());
  }
  CAPO_CHECK(!names.empty(), folder, ": must have one sub-folder per class, got none");
  if (left_out > 0) log(LogLevel::warning, cat(folder, ": left out ", left_out, " files that are not PNG or JPEG"));
  return std::make_shared<FolderDataset>(folder, std::move(names), std::move(items));
}

}  // namespace capo
