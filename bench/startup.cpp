// Time from the start of the process to the end of the first op.
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/matmul.h>

#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <sstream>
#include <unistd.h>

using namespace capo;

int main() {
  const Tensor y = matmul(ones({64, 64}), ones({64, 64}));
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  // Field 22 of /proc/self/stat: start time in clock ticks since boot; its resolution is one tick (10 ms).
  std::ifstream in("/proc/self/stat");
  std::stringstream text;
  text << in.rdbuf();
  std::istringstream fields(text.str().substr(text.str().rfind(')') + 2));
  std::string field;
  for (int i = 0; i < 20; ++i) fields >> field;
  const double started = std::stod(field) / static_cast<double>(sysconf(_SC_CLK_TCK));
  const double ms = 1e3 * (static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec) - started);
  std::printf("first op done %.0f ms after process start (clock tick %.0f ms), value %.0f\n", ms,
              1e3 / static_cast<double>(sysconf(_SC_CLK_TCK)), to_vector<float>(y)[0]);
  std::printf("RESULT {\"bench\":\"startup\",\"ms\":%.0f}\n", ms);
}
