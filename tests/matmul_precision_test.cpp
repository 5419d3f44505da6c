// Products whose f32 operands are rounded to bf16, and products of 16-bit tensors: equal to the product of the rounded
// operands, on every instruction set.
#include <capo/autograd/autograd.h>
#include <capo/engine/cpu.h>
#include <capo/engine/threads.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/matmul.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/support.h>

#include <doctest/doctest.h>

#include <cstring>

using namespace capo;
using namespace capo::testing;

namespace {

struct Bf16Scope {
  Bf16Scope() { set_matmul_precision(bf16); }
  ~Bf16Scope() { set_matmul_precision(f32); }
};

Tensor rounded(const Tensor& t) { return cast(cast(t, bf16), f64); }

// A [m, k] as it lies, transposed in memory, or with a hole between elements.
Tensor matrix(Generator& rng, std::int64_t rows, std::int64_t cols, int layout) {
  if (layout == 1) return transpose(rand_normal({cols, rows}, rng), 0, 1);
  if (layout == 2) return select(rand_normal({rows, cols, 2}, rng), 2, 1);
  return rand_normal({rows, cols}, rng);
}

}  // namespace

TEST_CASE("bf16 products equal products of rounded operands, whatever the shape, the layout and the instruction set") {
  const IsaScope restore;
  struct Case {
    std::int64_t m, n, k;
  };
  Generator rng(3);
  for (const Case& s : {Case{1, 1, 1}, {5, 7, 3}, {17, 33, 31}, {48, 64, 32}, {97, 100, 65}, {300, 130, 47},
                        {129, 192, 192}, {40, 17, 1801}, {260, 48, 2000}, {192, 576, 1088}, {3, 4, 0}})
    for (int la = 0; la < 3; ++la)
      for (int lb = 0; lb < 3; ++lb) {
        const Tensor a = matrix(rng, s.m, s.k, la), b = matrix(rng, s.k, s.n, lb);
        const Tensor want = matmul(rounded(a), rounded(b));
        for (Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
          if (level > best_isa()) break;
          set_isa(level);
          const Bf16Scope scope;
          INFO(s.m, " x ", s.n, " x ", s.k, " layouts ", la, lb, " ", to_string(level));
          CHECK(relative_error(matmul(a, b), want) < 2e-6);
        }
      }
}

TEST_CASE("16-bit products: rounded once, whatever the shape, the layout and the instruction set") {
  const IsaScope restore;
  struct Case {
    std::int64_t m, n, k;
  };
  Generator rng(7);
  for (const Case& s : {Case{1, 1, 1}, {5, 7, 3}, {17, 33, 31}, {97, 100, 65}, {200, 130, 64}, {129, 192, 192},
                        {40, 17, 1801}, {260, 48, 3000}, {8, 200, 1300}, {300, 8, 200}, {13, 30, 97}, {90, 9, 130},
                        {3, 4, 0}})
    for (int la = 0; la < 3; ++la)
      for (int lb = 0; lb < 3; ++lb) {
        const Tensor a = matrix(rng, s.m, s.k, la), b = matrix(rng, s.k, s.n, lb);
        for (DType t : {bf16, f16}) {
          const auto stored = [&](const Tensor& x, int layout) {
            return layout == 1 ? transpose(cast(transpose(x, 0, 1), t), 0, 1) : cast(x, t);
          };
          const Tensor at = stored(a, la), bt = stored(b, lb), want = matmul(cast(at, f64), cast(bt, f64));
          for (Isa level : {Isa::v2, Isa::v3, Isa::v4}) {
            if (level > best_isa()) break;
            set_isa(level);
            INFO(s.m, " x ", s.n, " x ", s.k, " layouts ", la, lb, " ", to_string(level), " ", t);
            const Tensor got = matmul(at, bt);
            REQUIRE(got.dtype() == t);
            CHECK(relative_error(got, want) < (t == bf16 ? 0x1.02p-8 : 0x1.02p-11));
          }
        }
      }
}

