// Kernels of group_norm, instance_norm and batch_norm over [outer, rows, columns]. A block owns one chunk of rows and a
// tile of columns, a thread 16 bytes of neighbouring columns (or one column) in every lanes-th row: loads are
// coalesced, and what belongs to a column (its statistics and weight) is read once. Parts of chunks are joined in f64
// by one block per group.
#include <capo/cuda/block_sum.cuh>
#include <capo/cuda/math.cuh>
#include <capo/cuda/pack.cuh>
#include <capo/ops/group_norm.h>
#include <capo/ops/unary_functors.h>

namespace {

using capo::Activation;
using capo::ChannelNormArgs;
using capo::ChannelNormBackwardArgs;
using capo::DType;
namespace gpu = capo::gpu;

constexpr int kThreads = 256;
template <class T>
constexpr int kWidth = gpu::kPack<T>;

// How a block's threads lie over its chunk: `across` of them side by side, kThreads / across rows at a time.
struct Layout {
  std::int64_t chunks, tiles;
  int across;  // a power of two, at most 32
};

struct Place {
  std::int64_t outer, item;   // item: outer * chunks + chunk, the row of the part tables
  std::int64_t row, count;    // the chunk's first row in [outer * rows], and how many it has
  std::int64_t column;        // the thread's first column; may lie beyond the last one
  int lane, lanes;            // its first row in the chunk, and the distance to its next one
};
template <int N, class Args>
__device__ inline Place place_of(const Args& a, const Layout& l) {
  const std::int64_t item = blockIdx.x / l.tiles, outer = item / l.chunks, begin = (item - outer * l.chunks) * a.chunk;
  const std::int64_t rest = a.rows - begin, tile = blockIdx.x - item * l.tiles;
  const int x = static_cast<int>(threadIdx.x) & (l.across - 1);
  return {outer, item, outer * a.rows + begin, rest < a.chunk ? rest : a.chunk, (tile * l.across + x) * N,
          static_cast<int>(threadIdx.x) / l.across, kThreads / l.across};
}

// table[outer, group of column c + j]
template <int N, class Args>
__device__ inline void of_columns(const Args& a, const void* table, const Place& p, float* out) {
  const float* values = static_cast<const float*>(table) + p.outer * a.groups;
  const std::int64_t size = a.columns / a.groups;
  for (int j = 0; j < N; ++j) out[j] = values[size == 1 ? p.column + j : (p.column + j) / size];
}

// A weight or bias of any of the three dtypes.
__device__ inline float value_at(const void* p, DType dtype, std::int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i];
  if (dtype == DType::bf16) return gpu::load(static_cast<const capo::BFloat16*>(p)[i]);
  return gpu::load(static_cast<const capo::Half*>(p)[i]);
}
template <int N>
__device__ inline void values_or(const void* p, DType dtype, std::int64_t at, float otherwise, float* out) {
  for (int j = 0; j < N; ++j) out[j] = p ? value_at(p, dtype, at + j) : otherwise;
}

// The activation of a kernel: None, a functor of unary_functors.h, or Any, which asks at run time (one column per
// thread, and the rare leaky relu). p, q: the functor's, relu's slope below zero and its ceiling.
struct None {};
struct Any {};
template <class F>
constexpr bool kActs = true;
template <>
constexpr bool kActs<None> = false;

// act(z)
template <class F>
__device__ inline float value_of(F, float z, Activation, float p, float q) { return F::f(z, p, q); }
__device__ inline float value_of(None, float z, Activation, float, float) { return z; }
__device__ inline float value_of(Any, float z, Activation activation, float p, float q) {
  if (activation == Activation::none) return z;
  if (activation == Activation::silu) return Silu::f(z, 0.0f, 0.0f);
  if (q > 0) return Clamp::f(z, p, q);
  return p == 0 ? Relu::f(z, 0.0f, 0.0f) : LeakyRelu::f(z, p, 0.0f);
}
// act'(z); relu's y may stand for z.
template <class F>
__device__ inline float slope_of(F, float z, Activation, float p, float q) { return F::df(z, z, p, q); }
__device__ inline float slope_of(Any, float z, Activation activation, float p, float q) {
  if (activation == Activation::none) return 1.0f;
  if (activation == Activation::silu) return Silu::df(z, z, 0.0f, 0.0f);
  if (q > 0) return Clamp::df(z, z, p, q);
  return p == 0 ? Relu::df(z, z, 0.0f, 0.0f) : LeakyRelu::df(z, z, p, 0.0f);
}

