// What cuda/cublaslt.cpp asks of cuBLASLt, against a stand-in that computes what the library documents
// (cublaslt_fake.cpp): transpositions, batches, epilogues, residuals, alignments, one plan per problem, tuning.
#include <capo/cuda/gemm.h>
#include <capo/engine/dtype.h>
#include <capo/engine/rng.h>
#include <capo/ops/copy.h>
#include <capo/tests/shim/cublaslt_fake.h>

#include <cmath>
#include <cstring>
#include <doctest/doctest.h>
#include <vector>

using namespace capo;
using shim::fake_products;

namespace {

struct Case {
  DType dtype = f32;
  std::int64_t m = 24, n = 16, k = 40, matrices = 1;
  bool a_transposed = false, b_transposed = false, one_b = false, bias = false, z = false, residual = false,
       sums = false;
  Activation activation = Activation::none;
  std::int64_t gap = 0;  // between the rows of c
};

double read(DType t, const void* p, std::int64_t i) {
  if (t == f32) return static_cast<const float*>(p)[i];
  return t == bf16 ? to_f32(static_cast<const BFloat16*>(p)[i]) : to_f32(static_cast<const Half*>(p)[i]);
}
void write(DType t, void* p, std::int64_t i, float v) {
  if (t == f32)
    static_cast<float*>(p)[i] = v;
  else if (t == bf16)
    static_cast<BFloat16*>(p)[i] = to_bf16(v);
  else
    static_cast<Half*>(p)[i] = to_f16(v);
}

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return x > 0 ? x : 0;
    case Activation::gelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    default: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
  }
}

// n random elements on the shim's device, 256-byte aligned.
struct Buffer {
  Tensor bytes;
  void* data;
  Buffer(DType t, std::int64_t n, std::uint64_t seed)
      : bytes(empty({n * static_cast<std::int64_t>(size_of(t)) + 256}, u8, Device{DeviceType::cuda, 0})) {
    const auto at = reinterpret_cast<std::uintptr_t>(bytes.data());
    data = reinterpret_cast<void*>((at + 255) / 256 * 256);
    Generator rng(seed);
    const Tensor values = rand_normal({n > 0 ? n : 1}, rng);
    for (std::int64_t i = 0; i < n; ++i) write(t, data, i, values.data<float>()[i]);
  }
};

struct Run {
  Case is;
  std::int64_t c_row;
  Buffer a, b, bias, z, c, residual, sums;
  GemmArgs args{};

  explicit Run(const Case& x)
      : is(x), c_row(x.n + x.gap), a(x.dtype, x.matrices * x.m * x.k, 1),
        b(x.dtype, (x.one_b ? 1 : x.matrices) * x.k * x.n, 2), bias(x.dtype, x.n, 3),
        z(x.dtype, x.matrices * x.m * c_row, 4), c(x.dtype, x.matrices * x.m * c_row, 5),
        residual(x.dtype, x.matrices * x.m * c_row, 6), sums(x.dtype, x.m, 7) {
    args.dtype = x.dtype;
    args.a = a.data, args.b = b.data, args.c = c.data;
    args.bias = x.bias ? bias.data : nullptr;
    args.z = x.z ? z.data : nullptr;
    args.residual = x.residual ? residual.data : nullptr;
    args.a_sums = x.sums ? sums.data : nullptr;
    args.activation = x.activation;
    args.m = x.m, args.n = x.n, args.k = x.k, args.c_row = c_row;
    args.a_row = x.a_transposed ? 1 : x.k, args.a_k = x.a_transposed ? x.m : 1;
    args.b_k = x.b_transposed ? 1 : x.n, args.b_col = x.b_transposed ? x.k : 1;
    args.rank = x.matrices > 1 ? 1 : 0;
    args.batch[0] = x.matrices, args.sa[0] = x.m * x.k, args.sb[0] = x.one_b ? 0 : x.k * x.n;
    args.matrices = x.matrices, args.k_chunk = x.k, args.k_chunks = 1;
  }
  bool multiply() { return kernels::cublaslt_multiply(args, nullptr); }

