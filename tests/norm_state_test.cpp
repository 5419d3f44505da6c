// What batch_norm and dropout do over several calls: running statistics, checkpoint replay, evaluation before training.
#include <capo/autograd/autograd.h>
#include <capo/ops/batch_norm.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/dropout.h>
#include <capo/ops/view.h>
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
  const Tensors y =
      checkpoint([&](const std::vector<Tensor>& in) -> std::vector<Tensor> { return {replayed(in[0], true)}; }, {x},
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

TEST_CASE("batch_norm: the running statistics have the bits of the ops") {
  constexpr std::int64_t kChannels = 300;
  constexpr double kMomentum = 0.1;
  for (const DType t : {f32, f64, bf16})
    for (const bool strided : {false, true}) {
      INFO(to_string(t), strided ? ", strided" : "");
      const Tensor x = cast(normal({7, kChannels}, "x", 2, 3), t);
      const auto statistics = [&](const Tensor& values) {
        const Tensor both = cast(values, t);
        return strided ? select(both, 1, 1) : contiguous(select(both, 1, 1));
      };
      const auto after = [&](const Tensor& mean, const Tensor& var, double momentum) {
        batch_norm(x, {}, {}, mean, var, true, momentum);
      };
      const DType acc = t == f64 ? f64 : f32;
      const Tensor batch_mean = zeros({kChannels}, acc), batch_var = zeros({kChannels}, acc);
      after(batch_mean, batch_var, 1);
      const Tensor before_mean = normal({kChannels, 2}, "mean"), before_var = uniform({kChannels, 2}, "var", 0.5, 2);
      const Tensor mean = statistics(before_mean), var = statistics(before_var);
      const auto expected = [&](const Tensor& running, const Tensor& batch) {
        return cast(cast(running, acc) * (1 - kMomentum) + batch * kMomentum, t);
      };
      const Tensor mean_then = expected(mean, batch_mean), var_then = expected(var, batch_var);
      after(mean, var, kMomentum);
      CHECK(same_bits(contiguous(mean), mean_then));
      CHECK(same_bits(contiguous(var), var_then));
    }
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