// Rows of a chunk that a lane has.
__device__ inline std::int64_t rows_of_lane(std::int64_t count, int lane, int lanes) {
  return lane < count ? (count - lane + lanes - 1) / lanes : 0;
}

// Per column: mean and sum of squared deviations. Every thread sums around its own first value, so that a large mean
// costs no digits and x is read once; the lanes are joined with Chan's formula.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) partial(ChannelNormArgs a, Layout l) {
  CAPO_SHARED(float, pivots, kThreads * N);
  CAPO_SHARED(float, offsets, kThreads * N);  // of a thread's mean from its pivot: the two are not rounded into one
  CAPO_SHARED(float, squares, kThreads * N);
  const Place p = place_of<N>(a, l);
  if (p.column < a.columns && p.lane < p.count) {
    const T* x = static_cast<const T*>(a.x) + p.row * a.columns + p.column;
    float pivot[N], v[N], sum[N] = {}, square[N] = {};
    gpu::load_many<N>(x + p.lane * a.columns, pivot);
#pragma unroll 4
    for (std::int64_t r = p.lane + p.lanes; r < p.count; r += p.lanes) {
      gpu::load_many<N>(x + r * a.columns, v);
      for (int j = 0; j < N; ++j) {
        const float d = v[j] - pivot[j];
        sum[j] += d;
        square[j] += d * d;
      }
    }
    const float n = static_cast<float>(rows_of_lane(p.count, p.lane, p.lanes));
    for (int j = 0; j < N; ++j) {
      const float m2 = square[j] - sum[j] * sum[j] / n;
      pivots[threadIdx.x * N + j] = pivot[j];
      offsets[threadIdx.x * N + j] = sum[j] / n;
      squares[threadIdx.x * N + j] = m2 < 0 ? 0.0f : m2;
    }
  }
  __syncthreads();
  const int x = threadIdx.x, wide = l.across * N;
  const std::int64_t c = (blockIdx.x % l.tiles) * wide + x;
  if (x >= wide || c >= a.columns) return;
  const float first = pivots[x], count = static_cast<float>(p.count);
  const auto offset = [&](int lane) { return (pivots[lane * wide + x] - first) + offsets[lane * wide + x]; };
  float mean = 0, m2 = 0;  // the mean as a distance from the first pivot
  for (int lane = 0; lane < p.lanes && lane < p.count; ++lane)
    mean += static_cast<float>(rows_of_lane(p.count, lane, p.lanes)) * offset(lane);
  mean /= count;
  for (int lane = 0; lane < p.lanes && lane < p.count; ++lane) {
    const float d = offset(lane) - mean;
    m2 += squares[lane * wide + x] + static_cast<float>(rows_of_lane(p.count, lane, p.lanes)) * d * d;
  }
  static_cast<double*>(a.part_mean)[p.item * a.columns + c] = static_cast<double>(first) + static_cast<double>(mean);
  static_cast<float*>(a.part_m2)[p.item * a.columns + c] = m2;
}

// One block per group: Chan, Golub and LeVeque's update over chunks and columns with all counts known.
__global__ void __launch_bounds__(kThreads) moments(ChannelNormArgs a, std::int64_t chunks) {
  const std::int64_t outer = blockIdx.x / a.groups, group = blockIdx.x - outer * a.groups, size = a.columns / a.groups;
  const std::int64_t at = outer * chunks * a.columns + group * size;
  const double* means = static_cast<const double*>(a.part_mean) + at;
  const float* squares = static_cast<const float*>(a.part_m2) + at;
  const double count = static_cast<double>(a.rows) * static_cast<double>(size), inverse = count > 0 ? 1.0 / count : 0.0;
  const auto rows_in = [&](std::int64_t chunk) {
    const std::int64_t rest = a.rows - chunk * a.chunk;
    return static_cast<double>(rest < a.chunk ? rest : a.chunk);
  };
  double mean = 0, m2 = 0;
  for (std::int64_t i = threadIdx.x; i < chunks * size; i += kThreads) {
    const std::int64_t chunk = i / size, j = i - chunk * size;
    mean += rows_in(chunk) * means[chunk * a.columns + j];
  }
  mean = gpu::block_sum<kThreads>(mean) * inverse;
  for (std::int64_t i = threadIdx.x; i < chunks * size; i += kThreads) {
    const std::int64_t chunk = i / size, j = i - chunk * size;
    const double d = means[chunk * a.columns + j] - mean;
    m2 += static_cast<double>(squares[chunk * a.columns + j]) + rows_in(chunk) * d * d;
  }
  const double var = gpu::block_sum<kThreads>(m2) * inverse;
  if (threadIdx.x != 0) return;
  static_cast<float*>(a.mean)[blockIdx.x] = static_cast<float>(mean);
  static_cast<float*>(a.var)[blockIdx.x] = static_cast<float>(var);
  static_cast<float*>(a.rstd)[blockIdx.x] = static_cast<float>(1.0 / sqrt(var + a.eps));
}

