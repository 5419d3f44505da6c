#include <capo/engine/files.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <system_error>

namespace capo {
namespace {

std::string errno_text(int code) { return std::generic_category().message(code); }

// Linux moves at most 0x7ffff000 bytes a call, and macOS refuses more than INT_MAX.
constexpr std::size_t kMaxTransfer = std::size_t{1} << 30;

struct OpenFile {
  int fd;
  std::uint64_t size;
};

// O_NONBLOCK: opening a pipe must not wait for a writer; it has no effect on regular files.
OpenFile open_regular(const std::string& path) {
  int fd;
  do {
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (fd < 0 && errno == EINTR);
  CAPO_CHECK(fd >= 0, path, ": cannot open the file, ", errno_text(errno));
  struct stat st {};
  const int code = ::fstat(fd, &st) == 0 ? 0 : errno;
  const bool regular = code == 0 && S_ISREG(st.st_mode);
  if (!regular) ::close(fd);
  CAPO_CHECK(code == 0, path, ": cannot stat the file, ", errno_text(code));
  CAPO_CHECK(regular, path, ": must be a regular file, got a ", S_ISDIR(st.st_mode) ? "folder" : "special file");
  return {fd, static_cast<std::uint64_t>(st.st_size)};
}

std::string folder_of(const std::string& path) {
  const auto slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

int sync_fd(int fd) {
#ifdef F_FULLFSYNC
  if (::fcntl(fd, F_FULLFSYNC) == 0) return 0;  // macOS: fsync alone stops at the drive's cache
#endif
  int r;
  do {
    r = ::fsync(fd);
  } while (r != 0 && errno == EINTR);
  return r == 0 ? 0 : errno;
}

void sync_folder(const std::string& path) {
  const std::string folder = folder_of(path);
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  CAPO_CHECK(fd >= 0, path, ": written, but its folder cannot be opened for fsync, ", errno_text(errno));
  const int code = sync_fd(fd);
  ::close(fd);
  // EINVAL: this file system has no fsync of folders; there is nothing more to do on it.
  CAPO_CHECK(code == 0 || code == EINVAL, path, ": written, but fsync of its folder failed, ", errno_text(code));
}

}  // namespace

InputFile::InputFile(const std::string& path) : path_(path) {
  const OpenFile f = open_regular(path);
  fd_ = f.fd;
  size_ = f.size;
}

InputFile::~InputFile() {
  if (fd_ >= 0) ::close(fd_);
}

void InputFile::read_at(std::uint64_t offset, void* dst, std::size_t bytes) const {
  auto* out = static_cast<char*>(dst);
  CAPO_CHECK(offset <= size_ && bytes <= size_ - offset, path_, ": read past the end, wanted ", bytes, " bytes at ",
             offset, " of ", size_);
  while (bytes > 0) {
    const ssize_t n = ::pread(fd_, out, std::min(bytes, kMaxTransfer), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    CAPO_CHECK(n >= 0, path_, ": cannot read, ", errno_text(errno));
    CAPO_CHECK(n > 0, path_, ": truncated after it was opened, it ends at byte ", offset, " of ", size_);
    out += n;
    offset += static_cast<std::uint64_t>(n);
    bytes -= static_cast<std::size_t>(n);
  }
}

std::string read_file(const std::string& path, std::size_t max_bytes) {
  const InputFile file(path);
  CAPO_CHECK(file.size() <= max_bytes, path, ": too long, at most ", max_bytes, " bytes are accepted, got ",
             file.size());
  std::string out(static_cast<std::size_t>(file.size()), '\0');
  file.read_at(0, out.data(), out.size());
  return out;
}

MappedFile::MappedFile(const std::string& path) {
  const OpenFile f = open_regular(path);
  size_ = static_cast<std::size_t>(f.size);
  void* p = nullptr;
  int code = 0;
  if (size_ > 0) {
    p = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, f.fd, 0);
    if (p == MAP_FAILED) code = errno;
  }
  ::close(f.fd);  // the map keeps the file alive
  CAPO_CHECK(code == 0, path, ": cannot map the file, ", errno_text(code));
  data_ = static_cast<const std::uint8_t*>(p);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::uint8_t*>(data_), size_);
}

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
  static std::atomic<unsigned> counter{0};
  CAPO_CHECK(!path.empty() && path.back() != '/', path, ": a file name is needed to write to");
  struct stat st {};
  const bool replaces = ::stat(path.c_str(), &st) == 0;
  CAPO_CHECK(!replaces || S_ISREG(st.st_mode), path, ": must be a regular file to be replaced, got a ",
             S_ISDIR(st.st_mode) ? "folder" : "special file");
  const mode_t mode = replaces ? st.st_mode & 0777 : 0666;
  // O_EXCL and a fresh number each try: a temporary left by a crashed process of the same id is not reused.
  do {
    temp_ = cat(path, ".tmp.", static_cast<long long>(::getpid()), ".", counter.fetch_add(1));
    fd_ = ::open(temp_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
  } while (fd_ < 0 && (errno == EEXIST || errno == EINTR));
  CAPO_CHECK(fd_ >= 0, path, ": cannot create a temporary file beside it, ", errno_text(errno));
  if (replaces && ::fchmod(fd_, mode) != 0) {  // what the umask took away
    const int code = errno;
    abandon();
    CAPO_CHECK(false, path, ": cannot give the temporary file its permissions, ", errno_text(code));
  }
}

AtomicFile::~AtomicFile() { abandon(); }

void AtomicFile::abandon() noexcept {
  if (fd_ < 0) return;
  ::close(fd_);
  fd_ = -1;
  ::unlink(temp_.c_str());
}

void AtomicFile::write(const void* data, std::size_t size) {
  CAPO_CHECK(fd_ >= 0, path_, ": write after commit or failure");
  const auto* p = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = ::write(fd_, p, std::min(size, kMaxTransfer));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int code = n < 0 ? errno : EIO;
      abandon();
      CAPO_CHECK(false, path_, ": cannot write after ", written_, " bytes, ", errno_text(code));
    }
    p += n;
    size -= static_cast<std::size_t>(n);
    written_ += static_cast<std::uint64_t>(n);
  }
}

void AtomicFile::commit() {
  CAPO_CHECK(fd_ >= 0, path_, ": commit after commit or failure");
  if (const int code = sync_fd(fd_); code != 0) {
    abandon();
    CAPO_CHECK(false, path_, ": fsync failed, ", errno_text(code));
  }
  // close() is the last chance to report a delayed write error (NFS, quotas).
  const int fd = fd_;
  fd_ = -1;
  if (::close(fd) != 0 && errno != EINTR) {
    const int code = errno;
    ::unlink(temp_.c_str());
    CAPO_CHECK(false, path_, ": close failed, ", errno_text(code));
  }
  if (::rename(temp_.c_str(), path_.c_str()) != 0) {
    const int code = errno;
    ::unlink(temp_.c_str());
    CAPO_CHECK(false, path_, ": cannot rename the temporary file over it, ", errno_text(code));
  }
  sync_folder(path_);
}

void write_file_atomic(const std::string& path, const void* data, std::size_t size) {
  AtomicFile file(path);
  file.write(data, size);
  file.commit();
}

void write_file_atomic(const std::string& path, const std::string& text) {
  write_file_atomic(path, text.data(), text.size());
}

}  // namespace capo
