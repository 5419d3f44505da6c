// How many threads the pool starts with: what the process may use of the machine. Linux.
#include <capo/engine/error.h>
#include <capo/engine/threads.h>

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <string>
#include <string_view>
#include <system_error>

namespace capo {
namespace {

constexpr int kMost = 1024;  // as in set_num_threads

// A small file of /proc or /sys (their stat says 0 bytes); "" when it cannot be read or has 64 KiB or more.
std::string read_small(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return "";
  std::string out(65536, '\0');
  std::size_t size = 0;
  ssize_t n = 1;
  while (n > 0 && size < out.size()) {
    do {
      n = ::read(fd, out.data() + size, out.size() - size);
    } while (n < 0 && errno == EINTR);
    if (n > 0) size += static_cast<std::size_t>(n);
  }
  ::close(fd);
  out.resize(n == 0 ? size : 0);
  return out;
}

// A whole number from 1 and nothing else, perhaps before a line's end; else 0.
std::int64_t positive(std::string_view text) {
  if (!text.empty() && text.back() == '\n') text.remove_suffix(1);
  std::int64_t n = 0;
  const char* end = text.data() + text.size();
  const auto [at, code] = std::from_chars(text.data(), end, n);
  return code == std::errc() && at == end && n > 0 ? n : 0;
}

// Microseconds of processor time a period, as whole processors; 0 when either is no number ("max", "-1").
int processors_of(std::string_view quota, std::string_view period) {
  const std::int64_t q = positive(quota), p = positive(period);
  return q > 0 && p > 0 ? static_cast<int>(std::min<std::int64_t>((q - 1) / p + 1, kMost)) : 0;
}
int quota_v2(const std::string& folder) {  // "150000 100000"
  const std::string text = read_small(folder + "/cpu.max");
  const auto space = text.find(' ');
  return space == std::string::npos ? 0 : processors_of(text.substr(0, space), text.substr(space + 1));
}
int quota_v1(const std::string& folder) {
  return processors_of(read_small(folder + "/cpu.cfs_quota_us"), read_small(folder + "/cpu.cfs_period_us"));
}

// The smaller of two quotas, where 0 is none.
int tighter(int a, int b) { return a == 0 || (b != 0 && b < a) ? b : a; }

// Of the group and of all above it. In a container the group's path may not exist below the mount: the root still does.
int quota_above(const std::string& mount, std::string group, int (*quota)(const std::string& folder)) {
  if (group.empty() || group.front() != '/' || group == "/" || group.find("/..") != std::string::npos) group.clear();
  int least = quota(mount);
  for (; !group.empty(); group.resize(group.rfind('/'))) least = tighter(least, quota(mount + group));
  return least;
}

// The processors in the affinity mask. The kernel refuses masks that are shorter than its own.
int affinity() {
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(cpus);
    if (!set) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(cpus);
    const int code = sched_getaffinity(0, bytes, set) == 0 ? 0 : errno;
    const int count = code == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (code != EINVAL) return std::max(count, 1);
  }
  return 1;
}

}  // namespace

int detail::cpu_quota(const char* root) {
  const std::string text = read_small(cat(root, "/proc/self/cgroup")), mount = cat(root, "/sys/fs/cgroup");
  int least = 0;
  for (std::size_t at = 0; at < text.size();) {  // "id:controllers:group"; version 2 has no controllers there
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    const auto first = line.find(':'), second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), group = line.substr(second + 1);
    if (controllers.empty()) least = tighter(least, quota_above(mount, group, quota_v2));
    if (cat(",", controllers, ",").find(",cpu,") != std::string::npos)
      least = tighter(least, quota_above(mount + "/cpu", group, quota_v1));
  }
  return least;
}

int detail::default_threads() {
  if (const char* text = std::getenv("CAPO_THREADS")) {
    char* end = nullptr;
    const long n = std::strtol(text, &end, 10);
    if (end != text && *end == '\0' && n >= 1 && n <= kMost) return static_cast<int>(n);
    log(LogLevel::warning, cat("CAPO_THREADS: must be 1..1024, got \"", text, "\"; using all processors"));
  }
  return tighter(std::min(affinity(), kMost), cpu_quota(""));
}

}  // namespace capo
