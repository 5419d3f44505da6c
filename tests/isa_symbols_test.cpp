// The kernel objects of the three instruction sets must not share a function: the linker keeps one copy of a weak
// symbol, and an older processor could then be led into AVX-512 code (ops/cpu/kernel.h).
#include <doctest/doctest.h>

#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

namespace fs = std::filesystem;

namespace {

[[maybe_unused]] std::string output_of(const std::string& command) {
  std::string out;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char part[4096];
    while (const std::size_t n = std::fread(part, 1, sizeof part, pipe)) out.append(part, n);
    if (pclose(pipe) != 0) out.clear();
  }
  return out;
}

// The names that `nm` marks as weak (W, V, w with a definition) or unique (u).
std::vector<std::string> weak_symbols(const std::string& nm) {
  std::vector<std::string> out;
  for (std::size_t at = 0; at < nm.size();) {
    const std::size_t end = nm.find('\n', at);
    const std::string line = nm.substr(at, end - at);
    at = end == std::string::npos ? nm.size() : end + 1;
    // "0000000000000000 W name"; undefined ones have blanks in place of the address.
    const std::size_t space = line.find(' ');
    if (space != 16 || line.size() < 19) continue;
    if (std::string("WVu").find(line[17]) != std::string::npos) out.push_back(line.substr(19));
  }
  return out;
}

}  // namespace

TEST_CASE("weak symbols are recognised") {
  CHECK(weak_symbols("0000000000000000 W f\n                 U g\n0000000000000010 t h\n"
                     "0000000000000000 V i\n                 w j\n") == std::vector<std::string>{"f", "i"});
}

TEST_CASE("kernel objects define no weak symbol") {
#if !defined(NDEBUG) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  std::puts("ALL SKIPPED: only a Release build inlines everything");
#else
  if (output_of("nm --version 2>/dev/null").empty()) {
    std::puts("ALL SKIPPED: nm is not installed");
    return;
  }
  int objects = 0;
  for (const char* isa : {"v2", "v3", "v4"}) {
    const fs::path folder = fs::path(CAPO_BINARY_DIR) / "CMakeFiles" / (std::string("capo_cpu_") + isa + ".dir");
    if (!fs::exists(folder)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(folder)) {
      if (entry.path().extension() != ".o") continue;
      ++objects;
      const std::string symbols = output_of("nm -C '" + entry.path().string() + "' 2>/dev/null");
      CHECK_MESSAGE(symbols.find(isa) != std::string::npos, entry.path().string(), " defines no kernel for ", isa);
      for (const auto& name : weak_symbols(symbols))
        CHECK_MESSAGE(false, entry.path().filename().string(), " (", isa, "): ", name);
    }
  }
  if (objects == 0) std::puts("ALL SKIPPED: no kernel objects in this build folder");
#endif
}
