// Helpers of the file tests: a folder that removes itself, and the text of the Error a call throws.
#pragma once

#include <capo/engine/error.h>
#include <capo/engine/files.h>

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

// what() of the capo::Error that f throws; "no error" when it throws none. Other exceptions pass.
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
inline bool starts_with(const std::string& text, const std::string& part) { return text.rfind(part, 0) == 0; }

}  // namespace capo::testing
