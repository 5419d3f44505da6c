#include <capo/ops/binary.h>
#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/cpu/nest.h>
#include <capo/ops/integer_functors.h>

namespace {

struct Add { template <class T> static T f(T a, T b) { return wrap_add(a, b); } };
struct Sub { template <class T> static T f(T a, T b) { return wrap_sub(a, b); } };
struct Mul { template <class T> static T f(T a, T b) { return wrap_mul(a, b); } };
struct Div { template <class T> static T f(T a, T b) { return static_cast<T>(a / b); } };
// NaN in either wins, as in PyTorch.
struct Maximum { template <class T> static T f(T a, T b) { return a != a ? a : (b != b ? b : (a < b ? b : a)); } };
struct Minimum { template <class T> static T f(T a, T b) { return a != a ? a : (b != b ? b : (b < a ? b : a)); } };
struct Eq { template <class T> static bool f(T a, T b) { return a == b; } };
struct Ne { template <class T> static bool f(T a, T b) { return a != b; } };
struct Lt { template <class T> static bool f(T a, T b) { return a < b; } };
struct Le { template <class T> static bool f(T a, T b) { return a <= b; } };
struct Gt { template <class T> static bool f(T a, T b) { return a > b; } };
struct Ge { template <class T> static bool f(T a, T b) { return a >= b; } };
struct And { template <class T> static bool f(T a, T b) { return a && b; } };
struct Or { template <class T> static bool f(T a, T b) { return a || b; } };

// out[i] = f(x[i ix], z[i iz])
template <class F, class T, class R>
inline void row(const T* x, std::int64_t ix, const T* z, std::int64_t iz, R* out, std::int64_t n) {
  if (ix == 1 && iz == 1) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = F::f(x[i], z[i]);
  } else if (ix == 1 && iz == 0) {
    const T v = *z;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = F::f(x[i], v);
  } else if (ix == 0 && iz == 1) {
    const T v = *x;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = F::f(v, z[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) out[i] = F::f(x[i * ix], z[i * iz]);
  }
}

template <class F, class T>
void loop(const capo::BinaryArgs& p, std::int64_t begin, std::int64_t end) {
  using R = decltype(F::f(T(), T()));
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  R* y = static_cast<R*>(p.y);
  const std::int64_t ia = p.sa[p.rank - 1], ib = p.sb[p.rank - 1];
  for_rows(p.rank, p.shape, p.sa, p.sb, begin, end,
           [=](std::int64_t k, std::int64_t n, std::int64_t oa, std::int64_t ob) {
             row<F>(a + oa, ia, b + ob, ib, y + k, n);
           });
}

// n 16-bit elements, stride apart, as f32: side by side, or one for all of them when the stride is 0.
inline const float* read_strided(const void* x, capo::DType dtype, std::int64_t at, std::int64_t stride, std::int64_t n,
                                 float* buffer) {
  if (stride <= 1 && stride >= 0) return read_row(x, dtype, at, stride ? n : 1, buffer);
  for (std::int64_t i = 0; i < n; ++i) buffer[i] = read_one<float>(x, dtype, at + i * stride);
  return buffer;
}
inline bool* open_row(void* y, capo::DType, std::int64_t at, bool*) { return static_cast<bool*>(y) + at; }
inline void close_row(void*, capo::DType, std::int64_t, std::int64_t, const bool*) {}

// The same for bf16 and f16, in pieces.
template <class F>
void half_loop(const capo::BinaryArgs& p, std::int64_t begin, std::int64_t end) {
  using R = decltype(F::f(0.0f, 0.0f));
  const std::int64_t ia = p.sa[p.rank - 1], ib = p.sb[p.rank - 1];
  float left[kPiece], right[kPiece];
  R result[kPiece];
  for_rows(p.rank, p.shape, p.sa, p.sb, begin, end,
           [&](std::int64_t k, std::int64_t count, std::int64_t oa, std::int64_t ob) {
             for (std::int64_t i = 0; i < count; i += kPiece) {
               const std::int64_t n = lesser(kPiece, count - i);
               const float* x = read_strided(p.a, p.dtype, oa + i * ia, ia, n, left);
               const float* z = read_strided(p.b, p.dtype, ob + i * ib, ib, n, right);
               R* out = open_row(p.y, p.dtype, k + i, result);
               row<F>(x, std::int64_t{ia != 0}, z, std::int64_t{ib != 0}, out, n);
               close_row(p.y, p.dtype, k + i, n, out);
             }
           });
}

template <class F>
void number(const capo::BinaryArgs& p, std::int64_t begin, std::int64_t end) {
  switch (p.dtype) {
    case capo::DType::f32: return loop<F, float>(p, begin, end);
    case capo::DType::f64: return loop<F, double>(p, begin, end);
    case capo::DType::i32: return loop<F, std::int32_t>(p, begin, end);
    case capo::DType::i64: return loop<F, std::int64_t>(p, begin, end);
    default: return half_loop<F>(p, begin, end);
  }
}

template <class F>
void floating(const capo::BinaryArgs& p, std::int64_t begin, std::int64_t end) {
  if (in_16_bits(p.dtype)) return half_loop<F>(p, begin, end);
  p.dtype == capo::DType::f32 ? loop<F, float>(p, begin, end) : loop<F, double>(p, begin, end);
}

}  // namespace

