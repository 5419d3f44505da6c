// In-place optimiser steps over tables of tensors, and sums over gradients. One block, one chunk of one tensor.
#include <capo/cuda/block_sum.cuh>
#include <capo/cuda/pack.cuh>
#include <capo/ops/optim.h>

#include <type_traits>

namespace {

using capo::AtRunArgs;
using capo::GradTotalArgs;
using capo::kOptimChunk;
using capo::TensorTable;
namespace gpu = capo::gpu;

constexpr int kThreads = 256;
constexpr int kWidth = 4;  // elements that a thread takes together

struct Piece {
  int tensor;
  std::int64_t begin;
  int count;
};
__device__ inline Piece piece_of(const TensorTable& t, std::int64_t item) {
  int k = 0;
  while (item >= t.first[k + 1]) ++k;
  const std::int64_t begin = (item - t.first[k]) * kOptimChunk, rest = t.size[k] - begin;
  return {k, begin, static_cast<int>(rest < kOptimChunk ? rest : kOptimChunk)};
}

// W of a table without 16-bit weights.
struct None {};

template <class T>
__device__ inline T* start_of(const TensorTable& table, int list, const Piece& piece) {
  return static_cast<T*>(table.data[list][piece.tensor]) + piece.begin;
}
template <class T>
__device__ inline bool for_packs(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % (kWidth * sizeof(T)) == 0;
}

// Calls f(v) for every element, v[l] being its value in list l, and stores what f leaves in the lists of kWritten
// (bits). List 1 is of type G, the others f32. The weights, of type W, take the rounded list 0.
template <int kLists, unsigned kWritten, class G, class W, class F>
__device__ inline void each(const TensorTable& table, const F& f) {
  constexpr bool kWeights = !std::is_same_v<W, None>;
  const Piece piece = piece_of(table, blockIdx.x);
  float* at[kLists];
  G* in = nullptr;
  W* weight = nullptr;
  bool packs = true;
  for (int l = 0; l < kLists; ++l) {
    if (l == 1)
      in = start_of<G>(table, l, piece), packs = packs && for_packs(in);
    else
      at[l] = start_of<float>(table, l, piece), packs = packs && for_packs(at[l]);
  }
  if constexpr (kWeights) weight = start_of<W>(table, 4, piece), packs = packs && for_packs(weight);
  const int tail = packs ? piece.count / kWidth * kWidth : 0;
  for (int i = kWidth * static_cast<int>(threadIdx.x); i < tail; i += kWidth * kThreads) {
    float v[kLists][kWidth];
#pragma unroll
    for (int l = 0; l < kLists; ++l) {
      if (l == 1)
        gpu::load_many<kWidth>(in + i, v[l]);
      else
        gpu::load_many<kWidth>(at[l] + i, v[l]);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float one[kLists];
      for (int l = 0; l < kLists; ++l) one[l] = v[l][j];
      f(one);
      for (int l = 0; l < kLists; ++l) v[l][j] = one[l];
    }
#pragma unroll
    for (int l = 0; l < kLists; ++l)
      if (kWritten >> l & 1) gpu::store_many<kWidth>(at[l] + i, v[l]);
    if constexpr (kWeights) gpu::store_many<kWidth>(weight + i, v[0]);
  }
  for (int i = tail + static_cast<int>(threadIdx.x); i < piece.count; i += kThreads) {
    float one[kLists];
    for (int l = 0; l < kLists; ++l) one[l] = l == 1 ? gpu::load(in[i]) : at[l][i];
    f(one);
    for (int l = 0; l < kLists; ++l)
      if (kWritten >> l & 1) at[l][i] = one[l];
    if constexpr (kWeights) weight[i] = gpu::Store<W>::from(one[0]);
  }
}

// A captured step reads by pointer what changes from replay to replay; null: the argument's value holds.
__device__ inline bool skipped(const AtRunArgs& at) { return at.skip && *at.skip != 0.0f; }
__device__ inline void read_scale(const AtRunArgs& at, float& scale) {
  if (at.scale) scale = *at.scale;
}
__device__ inline void read_number(const AtRunArgs& at, int i, float& number) {
  if (at.numbers) number = at.numbers[i];
}

template <class G, class W>
__global__ void __launch_bounds__(kThreads)
sgd_plain(const TensorTable t, float lr, float decay, float scale, AtRunArgs at) {
  if (skipped(at)) return;
  read_number(at, 0, lr);
  read_scale(at, scale);
  each<2, 1, G, W>(t, [=](float* v) { v[0] -= lr * (v[1] * scale + decay * v[0]); });
}

struct Momentum {
  float lr, decay, scale, old, fresh, of_g, of_buffer;
  bool first;
};
template <class G, class W>
__global__ void __launch_bounds__(kThreads) sgd_momentum(const TensorTable t, Momentum o, AtRunArgs at) {
  if (skipped(at)) return;
  read_number(at, 0, o.lr);
  read_scale(at, o.scale);
  each<3, 1 | 4, G, W>(t, [=](float* v) {
    const float g = v[1] * o.scale + o.decay * v[0];
    v[2] = (o.first ? 0.0f : o.old * v[2]) + o.fresh * g;  // the first time it may hold anything, NaN too
    v[0] -= o.lr * (o.of_g * g + o.of_buffer * v[2]);
  });
}

struct Adamw {
  float decay, scale, eps, fresh1, beta2, fresh2, step_size, root;
};
template <class G, class W>
__global__ void __launch_bounds__(kThreads) adamw(const TensorTable t, Adamw o, AtRunArgs at) {
  if (skipped(at)) return;
  read_number(at, 0, o.decay);
  read_number(at, 1, o.step_size);
  read_number(at, 2, o.root);
  read_scale(at, o.scale);
  each<4, 1 | 4 | 8, G, W>(t, [=](float* v) {
    const float g = v[1] * o.scale;
    v[2] += o.fresh1 * (g - v[2]);
    v[3] = o.beta2 * v[3] + o.fresh2 * g * g;
    v[0] = v[0] * o.decay - o.step_size * (v[2] / (sqrtf(v[3]) * o.root + o.eps));
  });
}

template <class G>
__global__ void __launch_bounds__(kThreads) ema(const TensorTable t, float weight, AtRunArgs at) {
  if (skipped(at)) return;
  read_number(at, 0, weight);
  each<2, 1, G, None>(t, [=](float* v) { v[0] += weight * (v[1] - v[0]); });
}

__global__ void __launch_bounds__(kThreads) scale(const TensorTable t, float factor, AtRunArgs at) {
  if (skipped(at)) return;
  read_scale(at, factor);
  each<1, 1, float, None>(t, [=](float* v) { v[0] *= factor; });
}

// x - x is 0 for a finite x, else NaN.
template <class T, bool kCountNonFinite>
__device__ inline double stat_of(T x) {
  const float v = gpu::load(x);
  if (kCountNonFinite) return v - v == 0.0f ? 0.0 : 1.0;
  return static_cast<double>(v) * static_cast<double>(v);
}

template <class T, bool kCountNonFinite>
__global__ void __launch_bounds__(kThreads) grad_stat(const TensorTable t, double* out) {
  constexpr int kTogether = gpu::kPack<T>;
  const Piece piece = piece_of(t, blockIdx.x);
  const T* x = static_cast<const T*>(t.data[0][piece.tensor]) + piece.begin;
  const int tail = reinterpret_cast<std::uintptr_t>(x) % 16 == 0 ? piece.count / kTogether * kTogether : 0;
  double sum = 0;
  for (int i = kTogether * static_cast<int>(threadIdx.x); i < tail; i += kTogether * kThreads) {
    const auto pack = *reinterpret_cast<const gpu::Pack<T, kTogether>*>(x + i);
    for (int j = 0; j < kTogether; ++j) sum += stat_of<T, kCountNonFinite>(pack.v[j]);
  }
  for (int i = tail + static_cast<int>(threadIdx.x); i < piece.count; i += kThreads)
    sum += stat_of<T, kCountNonFinite>(x[i]);
  sum = gpu::block_sum<kThreads>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// One block adds the chunks' parts up, in an order that depends on nothing but their number.
__device__ inline double sum_of(const double* parts, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) sum += parts[i];
  return gpu::block_sum<kThreads>(sum);
}

// No sample: grad_verdict is no op; tests/graph_test.cpp runs it on the shim.
__global__ void __launch_bounds__(kThreads) grad_total(GradTotalArgs a) {
  const double total = sum_of(a.parts, a.count), wrong = sum_of(a.wrong, a.wrong_count);
  if (threadIdx.x != 0) return;
  if (a.total) *a.total = total;
  if (!a.norm) return;
  const double unscale = a.loss_scale ? 1 / static_cast<double>(*a.loss_scale) : 1, norm = sqrt(total) * unscale;
  const bool good = norm - norm == 0 && wrong == 0;
  *a.norm = norm;
  *a.scale = static_cast<float>((a.max_norm > 0 && norm > a.max_norm ? a.max_norm / norm : 1) * unscale);
  *a.skip = good ? 0.0f : 1.0f;
}

void check_f32(const char* op, capo::DType dtype) {
  CAPO_CHECK(dtype == capo::f32, op, ": CUDA kernels write f32 (keep f32 masters), got ", dtype);
}
float f(double v) { return static_cast<float>(v); }

// Calls run(G{}, W{}) with the types of the table's list 1 and weights.
template <class F>
void with_types(const char* op, const TensorTable& t, const F& run) {
  check_f32(op, t.dtype);
  if (t.weight == capo::f32) return run(float{}, None{});
  const auto beside = [&](auto weight) {
    if (t.gradient == capo::f32)
      run(float{}, weight);
    else
      run(weight, weight);
  };
  t.weight == capo::bf16 ? beside(capo::BFloat16{}) : beside(capo::Half{});
}

// A kernel takes the table and a few words by value, and all arguments may have 4 KiB.
static_assert(sizeof(TensorTable) <= 2048);

}  // namespace