  double before(std::int64_t batch, std::int64_t i, std::int64_t j) const {  // the activation and the residual
    double sum = is.bias ? read(is.dtype, bias.data, j) : 0;
    for (std::int64_t l = 0; l < is.k; ++l)
      sum += read(is.dtype, a.data, batch * is.m * is.k + i * args.a_row + l * args.a_k) *
             read(is.dtype, b.data, batch * args.sb[0] * (is.matrices > 1) + l * args.b_k + j * args.b_col);
    return sum;
  }
  // The result beside a plain loop. What lies between the rows of c stays as it was.
  void compare() const {
    const double unit = is.dtype == f32 ? 1e-6 : is.dtype == f16 ? 1e-3 : 8e-3;
    const Buffer untouched(is.dtype, is.matrices * is.m * c_row, 5);
    for (std::int64_t batch = 0; batch < is.matrices; ++batch)
      for (std::int64_t i = 0; i < is.m; ++i)
        for (std::int64_t j = 0; j < c_row; ++j) {
          const std::int64_t at = (batch * is.m + i) * c_row + j;
          if (j >= is.n) {
            REQUIRE(read(is.dtype, c.data, at) == read(is.dtype, untouched.data, at));
            continue;
          }
          const double x = before(batch, i, j), bound = unit * 4 * (1 + std::abs(x));
          if (is.z) REQUIRE(std::abs(read(is.dtype, z.data, at) - x) < bound);
          const double y = activate(is.activation, x) + (is.residual ? read(is.dtype, residual.data, at) : 0);
          REQUIRE(std::abs(read(is.dtype, c.data, at) - y) < bound + unit * 4 * std::abs(y));
        }
    if (!is.sums) return;
    for (std::int64_t i = 0; i < is.m; ++i) {
      double sum = 0;
      for (std::int64_t l = 0; l < is.k; ++l) sum += read(is.dtype, a.data, i * args.a_row + l * args.a_k);
      REQUIRE(std::abs(read(is.dtype, sums.data, i) - sum) < unit * 4 * (1 + std::abs(sum)));
    }
  }
};

void check(const Case& c) {
  CAPTURE(to_string(c.dtype));
  CAPTURE(c.m);
  CAPTURE(c.a_transposed);
  CAPTURE(c.b_transposed);
  CAPTURE(static_cast<int>(c.activation));
  CAPTURE(c.z);
  Run run(c);
  REQUIRE(run.multiply());
  run.compare();
}

}  // namespace

TEST_CASE("products in all transpositions, batched and not, are those of a plain loop") {
  for (const DType t : {f32, bf16, f16})
    for (const bool ta : {false, true})
      for (const bool tb : {false, true})
        for (const std::int64_t matrices : {1, 3})
          for (const bool one_b : {false, true})
            for (const std::int64_t m : {24, 5, 1}) {
              Case c;
              c.dtype = t, c.a_transposed = ta, c.b_transposed = tb, c.matrices = matrices, c.one_b = one_b, c.m = m;
              if (m != 24) c.n = 7, c.k = 3;
              check(c);
            }
}

TEST_CASE("bias, activation and what is kept of it") {
  for (const DType t : {f32, bf16})
    for (const Activation activation : {Activation::none, Activation::relu, Activation::gelu, Activation::gelu_tanh})
      for (const bool bias : {false, true})
        for (const bool z : {false, true})
          for (const std::int64_t n : {16, 7})  // 7: z's rows suit no auxiliary matrix
            for (const std::int64_t matrices : {1, 2}) {
              Case c;
              c.dtype = t, c.activation = activation, c.bias = bias, c.z = z, c.n = n, c.matrices = matrices;
              c.b_transposed = true;
              check(c);
            }
}

