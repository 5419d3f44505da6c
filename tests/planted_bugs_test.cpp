// The harness tests itself: ops with one planted bug each, and the check that must report it.
#include <capo/engine/cpu.h>
#include <capo/engine/threads.h>
#include <capo/ops/binary.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>

#include <doctest/doctest.h>

#include <cmath>

using namespace capo;
using namespace capo::test;

namespace {

using Op = Tensor (*)(const Tensors&);

// The failures of one op with one sample.
std::vector<std::string> failures_of(Op op, const Tensors& inputs, Op reference, bool second_order = false) {
  OpCase c{"planted", {}, {}};
  Sample s{"sample", inputs, [op](const Tensors& in) { return Tensors{op(in)}; },
           [reference](const Tensors& in) { return Tensors{reference(in)}; }};
  s.second_order = second_order;
  c.samples.push_back(s);
  return check_case(c);
}

void must_report(const std::vector<std::string>& failures, const std::string& check) {
  bool found = false;
  std::string all;
  for (const auto& f : failures) {
    found |= f.find("[" + check + "]") != std::string::npos;
    all += f + "\n";
  }
  CHECK_MESSAGE(found, "[" << check << "] is missing among " << failures.size() << " failures:\n" << all);
}

// ---- y = f(x) by a loop over contiguous memory, f32 or f64; half through f32; nothing on meta.
template <class T, class F>
void fill_from(const Tensor& x, const Tensor& y, const F& f) {
  const T* src = x.data<T>();
  T* dst = y.data<T>();
  for (std::int64_t i = 0; i < x.numel(); ++i) dst[i] = static_cast<T>(f(src[i]));
}
template <class F>
Tensor map(const Tensor& x0, const F& f) {
  const Tensor x = contiguous(x0.detach()), y = empty_like(x);
  if (x.device().is_meta()) return y;
  x.dtype() == f64 ? fill_from<double>(x, y, f) : fill_from<float>(x, y, f);
  return y;
}
// Runs op in f32 when the first input is bf16 or f16.
Tensor through_f32(const Tensors& in, Op op) {
  Tensors wide;
  for (const auto& t : in) wide.push_back(is_half(t.dtype()) ? cast(t, f32) : t);
  return cast(op(wide), in[0].dtype());
}
bool half(const Tensors& in) { return is_half(in[0].dtype()); }

// ---- the sound op: y = x^2 w, made by hand
Grads scaled_square_gradient(const Saved& s, const Tensor& dy, Needs n) {
  return {n[0] ? dy * s[0] * s[1] * 2.0 : Tensor(), n[1] ? dy * square(s[0]) : Tensor()};
}
Tensor scaled_square_value(const Tensor& x, const Tensor& w) {
  const NoGrad off;
  return square(x) * w;
}
Tensor sound(const Tensors& in) {
  if (half(in)) return through_f32(in, sound);
  const Tensor &x = in[0], &w = in[1];
  const Needs n = needs_of({x, w});
  return record("planted", scaled_square_value(x, w), {x, w}, Saved({keep_if(n.any(), x), keep_if(n[0], w)}),
                [](const Saved& s, const Tensor& dy, Needs need) { return scaled_square_gradient(s, dy, need); });
}
Tensor scaled_square(const Tensors& in) { return square(in[0]) * in[1]; }

Tensors two_inputs() { return {normal({3, 4}, "x"), normal({3, 4}, "w", 1, 0.5)}; }

}  // namespace

TEST_CASE("a sound op passes every check") {
  const auto failures = failures_of(sound, two_inputs(), scaled_square, true);
  for (const auto& f : failures) MESSAGE(f);
  CHECK(failures.empty());
}

TEST_CASE("zeroed softmax gradient") {
  const Op softmax = [](const Tensors& in) {
    const Tensor e = exp(in[0]);
    return e / sum(e, {-1}, true);
  };
  const Op planted = [](const Tensors& in) {
    Tensor y;
    {
      const NoGrad off;
      const Tensor e = exp(in[0]);
      y = e / sum(e, {-1}, true);
    }
    return record("planted", y, {in[0]}, Saved(),
                  [](const Saved&, const Tensor& dy, Needs) -> Grads { return {dy * 0.0}; });
  };
  must_report(failures_of(planted, {normal({2, 5}, "x")}, softmax), "gradient");
}

