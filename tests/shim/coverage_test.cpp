// Every kernel of cuda/*.cu ran on some sample of some op, in every order of threads, and with the race checker. Reads
// what the op tests wrote: they run first. Prints the kernels, the instances that no sample reaches, and what of cuda/
// cannot run on the host, with the reason from its source: a comment "Not on the shim: <reason>." above it, or "No
// sample: <reason>." where something else than an op launches it.
#include <capo/tests/ops_def.h>
#include <capo/tests/shim/control.h>

#include <doctest/doctest.h>

#include <cstdio>
#include <filesystem>
#include <map>
#include <set>

namespace fs = std::filesystem;

namespace {

const fs::path kRoot = CAPO_SOURCE_DIR;
constexpr const char *kNotHere = "Not on the shim: ", *kNoSample = "No sample: ";

std::vector<std::string> lines_of(const fs::path& file) {
  std::vector<std::string> lines;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

// "" or the reason that a comment gives in lines [begin, end).
std::string reason_in(const std::vector<std::string>& lines, std::size_t begin, std::size_t end) {
  for (std::size_t i = begin; i < end && i < lines.size(); ++i)
    for (const char* mark : {kNotHere, kNoSample})
      if (const auto at = lines[i].find(mark); at != std::string::npos) return lines[i].substr(at);
  return "";
}

// The function that a line "__global__ void __launch_bounds__(n) name(..." declares.
std::string declared(const std::string& line) {
  auto at = line.find("void ");
  if (at == std::string::npos) return "";
  at += 5;
  if (line.compare(at, 17, "__launch_bounds__") == 0) {
    int depth = 0;
    for (at = line.find('(', at); at < line.size(); ++at) {
      depth += (line[at] == '(') - (line[at] == ')');
      if (depth == 0) break;
    }
    at = line.find_first_not_of(" )", at);
  }
  return line.substr(at, line.find('(', at) - at);
}

// "apply" of "void capo::(anonymous namespace)::apply<float, true>(capo::Apply)".
std::string plain_name(std::string name) {
  static const std::string unnamed = "(anonymous namespace)::";
  for (auto at = name.find(unnamed); at != std::string::npos; at = name.find(unnamed)) name.erase(at, unnamed.size());
  name = name.substr(0, name.find_first_of("<("));
  return name.substr(name.find_last_of(": ") + 1);
}

struct Ran {
  unsigned asan = 0;   // orders
  unsigned race = 0;
};

struct Kernel {
  std::string reason;                    // why not on the shim
  std::map<std::string, Ran> instances;  // by full name
};
using Kernels = std::map<std::pair<std::string, std::string>, Kernel>;  // by file and name

Kernels kernels_of_sources() {
  Kernels kernels;
  for (const auto& entry : fs::directory_iterator(kRoot / "cuda")) {
    if (entry.path().extension() != ".cu") continue;
    const auto lines = lines_of(entry.path());
    for (std::size_t i = 0; i < lines.size(); ++i)
      if (lines[i].rfind("__global__", 0) == 0) {
        const std::string head = i + 1 < lines.size() ? lines[i] + lines[i + 1] : lines[i];
        kernels[{entry.path().filename().string(), declared(head)}].reason = reason_in(lines, i < 4 ? 0 : i - 4, i);
      }
  }
  return kernels;
}

// Adds what one program launched, or says that it has not run.
void add_program(const std::string& program, Kernels& kernels) {
  const auto lines = lines_of(fs::path(CAPO_BINARY_DIR) / "shim_coverage" / (program + ".txt"));
  CHECK_MESSAGE(!lines.empty(), program, " has not run: it writes which kernels it launches");
  for (const std::string& line : lines) {
    const auto a = line.find(' '), b = line.find(' ', a + 1);
    const std::string name = line.substr(b + 1);
    const auto at = kernels.find({line.substr(0, a), plain_name(name)});
    if (at == kernels.end()) continue;
    Ran& ran = at->second.instances[name];
    (program.rfind("race_", 0) == 0 ? ran.race : ran.asan) |=
        static_cast<unsigned>(std::stoul(line.substr(a + 1, b - a - 1)));
  }
}

unsigned all_orders() {
  unsigned bits = 0;
  for (const auto& c : capo::shim::orders()) bits |= 1u << static_cast<int>(c.order);
  return bits;
}

void print_instances(const Kernel& kernel, std::size_t& unreached) {
  for (const auto& [name, ran] : kernel.instances)
    if (!ran.asan || !ran.race) {
      ++unreached;
      std::printf("  no sample launches %s%s\n", name.c_str(), ran.asan ? " with the race checker" : "");
    }
}

}  // namespace

TEST_CASE("kernels that samples reach") {
  Kernels kernels = kernels_of_sources();
  CHECK(kernels.size() > 50);
  std::set<std::string> stems;
  for (const auto& op : capo::testing::ops_def()) stems.insert(op.stem);
  for (const auto& stem : stems) {
    add_program("op_" + stem, kernels);
    add_program("race_" + stem, kernels);
  }
  std::size_t instances = 0, unreached = 0;
  for (const auto& [key, kernel] : kernels) {
    const std::string where = key.first + " " + key.second;
    if (!kernel.reason.empty()) {
      std::printf("%-40s %s\n", where.c_str(), kernel.reason.c_str());
      continue;
    }
    Ran ran;
    for (const auto& [name, r] : kernel.instances) ran.asan |= r.asan, ran.race |= r.race;
    std::printf("%-40s %zu instances\n", where.c_str(), kernel.instances.size());
    print_instances(kernel, unreached);
    instances += kernel.instances.size();
    CHECK_MESSAGE(!kernel.instances.empty(), where,
                  ": no program has it; on the shim it must be compiled, or say why not");
    if (kernel.instances.empty()) continue;
    CHECK_MESSAGE(ran.asan == all_orders(), where, ": no sample launches it in every order of threads");
    CHECK_MESSAGE(ran.race != 0, where, ": no sample launches it with the race checker");
  }
  std::printf("%zu kernels, %zu instances, of which no sample reaches %zu\n", kernels.size(), instances, unreached);
}

TEST_CASE("sources of cuda/ that are not on the shim say why") {
  for (const auto& entry : fs::directory_iterator(kRoot / "cuda")) {
    if (entry.path().extension() != ".cpp") continue;
    const auto lines = lines_of(entry.path());
    const std::string reason = reason_in(lines, 0, 10), name = entry.path().filename().string();
    std::printf("%-40s %s\n", name.c_str(), reason.c_str());
    CHECK_MESSAGE(!reason.empty(), "cuda/", name, " needs a line // ", kNotHere, "<reason>");
  }
}