template <class T, int N, class F>
__global__ void __launch_bounds__(kThreads) apply(ChannelNormArgs a, Layout l) {
  const Place p = place_of<N>(a, l);
  if (p.column >= a.columns) return;
  float mean[N], rstd[N], w[N], b[N], v[N], added[N] = {};
  of_columns<N>(a, a.mean, p, mean);
  of_columns<N>(a, a.rstd, p, rstd);
  values_or<N>(a.weight, a.weight_dtype, p.column, 1.0f, w);
  values_or<N>(a.bias, a.weight_dtype, p.column, 0.0f, b);
  for (int j = 0; j < N; ++j) w[j] *= rstd[j];
  const float act_p = static_cast<float>(a.below_zero), act_q = static_cast<float>(a.ceiling);
  const std::int64_t at = p.row * a.columns + p.column;
#pragma unroll 4
  for (std::int64_t r = p.lane; r < p.count; r += p.lanes) {
    gpu::load_many<N>(static_cast<const T*>(a.x) + at + r * a.columns, v);
    if (a.residual) gpu::load_many<N>(static_cast<const T*>(a.residual) + at + r * a.columns, added);
    for (int j = 0; j < N; ++j)
      v[j] = value_of(F{}, (v[j] - mean[j]) * w[j] + b[j] + added[j], a.activation, act_p, act_q);
    gpu::store_many<N>(static_cast<T*>(a.y) + at + r * a.columns, v);
  }
}

// Whether z is made again from x: not where relu's slope is read from y.
template <class F>
__device__ inline bool remakes_z(const ChannelNormBackwardArgs& a) {
  return kActs<F> && !a.y && a.activation != Activation::none;
}

// What dz of a thread's columns is made of, a row at a time: dy alone, dy and y, or dy and z made again.
template <class T, int N, class F>
struct Slope {
  float mean[N] = {}, scale[N] = {}, bias[N] = {};  // z = (x - mean) scale + bias + residual
  float x[N] = {}, beside[N] = {};                  // the row's x, and its residual or y
  const T* other;
  float act_p, act_q;

  // with_mean, with_scale: the caller needs them too.
  __device__ Slope(const ChannelNormBackwardArgs& a, const Place& p, bool with_mean, bool with_scale)
      : other(static_cast<const T*>(a.y ? a.y : a.residual)),
        act_p(static_cast<float>(a.below_zero)),
        act_q(static_cast<float>(a.ceiling)) {
    const bool remakes = remakes_z<F>(a);
    if (remakes || with_mean) of_columns<N>(a, a.mean, p, mean);
    if (remakes) values_or<N>(a.bias, a.weight_dtype, p.column, 0.0f, bias);
    if (!remakes && !with_scale) return;
    float w[N];
    of_columns<N>(a, a.rstd, p, scale);
    values_or<N>(a.weight, a.weight_dtype, p.column, 1.0f, w);
    for (int j = 0; j < N; ++j) scale[j] *= w[j];
  }
  // dz of the row at element i; reads_x: x too.
  __device__ void dz_at(const ChannelNormBackwardArgs& a, std::int64_t i, bool reads_x, float* dz) {
    gpu::load_many<N>(static_cast<const T*>(a.dy) + i, dz);
    if (reads_x) gpu::load_many<N>(static_cast<const T*>(a.x) + i, x);
    if constexpr (kActs<F>) {
      if (other) gpu::load_many<N>(other + i, beside);
      for (int j = 0; j < N; ++j) {
        const float z = a.y ? beside[j] : (x[j] - mean[j]) * scale[j] + bias[j] + beside[j];
        dz[j] *= slope_of(F{}, z, a.activation, act_p, act_q);
      }
      if (a.dz) gpu::store_many<N>(static_cast<T*>(a.dz) + i, dz);
    }
  }
};