TEST_CASE("ignored weight") {
  const Op forward = [](const Tensors& in) { return square(in[0]) + in[1] * 0.0; };
  must_report(failures_of(forward, two_inputs(), scaled_square), "value");
  const Op backward = [](const Tensors& in) { return square(in[0]) * stop_gradient(in[1]); };
  must_report(failures_of(backward, two_inputs(), scaled_square), "gradient");
}

TEST_CASE("one-pass variance at mean 10,000") {
  const Op two_pass = [](const Tensors& in) { return mean(square(in[0] - mean(in[0], {-1}, true)), {-1}); };
  const Op one_pass = [](const Tensors& in) { return mean(square(in[0]), {-1}) - square(mean(in[0], {-1})); };
  must_report(failures_of(one_pass, {normal({3, 257}, "x", 10000)}, two_pass), "f32");
}

TEST_CASE("stale save") {
  const Op silent = [](const Tensors& in) {  // the saved tensor is overwritten behind autograd's back
    if (half(in)) return cast(in[0], in[0].dtype());
    const Tensor kept = clone(in[0].detach());
    const Tensor y = record("planted", map(in[0], [](auto v) { return v * v; }), {in[0]}, Saved({}, {kept}),
                            [](const Saved& s, const Tensor& dy, Needs) -> Grads { return {dy * s[0] * 2.0}; });
    if (!kept.device().is_meta() && kept.numel() > 0) std::fill_n(static_cast<char*>(kept.data()), kept.nbytes(), '\0');
    return y;
  };
  const Op squared = [](const Tensors& in) { return square(in[0]); };
  must_report(failures_of(silent, {normal({3, 4}, "x")}, squared), "gradient");
  const Op counted = [](const Tensors& in) {
    const Tensor kept = clone(in[0].detach());
    const Tensor y = record("planted", map(in[0], [](auto v) { return v * v; }), {in[0]}, Saved({}, {kept}),
                            [](const Saved& s, const Tensor& dy, Needs) -> Grads { return {dy * s[0] * 2.0}; });
    fill_(kept, 0);
    return y;
  };
  const auto failures = failures_of(counted, {normal({3, 4}, "x")}, squared);
  must_report(failures, "gradient");
  CHECK(failures.front().find("planted: a tensor [3, 4] saved for its gradient was changed in place by fill_") !=
        std::string::npos);
}

TEST_CASE("strides ignored") {
  const Op planted = [](const Tensors& in) -> Tensor {
    if (half(in)) return square(in[0]);
    const Tensor y = empty_like(in[0]);
    if (!y.device().is_meta()) {
      const auto f = [](auto v) { return v * v; };  // reads row-major whatever the strides
      y.dtype() == f64 ? fill_from<double>(in[0], y, f) : fill_from<float>(in[0], y, f);
    }
    return record("planted", y, {in[0]}, Saved({in[0]}), [](const Saved& s, const Tensor& dy, Needs) -> Grads {
      return {dy * s[0] * 2.0};
    });
  };
  // On the expanded view it reads past the storage; 12 elements stay within the debug allocator's guards.
  const auto failures = failures_of(planted, {normal({3, 4}, "x")}, [](const Tensors& in) { return square(in[0]); });
  must_report(failures, "layouts");
}

TEST_CASE("strides of the cotangent ignored") {
  const Op planted = [](const Tensors& in) {
    return record("planted", in[0].device().is_meta() ? empty_like(in[0]) : clone(in[0].detach()), {in[0]}, Saved(),
                  [](const Saved&, const Tensor& dy, Needs) -> Grads {
                    return {strided_view(dy, dy.shape(), contiguous_strides(dy.shape()), dy.offset())};
                  });
  };
  must_report(failures_of(planted, {normal({3, 4}, "x")}, [](const Tensors& in) { return in[0]; }), "layouts");
}

TEST_CASE("an output element is never written") {
  const Op planted = [](const Tensors& in) -> Tensor {
    if (half(in)) return in[0];
    const Tensor x = contiguous(in[0].detach()), y = empty_like(x);
    if (!x.device().is_meta())
      std::copy_n(static_cast<char*>(x.data()), x.nbytes() - size_of(x.dtype()), static_cast<char*>(y.data()));
    return record("planted", y, {in[0]}, Saved(), [](const Saved&, const Tensor& dy, Needs) -> Grads { return {dy}; });
  };
  must_report(failures_of(planted, {normal({3, 4}, "x")}, [](const Tensors& in) { return in[0]; }), "value");
}

