// No include points upward (docs: the house). Reads the source tree; the first case proves the rule itself.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace fs = std::filesystem;

namespace {

// The part of the house that a file belongs to: "engine", "models/nn", ...; "models/vit" for a network.
std::string part_of(const std::string& path) {
  const auto slash = path.find('/');
  const std::string top = path.substr(0, slash);
  if (top != "models" || slash == std::string::npos) return top;
  const auto next = path.find('/', slash + 1);
  return next == std::string::npos ? top : path.substr(0, next);  // models/models.h would be "models"
}

bool is_network(const std::string& part) {
  return part.rfind("models/", 0) == 0 && part != "models/nn" && part != "models/train";
}

// What each part may see beside itself.
bool may_see(const std::string& from, const std::string& to) {
  const auto one_of = [&](std::initializer_list<const char*> parts) {
    return std::any_of(parts.begin(), parts.end(), [&](const char* p) { return to == p; });
  };
  if (from == to || from == "examples" || from == "tests" || from == "bench")
    return to != "tests" || from == to || from == "bench";
  if (from == "engine") return false;
  if (from == "autograd") return one_of({"engine"});
  if (from == "ops") return one_of({"engine", "autograd"});
  if (from == "cuda") return one_of({"engine", "ops"});
  if (from == "models/nn") return one_of({"engine", "autograd", "ops"});
  if (from == "models/train") return one_of({"engine", "autograd", "ops", "models/nn"});
  if (from == "models/unet" && one_of({"models/resnet", "models/vit"})) return true;  // its encoders
  if (is_network(from)) return one_of({"engine", "autograd", "ops", "models/nn", "models/train"});
  if (from == "tuners") return one_of({"engine", "autograd", "ops", "models/nn", "models/train"});
  if (from == "datasets") return one_of({"engine", "autograd", "ops", "models/train"});
  return false;
}

bool is_header(const std::string& path) { return path.size() > 2 && path.substr(path.size() - 2) == ".h"; }

// "" or what is wrong with `file` including `<target>` (or "target" when quoted).
std::string complaint(const std::string& file, const std::string& target, bool quoted) {
  const std::string part = part_of(file);
  if (quoted) return "includes are written <capo/...>, never in quotes";
  if (target.rfind("capo/", 0) == 0) {
    const std::string inside = target.substr(5);
    if (!may_see(part, part_of(inside))) return part + " must not see " + part_of(inside);
    if (inside.rfind("ops/cpu/", 0) == 0 && file.rfind("ops/cpu/", 0) != 0)
      return "ops/cpu headers are for ops/cpu files only";
    if (file.rfind("ops/cpu/", 0) == 0 && part_of(inside) != "ops") return "kernel files see ops headers only";
    return "";
  }
  const bool library = part != "examples" && part != "tests" && part != "bench";
  if (!library) return "";
  const auto starts = [&](const char* text) { return target.rfind(text, 0) == 0; };
  if ((starts("cuda") || starts("cublas") || starts("cudnn") || starts("nccl")) && part != "cuda")
    return "CUDA stays in cuda/";
  if (starts("CLI/")) return "the command line belongs to examples";
  if ((starts("stb") || starts("nlohmann")) && is_header(file)) return "third-party headers stay out of ours";
  if (target == "iostream") return "the library does not print";
  if (target == "functional" && is_header(file)) return "functional is too heavy for a public header";
  return "";
}

struct Include {
  std::string file, target;
  bool quoted;
};

std::vector<Include> includes_of(const fs::path& root) {
  std::vector<Include> out;
  for (const char* top :
       {"engine", "autograd", "ops", "cuda", "models", "tuners", "datasets", "examples", "tests", "bench"}) {
    if (!fs::exists(root / top)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(root / top)) {
      const std::string extension = entry.path().extension();
      if (extension != ".h" && extension != ".cpp" && extension != ".cu" && extension != ".cuh") continue;
      const std::string file = fs::relative(entry.path(), root).generic_string();
      // Other people's programs.
      if (file.rfind("tests/package", 0) == 0 || file.rfind("tests/reject", 0) == 0) continue;
      std::ifstream text(entry.path());
      for (std::string line; std::getline(text, line);) {
        if (line.rfind("#include", 0) != 0) continue;
        const auto open = line.find_first_of("<\"");
        if (open == std::string::npos) continue;
        const auto close = line.find_first_of(">\"", open + 1);
        out.push_back({file, line.substr(open + 1, close - open - 1), line[open] == '"'});
      }
    }
  }
  return out;
}

}  // namespace