namespace capo::kernels {

void sgd_cuda(const SgdArgs& a, std::int64_t chunks, void* stream) {
  const SgdOptions& o = a.options;
  const Momentum m{f(o.lr), f(o.weight_decay), f(o.grad_scale), f(o.momentum), o.first ? 1.0f : f(1 - o.dampening),
                   o.nesterov ? 1.0f : 0.0f, o.nesterov ? f(o.momentum) : 1.0f, o.first};
  with_types("sgd_", a.table, [&](auto g, auto w) {
    using G = decltype(g);
    using W = decltype(w);
    if (o.momentum == 0)
      gpu::launch("sgd", sgd_plain<G, W>, chunks, kThreads, 0, stream, a.table, m.lr, m.decay, m.scale, a.at_run);
    else
      gpu::launch("sgd", sgd_momentum<G, W>, chunks, kThreads, 0, stream, a.table, m, a.at_run);
  });
}

void adamw_cuda(const AdamwArgs& a, std::int64_t chunks, void* stream) {
  const Adamw o{f(a.decay), f(a.grad_scale), f(a.eps), f(1 - a.beta1), f(a.beta2), f(1 - a.beta2), f(a.step_size),
                f(1 / a.root_correction)};
  with_types("adamw_", a.table, [&](auto g, auto w) {
    gpu::launch("adamw", adamw<decltype(g), decltype(w)>, chunks, kThreads, 0, stream, a.table, o, a.at_run);
  });
}

void ema_cuda(const EmaArgs& a, std::int64_t chunks, void* stream) {
  check_f32("ema_", a.table.dtype);
  gpu::for_floating("ema_", a.table.gradient, [&](auto v) {
    gpu::launch("ema", ema<decltype(v)>, chunks, kThreads, 0, stream, a.table, f(a.weight), a.at_run);
  });
}

void optim_scale_cuda(const ScaleArgs& a, std::int64_t chunks, void* stream) {
  check_f32("scale_", a.table.dtype);
  gpu::launch("scale", scale, chunks, kThreads, 0, stream, a.table, f(a.scale), a.at_run);
}

void grad_stat_cuda(const GradStatArgs& a, std::int64_t chunks, void* stream) {
  gpu::for_floating(a.count_non_finite ? "all_finite" : "global_norm", a.table.dtype, [&](auto t) {
    using T = decltype(t);
    gpu::launch("grad_stat", a.count_non_finite ? grad_stat<T, true> : grad_stat<T, false>, chunks, kThreads, 0, stream,
                a.table, a.out);
  });
}

void grad_total_cuda(const GradTotalArgs& a, std::int64_t, void* stream) {
  gpu::launch("grad_total", grad_total, 1, kThreads, 0, stream, a);
}

}  // namespace capo::kernels
