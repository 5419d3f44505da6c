// Prints the support table, one line per op, and holds the kernel tables to the kernels that exist.
//
// A kernel table is a constant of its op's .cpp, so no list of them exists at run time; one would need self-registering
// statics (which vanish from a .a) or a second hand-kept list. The CAPO_KERNEL lines are the tables, though: the macro
// fills every CPU slot, and a kernel that is not built is a link error. So the table is read from ops.def and these
// lines. They belong to a stem: which of them an op launches, or that it is composed of other ops that do, they do not
// tell.
#include <capo/tests/ops_def.h>

#include <doctest/doctest.h>

#include <cstdio>
#include <filesystem>
#include <map>
#include <set>

namespace fs = std::filesystem;
using capo::testing::OpLine;
using capo::testing::ops_def;

namespace {

const fs::path kRoot = CAPO_SOURCE_DIR;

#if defined(CAPO_ONE_ISA)
constexpr const char* kCpu = "v2";
#else
constexpr const char* kCpu = "v2 v3 v4";
#endif
#if defined(CAPO_WITH_CUDA)
constexpr const char* kCuda = "with";
#else
constexpr const char* kCuda = "without";
#endif

// The text between `before` at the start of a line and the next `after`, of every such line.
std::vector<std::string> names_in(const fs::path& file, const std::string& before, const std::string& after) {
  std::vector<std::string> names;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(before, 0) != 0) continue;
    const auto end = line.find(after, before.size());
    if (end != std::string::npos) names.push_back(line.substr(before.size(), end - before.size()));
  }
  return names;
}

std::set<std::string> names_under(const char* folder, const char* extension, const std::string& before,
                                  const std::string& after) {
  std::set<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(kRoot / folder)) {
    if (entry.path().extension() != extension) continue;
    for (const auto& name : names_in(entry.path(), before, after)) names.insert(name);
  }
  return names;
}

struct Tables {
  std::vector<std::string> all;     // of a stem, with CPU builds
  std::set<std::string> cuda;       // those whose CUDA slot is filled
  std::set<std::string> cuda_only;  // the GPU's own plan, in place of those without a slot
};

Tables tables_of(const std::string& stem) {
  const fs::path file = kRoot / "ops" / (stem + ".cpp");
  Tables t;
  t.all = names_in(file, "CAPO_KERNEL(", ",");
  for (const auto& name : names_in(file, "CAPO_KERNEL_CUDA(", ",")) {
    t.all.push_back(name);
    t.cuda.insert(name);
  }
  for (const auto& name : names_in(file, "CAPO_KERNEL_CUDA_ONLY(", ",")) t.cuda_only.insert(name);
  return t;
}

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const auto& n : names) out += (out.empty() ? "" : ", ") + n;
  return out;
}

void print(const OpLine& op, const Tables& t) {
  std::string made = "kernels", cpu = kCpu, cuda = "no", names = joined(t.all);
  if (op.kind == "VIEW" || t.all.empty()) {
    made = op.kind == "VIEW" ? "view" : "composed";
    cpu = cuda = op.kind == "VIEW" ? "any" : "as its ops";
    names.clear();
  } else if (!t.cuda_only.empty()) {
    cuda = "yes";
    for (const auto& n : t.cuda_only) names += ", " + n;
  } else if (!t.cuda.empty()) {
    cuda = t.cuda.size() == t.all.size() ? "yes" : capo::cat(t.cuda.size(), " of ", t.all.size());
  }
  std::printf("%-20s %-7s %-9s %-11s %-11s %s\n", op.name.c_str(), op.kind.c_str(), made.c_str(), cpu.c_str(),
              cuda.c_str(), names.c_str());
}

}  // namespace

TEST_CASE("the support table") {
  std::map<std::string, Tables> stems;
  const auto ops = ops_def();
  CHECK(ops.size() > 100);
  std::printf("This build is %s CUDA.\n%-20s %-7s %-9s %-11s %-11s %s\n", kCuda, "op", "kind", "made of", "CPU", "CUDA",
              "kernels of its stem");
  for (const OpLine& op : ops) {
    const auto [at, fresh] = stems.try_emplace(op.stem);
    if (fresh) at->second = tables_of(op.stem);
    print(op, at->second);
  }

  const auto on_cpu = names_under("ops/cpu", ".cpp", "CAPO_CPU_KERNEL(", ",");
  const auto on_cuda = names_under("cuda", ".cu", "void ", "_cuda(");
  std::set<std::string> listed, listed_cuda;
  for (const auto& [stem, t] : stems) {
    for (const auto& name : t.all) {
      CHECK_MESSAGE(on_cpu.count(name), "ops/", stem, ".cpp lists ", name, ", which no file of ops/cpu defines");
      listed.insert(name);
    }
    // A CPU build does not link them.
    for (const auto* names : {&t.cuda, &t.cuda_only}) {
      for (const auto& name : *names)
        CHECK_MESSAGE(on_cuda.count(name), "ops/", stem, ".cpp lists ", name, ", which no file of cuda defines");
      listed_cuda.insert(names->begin(), names->end());
    }
  }
  CHECK(listed.size() > 30);
  for (const auto& name : on_cpu) CHECK_MESSAGE(listed.count(name), "ops/cpu defines ", name, ", which no op lists");
  std::string waiting;
  for (const auto& name : on_cuda)
    if (!listed_cuda.count(name)) waiting += " " + name;
  std::printf("CUDA kernels that no table lists (parts of others):%s\n", waiting.empty() ? " none" : waiting.c_str());
}
