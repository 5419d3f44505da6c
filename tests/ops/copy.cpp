// Samples of creation, copies, casts and fills. References are host loops on engine/dtype.h and engine/rng.h.
#include <capo/autograd/autograd.h>
#include <capo/engine/backend.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

namespace capo::test {
namespace {

const double kInf = HUGE_VAL;

template <class F>
Tensor generate(const Shape& shape, const F& f) {
  std::vector<double> v;
  for (std::int64_t i = 0; i < numel(shape); ++i) v.push_back(f(i));
  return from_vector<double>(v, shape);
}

// A value as storage of type t holds it, read back.
double stored(double v, DType t) {
  switch (t) {
    case DType::f32: return static_cast<float>(v);
    case DType::bf16: return to_f32(to_bf16(static_cast<float>(v)));
    case DType::f16: return to_f32(to_f16(static_cast<float>(v)));
    case DType::f64: return v;
    case DType::boolean: return v != 0;
    default: return std::trunc(v);
  }
}

Sample create(const std::string& label, std::function<Tensor()> run, std::function<Tensor()> reference) {
  Sample s{label, {}, [run](const Tensors&) { return Tensors{run()}; },
           [reference](const Tensors&) { return Tensors{reference()}; }};
  s.gradient = s.f32 = false;
  s.as_is = true;
  return s;
}

OpCase full_case() {
  OpCase c{"full", {}, {}};
  for (const DType t : {f32, f64, bf16, f16, i32, i64, u8, i8, boolean})
    for (const Shape& shape : {Shape{3, 7}, Shape{}, Shape{0, 4}, Shape{20000}})
      c.samples.push_back(create(cat(t, " ", shape), [=] { return full(shape, 2.7, t, creation_device()); },
                                 [=] { return generate(shape, [=](auto) { return stored(2.7, t); }); }));
  c.errors = {{"negative size", [] { full({2, -1}, 0); }, "shape: sizes must not be negative"},
              {"too many elements", [] { full({std::int64_t{1} << 40, std::int64_t{1} << 40}, 0); }, "shape: "}};
  return c;
}

OpCase arange_case() {
  OpCase c{"arange", {}, {}};
  for (const DType t : {i64, i32, f32, f64, u8})
    for (const std::int64_t n : {0, 1, 113})
      c.samples.push_back(create(cat(t, " ", n), [=] { return arange(n, t, creation_device()); },
                                 [=] { return generate({n}, [](auto i) { return static_cast<double>(i); }); }));
  c.samples.push_back(create("many chunks", [] { return arange(40001, f32, creation_device()); },
                             [] { return generate({40001}, [](auto i) { return static_cast<double>(i); }); }));
  c.errors = {{"negative", [] { arange(-1); }, "shape: sizes must not be negative"},
              {"too many", [] { arange(std::int64_t{1} << 62); }, "shape: "}};
  return c;
}

double unit(std::uint64_t seed, std::uint64_t stream, std::uint64_t block, int word) {
  return (philox(seed, stream, block).v[word] + 0.5) * 0x1p-32;
}

// Offsets are in blocks of four: the draw that follows a reserve(5) starts at block 2.
Tensor uniform_reference(const Shape& shape, double low, double high) {
  return generate(shape, [=](std::int64_t i) {
    return low + (high - low) * unit(7, 9, static_cast<std::uint64_t>(2 + i / 4), static_cast<int>(i % 4));
  });
}
Tensor normal_reference(const Shape& shape, double mean, double std) {
  return generate(shape, [=](std::int64_t i) {
    const auto block = static_cast<std::uint64_t>(2 + i / 4);
    const int pair = static_cast<int>(i % 4) / 2 * 2;
    const double r = std::sqrt(-2 * std::log(unit(7, 9, block, pair))), angle = 2 * M_PI * unit(7, 9, block, pair + 1);
    return mean + std * r * (i % 2 ? std::sin(angle) : std::cos(angle));
  });
}

OpCase random_case(bool normal_draws) {
  OpCase c{normal_draws ? "rand_normal" : "rand_uniform", {}, {}};
  const auto draw = [=](const Shape& shape, DType t) {
    Generator rng(7, 9);
    rng.reserve(5);
    return normal_draws ? rand_normal(shape, rng, -1, 2.5, t, creation_device())
                        : rand_uniform(shape, rng, -1, 2.5, t, creation_device());
  };
  const auto expected = [=](const Shape& shape) {
    return normal_draws ? normal_reference(shape, -1, 2.5) : uniform_reference(shape, -1, 2.5);
  };
  for (const Shape& shape : {Shape{3, 7}, Shape{}, Shape{4}, Shape{0}, Shape{2, 8209}})
    for (const DType t : {f64, f32}) {
      c.samples.push_back(create(cat(t, " ", shape), [=] { return draw(shape, t); }, [=] { return expected(shape); }));
      c.samples.back().tol = t == f32 ? 1e-7 : 1e-14;
      c.samples.back().random = true;
    }
  c.errors = {{"integers", [=] { draw({2}, i64); }, "dtype must be f32 or f64, got i64"},
              {"half", [=] { draw({2}, bf16); }, "dtype must be f32 or f64, got bf16"}};
  return c;
}

Sample identity(const std::string& label, const Tensor& x, Tensor (*op)(const Tensor&)) {
  Sample s{label, {x}, [op](const Tensors& in) { return Tensors{op(in[0])}; }, [](const Tensors& in) {
             return Tensors{from_vector<double>(to_vector<double>(in[0]), in[0].shape())};
           }};
  s.tol = s.tol_f32 = 0;
  s.second_order = true;
  return s;
}

Tensor make(DType t, const std::vector<double>& v, const Shape& shape) {
  const NoGrad off;
  return cast(values(v, shape), t);
}

// Columns first.
Tensor turned(const Tensor& x) {
  return strided_view(x, {x.shape()[1], x.shape()[0]}, Dims{1, x.shape()[1]}, x.offset());
}

OpCase identity_case(const std::string& name, Tensor (*op)(const Tensor&)) {
  OpCase c{name, {}, {}};
  for (const Shape& shape : {Shape{2, 3, 5}, Shape{}, Shape{1, 7, 1}, Shape{0, 4}, Shape{33, 501}})
    c.samples.push_back(identity(to_string(shape), normal(shape, name), op));
  c.samples.push_back(identity("i64", integers({3, 4}, name, -9, 9), op));
  c.samples.push_back(
      identity("u8", make(u8, {1, 2, 3, 250, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18}, {18}), op));
  c.samples.push_back({"bool, turned", {make(boolean, {1, 0, 0, 1, 1, 0}, {2, 3})},
                       [op](const Tensors& in) { return Tensors{op(turned(in[0]))}; },
                       [](const Tensors&) { return Tensors{values({1, 1, 0, 1, 0, 0}, {3, 2})}; }});
  c.samples.back().strided = false;
  c.samples.push_back(identity("special values", values({0.0, -0.0, kInf, -kInf, std::nan("")}, {5}), op));
  c.samples.back().gradient = false;
  c.errors = {{"undefined", [op] { op(Tensor()); }, "tensor: used while undefined"}};
  return c;
}

OpCase cast_case() {
  OpCase c{"cast", {}, {}};
  const std::vector<double> small = {0, 1, 2.75, 100.5, 1e-3, 7.9999};  // fits every dtype
  for (const DType from : {f64, f32, bf16, f16, i32, i64, u8, i8, boolean})
    for (const DType to : {f64, f32, bf16, f16, i32, i64, u8, i8, boolean}) {
      const Tensor x = from == f64 ? values(small, {2, 3}) : make(from, small, {2, 3});
      Sample s{cat(from, " to ", to), {x}, [to](const Tensors& in) { return Tensors{cast(in[0], to)}; },
               [to](const Tensors& in) {
                 auto v = to_vector<double>(in[0]);
                 for (auto& a : v) a = stored(a, to);
                 return Tensors{from_vector<double>(v, in[0].shape())};
               }};
      s.tol = 0;
      s.f32 = false;
      s.as_is = true;
      s.gradient = from == f64 && to == f64;  // narrower storage has no differences to compare with; see the test below
      c.samples.push_back(s);
    }
  Sample special{"special values",
                 {values({-0.0, kInf, -kInf, std::nan(""), 65519, 65520, 6e-8, 2.9e-8, -1e-30, 3.4e38}, {2, 5})},
                 [](const Tensors& in) {
                   return Tensors{cast(in[0], f16), cast(in[0], bf16), cast(in[0], f32), cast(in[0], boolean)};
                 },
                 [](const Tensors& in) {
                   Tensors out;
                   for (const DType t : {f16, bf16, f32, boolean}) {
                     auto v = to_vector<double>(in[0]);
                     for (auto& a : v) a = stored(a, t);
                     out.push_back(from_vector<double>(v, in[0].shape()));
                   }
                   return out;
                 }};
  special.tol = 0;
  special.gradient = special.f32 = false;
  special.as_is = true;
  c.samples.push_back(special);
  Sample many{"many chunks",
              {normal({2, 8209}, "cast")},
              [](const Tensors& in) { return Tensors{cast(cast(in[0], bf16), f64)}; },
              [](const Tensors& in) {
                auto v = to_vector<double>(in[0]);
                for (auto& a : v) a = stored(a, bf16);
                return Tensors{from_vector<double>(v, in[0].shape())};
              }};
  many.gradient = many.f32 = false;
  many.as_is = true;
  many.tol = 0;
  c.samples.push_back(many);
  c.errors = {{"undefined", [] { cast(Tensor(), f32); }, "tensor: used while undefined"},
              {"gradient through integers",
               [] {
                 const Tensor x = ones({2});
                 set_requires_grad(x, true);
                 grad({cast(cast(x, i32), f32)}, {x}, {ones({2})});
               },
               "has no derivative"}};
  return c;
}

// ---- in place: each run works on its own copy of the first input

Sample in_place(const std::string& label, const Tensors& inputs, Fn run, Fn reference) {
  Sample s{label, inputs, std::move(run), std::move(reference)};
  s.gradient = false;
  s.tol = s.tol_f32 = 0;
  return s;
}

OpCase copy_into_case() {
  OpCase c{"copy_into", {}, {}};
  const Fn second = [](const Tensors& in) {
    return Tensors{from_vector<double>(to_vector<double>(in[1]), in[1].shape())};
  };
  const Fn plain = [](const Tensors& in) {
    const Tensor d = clone(in[0]);
    copy_into(d, in[1]);
    return Tensors{d};
  };
  for (const Shape& shape : {Shape{2, 3, 5}, Shape{}, Shape{1, 7, 1}, Shape{0, 4}, Shape{33, 501}})
    c.samples.push_back(in_place(to_string(shape), {normal(shape, "a"), normal(shape, "b")}, plain, second));
  c.samples.push_back(in_place("into a transposed view", {normal({4, 3}, "a"), normal({3, 4}, "b")},
                               [](const Tensors& in) {
                                 const Tensor d = clone(in[0]);
                                 copy_into(transpose(d, 0, 1), in[1]);
                                 return Tensors{d};
                               },
                               [](const Tensors& in) {
                                 const auto b = to_vector<double>(in[1]);
                                 return Tensors{generate({4, 3}, [&](std::int64_t i) {
                                   return b[static_cast<std::size_t>(i % 3 * 4 + i / 3)];
                                 })};
                               }));
  c.samples.push_back(in_place("into every second column", {normal({3, 7}, "a"), normal({3, 4}, "b")},
                               [](const Tensors& in) {
                                 const Tensor d = clone(in[0]);
                                 copy_into(slice(d, 1, 0, 7, 2), in[1]);
                                 return Tensors{d};
                               },
                               [](const Tensors& in) {
                                 const auto a = to_vector<double>(in[0]), b = to_vector<double>(in[1]);
                                 return Tensors{generate({3, 7}, [&](std::int64_t i) {
                                   const auto r = i / 7, k = i % 7;
                                   return k % 2 ? a[static_cast<std::size_t>(i)]
                                                : b[static_cast<std::size_t>(r * 4 + k / 2)];
                                 })};
                               }));
  c.samples.push_back(in_place("under a mask",
                               {normal({3, 7}, "a"), normal({3, 7}, "b"),
                                make(boolean, to_vector<double>(integers({21}, "m", 0, 2)), {3, 7})},
                               [](const Tensors& in) {
                                 const Tensor d = clone(in[0]);
                                 copy_into(d, in[1], in[2]);
                                 return Tensors{d};
                               },
                               [](const Tensors& in) {
                                 const auto a = to_vector<double>(in[0]), b = to_vector<double>(in[1]),
                                            m = to_vector<double>(in[2]);
                                 return Tensors{generate({3, 7}, [&](std::int64_t i) {
                                   const auto k = static_cast<std::size_t>(i);
                                   return m[k] != 0 ? b[k] : a[k];
                                 })};
                               }));
  // Three layouts, chunks that begin inside a row, an axis that only the mask repeats.
  c.samples.push_back(in_place("into a transposed view under a mask of columns",
                               {normal({8209, 3, 2}, "a"), normal({2, 3, 8209}, "b"),
                                make(boolean, to_vector<double>(integers({16418}, "m", 0, 2)), {2, 1, 8209})},
                               [](const Tensors& in) {
                                 const Tensor d = clone(in[0]);
                                 copy_into(transpose(d, 0, 2), in[1], expand(in[2], {2, 3, 8209}));
                                 return Tensors{d};
                               },
                               [](const Tensors& in) {
                                 const auto a = to_vector<double>(in[0]), b = to_vector<double>(in[1]),
                                            m = to_vector<double>(in[2]);
                                 return Tensors{generate({8209, 3, 2}, [&](std::int64_t i) {
                                   const auto x = i / 6, y = i / 2 % 3, z = i % 2;
                                   return m[static_cast<std::size_t>(z * 8209 + x)] != 0
                                              ? b[static_cast<std::size_t>((z * 3 + y) * 8209 + x)]
                                              : a[static_cast<std::size_t>(i)];
                                 })};
                               }));
  c.samples.push_back(in_place("from integers", {normal({3, 7}, "a"), integers({3, 7}, "b", -5, 5)}, plain, second));
  c.errors = {{"shapes", [] { copy_into(zeros({2, 3}), zeros({3, 2})); }, "shapes must be equal"},
              {"mask shape", [] { copy_into(zeros({2}), zeros({2}), zeros({3}, boolean)); }, "mask must be bool [2]"},
              {"mask dtype", [] { copy_into(zeros({2}), zeros({2}), zeros({2})); }, "mask must be bool [2]"},
              {"devices", [] { copy_into(zeros({2}), zeros({2}, f32, kMeta)); }, "devices must be equal"},
              {"repeated memory", [] { copy_into(strided_view(zeros({2}), {3, 2}, {0, 1}, 0), zeros({3, 2})); },
               "dst must not repeat memory, got [3, 2] with strides [0, 1]"},
              {"shifted onto itself",
               [] {
                 const Tensor x = zeros({5});
                 copy_into(slice(x, 0, 0, 4), slice(x, 0, 1, 5));
               },
               "must not overlap in memory (clone the source), got [4] at 0 with strides [1] from 1 with strides [1]"},
              {"transposed onto itself",
               [] {
                 const Tensor x = zeros({3, 3});
                 copy_into(x, transpose(x, 0, 1));
               },
               "must not overlap"},
              {"expanded from a part of itself",
               [] {
                 const Tensor x = zeros({3, 2});
                 copy_into(x, strided_view(x, {3, 2}, {0, 1}, 4));
               },
               "must not overlap"},
              {"mask",
               [] {
                 const Tensor x = zeros({5}, boolean);
                 copy_into(slice(x, 0, 0, 4), zeros({4}, boolean), slice(x, 0, 1, 5));
               },
               "must not overlap"},
              {"trainable leaf",
               [] {
                 const Tensor w = zeros({2});
                 set_requires_grad(w, true);
                 copy_into(w, ones({2}));
               },
               "needs a NoGrad scope"},
              {"on the graph",
               [] {
                 const Tensor w = zeros({2});
                 set_requires_grad(w, true);
                 const Tensor y = clone(w);
                 const NoGrad off;
                 copy_into(y, ones({2}));
               },
               "must not write into a tensor of the graph"}};
  return c;
}

OpCase fill_case() {
  OpCase c{"fill_", {}, {}};
  for (const Shape& shape : {Shape{2, 3, 5}, Shape{}, Shape{0, 4}, Shape{33, 501}})
    c.samples.push_back(in_place(to_string(shape), {normal(shape, "a")},
                                 [](const Tensors& in) {
                                   const Tensor d = clone(in[0]);
                                   fill_(d, -1.5);
                                   return Tensors{d};
                                 },
                                 [](const Tensors& in) {
                                   return Tensors{generate(in[0].shape(), [](auto) { return -1.5; })};
                                 }));
  c.errors = {{"strided", [] { fill_(transpose(zeros({2, 3}), 0, 1), 1); }, "needs a contiguous tensor"},
              {"trainable leaf",
               [] {
                 const Tensor w = zeros({2});
                 set_requires_grad(w, true);
                 fill_(w, 1);
               },
               "needs a NoGrad scope"}};
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() {
  return {full_case(), arange_case(), random_case(false), random_case(true), identity_case("contiguous", contiguous),
          identity_case("clone", clone), cast_case(), copy_into_case(), fill_case()};
}

TEST_CASE("cast: floating values outside an integer's range become its nearest end, NaN 0; integers wrap around") {
  const std::vector<double> in = {kInf,   -kInf,       std::nan(""), 1e30,    -1e30, 300.9, -300.9,
                                  0x1p31, -0x1p31 - 1, 0x1p63,       -0x1p63, -0.9,  255.9};
  const auto whole = [&](double low, double high) {
    std::vector<double> out;
    for (const double v : in) out.push_back(std::isnan(v) ? 0 : std::trunc(std::clamp(v, low, high)) + 0.0);
    return out;
  };
  for (int d = 0; d <= (device_count() > 0); ++d) {
    const Device device = d ? Device{DeviceType::cuda, 0} : kCpu;
    const Tensor x = to(values(in, {13}), device);
    CHECK(to_vector<double>(cast(x, u8)) == whole(0, 255));
    CHECK(to_vector<double>(cast(x, i8)) == whole(-128, 127));
    CHECK(to_vector<double>(cast(x, i32)) == whole(-0x1p31, 0x1p31 - 1));
    CHECK(to_vector<double>(cast(x, i64)) == whole(-0x1p63, 0x1p63));
    CHECK(to_vector<std::int64_t>(cast(x, i64))[0] == INT64_MAX);
    CHECK(to_vector<std::int64_t>(cast(cast(x, f32), i64))[4] == INT64_MIN);
    CHECK(to_vector<std::int64_t>(cast(cast(x, f16), i32))[0] == INT32_MAX);
    CHECK(to_vector<double>(full({1}, -1, u8, device)) == std::vector<double>{0});
    CHECK(to_vector<double>(full({1}, 1e20, i32, device)) == std::vector<double>{0x1p31 - 1});
    const Tensor n = to(from_vector<std::int64_t>({0x1ffffffffll, 300, -129}, {3}), device);
    CHECK(to_vector<std::int64_t>(cast(n, i32)) == std::vector<std::int64_t>{-1, 300, -129});
    CHECK(to_vector<std::int64_t>(cast(n, u8)) == std::vector<std::int64_t>{255, 44, 127});
    CHECK(to_vector<double>(slice(arange(258, u8, device), 0, 255, 258)) == std::vector<double>{255, 0, 1});
  }
}

TEST_CASE("cast: the gradient is cast back") {
  for (const DType from : {f32, f64, bf16, f16})
    for (const DType to : {f32, f64, bf16, f16}) {
      if (from == to) continue;
      const Tensor x = full({3}, 1.5, from);
      set_requires_grad(x, true);
      const auto g = grad({cast(x, to)}, {x}, {make(to, {1, 2, -0.5}, {3})});
      CHECK(same_bits(g[0], make(from, {1, 2, -0.5}, {3})));
    }
}

TEST_CASE("contiguous and cast return the tensor itself when nothing changes") {
  const Tensor x = normal({2, 3}, "x");
  CHECK(contiguous(x).same(x));
  CHECK(cast(x, f64).same(x));
  CHECK_FALSE(clone(x).storage() == x.storage());
  CHECK_FALSE(contiguous(transpose(x, 0, 1)).storage() == x.storage());
}

TEST_CASE("copy_into within one storage: the same view, and views that do not meet") {
  const Tensor x = values({1, 2, 3, 4, 5, 6}, {3, 2});
  copy_into(x, x.detach());
  copy_into(transpose(x, 0, 1), transpose(x, 0, 1));
  CHECK(to_vector<double>(x) == std::vector<double>{1, 2, 3, 4, 5, 6});
  copy_into(slice(x, 0, 2, 3), slice(x, 0, 0, 1));
  CHECK(to_vector<double>(x) == std::vector<double>{1, 2, 3, 4, 1, 2});
  const Tensor mask = from_vector<std::uint8_t>({1, 0, 1}, {3}), b = cast(mask, boolean);
  copy_into(b, full({3}, 0, boolean), b);
  CHECK(to_vector<double>(b) == std::vector<double>{0, 0, 0});
}

TEST_CASE("rand_uniform refuses bounds out of order") {
  Generator rng(3);
  CHECK_THROWS_WITH_AS(rand_uniform({2}, rng, 1, 0), "rand_uniform: low must be at most high, got 1 and 0", Error);
}

TEST_CASE("rand_uniform stays below its upper bound") {
  Generator rng(3);
  for (const auto v : to_vector<float>(rand_uniform({1 << 20}, rng, 0, 1e-3))) REQUIRE(v < 1e-3f);
  Generator other(3);
  for (const auto v : to_vector<float>(rand_uniform({4096}, other, 1.0, 1.0 + 1e-6))) {  // a few f32 steps wide
    REQUIRE(v >= 1.0f);
    REQUIRE(v < static_cast<float>(1.0 + 1e-6));
  }
}

TEST_CASE("in-place ops bump the version and name themselves") {
  const Tensor x = zeros({2});
  const auto before = x.storage()->version();
  fill_(x, 1);
  CHECK(x.storage()->version() == before + 1);
  CHECK(std::string(x.storage()->last_writer()) == "fill_");
  copy_into(slice(x, 0, 0, 1), zeros({1}));
  CHECK(x.storage()->version() == before + 2);
  CHECK(std::string(x.storage()->last_writer()) == "copy_into");
}

}  // namespace capo::test
