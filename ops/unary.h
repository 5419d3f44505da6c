// Elementwise functions of one tensor: y[i] = f(x[i]), same shape, dtype and device as x, contiguous result.
//
// dtypes  f32, f64; bf16 and f16 are computed in f32. Others throw.
// grad    dx[i] = dy[i] f'(x[i]); keeps one tensor, x or y (reads_output). Second derivatives come from the composite
//         of primitives where one is written (unary.cpp), else throw by name.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

class Saved;

enum class UnaryKind : int {
  abs, neg, sign, floor, exp, log, sqrt, rsqrt, reciprocal, square, sin, cos, tanh, sigmoid, relu, leaky_relu, gelu,
  gelu_tanh, quick_gelu, silu, softplus, erf, clamp, pow, affine
};
const char* name_of(UnaryKind kind);

// p, q: leaky_relu's slope; clamp's low and high; pow's exponent; affine's scale and shift; else unused.
Tensor unary(UnaryKind kind, const Tensor& x, double p = 0, double q = 0);

inline Tensor abs(const Tensor& x) { return unary(UnaryKind::abs, x); }    // slope 0 at 0
inline Tensor neg(const Tensor& x) { return unary(UnaryKind::neg, x); }
inline Tensor sign(const Tensor& x) { return unary(UnaryKind::sign, x); }  // -1, 0, 1; gradient zero
inline Tensor floor(const Tensor& x) { return unary(UnaryKind::floor, x); }  // gradient zero
inline Tensor exp(const Tensor& x) { return unary(UnaryKind::exp, x); }
inline Tensor log(const Tensor& x) { return unary(UnaryKind::log, x); }
inline Tensor sqrt(const Tensor& x) { return unary(UnaryKind::sqrt, x); }
inline Tensor rsqrt(const Tensor& x) { return unary(UnaryKind::rsqrt, x); }
inline Tensor reciprocal(const Tensor& x) { return unary(UnaryKind::reciprocal, x); }
inline Tensor square(const Tensor& x) { return unary(UnaryKind::square, x); }
inline Tensor sin(const Tensor& x) { return unary(UnaryKind::sin, x); }
inline Tensor cos(const Tensor& x) { return unary(UnaryKind::cos, x); }
inline Tensor tanh(const Tensor& x) { return unary(UnaryKind::tanh, x); }
inline Tensor sigmoid(const Tensor& x) { return unary(UnaryKind::sigmoid, x); }
inline Tensor relu(const Tensor& x) { return unary(UnaryKind::relu, x); }  // slope 0 at 0; NaN stays NaN, with slope 1
inline Tensor leaky_relu(const Tensor& x, double slope = 0.01) { return unary(UnaryKind::leaky_relu, x, slope); }
inline Tensor gelu(const Tensor& x) { return unary(UnaryKind::gelu, x); }             // x Phi(x), exact
inline Tensor gelu_tanh(const Tensor& x) { return unary(UnaryKind::gelu_tanh, x); }  // Hendrycks and Gimpel's tanh form
inline Tensor quick_gelu(const Tensor& x) { return unary(UnaryKind::quick_gelu, x); } // x sigmoid(1.702 x), as CLIP
inline Tensor silu(const Tensor& x) { return unary(UnaryKind::silu, x); }
inline Tensor softplus(const Tensor& x) { return unary(UnaryKind::softplus, x); }     // log(1 + e^x), beta 1
inline Tensor erf(const Tensor& x) { return unary(UnaryKind::erf, x); }
inline Tensor clamp(const Tensor& x, double low, double high) { return unary(UnaryKind::clamp, x, low, high); }
inline Tensor pow(const Tensor& x, double exponent) { return unary(UnaryKind::pow, x, exponent); }
inline Tensor affine(const Tensor& x, double scale, double shift) { return unary(UnaryKind::affine, x, scale, shift); }

// True when f' is computed from y = f(x) alone (exp, sqrt, tanh, ...): y is kept instead of x.
bool reads_output(UnaryKind kind);
// dy * f'(x): the fused gradient kernel; has no further derivative. saved is x, or y when reads_output(kind), like dy
// in shape, dtype and device.
Tensor unary_backward(UnaryKind kind, const Tensor& dy, const Tensor& saved, double p, double q);
// The same for gradients of ops that end in such a function: that kernel, or under create_graph recorded primitives.
Tensor unary_gradient(UnaryKind kind, const Tensor& dy, const Tensor& saved, double p = 0, double q = 0);

// How a node whose first saved tensor is x remakes f(x): record()'s last argument (autograd/node.h).
struct RemakesUnary {
  UnaryKind kind;
  double p = 0, q = 0;
  bool possible = true;
  bool operator()(int) const { return possible; }
  Tensor operator()(const Saved& s, int) const;
};

struct UnaryArgs {
  UnaryKind kind;
  DType dtype;
  const void* x;      // forward: x; backward: the saved tensor
  const void* dy;     // backward only
  void* y;            // result
  double p, q;
  std::int64_t elements;  // of the whole
};

}  // namespace capo
