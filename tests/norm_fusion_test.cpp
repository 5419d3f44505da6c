// A norm with its residual sum and activation in one pass against the ops one after the other, to the bit; and what
// it keeps.
#include <capo/autograd/autograd.h>
#include <capo/engine/cpu.h>
#include <capo/ops/batch_norm.h>
#include <capo/ops/binary.h>
#include <capo/ops/group_norm.h>
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

struct Case {
  const char* name;
  Activation activation;
  double slope;
};
constexpr Case kCases[] = {{"none", Activation::none, 0},
                           {"relu", Activation::relu, 0},
                           {"leaky relu", Activation::relu, 0.01},
                           {"silu", Activation::silu, 0}};

Tensor activate(const Tensor& z, const Case& c) {
  if (c.activation == Activation::silu) return silu(z);
  if (c.activation == Activation::relu) return c.slope == 0 ? relu(z) : leaky_relu(z, c.slope);
  return z;
}

struct Inputs {
  Tensor x, weight, bias, residual, dy;
  Tensors leaves() const { return {x, weight, bias, residual}; }
};
Inputs inputs_in(DType t, const Shape& shape = {3, 37, 5, 19}) {
  const Shape channels{shape.back()};
  const Inputs in{cast(normal(shape, "x", 0.3, 2), t), cast(normal(channels, "weight", 1, 0.3), t),
                  cast(normal(channels, "bias"), t), cast(normal(shape, "residual"), t), cast(normal(shape, "dy"), t)};
  for (const Tensor& leaf : in.leaves()) set_requires_grad(leaf, true);
  return in;
}

// y and the gradients of whatever it depends on.
Tensors all_of(const Tensor& y, const Inputs& in) {
  Tensors out = grad({y}, in.leaves(), {in.dy});
  out.push_back(y);
  return out;
}
bool same(const Tensors& a, const Tensors& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i].defined() != b[i].defined()) return false;
    if (a[i].defined() && !same_bits(a[i], b[i])) return false;
  }
  return a.size() == b.size();
}

template <class F>
void on_every_isa(const F& f) {
  const Isa before = isa();
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    for (const DType t : {f32, f64})
      for (const std::int64_t channels : {19, 32}) f(inputs_in(t, {3, 37, 5, channels}));
  }
  set_isa(before);
}

std::int64_t bytes_kept(const Inputs& in, const std::function<Tensor()>& run) {
  const SavedBytes saved({in.weight, in.bias});
  const Tensor y = run();
  return saved.total();
}

}  // namespace

TEST_CASE("group_norm and instance_norm: an activation in the same pass gives the composite's bits") {
  on_every_isa([](const Inputs& in) {
    for (const Case& c : kCases) {
      const Tensor by_group = group_norm(in.x, 1, in.weight, in.bias),
                   by_channel = instance_norm(in.x, in.weight, in.bias);
      CHECK_MESSAGE(same(all_of(group_norm(in.x, 1, in.weight, in.bias, 1e-5, c.activation, c.slope), in),
                         all_of(activate(by_group, c), in)), c.name);
      CHECK_MESSAGE(same(all_of(instance_norm(in.x, in.weight, in.bias, 1e-5, c.activation, c.slope), in),
                         all_of(activate(by_channel, c), in)), c.name);
    }
  });
}

TEST_CASE("group_norm: a sample at a time or a step at a time, the same bits") {
  const ThreadsScope restore;
  const auto results = [](int threads, std::int64_t groups) {
    set_num_threads(threads);
    std::vector<Tensors> all;
    on_every_isa([&](const Inputs& few) {
      const Inputs in = inputs_in(few.x.dtype(), {8, 9, 15, 24});  // three chunks of rows
      for (const Case& c : kCases)
        all.push_back(all_of(group_norm(in.x, groups, in.weight, in.bias, 1e-5, c.activation, c.slope), in));
    });
    return all;
  };
  for (const std::int64_t groups : {1, 4, 24}) {
    // 8 samples: 4 a thread, or fewer.
    const std::vector<Tensors> samples = results(1, groups), steps = results(3, groups);
    REQUIRE(samples.size() == steps.size());
    for (std::size_t i = 0; i < samples.size(); ++i)
      CHECK_MESSAGE(same(samples[i], steps[i]), groups << " groups, case " << i);
  }
}

