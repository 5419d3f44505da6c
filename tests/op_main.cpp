// The test of one stem: every op that ops.def lists under CAPO_TEST_STEM has a case, and every case passes every check.
// Builds on the CUDA shim run the check "device" alone: all others are the same in any build.
#include <capo/examples/show_log.h>
#include <capo/tests/op_checks.h>
#include <capo/tests/ops_def.h>

#include <doctest/doctest.h>

#include <algorithm>

#if defined(CAPO_TEST_SHIM)
#include <capo/tests/shim/control.h>
#endif

namespace {

#if defined(CAPO_TEST_SHIM)
constexpr const char* kOnly = "device";
#else
constexpr const char* kOnly = "";
#endif

using capo::testing::OpLine;

std::vector<OpLine> ops_of(const std::string& stem) {
  auto lines = capo::testing::ops_def();
  std::erase_if(lines, [&](const OpLine& line) { return line.stem != stem; });
  return lines;
}

}  // namespace

TEST_CASE("ops: " CAPO_TEST_STEM) {
  capo::examples::show_log();
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
    const auto is_it = [&](const OpLine& line) { return line.name == c.name; };
    CHECK_MESSAGE(std::any_of(lines.begin(), lines.end(), is_it), c.name, ": is not in ops.def under " CAPO_TEST_STEM);
    const auto failures = capo::test::check_case(c, kOnly);
    for (const auto& text : failures) CHECK_MESSAGE(false, text);
    CHECK(failures.empty());
  }
  std::string missing;
  for (const auto& name : capo::test::missing_kernels()) missing += " " + name;
  if (!missing.empty()) MESSAGE("no CUDA kernel yet:" << missing);
#if defined(CAPO_TEST_SHIM)
  capo::shim::write_coverage();
#endif
}
