#include <capo/engine/files.h>
#include <capo/models/train/tensorboard.h>

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <filesystem>

namespace capo::train {
namespace {

constexpr std::array<std::uint32_t, 256> make_crc_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t c = i;
    for (int k = 0; k < 8; ++k) c = c & 1 ? (c >> 1) ^ 0x82F63B78u : c >> 1;
    table[i] = c;
  }
  return table;
}
constexpr auto kCrcTable = make_crc_table();

std::uint32_t masked(std::uint32_t crc) { return ((crc >> 15) | (crc << 17)) + 0xA282EAD8u; }

void put_fixed(std::string& out, std::uint64_t v, int bytes) {
  for (int i = 0; i < bytes; ++i) out += static_cast<char>(v >> (8 * i));
}

// The few pieces of the protobuf wire format that events need: varint (0), 64-bit (1), bytes (2), 32-bit (5).
void put_varint(std::string& out, std::uint64_t v) {
  for (; v >= 128; v >>= 7) out += static_cast<char>(v | 128);
  out += static_cast<char>(v);
}
void put_key(std::string& out, int field, int wire) { put_varint(out, static_cast<std::uint64_t>(field << 3 | wire)); }
void put_bytes(std::string& out, int field, std::string_view bytes) {
  put_key(out, field, 2);
  put_varint(out, bytes.size());
  out += bytes;
}

// Event { double wall_time = 1; int64 step = 2; .. }
std::string event_head(std::int64_t step) {
  const double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  std::string out;
  put_key(out, 1, 1);
  put_fixed(out, std::bit_cast<std::uint64_t>(now), 8);
  put_key(out, 2, 0);
  put_varint(out, static_cast<std::uint64_t>(step));
  return out;
}

void write_all(int fd, const std::string& path, const std::string& data) {
  std::size_t at = 0;
  while (at < data.size()) {
    const ssize_t n = ::write(fd, data.data() + at, data.size() - at);
    if (n < 0 && errno == EINTR) continue;
    CAPO_CHECK(n > 0, path, ": cannot append, ", std::strerror(n < 0 ? errno : EIO));
    at += static_cast<std::size_t>(n);
  }
}

int open_append(const std::string& path, int flags) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | flags, 0666);
  CAPO_CHECK(fd >= 0, path, ": cannot open for appending, ", std::strerror(errno));
  return fd;
}

}  // namespace

std::uint32_t crc32c(std::string_view data) {
  std::uint32_t c = 0xFFFFFFFFu;
  for (const char x : data) c = kCrcTable[(c ^ static_cast<unsigned char>(x)) & 255] ^ (c >> 8);
  return c ^ 0xFFFFFFFFu;
}

std::string tf_record(std::string_view data) {
  std::string out;
  put_fixed(out, data.size(), 8);
  put_fixed(out, masked(crc32c(out)), 4);
  out += data;
  put_fixed(out, masked(crc32c(data)), 4);
  return out;
}

TensorBoard::TensorBoard(const std::string& dir, std::int64_t resume_step) {
  static std::atomic<int> count{0};
  std::error_code ignored;
  std::filesystem::create_directories(dir, ignored);
  char host[256] = "host";
  ::gethostname(host, sizeof host - 1);
  const auto seconds =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  path_ = cat(dir, "/events.out.tfevents.", seconds, ".", static_cast<const char*>(host), ".", ::getpid(), ".",
              count.fetch_add(1));
  fd_ = open_append(path_, O_EXCL);
  std::string version = event_head(0);
  put_bytes(version, 3, "brain.Event:2");  // file_version
  append(version);
  if (resume_step < 0) return;
  std::string start = event_head(resume_step + 1);
  std::string session;
  put_key(session, 1, 0);  // SessionLog.status = START
  put_varint(session, 1);
  put_bytes(start, 7, session);
  append(start);
}

TensorBoard::~TensorBoard() {
  if (fd_ >= 0) ::close(fd_);
}

void TensorBoard::append(const std::string& event) { write_all(fd_, path_, tf_record(event)); }

void TensorBoard::scalar(std::string_view tag, std::int64_t step, double value) {
  std::string v;
  put_bytes(v, 1, tag);  // Summary.Value { string tag = 1; float simple_value = 2; }
  put_key(v, 2, 5);
  put_fixed(v, std::bit_cast<std::uint32_t>(static_cast<float>(value)), 4);
  std::string summary;
  put_bytes(summary, 1, v);
  std::string event = event_head(step);
  put_bytes(event, 5, summary);
  append(event);
}

CsvLog::CsvLog(const std::string& path, const std::string& header, std::int64_t rows, std::int64_t last_step)
    : path_(path) {
  std::error_code ignored;
  if (const auto folder = std::filesystem::path(path).parent_path(); !folder.empty())
    std::filesystem::create_directories(folder, ignored);
  std::string text = header + "\n";
  if (rows >= 0 && std::filesystem::exists(path, ignored)) {
    const std::string old = read_file(path, std::size_t{1} << 30);
    CAPO_CHECK(old.empty() || old.rfind(text, 0) == 0, path, ": must have the header \"", header, "\" to be continued");
    std::size_t at = text.size();
    while (at < old.size() && rows_ < rows) {
      const std::size_t end = old.find('\n', at);
      if (end == std::string::npos) break;  // a row that was cut short
      std::int64_t step = 0;
      const auto parsed = std::from_chars(old.data() + at, old.data() + end, step);
      if (parsed.ec == std::errc() && step <= last_step) {
        text.append(old, at, end + 1 - at);
        ++rows_;
      }
      at = end + 1;
    }
  }
  write_file_atomic(path, text);
  fd_ = open_append(path, 0);
}

CsvLog::~CsvLog() {
  if (fd_ >= 0) ::close(fd_);
}

void CsvLog::row(const std::string& line) {
  write_all(fd_, path_, line + "\n");
  ++rows_;
}

}  // namespace capo::train
