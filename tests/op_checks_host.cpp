// Host-side tensors for the checks: seeded inputs, layouts, casts, comparisons.
#include <capo/engine/backend.h>
#include <capo/engine/rng.h>
#include <capo/tests/op_checks.h>

#include <cmath>
#include <cstring>

namespace capo::test {
namespace {

// Calls f(position in a, position in b) for every element in row-major order, positions in elements from data().
template <class F>
void walk(const Shape& shape, const Dims& sa, const Dims& sb, const F& f) {
  Dims index = Dims::filled(shape.size(), 0);
  const std::int64_t n = numel(shape);
  std::int64_t a = 0, b = 0;
  for (std::int64_t k = 0; k < n; ++k) {
    f(a, b);
    for (int i = shape.size() - 1; i >= 0; --i) {
      a += sa[i];
      b += sb[i];
      if (++index[i] < shape[i]) break;
      a -= shape[i] * sa[i];
      b -= shape[i] * sb[i];
      index[i] = 0;
    }
  }
}

void copy_elements(const Tensor& from, const Tensor& to) {
  const std::size_t width = size_of(from.dtype());
  const auto* src = static_cast<const char*>(from.data());
  auto* dst = static_cast<char*>(to.data());
  walk(from.shape(), from.strides(), to.strides(), [&](std::int64_t a, std::int64_t b) {
    std::memcpy(dst + static_cast<std::size_t>(b) * width, src + static_cast<std::size_t>(a) * width, width);
  });
}

double uniform_at(std::uint64_t stream, std::int64_t i) {
  const auto block = philox(1, stream, static_cast<std::uint64_t>(i / 4));
  return (block.v[i % 4] + 0.5) * 0x1p-32;
}

template <class T, class F>
Tensor generate(const Shape& shape, const F& f) {
  std::vector<T> v;
  const std::int64_t n = numel(shape);
  for (std::int64_t i = 0; i < n; ++i) v.push_back(static_cast<T>(f(i)));
  return from_vector<T>(v, shape);
}

}  // namespace

Tensor normal(const Shape& shape, const std::string& seed, double mean, double std) {
  const std::uint64_t stream = stream_of(seed);
  return generate<double>(shape, [&](std::int64_t i) {
    const double r = std::sqrt(-2 * std::log(uniform_at(stream, 2 * i)));
    return mean + std * r * std::cos(6.283185307179586 * uniform_at(stream, 2 * i + 1));
  });
}

Tensor uniform(const Shape& shape, const std::string& seed, double low, double high) {
  const std::uint64_t stream = stream_of(seed);
  return generate<double>(shape, [&](std::int64_t i) { return low + (high - low) * uniform_at(stream, i); });
}

Tensor integers(const Shape& shape, const std::string& seed, std::int64_t low, std::int64_t high) {
  const std::uint64_t stream = stream_of(seed);
  const auto span = static_cast<double>(high - low);
  return generate<std::int64_t>(shape, [&](std::int64_t i) {
    return low + static_cast<std::int64_t>(span * uniform_at(stream, i));
  });
}

Tensor values(const std::vector<double>& v, const Shape& shape) { return from_vector<double>(v, shape); }

std::vector<double> host(const Tensor& t) { return to_vector<double>(t); }

Tensor lay_out(const Tensor& t, Layout layout) {
  if (!t.defined()) return t;
  const int rank = t.rank();
  Dims strides = contiguous_strides(t.shape());
  std::int64_t room = t.numel(), offset = 0;
  if (layout == Layout::transposed) {
    std::int64_t step = 1;
    for (int i = 0; i < rank; ++i) {
      strides[i] = step;
      step *= t.shape()[i] > 0 ? t.shape()[i] : 1;
    }
  } else if (layout == Layout::sliced) {
    Shape longer = t.shape();
    offset = 1;
    if (rank > 0) {
      longer.back() = 2 * longer.back() + 1;
      strides = contiguous_strides(longer);
      strides.back() = 2;
    }
    room = rank > 0 ? numel(longer) : 3;
  }
  const Tensor block = empty({room}, t.dtype());  // NaN from the debug allocator ...
  if (!is_floating(t.dtype()) && room > 0) std::memset(block.data(), 0, block.nbytes());  // ... but harmless indices
  const Tensor out = strided_view(block, t.shape(), strides, offset);
  if (t.numel() > 0) copy_elements(t, out);
  return out;
}

Tensor repeat_first(const Tensor& t, int axis, bool view) {
  Dims strides = t.strides();
  strides[axis] = 0;
  const Tensor repeated = strided_view(t, t.shape(), strides, t.offset());
  if (!view) return lay_out(repeated, Layout::plain);
  Shape first = t.shape();  // own memory of just the repeated part, so that reading past it is seen
  first[axis] = t.shape()[axis] > 0 ? 1 : 0;
  const Tensor part = lay_out(strided_view(t, first, t.strides(), t.offset()), Layout::plain);
  strides = part.strides();
  strides[axis] = 0;
  return strided_view(part, t.shape(), strides, 0);
}

Tensors in_dtype(const Tensors& tensors, DType dtype) {
  Tensors out;
  for (const auto& t : tensors) {
    if (!t.defined() || !is_floating(t.dtype())) {
      out.push_back(t);
      continue;
    }
    const auto v = host(t);
    const Tensor y = empty(t.shape(), dtype);
    for (std::size_t i = 0; i < v.size(); ++i) {
      const auto x = static_cast<float>(v[i]);
      if (dtype == capo::f64) y.data<double>()[i] = v[i];
      if (dtype == capo::f32) y.data<float>()[i] = x;
      if (dtype == capo::bf16) y.data<BFloat16>()[i] = to_bf16(x);
      if (dtype == capo::f16) y.data<Half>()[i] = to_f16(x);
    }
    out.push_back(y);
  }
  return out;
}

Tensors on_meta(const Tensors& tensors) {
  Tensors out;
  for (const auto& t : tensors) out.push_back(t.defined() ? empty(t.shape(), t.dtype(), kMeta) : t);
  return out;
}

Tensor on_device(const Tensor& t, Device device) {
  if (!t.defined() || t.device() == device) return t;
  const Tensor packed = t.is_contiguous() ? t : lay_out(t, Layout::plain);
  const Tensor out = empty(t.shape(), t.dtype(), device);
  copy_bytes(out.data(), device, packed.data(), t.device(), out.nbytes());
  return out;
}
Tensors on_device(const Tensors& tensors, Device device) {
  Tensors out;
  for (const auto& t : tensors) out.push_back(on_device(t, device));
  return out;
}

std::string difference(const Tensor& a, const Tensor& b, double tol, double floor) {
  if (!a.defined() || !b.defined()) return a.defined() == b.defined() ? "" : "one of the tensors is undefined";
  if (a.shape() != b.shape()) return cat("shape ", a.shape(), " instead of ", b.shape());
  const auto x = host(a), y = host(b);
  double scale = 0;
  for (const double v : y)
    if (std::isfinite(v)) scale = std::fmax(scale, std::fabs(v));
  std::size_t worst = 0;
  double worst_error = -1;
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(x[i]) && std::isnan(y[i])) continue;
    if (x[i] == y[i]) continue;
    double error = std::fabs(x[i] - y[i]);
    if (!(error <= tol * (floor + scale))) {
      if (std::isnan(error)) error = HUGE_VAL;
      if (error > worst_error) {
        worst_error = error;
        worst = i;
      }
    }
  }
  if (worst_error < 0) return "";
  return cat("element ", worst, " of ", b.shape(), " is ", x[worst], " instead of ", y[worst], ", error ", worst_error,
             ", allowed ", tol * (floor + scale));
}

bool close(const Tensor& a, const Tensor& b, double tol, double floor) {
  return a.defined() && b.defined() && a.dtype() == b.dtype() && difference(a, b, tol, floor).empty();
}

bool same_bits(const Tensor& a, const Tensor& b) {
  if (!a.defined() || !b.defined()) return a.defined() == b.defined();
  if (a.shape() != b.shape() || a.dtype() != b.dtype()) return false;
  const std::size_t width = size_of(a.dtype());
  const auto *x = static_cast<const char*>(a.data()), *y = static_cast<const char*>(b.data());
  bool same = true;
  walk(a.shape(), a.strides(), b.strides(), [&](std::int64_t i, std::int64_t j) {
    same &= std::memcmp(x + static_cast<std::size_t>(i) * width, y + static_cast<std::size_t>(j) * width, width) == 0;
  });
  return same;
}

}  // namespace capo::test
