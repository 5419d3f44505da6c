// The test of one stem: every op that ops.def lists under CAPO_TEST_STEM has a case, and every case passes every check.
#include <capo/tests/op_checks.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <fstream>

namespace {

struct Line {
  std::string stem, name, kind;
};

std::vector<Line> ops_of(const std::string& stem) {
  std::vector<Line> lines;
  std::ifstream file(CAPO_SOURCE_DIR "/ops/ops.def");
  for (std::string text; std::getline(file, text);) {
    if (text.rfind("OP(", 0) != 0) continue;
    text.erase(std::remove(text.begin(), text.end(), ' '), text.end());
    const auto a = text.find(','), b = text.find(',', a + 1), c = text.find(')', b);
    REQUIRE(c != std::string::npos);
    const Line line{text.substr(3, a - 3), text.substr(a + 1, b - a - 1), text.substr(b + 1, c - b - 1)};
    if (line.stem == stem) lines.push_back(line);
  }
  return lines;
}

}  // namespace

TEST_CASE("ops: " CAPO_TEST_STEM) {
  const auto lines = ops_of(CAPO_TEST_STEM);
  const auto cases = capo::test::op_cases();
  REQUIRE(!lines.empty());
  for (const auto& line : lines) {
    INFO(line.name);
    const auto is_it = [&](const capo::test::OpCase& c) { return c.name == line.name; };
    const auto found = std::find_if(cases.begin(), cases.end(), is_it);
    CHECK_MESSAGE(found != cases.end(), "ops.def lists it, tests/ops/" CAPO_TEST_STEM ".cpp has no case for it");
    if (found != cases.end()) CHECK_MESSAGE(!found->samples.empty(), "its case has no sample");
  }
  for (const auto& c : cases) {
    const auto is_it = [&](const Line& line) { return line.name == c.name; };
    CHECK_MESSAGE(std::any_of(lines.begin(), lines.end(), is_it), c.name, ": is not in ops.def under " CAPO_TEST_STEM);
    const auto failures = capo::test::check_case(c);
    for (const auto& text : failures) CHECK_MESSAGE(false, text);
    CHECK(failures.empty());
  }
  std::string missing;
  for (const auto& name : capo::test::missing_kernels()) missing += " " + name;
  if (!missing.empty()) MESSAGE("no CUDA kernel yet:" << missing);
}