// Per column: the sums of dz and of dz (x - mean).
template <class T, int N, class F>
__global__ void __launch_bounds__(kThreads) dots(ChannelNormBackwardArgs a, Layout l) {
  CAPO_SHARED(float, sums, kThreads * N);
  CAPO_SHARED(float, products, kThreads * N);
  const Place p = place_of<N>(a, l);
  float dz[N], sum[N] = {}, dot[N] = {};
  if (p.column < a.columns) {
    const bool reads_x = a.part_dyx || remakes_z<F>(a);
    Slope<T, N, F> slope(a, p, a.part_dyx != nullptr, false);
    const std::int64_t at = p.row * a.columns + p.column;
#pragma unroll 4
    for (std::int64_t r = p.lane; r < p.count; r += p.lanes) {
      slope.dz_at(a, at + r * a.columns, reads_x, dz);
      for (int j = 0; j < N; ++j) {
        sum[j] += dz[j];
        dot[j] += dz[j] * (slope.x[j] - slope.mean[j]);
      }
    }
  }
  for (int j = 0; j < N; ++j) {
    sums[threadIdx.x * N + j] = sum[j];
    products[threadIdx.x * N + j] = dot[j];
  }
  __syncthreads();
  const int t = threadIdx.x, wide = l.across * N;
  const std::int64_t c = (blockIdx.x % l.tiles) * wide + t;
  if (t >= wide || c >= a.columns) return;
  float all = 0, all_dot = 0;
  for (int lane = 0; lane < p.lanes; ++lane) {
    all += sums[lane * wide + t];
    all_dot += products[lane * wide + t];
  }
  static_cast<float*>(a.part_dy)[p.item * a.columns + c] = all;
  if (a.part_dyx) static_cast<float*>(a.part_dyx)[p.item * a.columns + c] = all_dot;
}

// One block per group: `across` of its columns side by side, kThreads / across chunks at a time.
__global__ void __launch_bounds__(kThreads) sums(ChannelNormBackwardArgs a, std::int64_t chunks, int across) {
  CAPO_SHARED(double, of_dy, kThreads);
  CAPO_SHARED(double, of_dyx, kThreads);
  const std::int64_t outer = blockIdx.x / a.groups, group = blockIdx.x - outer * a.groups, size = a.columns / a.groups;
  const int t = threadIdx.x, x = t & (across - 1), lane = t / across, lanes = kThreads / across;
  const double count = static_cast<double>(a.rows) * static_cast<double>(size), inverse = count > 0 ? 1.0 / count : 0.0;
  const double rstd = a.rstd ? static_cast<double>(static_cast<const float*>(a.rstd)[blockIdx.x]) : 0.0;
  double total = 0, along = 0;
  for (std::int64_t first = 0; first < size; first += across) {
    const std::int64_t c = group * size + first + x;
    double s = 0, d = 0;
    if (first + x < size)
      for (std::int64_t k = lane; k < chunks; k += lanes) {
        const std::int64_t at = (outer * chunks + k) * a.columns + c;
        s += static_cast<double>(static_cast<const float*>(a.part_dy)[at]);
        if (a.part_dyx) d += static_cast<double>(static_cast<const float*>(a.part_dyx)[at]);
      }
    of_dy[t] = s;
    of_dyx[t] = d;
    __syncthreads();
    if (lane == 0 && first + x < size) {
      for (int i = 1; i < lanes; ++i) {
        s += of_dy[i * across + x];
        d += of_dyx[i * across + x];
      }
      if (a.dweight) static_cast<float*>(a.dweight)[outer * a.columns + c] = static_cast<float>(d * rstd);
      if (a.dbias) static_cast<float*>(a.dbias)[outer * a.columns + c] = static_cast<float>(s);
      const double w = a.weight ? static_cast<double>(value_at(a.weight, a.weight_dtype, c)) : 1.0;
      total += w * s;
      along += w * d;
    }
    __syncthreads();
  }
  total = gpu::block_sum<kThreads>(total);
  along = gpu::block_sum<kThreads>(along);
  if (t != 0 || !a.shift) return;
  static_cast<float*>(a.shift)[blockIdx.x] = static_cast<float>(total * inverse);
  static_cast<float*>(a.slope)[blockIdx.x] = static_cast<float>(along * rstd * rstd * inverse);
}

template <class T, int N, class F>
__global__ void __launch_bounds__(kThreads) gradient(ChannelNormBackwardArgs a, Layout l) {
  const Place p = place_of<N>(a, l);
  if (p.column >= a.columns) return;
  const bool fixed = !a.shift;  // the statistics are constants
  const bool reads_x = !fixed || remakes_z<F>(a);
  float shift[N] = {}, slope[N] = {}, v[N];
  Slope<T, N, F> act(a, p, !fixed, a.dx != nullptr);
  if (!fixed) {
    float rstd[N];
    of_columns<N>(a, a.rstd, p, rstd);
    of_columns<N>(a, a.shift, p, shift);
    of_columns<N>(a, a.slope, p, slope);
    for (int j = 0; j < N; ++j) {
      shift[j] *= rstd[j];
      slope[j] *= rstd[j];
    }
  }
  const std::int64_t at = p.row * a.columns + p.column;
#pragma unroll 4
  for (std::int64_t r = p.lane; r < p.count; r += p.lanes) {
    act.dz_at(a, at + r * a.columns, reads_x, v);
    if (!a.dx) continue;
    for (int j = 0; j < N; ++j) v[j] = v[j] * act.scale[j] - shift[j] - (act.x[j] - act.mean[j]) * slope[j];
    gpu::store_many<N>(static_cast<T*>(a.dx) + at + r * a.columns, v);
  }
}

