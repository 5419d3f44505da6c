// Results of 32 MiB and more are written past the caches on the CPU: the same bits as in parts, at any alignment.
#include <capo/autograd/autograd.h>
#include <capo/engine/cpu.h>
#include <capo/ops/copy.h>
#include <capo/ops/group_norm.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/softmax.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>
#include <capo/tests/support.h>

#include <doctest/doctest.h>

#include <functional>

using namespace capo;
using namespace capo::test;
using namespace capo::testing;

namespace {

constexpr std::int64_t kRows = 64 * 200, kColumns = 661;  // 33.8 MB; rows end within lines

using Map = std::function<Tensor(const Tensor& x, const Tensor& dy)>;

// f of all rows against f of eight parts of them, each too small to be streamed.
void check(const char* name, const Tensor& x, const Tensor& dy, const Map& f) {
  const Tensor whole = f(x, dy);
  REQUIRE(whole.nbytes() >= std::size_t{32} << 20);
  const std::int64_t part = x.size(0) / 8;
  for (std::int64_t k = 0; k < 8; ++k) {
    const Tensor y = f(slice(x, 0, k * part, (k + 1) * part), slice(dy, 0, k * part, (k + 1) * part));
    CHECK_MESSAGE(same_bits(slice(whole, 0, k * part, (k + 1) * part), y), std::string(name) << ", part " << k);
  }
}

Tensor gradient(const Tensor& x0, const Tensor& dy, const std::function<Tensor(const Tensor&)>& f) {
  const Tensor x = clone(x0);
  set_requires_grad(x, true);
  return grad({f(x)}, {x}, {dy})[0];
}

}  // namespace

TEST_CASE("large results are streamed with the bits of small ones, on every instruction set") {
  const IsaScope restore;
  Generator rng(1);
  const Tensor x = rand_normal({kRows, kColumns}, rng), dy = rand_normal({kRows, kColumns}, rng);
  const Tensor w = rand_normal({kColumns}, rng), b = rand_normal({kColumns}, rng);
  const Tensor double_width = rand_normal({2 * kRows, kColumns}, rng);
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    check("gelu", x, dy, [](const Tensor& a, const Tensor&) { return gelu(a); });
    check("gelu'", x, dy, [](const Tensor& a, const Tensor& g) { return unary_backward(UnaryKind::gelu, g, a, 0, 0); });
    check("clone", x, dy, [](const Tensor& a, const Tensor&) { return clone(a); });
    check("to bf16", double_width, double_width, [](const Tensor& a, const Tensor&) { return cast(a, bf16); });
    check("from f16", cast(x, f16), dy, [](const Tensor& a, const Tensor&) { return cast(a, f32); });
    check("softmax", x, dy, [](const Tensor& a, const Tensor&) { return softmax(a); });
    check("softmax'", x, dy,
          [](const Tensor& a, const Tensor& g) { return gradient(a, g, [](const Tensor& v) { return softmax(v); }); });
    check("layer_norm", x, dy, [&](const Tensor& a, const Tensor&) { return layer_norm(a, w, b); });
    check("layer_norm'", x, dy, [&](const Tensor& a, const Tensor& g) {
      return gradient(a, g, [&](const Tensor& v) { return layer_norm(v, w, b); });
    });
    check("layer_norm' beside its weights'", x, dy, [&](const Tensor& a, const Tensor& g) {
      const Tensor leaves[] = {clone(a), clone(w), clone(b)};
      for (const Tensor& t : leaves) set_requires_grad(t, true);
      return grad({layer_norm(leaves[0], leaves[1], leaves[2])}, {leaves[0], leaves[1], leaves[2]}, {g})[0];
    });
    const Tensor image = reshape(x, {8, kRows / 8, kColumns}), dimage = reshape(dy, {8, kRows / 8, kColumns});
    check("group_norm", image, dimage, [&](const Tensor& a, const Tensor&) { return group_norm(a, 1, w, b); });
    check("group_norm'", image, dimage, [&](const Tensor& a, const Tensor& g) {
      return gradient(a, g, [&](const Tensor& v) { return group_norm(v, 1, w, b); });
    });
  }
}
