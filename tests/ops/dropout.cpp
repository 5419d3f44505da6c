#include <capo/ops/dropout.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>

namespace capo::test {
namespace {

constexpr std::uint64_t kSeed = 0x123456789abcdef, kStream = 77;

// Element i of x, or of each sample's block of `run` elements, by the scalar generator.
Tensor by_loop(const Tensor& x, double p, std::int64_t run, std::uint64_t offset) {
  auto v = to_vector<double>(x);
  for (std::size_t i = 0; i < v.size(); ++i) {
    const auto draw = i / static_cast<std::size_t>(run);
    const std::uint32_t word = philox(kSeed, kStream, offset + draw / 4).v[draw % 4];
    v[i] = static_cast<double>(word) * 0x1p-32 < p ? 0 : v[i] / (1 - p);
  }
  return values(v, x.shape());
}

Sample sample(const std::string& label, bool path, const Shape& shape, double p, bool training = true,
              std::uint64_t offset = 0) {
  Sample s;
  s.label = label;
  s.inputs = {normal(shape, label)};
  s.run = [=](const Tensors& in) -> Tensors {
    Generator rng(kSeed, kStream);
    rng.set_offset(offset);
    return {path ? drop_path(in[0], p, rng, training) : dropout(in[0], p, rng, training)};
  };
  s.reference = [=](const Tensors& in) -> Tensors {
    if (!training) return {in[0]};
    return {by_loop(in[0], p, path && in[0].size(0) > 0 ? in[0].numel() / in[0].size(0) : 1, offset)};
  };
  s.second_order = true;
  s.random = true;
  return s;
}

OpCase case_of(const std::string& name, bool path) {
  OpCase c{name, {}, {}};
  c.samples = {
      sample("half", path, {5, 3, 7}, 0.5),
      sample("a tenth", path, {9, 2}, 0.1),
      sample("nearly all", path, {6, 4}, 0.95),
      sample("later in the stream", path, {11, 5}, 0.3, true, (std::uint64_t{1} << 32) - 2),
      sample("one element", path, {1}, 0.5),
      sample("many", path, {300, 71}, 0.25),
      sample("whole packs", path, {3, 32}, 0.3),
      sample("empty", path, {0, 4}, 0.5),
      sample("evaluation", path, {3, 4}, 0.5, false),
      sample("p = 0", path, {3, 4}, 0),
  };
  Sample odd = sample("one element further", path, {41}, 0.5);  // nothing is aligned
  const Fn drop = odd.run, expected = odd.reference;
  odd.inputs = {normal({42}, "odd")};
  odd.run = [drop](const Tensors& in) { return drop({slice(in[0], 0, 1, 42)}); };
  odd.reference = [expected](const Tensors& in) { return expected({slice(in[0], 0, 1, 42)}); };
  c.samples.push_back(odd);
  const auto run = [path](const Tensor& x, double p) {
    Generator rng(1);
    path ? drop_path(x, p, rng, true) : dropout(x, p, rng, true);
  };
  const Tensor x = normal({2, 3}, "x");
  c.errors = {
      {"p too large", [=] { run(x, 1); }, "p must be in [0, 1)"},
      {"p negative", [=] { run(x, -0.1); }, "p must be in [0, 1)"},
      {"integers", [=] { run(integers({2}, "x", 0, 3), 0.5); }, "floating"},
  };
  if (path) c.errors.push_back({"scalar", [=] { run(values({1}, {}), 0.5); }, "[B, ...]"});
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() { return {case_of("dropout", false), case_of("drop_path", true)}; }

}  // namespace capo::test