TEST_CASE("linear in 16 bits: bias, activation and residual before the one rounding; equal bits for any threads") {
  Generator rng(8);
  const ThreadsScope restore;
  const Tensor x = cast(rand_normal({3, 70, 96}, rng), bf16), w = cast(rand_normal({200, 96}, rng), bf16);
  const Tensor bias = cast(rand_normal({200}, rng), bf16), r = cast(rand_normal({3, 70, 200}, rng), bf16);
  const Tensor sum = matmul(cast(x, f64), transpose(cast(w, f64), 0, 1)) + cast(bias, f64);
  Tensor first[3];
  for (int threads : {1, 2, 3}) {
    set_num_threads(threads);
    const Tensor got[3] = {linear(x, w, bias), linear(x, w, bias, Activation::relu), add_linear(r, {{x, w, bias}})};
    if (threads == 1) {
      CHECK(relative_error(got[0], sum) < 0x1.02p-8);
      CHECK(relative_error(got[1], relu(sum)) < 0x1.02p-8);
      CHECK(relative_error(got[2], sum + cast(r, f64)) < 0x1.02p-8);
      for (int i = 0; i < 3; ++i) first[i] = got[i];
    }
    for (int i = 0; i < 3; ++i)
      CHECK(std::memcmp(got[i].data(), first[i].data(), static_cast<std::size_t>(got[i].numel()) * 2) == 0);
  }
}

TEST_CASE("batched products and a shared second matrix") {
  Generator rng(4);
  const Bf16Scope scope;
  const Tensor a = rand_normal({3, 20, 130, 65}, rng), b = rand_normal({3, 1, 65, 50}, rng);
  CHECK(relative_error(matmul(a, b), matmul(rounded(a), rounded(b))) < 2e-6);
  const Tensor c = rand_normal({65, 50}, rng);
  CHECK(relative_error(matmul(a, c), matmul(rounded(a), rounded(c))) < 2e-6);
}

TEST_CASE("linear: bias and activation stay f32, gradients are rounded products, bits do not depend on threads") {
  Generator rng(5);
  const Tensor x = rand_normal({7, 31, 96}, rng), w = rand_normal({200, 96}, rng), bias = rand_normal({200}, rng),
               dy = rand_normal({7, 31, 200}, rng);
  const ThreadsScope restore;
  Tensor first[3];
  for (int threads : {1, 2, 3}) {
    set_num_threads(threads);
    const Bf16Scope scope;
    const Tensor xv = x.detach(), wv = w.detach();
    set_requires_grad(xv, true), set_requires_grad(wv, true);
    const Tensor y = linear(xv, wv, bias);
    const auto g = grad({y}, {xv, wv}, {dy});
    const Tensor got[3] = {y.detach(), g[0], g[1]};
    if (threads == 1) {
      const Tensor rows = reshape(rounded(dy), {217, 200});
      CHECK(relative_error(y, matmul(rounded(x), transpose(rounded(w), 0, 1)) + cast(bias, f64)) < 2e-6);
      CHECK(relative_error(g[0], matmul(rounded(dy), rounded(w))) < 2e-6);
      CHECK(relative_error(g[1], matmul(transpose(rows, 0, 1), reshape(rounded(x), {217, 96}))) < 2e-6);
      for (int i = 0; i < 3; ++i) first[i] = got[i];
    }
    for (int i = 0; i < 3; ++i)
      CHECK(std::memcmp(got[i].data(), first[i].data(), static_cast<std::size_t>(got[i].numel()) * 4) == 0);
  }
}

TEST_CASE("only f32 is rounded, only when asked, and only f32 and bf16 can be asked for") {
  Generator rng(6);
  const Tensor a = rand_normal({20, 30}, rng), b = rand_normal({30, 10}, rng);
  const Tensor exact = matmul(cast(a, f64), cast(b, f64));
  CHECK(relative_error(matmul(a, b), exact) < 1e-6);
  {
    const Bf16Scope scope;
    CHECK(matmul_precision() == bf16);
    CHECK(relative_error(matmul(cast(a, f64), cast(b, f64)), exact) == 0);
    CHECK(relative_error(matmul(a, b), exact) > 1e-4);  // it does round
  }
  CHECK(matmul_precision() == f32);
  CHECK_THROWS_WITH_AS(set_matmul_precision(f16), doctest::Contains("must be f32 or bf16"), Error);
}