TEST_CASE("wrong need mask") {
  const Op swapped = [](const Tensors& in) {
    const Tensor &x = in[0], &w = in[1];
    return record("planted", scaled_square_value(x, w), {x, w}, Saved({x, w}),
                  [](const Saved& s, const Tensor& dy, Needs n) {
                    return Grads{n[1] ? dy * s[0] * s[1] * 2.0 : Tensor(), n[0] ? dy * square(s[0]) : Tensor()};
                  });
  };
  must_report(failures_of(swapped, two_inputs(), scaled_square), "subsets");
  const Op eager = [](const Tensors& in) {
    const Tensor &x = in[0], &w = in[1];
    return record("planted", scaled_square_value(x, w), {x, w}, Saved({x, w}),
                  [](const Saved& s, const Tensor& dy, Needs) {
                    return Grads{dy * s[0] * s[1] * 2.0, dy * square(s[0])};
                  });
  };
  must_report(failures_of(eager, two_inputs(), scaled_square), "subsets");
}

TEST_CASE("bytes kept for a frozen input") {
  const Op planted = [](const Tensors& in) {
    const Tensor &x = in[0], &w = in[1];
    const Needs n = needs_of({x, w});
    const Tensor extra = n[0] ? Tensor() : clone(x.detach());  // keeps a copy just when x is frozen
    return record("planted", scaled_square_value(x, w), {x, w}, Saved({x, w}, {extra}),
                  [](const Saved& s, const Tensor& dy, Needs need) { return scaled_square_gradient(s, dy, need); });
  };
  must_report(failures_of(planted, two_inputs(), scaled_square), "nothing kept");
}

namespace {
// Sums per thread's share: the bits follow the number of threads. One chunk per thread.
Tensor sum_by_threads(const Tensor& x) {
  const Tensor y = empty({}, x.dtype());
  const std::int64_t grain = (x.numel() + num_threads() - 1) / num_threads();
  std::vector<float> parts(static_cast<std::size_t>(num_threads()), 0.0f);
  parallel_for(x.numel(), grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) parts[static_cast<std::size_t>(begin / grain)] += x.data<float>()[i];
  });
  float total = 0;
  for (const float p : parts) total += p;
  *y.data<float>() = total;
  return y;
}
}  // namespace

TEST_CASE("bits depend on the thread count") {
  const Op planted = [](const Tensors& in) {
    if (in[0].dtype() != f32 || in[0].device().is_meta()) return sum(in[0]);
    const Shape shape = in[0].shape();
    return record("planted", sum_by_threads(contiguous(in[0].detach())), {in[0]}, Saved(),
                  [shape](const Saved&, const Tensor& dy, Needs) -> Grads { return {expand(dy, shape)}; });
  };
  const Op reference = [](const Tensors& in) { return sum(in[0]); };
  must_report(failures_of(planted, {normal({7, 1001}, "x")}, reference), "threads");
}

TEST_CASE("two runs differ") {
  const Op planted = [](const Tensors& in) {
    static int calls = 0;
    return in[0] * (1.0 + 1e-14 * ++calls);
  };
  must_report(failures_of(planted, {normal({3, 4}, "x")}, [](const Tensors& in) { return in[0]; }), "repeat");
}

TEST_CASE("one instruction set is wrong") {
  const Op planted = [](const Tensors& in) { return isa() == Isa::v2 ? in[0] * 1.001 : in[0] * 1.0; };
  if (best_isa() != Isa::v2)
    must_report(failures_of(planted, {normal({3, 4}, "x")}, [](const Tensors& in) { return in[0]; }), "isa");
}

TEST_CASE("writes behind its output") {
  const Op planted = [](const Tensors& in) {
    const Tensor y = map(is_half(in[0].dtype()) ? cast(in[0], f32) : in[0], [](auto v) { return v; });
    if (!y.device().is_meta()) static_cast<char*>(y.data())[y.nbytes()] = 1;
    return y;
  };
  const auto failures = failures_of(planted, {normal({3, 4}, "x")}, [](const Tensors& in) { return in[0]; });
  must_report(failures, "value");
  bool guard = false;
  for (const auto& f : failures)
    guard |= f.find("guard word overwritten after a block of 96 bytes") != std::string::npos;
  CHECK(guard);
}