TEST_CASE("batch_norm: residual and activation in the same pass give the composite's bits") {
  on_every_isa([](const Inputs& in) {
    const DType t = in.x.dtype();
    const Shape channels = in.weight.shape();
    const Tensor mean = cast(normal(channels, "mean"), t), var = cast(uniform(channels, "var", 0.5, 2), t);
    for (const bool training : {true, false})
      for (const bool shortcut : {true, false})
        for (const Case& c : kCases) {
          const auto fused = [&] {
            return batch_norm(in.x, in.weight, in.bias, mean, var, training, 0.1, 1e-5, false, c.activation,
                              shortcut ? in.residual : Tensor(), c.slope);
          };
          const Tensor norm = batch_norm(in.x, in.weight, in.bias, mean, var, training, 0.1, 1e-5, false);
          const Tensors composite = all_of(activate(shortcut ? norm + in.residual : norm, c), in);
          CHECK_MESSAGE(same(all_of(fused(), in), composite), c.name);
          CHECK_MESSAGE(same(all_of(affine(fused(), 1, 0), in), composite), c.name);  // dy is the pass's: written over
        }
  });
}

TEST_CASE("batch_norm: of rows that are wide and far, every column's bits are those of a few columns alone") {
  const Isa before = isa();
  for (const Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
    if (level > best_isa()) break;
    set_isa(level);
    const Inputs in = inputs_in(f32, {5, 37, 5, 300});
    CHECK(in.x.numel() * 4 > (1 << 20));  // beyond a second cache
    const auto run = [](const Inputs& part) {
      const Shape channels = part.weight.shape();
      const Tensor mean = zeros(channels, f32), var = ones(channels, f32);
      return all_of(batch_norm(part.x, part.weight, part.bias, mean, var, true, 0.1, 1e-5, false, Activation::silu,
                               part.residual),
                    part);
    };
    const Tensors whole = run(in);
    const auto columns = [](const Tensor& t) { return contiguous(slice(t.detach(), -1, 280, 296)); };
    Inputs part{columns(in.x), columns(in.weight), columns(in.bias), columns(in.residual), columns(in.dy)};
    for (const Tensor& leaf : part.leaves()) set_requires_grad(leaf, true);
    Tensors parts;
    for (const Tensor& t : whole) parts.push_back(columns(t));
    CHECK(same(run(part), parts));
  }
  set_isa(before);
}

TEST_CASE(
    "a fused norm keeps no more than the norm alone; with a residual relu also keeps one of residual and result") {
  const Inputs in = inputs_in(f32);
  const std::int64_t image = bytes_kept(in, [&] { return relu(in.x); });  // one activation as it is allocated
  const auto group = [&](Activation a) {
    return [&in, a] { return group_norm(in.x, 1, in.weight, in.bias, 1e-5, a); };
  };
  CHECK(bytes_kept(in, group(Activation::silu)) == bytes_kept(in, group(Activation::none)));
  CHECK(bytes_kept(in, group(Activation::relu)) == bytes_kept(in, group(Activation::none)));
  const auto apart = [&] { return silu(group_norm(in.x, 1, in.weight, in.bias)); };
  CHECK(bytes_kept(in, apart) == bytes_kept(in, group(Activation::none)));  // silu's argument is made again
  set_recompute(false);
  const std::int64_t not_made_again = bytes_kept(in, apart);
  set_recompute(true);
  CHECK(not_made_again == bytes_kept(in, group(Activation::none)) + image);

  const auto batch = [&](bool training, Activation a, const Tensor& residual) {
    return [&in, training, a, residual] {
      const Tensor mean = zeros({19}, f32), var = ones({19}, f32);
      return batch_norm(in.x, in.weight, in.bias, mean, var, training, 0.1, 1e-5, true, a, residual);
    };
  };
  const std::int64_t plain = bytes_kept(in, batch(true, Activation::none, {}));
  CHECK(bytes_kept(in, batch(true, Activation::relu, {})) == plain);
  CHECK(bytes_kept(in, batch(true, Activation::none, in.residual)) == plain);
  CHECK(bytes_kept(in, batch(true, Activation::relu, in.residual)) == plain + image);
  // A frozen norm inside a trained net keeps its result and no x.
  set_requires_grad(in.weight, false);
  set_requires_grad(in.bias, false);
  CHECK(bytes_kept(in, batch(false, Activation::none, in.residual)) < image);
  const std::int64_t frozen = bytes_kept(in, batch(false, Activation::relu, in.residual));
  CHECK(frozen >= image);
  CHECK(frozen < image + 1024);  // and rstd
}