CAPO_CPU_KERNEL(binary, capo::BinaryArgs) {
  using K = capo::BinaryKind;
  switch (args.kind) {
    case K::add: return number<Add>(args, begin, end);
    case K::sub: return number<Sub>(args, begin, end);
    case K::mul: return number<Mul>(args, begin, end);
    case K::div: return floating<Div>(args, begin, end);
    case K::maximum: return number<Maximum>(args, begin, end);
    case K::minimum: return number<Minimum>(args, begin, end);
    case K::eq: return number<Eq>(args, begin, end);
    case K::ne: return number<Ne>(args, begin, end);
    case K::lt: return number<Lt>(args, begin, end);
    case K::le: return number<Le>(args, begin, end);
    case K::gt: return number<Gt>(args, begin, end);
    case K::ge: return number<Ge>(args, begin, end);
    case K::logical_and: return loop<And, bool>(args, begin, end);
    case K::logical_or: return loop<Or, bool>(args, begin, end);
  }
}

namespace {
template <class W>
void select(const capo::WhereArgs& p, std::int64_t begin, std::int64_t end) {
  const W *a = static_cast<const W*>(p.a), *b = static_cast<const W*>(p.b);
  W* y = static_cast<W*>(p.y);
  const bool* condition = p.condition;
  const int last = p.rank - 1;
  const std::int64_t ic = p.sc[last], ia = p.sa[last], ib = p.sb[last];
  const std::int64_t* const strides[] = {p.sc, p.sa, p.sb};
  walk_rows(p.rank, p.shape, strides, begin, end, [=](std::int64_t k, std::int64_t n, const std::int64_t* at) {
    const bool* c = condition + at[0];
    const W *u = a + at[1], *v = b + at[2];
    W* out = y + k;
    if (ic == 1 && ia == 1 && ib == 1) {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) out[i] = c[i] ? u[i] : v[i];
    } else if (ic == 1 && ia == 1 && ib == 0) {  // a mask's gradient
      const W other = *v;
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) out[i] = c[i] ? u[i] : other;
    } else {
      for (std::int64_t i = 0; i < n; ++i) out[i] = c[i * ic] ? u[i * ia] : v[i * ib];
    }
  });
}
}  // namespace

CAPO_CPU_KERNEL(where, capo::WhereArgs) {
  switch (args.element_bytes) {
    case 8: return select<std::int64_t>(args, begin, end);
    case 4: return select<std::int32_t>(args, begin, end);
    case 2: return select<std::int16_t>(args, begin, end);
    default: return select<std::int8_t>(args, begin, end);
  }
}

namespace {
template <class T>
void axpy_loop(const capo::AxpyArgs& p, std::int64_t begin, std::int64_t end) {
  T* a = static_cast<T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  const T s = static_cast<T>(p.scale);
  if (b) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) a[i] += s * b[i];
  } else {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) a[i] *= s;
  }
}
}  // namespace

CAPO_CPU_KERNEL(axpy, capo::AxpyArgs) {
  args.dtype == capo::DType::f32 ? axpy_loop<float>(args, begin, end) : axpy_loop<double>(args, begin, end);
}
