// For tests of files: a folder that removes itself.
#pragma once

#include <capo/engine/files.h>
#include <capo/tests/support.h>

#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <string>

namespace capo::testing {

class TempFolder {
 public:
  TempFolder() {
    static std::atomic<int> count{0};
    path_ = std::filesystem::temp_directory_path() /
            cat("capo-test-", static_cast<long long>(::getpid()), "-", count.fetch_add(1));
    std::filesystem::create_directories(path_);
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  std::string path() const { return path_.string(); }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  // Writes a file (folders are made) and gives its path.
  std::string file(const std::string& name, const std::string& content) const {
    std::filesystem::create_directories((path_ / name).parent_path());
    write_file_atomic(*this / name, content);
    return *this / name;
  }
  int entries() const {
    int n = 0;
    for ([[maybe_unused]] const auto& e : std::filesystem::directory_iterator(path_)) ++n;
    return n;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace capo::testing
