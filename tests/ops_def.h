// ops/ops.def as tests read it.
#pragma once

#include <capo/engine/error.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

namespace capo::testing {

struct OpLine {
  std::string stem, name, kind;
};

inline std::vector<OpLine> ops_def() {
  std::vector<OpLine> lines;
  std::ifstream file(CAPO_SOURCE_DIR "/ops/ops.def");
  for (std::string text; std::getline(file, text);) {
    if (text.rfind("OP(", 0) != 0) continue;
    text.erase(std::remove(text.begin(), text.end(), ' '), text.end());
    const auto a = text.find(','), b = text.find(',', a + 1), c = text.find(')', b);
    CAPO_CHECK(c != std::string::npos, "ops.def: expected OP(stem, name, KIND), got ", text);
    lines.push_back({text.substr(3, a - 3), text.substr(a + 1, b - a - 1), text.substr(b + 1, c - b - 1)});
  }
  return lines;
}

}  // namespace capo::testing
