#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/cpu/row.h>
#include <capo/ops/optim.h>

namespace {

using capo::kOptimChunk;
using capo::TensorTable;

// One chunk of one tensor of the table.
struct Piece {
  int tensor;
  std::int64_t begin, count;
};
inline Piece piece_of(const TensorTable& t, std::int64_t item) {
  int k = 0;
  while (item >= t.first[k + 1]) ++k;
  const std::int64_t begin = (item - t.first[k]) * kOptimChunk;
  return {k, begin, lesser(kOptimChunk, t.size[k] - begin)};
}
template <class T>
inline T* at(const TensorTable& t, int list, const Piece& p) {
  return static_cast<T*>(t.data[list][p.tensor]) + p.begin;
}

// Calls step(piece, list 1) for the item. What is 16-bit beside f32 passes through the cache block by block: list 1 is
// widened before a block's step, the weights take the rounded list 0 after it.
template <class Step>
inline void by_pieces(const TensorTable& t, std::int64_t item, Step step) {
  const Piece all = piece_of(t, item);
  if (t.dtype == capo::DType::f64) return step(all, at<const double>(t, 1, all));
  if (t.gradient == t.dtype && t.weight == t.dtype) return step(all, at<const float>(t, 1, all));
  constexpr std::int64_t kBlock = 1024;
  float wide[kBlock];
  for (std::int64_t begin = 0; begin < all.count; begin += kBlock) {
    const Piece piece{all.tensor, all.begin + begin, lesser(kBlock, all.count - begin)};
    const float* const first = at<const float>(t, 0, piece);
    if (t.gradient == capo::DType::bf16) widen(at<const capo::BFloat16>(t, 1, piece), wide, piece.count);
    if (t.gradient == capo::DType::f16) widen(at<const capo::Half>(t, 1, piece), wide, piece.count);
    step(piece, t.gradient == t.dtype ? at<const float>(t, 1, piece) : wide);
    if (t.weight == capo::DType::bf16) narrow(first, at<capo::BFloat16>(t, 4, piece), piece.count);
    if (t.weight == capo::DType::f16) narrow(first, at<capo::Half>(t, 4, piece), piece.count);
  }
}

template <class T>
void sgd(const capo::SgdArgs& a, const Piece& piece, const T* grad) {
  T* p = at<T>(a.table, 0, piece);
  const auto& o = a.options;
  const T lr = static_cast<T>(o.lr), decay = static_cast<T>(o.weight_decay), scale = static_cast<T>(o.grad_scale);
  if (o.momentum == 0) {
#pragma omp simd
    for (std::int64_t i = 0; i < piece.count; ++i) p[i] -= lr * (grad[i] * scale + decay * p[i]);
    return;
  }
  T* buffer = at<T>(a.table, 2, piece);
  const T momentum = static_cast<T>(o.momentum), fresh = o.first ? T(1) : static_cast<T>(1 - o.dampening);
  const T old = o.first ? T(0) : momentum;
  const T of_g = o.nesterov ? T(1) : T(0), of_buffer = o.nesterov ? momentum : T(1);
  if (o.first)  // it may hold anything, NaN too
    for (std::int64_t i = 0; i < piece.count; ++i) buffer[i] = T(0);
#pragma omp simd
  for (std::int64_t i = 0; i < piece.count; ++i) {
    const T g = grad[i] * scale + decay * p[i];
    const T b = old * buffer[i] + fresh * g;
    buffer[i] = b;
    p[i] -= lr * (of_g * g + of_buffer * b);
  }
}

template <class T>
void adamw(const capo::AdamwArgs& a, const Piece& piece, const T* grad) {
  T* p = at<T>(a.table, 0, piece);
  T* m = at<T>(a.table, 2, piece);
  T* v = at<T>(a.table, 3, piece);
  const T decay = static_cast<T>(a.decay), scale = static_cast<T>(a.grad_scale), eps = static_cast<T>(a.eps);
  const T fresh1 = static_cast<T>(1 - a.beta1), beta2 = static_cast<T>(a.beta2), fresh2 = static_cast<T>(1 - a.beta2);
  const T step_size = static_cast<T>(a.step_size), root = static_cast<T>(1 / a.root_correction);
#pragma omp simd
  for (std::int64_t i = 0; i < piece.count; ++i) {
    const T g = grad[i] * scale;
    const T mi = m[i] + fresh1 * (g - m[i]);
    const T vi = beta2 * v[i] + fresh2 * g * g;
    m[i] = mi;
    v[i] = vi;
    p[i] = p[i] * decay - step_size * (mi / (m::sqrt(vi) * root + eps));
  }
}

template <class T>
void ema(const capo::EmaArgs& a, const Piece& piece, const T* value) {
  T* average = at<T>(a.table, 0, piece);
  const T weight = static_cast<T>(a.weight);
#pragma omp simd
  for (std::int64_t i = 0; i < piece.count; ++i) average[i] += weight * (value[i] - average[i]);
}

template <class T>
void scale_chunk(const capo::ScaleArgs& a, std::int64_t item) {
  const Piece piece = piece_of(a.table, item);
  T* x = at<T>(a.table, 0, piece);
  const T scale = static_cast<T>(a.scale);
#pragma omp simd
  for (std::int64_t i = 0; i < piece.count; ++i) x[i] *= scale;
}

template <class T>
void grad_stat(const capo::GradStatArgs& a, std::int64_t item) {
  const Piece piece = piece_of(a.table, item);
  const T* x = at<T>(a.table, 0, piece);
  if (a.count_non_finite)  // x - x is 0 for a finite x, else NaN
    a.out[item] = sum_of<double>(piece.count, [x](std::int64_t i) { return x[i] - x[i] == T(0) ? 0.0 : 1.0; });
  else
    a.out[item] = sum_of<double>(piece.count,
                                 [x](std::int64_t i) { return static_cast<double>(x[i]) * static_cast<double>(x[i]); });
}

}  // namespace

CAPO_CPU_KERNEL(sgd, capo::SgdArgs) {
  const auto step = [&args](const Piece& piece, const auto* grad) { sgd(args, piece, grad); };
  for (std::int64_t i = begin; i < end; ++i) by_pieces(args.table, i, step);
}
CAPO_CPU_KERNEL(adamw, capo::AdamwArgs) {
  const auto step = [&args](const Piece& piece, const auto* grad) { adamw(args, piece, grad); };
  for (std::int64_t i = begin; i < end; ++i) by_pieces(args.table, i, step);
}
CAPO_CPU_KERNEL(ema, capo::EmaArgs) {
  const auto step = [&args](const Piece& piece, const auto* value) { ema(args, piece, value); };
  for (std::int64_t i = begin; i < end; ++i) by_pieces(args.table, i, step);
}
CAPO_CPU_KERNEL(optim_scale, capo::ScaleArgs) {
  for (std::int64_t i = begin; i < end; ++i)
    args.table.dtype == capo::DType::f32 ? scale_chunk<float>(args, i) : scale_chunk<double>(args, i);
}
CAPO_CPU_KERNEL(grad_stat, capo::GradStatArgs) {
  for (std::int64_t i = begin; i < end; ++i)
    args.table.dtype == capo::DType::f32 ? grad_stat<float>(args, i) : grad_stat<double>(args, i);
}