TEST_CASE("the rule itself") {
  CHECK(complaint("engine/tensor.h", "capo/engine/shape.h", false).empty());
  CHECK(complaint("engine/tensor.h", "capo/autograd/node.h", false) == "engine must not see autograd");
  CHECK(complaint("autograd/node.cpp", "capo/ops/binary.h", false) == "autograd must not see ops");
  CHECK(complaint("ops/unary.cpp", "capo/models/nn/module.h", false) == "ops must not see models/nn");
  CHECK(complaint("ops/unary.cpp", "capo/ops/cpu/math.h", false) == "ops/cpu headers are for ops/cpu files only");
  CHECK(complaint("ops/cpu/unary.cpp", "capo/engine/tensor.h", false) == "kernel files see ops headers only");
  CHECK(complaint("cuda/unary.cu", "capo/autograd/node.h", false) == "cuda must not see autograd");
  CHECK(complaint("models/nn/layers.h", "capo/models/train/trainer.h", false) == "models/nn must not see models/train");
  CHECK(complaint("models/vit/vit.h", "capo/models/nn/layers.h", false).empty());
  CHECK(complaint("models/vit/vit.h", "capo/models/unet/unet.h", false) == "models/vit must not see models/unet");
  CHECK(complaint("models/vit/vit.h", "capo/tuners/lora.h", false) == "models/vit must not see tuners");
  CHECK(complaint("tuners/lora.h", "capo/models/vit/vit.h", false) == "tuners must not see models/vit");
  CHECK(complaint("datasets/loader.h", "capo/models/train/batch.h", false).empty());
  CHECK(complaint("models/train/trainer.h", "capo/datasets/loader.h", false) == "models/train must not see datasets");
  CHECK(complaint("examples/tune.cpp", "capo/tuners/lora.h", false).empty());
  CHECK(complaint("engine/tensor.h", "shape.h", true) == "includes are written <capo/...>, never in quotes");
  CHECK(complaint("engine/tensor.h", "functional", false) == "functional is too heavy for a public header");
  CHECK(complaint("ops/unary.cpp", "cuda_runtime.h", false) == "CUDA stays in cuda/");
}

TEST_CASE("every include of the tree points down") {
  const fs::path root = CAPO_SOURCE_DIR;
  const auto includes = includes_of(root);
  CHECK(includes.size() > 100);
  for (const auto& i : includes) {
    const std::string text = complaint(i.file, i.target, i.quoted);
    CHECK_MESSAGE(text.empty(), i.file, " includes ", i.target, ": ", text);
    if (i.target.rfind("capo/", 0) == 0)
      CHECK_MESSAGE(fs::exists(root / i.target.substr(5)), i.file, " includes ", i.target, ", which does not exist");
  }
}

TEST_CASE("every header says once") {
  for (const auto& entry : fs::recursive_directory_iterator(fs::path(CAPO_SOURCE_DIR))) {
    if (entry.path().extension() != ".h" && entry.path().extension() != ".cuh") continue;
    const std::string file = fs::relative(entry.path(), CAPO_SOURCE_DIR).generic_string();
    const auto slash = file.find('/');
    if (slash == std::string::npos || file[0] == '.' || file.rfind("build", 0) == 0) continue;
    std::ifstream text(entry.path());
    std::stringstream all;
    all << text.rdbuf();
    CHECK_MESSAGE(all.str().find("#pragma once") != std::string::npos, file, " lacks #pragma once");
  }
}
