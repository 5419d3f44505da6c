// Results beyond 32 MiB are written past the caches, by loops of their own: they must have the bits of the same rows
// computed a few at a time. Rows of an odd number of elements begin anywhere in a line of 64 bytes.
#include <capo/autograd/autograd.h>
#include <capo/engine/rng.h>
#include <capo/ops/binary.h>
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

using Rows = std::function<Tensor(const std::vector<Tensor>&)>;

// The gradients of `rows` and then the values of f(rows, weights). The weights' gradients are asked for as well: the
// backward pass then does everything at once.
std::vector<Tensor> results(const Rows& f, const std::vector<Tensor>& rows, const std::vector<Tensor>& weights,
                            const Tensor& dy) {
  std::vector<Tensor> in;
  for (const std::vector<Tensor>* list : {&rows, &weights})
    for (const Tensor& t : *list) {
      in.push_back(t.detach());
      set_requires_grad(in.back(), true);
    }
  const Tensor y = f(in);
  std::vector<Tensor> out = grad({y}, in, {dy});
  out.resize(rows.size());
  out.push_back(y.detach());
  return out;
}

// Compares all rows at once with the same rows in pieces of `piece`, on every instruction set.
void compare(const Shape& shape, int inputs, const std::vector<Tensor>& weights, std::int64_t piece, const Rows& f) {
  Generator rng(7);
  std::vector<Tensor> x;
  for (int i = 0; i < inputs; ++i) x.push_back(rand_normal(shape, rng));
  const Tensor dy = rand_normal(shape, rng);
  REQUIRE(dy.numel() * 4 >= (std::int64_t{32} << 20));
  const IsaScope scope;
  for (const Isa isa : {Isa::v2, Isa::v3, Isa::v4}) {
    if (isa > best_isa()) continue;
    set_isa(isa);
    CAPTURE(to_string(isa));
    const std::vector<Tensor> whole = results(f, x, weights, dy);
    for (const std::int64_t at : {std::int64_t{0}, shape[0] / piece / 2 * piece, shape[0] - piece}) {
      std::vector<Tensor> some;
      for (const Tensor& t : x) some.push_back(contiguous(slice(t, 0, at, at + piece)));
      const std::vector<Tensor> part = results(f, some, weights, contiguous(slice(dy, 0, at, at + piece)));
      for (std::size_t i = 0; i < part.size(); ++i) {
        CAPTURE(at);
        CAPTURE(i);
        CHECK(same_bits(part[i], contiguous(slice(whole[i], 0, at, at + piece))));
      }
    }
  }
}

std::vector<Tensor> weight_and_bias(std::int64_t n) {
  Generator rng(8);
  return {rand_normal({n}, rng), rand_normal({n}, rng)};
}

}  // namespace

TEST_CASE("layer norm past the caches") {
  for (const std::int64_t n : {1024, 1003})
    compare({8400, n}, 1, weight_and_bias(n), 64,
            [](const std::vector<Tensor>& in) { return layer_norm(in[0], in[1], in[2]); });
  compare({8400, 1003}, 1, {}, 64, [](const std::vector<Tensor>& in) { return rms_norm(in[0]); });
}

TEST_CASE("a residual sum's layer norm past the caches") {
  for (const std::int64_t n : {1003, 9001})  // the second: more than a row's buffer
    compare({n == 1003 ? 8400 : 960, n}, 2, weight_and_bias(n), 64, [](const std::vector<Tensor>& in) {
      const AddNorm norm = add_layer_norm(in[0], in[1], in[2], in[3]);
      return norm.sum + norm.y;
    });
}

TEST_CASE("softmax past the caches") {
  for (const std::int64_t n : {1024, 1003, 5}) {
    const std::int64_t rows = n == 5 ? 1680000 : 8400;
    compare({rows, n}, 1, {}, 64, [](const std::vector<Tensor>& in) { return softmax(in[0]); });
    compare({rows, n}, 1, {}, 64, [](const std::vector<Tensor>& in) { return log_softmax(in[0]); });
  }
}

TEST_CASE("group norm past the caches") {
  for (const std::int64_t n : {64, 35}) {
    const std::int64_t samples = n == 64 ? 132 : 250, groups = n == 64 ? 4 : 5;
    compare({samples, 1024, n}, 1, weight_and_bias(n), 2,
            [groups](const std::vector<Tensor>& in) { return group_norm(in[0], groups, in[1], in[2]); });
    compare({samples, 1024, n}, 1, weight_and_bias(n), 2, [](const std::vector<Tensor>& in) {
      return group_norm(in[0], 1, in[1], in[2], 1e-5, Activation::silu);
    });
  }
}

TEST_CASE("elementwise past the caches") {
  compare({8400, 1003}, 1, {}, 64, [](const std::vector<Tensor>& in) { return gelu(in[0]); });
}
