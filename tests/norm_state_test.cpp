// What batch_norm and dropout do over several calls: running statistics, checkpoint replay, evaluation before training.
#include <capo/autograd/autograd.h>
#include <capo/ops/batch_norm.h>
#include <capo/ops/binary.h>
#include <capo/ops/dropout.h>
#include <capo/tests/op_test.h>

#include <doctest/doctest.h>

using namespace capo;
using namespace capo::test;

namespace {

struct Norm {
  Tensor weight = normal({3}, "weight"), bias = normal({3}, "bias");
  Tensor mean = zeros({3}, f64), var = ones({3}, f64);
  Norm() {
    set_requires_grad(weight, true);
    set_requires_grad(bias, true);
  }
  Tensor operator()(const Tensor& x, bool training) const { return batch_norm(x, weight, bias, mean, var, training); }
};

}  // namespace

TEST_CASE("batch_norm: a checkpointed segment updates the statistics once") {
  const Tensor x = normal({5, 3}, "x", 2), dy = normal({5, 3}, "dy");
  const Norm plain, replayed;
  const auto a = grad({plain(x, true)}, {plain.weight, plain.bias}, {dy});
  const Tensors y = checkpoint([&](const std::vector<Tensor>& in) -> std::vector<Tensor> { return {replayed(in[0], true)}; }, {x},
                               {replayed.weight, replayed.bias});
  const auto b = grad(y, {replayed.weight, replayed.bias}, {dy});
  CHECK(same_bits(plain.mean, replayed.mean));
  CHECK(same_bits(plain.var, replayed.var));
  CHECK(same_bits(a[0], b[0]));
  CHECK(same_bits(a[1], b[1]));
}

TEST_CASE("batch_norm: training between an evaluation and its backward pass does not disturb it") {
  const Tensor x = normal({5, 3}, "x", 2), dy = normal({5, 3}, "dy");
  const Norm undisturbed, disturbed;
  const auto a = grad({undisturbed(x, false)}, {undisturbed.weight}, {dy});
  const Tensor y = disturbed(x, false);
  disturbed(x, true);
  CHECK(same_bits(a[0], grad({y}, {disturbed.weight}, {dy})[0]));
}

TEST_CASE("dropout: a checkpointed segment draws the same mask twice") {
  const Tensor x = normal({40}, "x"), dy = normal({40}, "dy");
  set_requires_grad(x, true);
  Generator first(5, 6), second(5, 6);
  const auto a = grad({dropout(x * x, 0.5, first, true)}, {x}, {dy});
  const Tensors y = checkpoint([&](const std::vector<Tensor>& in) -> std::vector<Tensor> {
    return {dropout(in[0] * in[0], 0.5, second, true)};
  }, {x}, {});
  dropout(x, 0.5, second, true);  // the stream moves on before the replay
  CHECK(same_bits(a[0], grad(y, {x}, {dy})[0]));
}