TEST_CASE("changes its input") {
  const Op planted = [](const Tensors& in) {
    const Tensor y = clone(in[0]);
    if (in[0].dtype() == f64 && !in[0].device().is_meta()) *in[0].data<double>() += 1e-3;
    return y;
  };
  must_report(failures_of(planted, {normal({3, 4}, "x")}, [](const Tensors& in) { return in[0]; }), "value");
}

TEST_CASE("shape rule and result differ on meta") {
  const Op planted = [](const Tensors& in) { return in[0].device().is_meta() ? reshape(in[0], {12}) : in[0] * 1.0; };
  must_report(failures_of(planted, {normal({3, 4}, "x")}, [](const Tensors& in) { return in[0]; }), "meta");
}

TEST_CASE("nothing is recorded") {
  const Op planted = [](const Tensors& in) { return stop_gradient(in[0]) * 2.0; };
  must_report(failures_of(planted, {normal({3, 4}, "x")}, [](const Tensors& in) { return in[0] * 2.0; }), "gradient");
}

TEST_CASE("a gradient of NaN") {
  const Op planted = [](const Tensors& in) {
    return record("planted", clone(in[0].detach()), {in[0]}, Saved(),
                  [](const Saved&, const Tensor& dy, Needs) -> Grads { return {dy * std::nan("")}; });
  };
  must_report(failures_of(planted, {normal({3, 4}, "x")}, [](const Tensors& in) { return in[0]; }), "gradient");
}

TEST_CASE("a wrong second derivative passes for a right one") {
  const Op planted = [](const Tensors& in) {
    Tensor y;
    {
      const NoGrad off;
      y = square(in[0]);
    }
    return record("planted", y, {in[0]}, Saved({in[0]}), [](const Saved& s, const Tensor& dy, Needs) -> Grads {
      return {dy * stop_gradient(s[0]) * 2.0};
    });
  };
  must_report(failures_of(planted, {normal({3, 4}, "x")}, [](const Tensors& in) { return square(in[0]); }),
              "second order");
}

TEST_CASE("a second derivative that is promised and missing") {
  const Op planted = [](const Tensors& in) {
    Tensor y;
    {
      const NoGrad off;
      y = square(in[0]);
    }
    return record("planted", y, {in[0]}, Saved({in[0]}), [](const Saved& s, const Tensor& dy, Needs) -> Grads {
      const Tensor x = s[0];
      return {record_no_gradient("planted_backward", stop_gradient(dy * x * 2.0), {dy, x})};
    });
  };
  const Op squared = [](const Tensors& in) { return square(in[0]); };
  CHECK(failures_of(planted, {normal({3, 4}, "x")}, squared, false).empty());
  must_report(failures_of(planted, {normal({3, 4}, "x")}, squared, true), "second order");
}

TEST_CASE("f32 inputs give f64 results; bf16 is coarse") {
  const Op wide = [](const Tensors& in) { return cast(in[0], f64) * 2.0; };
  const Op reference = [](const Tensors& in) { return in[0] * 2.0; };
  must_report(failures_of(wide, {normal({3, 4}, "x")}, reference), "f32");
  const Op coarse = [](const Tensors& in) { return in[0].dtype() == bf16 ? in[0] * 2.2 : in[0] * 2.0; };
  must_report(failures_of(coarse, {normal({3, 4}, "x")}, reference), "half");
}

TEST_CASE("error samples") {
  const auto report = [](std::function<void()> run, const std::string& text) {
    const auto failures = check_case({"planted", {}, {{"case", std::move(run), text}}});
    return failures.empty() ? std::string() : failures[0];
  };
  CHECK(report([] {}, "x").find("did not throw") != std::string::npos);
  CHECK(report([] { throw Error("other: x must be"); }, "x must").find("does not start") != std::string::npos);
  CHECK(report([] { throw Error("planted: y must be"); }, "x must").find("lacks") != std::string::npos);
  CHECK(report([] { throw std::runtime_error("planted: x"); }, "x").find("something else") != std::string::npos);
  CHECK(report([] { throw Error("planted: x must be"); }, "x must").empty());
  CHECK(report([] { throw Error("slice: x must be"); }, "slice: x must").empty());
}

TEST_CASE("global settings are as before") {
  Allocator* before = &allocator(kCpu);
  const int threads = num_threads();
  const Isa level = isa();
  failures_of(sound, two_inputs(), scaled_square);
  CHECK(&allocator(kCpu) == before);
  CHECK(num_threads() == threads);
  CHECK(isa() == level);
}