TEST_CASE("a residual is added, in place too, and rows of c may lie apart") {
  for (const DType t : {f32, bf16, f16})
    for (const std::int64_t gap : {0, 8, 3})
      for (const bool bias : {false, true}) {
        Case c;
        c.dtype = t, c.residual = true, c.gap = gap, c.bias = bias;
        check(c);
        Run run(c);
        std::memcpy(run.c.data, run.residual.data, static_cast<std::size_t>(c.m * run.c_row) * size_of(t));
        run.args.residual = run.c.data;
        REQUIRE(run.multiply());
        for (std::int64_t i = 0; i < c.m; ++i)
          for (std::int64_t j = 0; j < c.n; ++j) {
            const std::int64_t at = i * run.c_row + j;
            const double y = run.before(0, i, j) + read(t, run.residual.data, at);
            REQUIRE(std::abs(read(t, run.c.data, at) - y) < (t == f32 ? 1e-5 : 0.1) * (1 + std::abs(y)));
          }
      }
}

TEST_CASE("a bias gradient comes with the weight gradient, and alone where nothing else is asked") {
  for (const DType t : {f32, bf16})
    for (const bool ta : {false, true})
      for (const bool tb : {false, true}) {
        Case c;
        c.dtype = t, c.sums = true, c.a_transposed = ta, c.b_transposed = tb;
        check(c);
        c.bias = true;
        CHECK_FALSE(Run(c).multiply());
      }
}

TEST_CASE("what the library cannot read is refused") {
  Run run{Case{}};
  run.args.a_row = 2, run.args.a_k = 48;
  CHECK_FALSE(run.multiply());
  run = Run{Case{}};
  run.args.k = 0;
  CHECK_FALSE(run.multiply());
  run = Run{Case{}};
  run.args.rank = 2, run.args.batch[0] = run.args.batch[1] = 1, run.args.sa[0] = 7, run.args.sa[1] = 3;
  CHECK_FALSE(run.multiply());
}

TEST_CASE("an epilogue that the library declines becomes a second pass") {
  Case c;
  c.activation = Activation::gelu_tanh, c.bias = true, c.m = 23;
  fake_products().refused_epilogue = 32 | 4;  // CUBLASLT_EPILOGUE_GELU_BIAS
  check(c);
  fake_products().refused_epilogue = 0;
}

TEST_CASE("one search per problem; the operands' alignment is part of it") {
  Case c;
  c.m = 22;
  Run run(c);
  const int before = fake_products().searches;
  CHECK(kernels::cublaslt_takes(run.args, nullptr));
  REQUIRE(run.multiply());
  REQUIRE(run.multiply());
  CHECK(fake_products().searches == before + 1);
  run.args.k -= 1, run.args.a = static_cast<float*>(run.a.data) + 1;
  REQUIRE(run.multiply());  // the stand-in throws when less aligned than the search was told
  run.args.a = run.a.data;
  REQUIRE(run.multiply());
  run.args.n -= 1, run.args.b = static_cast<float*>(run.b.data) + 1;
  REQUIRE(run.multiply());
  run.args.b = run.b.data;
  REQUIRE(run.multiply());
  CHECK(fake_products().searches == before + 5);
}

TEST_CASE("tuning keeps the fastest offer, outside a capture") {
  set_product_tuning(true);
  fake_products().fastest = 2;
  Case c;
  c.m = 21;
  Run run(c);
  fake_products().capturing = true;
  REQUIRE(run.multiply());
  CHECK(fake_products().last_algorithm == 0);
  fake_products().capturing = false;
  REQUIRE(run.multiply());
  CHECK(fake_products().last_algorithm == 2);
  run.compare();
  c.residual = true;
  Run in_place(c);
  in_place.args.residual = in_place.c.data;
  REQUIRE(in_place.multiply());
  CHECK(fake_products().last_algorithm == 0);  // timing would add to c again and again
  set_product_tuning(false);
  REQUIRE(run.multiply());
  CHECK(fake_products().last_algorithm == 0);
  fake_products().fastest = 0;
}