int power_up_to(std::int64_t n, int most) {
  int p = 1;
  while (p < n && p < most) p *= 2;
  return p;
}

template <int N, class Args>
Layout layout_of(const Args& a) {
  const std::int64_t packs = (a.columns + N - 1) / N;
  const int across = power_up_to(packs, 32);
  return {(a.rows + a.chunk - 1) / a.chunk, (packs + across - 1) / across, across};
}

// Starts one of the kernels over chunks: wide when all pointers allow it.
template <class T, class Args, class Kernel>
void run(const char* name, const Args& a, std::int64_t items, bool packed, Kernel wide, Kernel narrow, void* stream) {
  const Layout l = packed ? layout_of<kWidth<T>>(a) : layout_of<1>(a);
  gpu::launch(name, packed ? wide : narrow, items * l.tiles, kThreads, 0, stream, a, l);
}

// Calls f(T{}, functor) for the dtype and the activation; the op lets no other one pass.
template <class Args, class F>
void for_each_form(const Args& a, const F& f) {
  gpu::for_floating("group_norm", a.dtype, [&](auto t) {
    if (a.activation == Activation::none) return f(t, None{});
    if (a.activation == Activation::silu) return f(t, Silu{});
    if (a.ceiling > 0) return f(t, Clamp{});
    a.below_zero == 0 ? f(t, Relu{}) : f(t, Any{});
  });
}

template <class Args>
std::int64_t chunks_of(const Args& a) { return (a.rows + a.chunk - 1) / a.chunk; }

}  // namespace

namespace capo::kernels {

void group_norm_partial_cuda(const ChannelNormArgs& a, std::int64_t items, void* stream) {
  gpu::for_floating("group_norm", a.dtype, [&](auto t) {
    using T = decltype(t);
    const bool packed = gpu::packs(a.columns, kWidth<T>, a.x);
    run<T>("group_norm_partial", a, items, packed, partial<T, kWidth<T>>, partial<T, 1>, stream);
  });
}

void group_norm_moments_cuda(const ChannelNormArgs& a, std::int64_t groups, void* stream) {
  gpu::launch("group_norm_moments", moments, groups, kThreads, 0, stream, a, chunks_of(a));
}

void group_norm_apply_cuda(const ChannelNormArgs& a, std::int64_t items, void* stream) {
  for_each_form(a, [&](auto t, auto act) {
    using T = decltype(t);
    const bool packed = gpu::packs(a.columns, kWidth<T>, a.x, a.residual, a.y);
    run<T>("group_norm_apply", a, items, packed, apply<T, kWidth<T>, decltype(act)>, apply<T, 1, Any>, stream);
  });
}

void group_norm_dots_cuda(const ChannelNormBackwardArgs& a, std::int64_t items, void* stream) {
  for_each_form(a, [&](auto t, auto act) {
    using T = decltype(t);
    const bool packed = gpu::packs(a.columns, kWidth<T>, a.x, a.dy, a.residual, a.y, a.dz);
    run<T>("group_norm_dots", a, items, packed, dots<T, kWidth<T>, decltype(act)>, dots<T, 1, Any>, stream);
  });
}

void group_norm_sums_cuda(const ChannelNormBackwardArgs& a, std::int64_t groups, void* stream) {
  const int across = power_up_to(a.columns / a.groups, 32);
  gpu::launch("group_norm_sums", sums, groups, kThreads, 0, stream, a, chunks_of(a), across);
}

void group_norm_dx_cuda(const ChannelNormBackwardArgs& a, std::int64_t items, void* stream) {
  for_each_form(a, [&](auto t, auto act) {
    using T = decltype(t);
    const bool packed = gpu::packs(a.columns, kWidth<T>, a.x, a.dy, a.residual, a.y, a.dz, a.dx);
    run<T>("group_norm_dx", a, items, packed, gradient<T, kWidth<T>, decltype(act)>, gradient<T, 1, Any>, stream);
  });
}

}  // namespace capo::kernels
