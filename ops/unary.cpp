#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/unary.h>
#include <capo/ops/work_internal.h>

namespace capo {

namespace {
Work unary_work(const UnaryArgs& p, std::int64_t items) {
  return Work::moved(bytes_of(p.dtype, items * (p.dy ? 3 : 2)));
}
}  // namespace

CAPO_KERNEL_CUDA(unary, UnaryArgs, unary_work)

const char* name_of(UnaryKind kind) {
  constexpr const char* names[] = {"abs", "neg", "sign", "floor", "exp", "log", "sqrt", "rsqrt", "reciprocal", "square",
                                   "sin", "cos", "tanh", "sigmoid", "relu", "leaky_relu", "gelu", "gelu_tanh",
                                   "quick_gelu", "silu", "softplus", "erf", "clamp", "pow", "affine"};
  return names[static_cast<int>(kind)];
}

bool reads_output(UnaryKind kind) {
  using K = UnaryKind;
  switch (kind) {
    case K::exp: case K::sqrt: case K::rsqrt: case K::reciprocal: case K::tanh: case K::sigmoid: case K::relu:
      return true;
    default: return false;
  }
}

namespace {

constexpr std::int64_t kGrain = 16384;  // elements per chunk: big enough to hide a fork, small enough to balance

Tensor apply(UnaryKind kind, const Tensor& x, const Tensor& dy, double p, double q) {
  Tensor y = empty(x.shape(), x.dtype(), x.device());
  if (x.device().is_meta()) return y;
  const UnaryArgs args{kind, x.dtype(), x.data(), dy.defined() ? dy.data() : nullptr, y.data(), p, q, x.numel()};
  launch(kernels::unary, x.device(), args, x.numel(), kGrain);
  return y;
}

// dy * f'(x) from recorded primitives, for second derivatives. s is x, or y when reads_output(kind).
Tensor composite_gradient(UnaryKind kind, const Tensor& dy, const Tensor& s, double p, double q) {
  using K = UnaryKind;
  const auto normal_pdf = [](const Tensor& x) { return exp(square(x) * -0.5) * 0.39894228040143267794; };
  const auto sigmoid_slope = [&](double a) {  // of x sigmoid(a x)
    const Tensor g = sigmoid(s * a);
    return dy * (g + s * a * g * (1.0 - g));
  };
  switch (kind) {
    case K::neg: return neg(dy);
    case K::affine: return dy * p;
    case K::abs: return dy * sign(s);
    case K::sign: case K::floor: return dy * 0.0;
    case K::exp: return dy * s;
    case K::log: return dy / s;
    case K::sqrt: return dy * 0.5 / s;
    case K::rsqrt: return dy * (s * s * s) * -0.5;
    case K::reciprocal: return neg(dy * square(s));
    case K::square: return dy * s * 2.0;
    case K::sin: return dy * cos(s);
    case K::cos: return neg(dy * sin(s));
    case K::tanh: return dy * (1.0 - square(s));
    case K::sigmoid: return dy * s * (1.0 - s);
    case K::relu: return dy * (1.0 - cast(less_equal(s, 0.0), s.dtype()));
    case K::leaky_relu: { const Tensor pos = cast(greater(s, 0.0), s.dtype()); return dy * (pos + (1.0 - pos) * p); }
    case K::gelu: return dy * ((erf(s * 0.70710678118654752440) + 1.0) * 0.5 + s * normal_pdf(s));
    case K::gelu_tanh: {
      const double c = 0.79788456080286535588;
      const Tensor t = tanh((s + s * s * s * 0.044715) * c);
      return dy * ((t + 1.0) * 0.5 + s * (1.0 - square(t)) * (square(s) * (3 * 0.044715) + 1.0) * (0.5 * c));
    }
    case K::quick_gelu: return sigmoid_slope(1.702);
    case K::silu: return sigmoid_slope(1.0);
    case K::softplus: return dy * sigmoid(s);
    case K::erf: return dy * exp(neg(square(s))) * 1.12837916709551257390;
    case K::clamp: return dy * cast(logical_and(greater_equal(s, p), less_equal(s, q)), s.dtype());
    case K::pow: return p == 0 ? dy * 0.0 : dy * pow(s, p - 1) * p;
  }
  return {};
}

}  // namespace

Tensor RemakesUnary::operator()(const Saved& s, int) const { return apply(kind, contiguous(s[0]), {}, p, q); }

Tensor unary_backward(UnaryKind kind, const Tensor& dy, const Tensor& saved, double p, double q) {
  CAPO_CHECK(dy.shape() == saved.shape() && dy.dtype() == saved.dtype() && dy.device() == saved.device(),
             "unary_backward: dy must be ", describe(saved), ", got ", describe(dy));
  return record_no_gradient("unary_backward", apply(kind, contiguous(saved), contiguous(dy), p, q), {dy, saved});
}

Tensor unary_gradient(UnaryKind kind, const Tensor& dy, const Tensor& saved, double p, double q) {
  if (!grad_enabled()) return unary_backward(kind, dy, saved, p, q);
  const DType acc = accumulator(dy.dtype());  // no rounding between the steps
  return cast(composite_gradient(kind, cast(dy, acc), cast(saved, acc), p, q), dy.dtype());
}

Tensor unary(UnaryKind kind, const Tensor& x0, double p, double q) {
  const char* name = name_of(kind);
  CAPO_CHECK(is_floating(x0.dtype()), name, ": x must be floating, got ", describe(x0));
  CAPO_CHECK(kind != UnaryKind::clamp || p <= q, "clamp: low must be at most high, got ", p, " and ", q);
  const Tensor x = contiguous(x0);
  const Tensor y = apply(kind, x, {}, p, q);
  const bool need = needs_of({x}).any();
  const bool keeps_nothing =
      kind == UnaryKind::neg || kind == UnaryKind::affine || kind == UnaryKind::sign || kind == UnaryKind::floor;
  Saved saved = !need || keeps_nothing ? Saved() : reads_output(kind) ? Saved({}, {y}) : Saved({x});
  const auto gradient = [kind, p, q](const Saved& s, const Tensor& dy, Needs) -> Grads {
    if (s.size() == 0) {
      if (kind == UnaryKind::neg) return {neg(dy)};
      return {dy * (kind == UnaryKind::affine ? p : 0.0)};
    }
    return {unary_gradient(kind, dy, s[0], p, q)};
  };
  return record(name, y, {x}, std::move(saved), gradient,
                RemakesUnary{kind, p, q, !keeps_nothing && !reads_output(kind)});
}

}  // namespace capo
