// Files: bounded reads, positioned reads, read-only maps and atomic writes. POSIX.
// Every failure is a capo::Error "<path>: <rule>, <errno text>". Thread safe across distinct objects.
#pragma once

#include <capo/engine/error.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace capo {

// The whole content of a regular file. Throws when it is missing, no regular file, or longer than max_bytes.
std::string read_file(const std::string& path, std::size_t max_bytes);

// A regular file open for positioned reads. Unlike a map, a file cut short after opening gives an Error, never SIGBUS.
class InputFile {
 public:
  // Throws when the path is missing or not a regular file (folders, devices and pipes are refused, never waited for).
  explicit InputFile(const std::string& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }  // at the time of opening
  // Reads exactly `bytes` bytes from `offset`; throws when the file ends before. Safe from several threads.
  void read_at(std::uint64_t offset, void* dst, std::size_t bytes) const;

 private:
  std::string path_;
  int fd_ = -1;
  std::uint64_t size_ = 0;
};

// A regular file mapped read only. For files that nobody truncates meanwhile: touching lost pages raises SIGBUS.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::uint8_t* data() const { return data_; }  // null for an empty file
  std::size_t size() const { return size_; }

 private:
  const std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

// Replaces a file all at once: bytes go to a temporary file in the same folder; commit() makes them durable (fsync),
// renames, and syncs the folder. A crash at any moment leaves the old file or the new one, never a mixture.
// Without commit(), or when anything throws, the temporary is removed and the old file stays.
// A symbolic link at `path` is replaced by the file itself. A replaced file's permissions are kept.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, std::size_t size);
  void write(const std::string& text) { write(text.data(), text.size()); }
  std::uint64_t written() const { return written_; }
  // Once only; afterwards the object does nothing more.
  void commit();

 private:
  void abandon() noexcept;

  std::string path_, temp_;
  int fd_ = -1;
  std::uint64_t written_ = 0;
};

void write_file_atomic(const std::string& path, const void* data, std::size_t size);
void write_file_atomic(const std::string& path, const std::string& text);

}  // namespace capo
