// layer_norm and rms_norm over the last axis. Rows of up to 1,536 aligned elements live in the registers of one warp,
// so that x (and dy) is read once; others are read again from the cache. Statistics and sums are f32. The same kernels
// add a residual before the norm and, backward, the gradient that came past it. T: of x, sum and their gradients; Y: of
// y, the residual and theirs, 16 bits beside an f32 stream or T; W: of weight and bias.
#include <capo/cuda/block_sum.cuh>
#include <capo/cuda/pack.cuh>
#include <capo/ops/layer_norm.h>

#include <type_traits>

namespace {

namespace gpu = capo::gpu;
using gpu::kWarp;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWidth = 8;                     // elements of one access pattern: 16 bytes of 16-bit types, 32 of f32
constexpr int kStep = kWidth * kWarp;         // elements that a warp covers at once
constexpr int kMostSteps = 6;                 // of a row in registers
constexpr int kChunk = static_cast<int>(capo::kLayerNormChunk);

template <class T, class Y, class W>
struct Forward {
  const T* x;
  const W *weight, *bias;  // or null
  Y* y;
  float *mean, *rstd;      // or null
  std::int64_t rows, columns;
  float eps;
  bool rms;
  const Y* residual;       // or null; else x + residual goes to sum and is what is normalised
  T* sum;
  std::int64_t per_sample;  // rows that share one row of weight and bias

  __device__ std::int64_t factors(std::int64_t row) const {
    return per_sample == rows ? 0 : row / per_sample * columns;
  }
};

// out[0..N) of a weight or bias, or the value that stands for an absent one.
template <int N, class W>
__device__ inline void load_or(const W* p, std::int64_t at, float otherwise, float* out) {
  if (p) return gpu::load_many<N>(p + at, out);
  for (int j = 0; j < N; ++j) out[j] = otherwise;
}

struct Moments {
  float mean, rest, rstd;  // the mean is mean + rest: what rounding it lost
};
// From the sums of x - mean and of their squares.
__device__ inline Moments moments_of(float mean, float sum, float square, float n, float eps) {
  const float rest = sum / n, var = (square - sum * rest) / n;
  return {mean, rest, 1.0f / sqrtf((var > 0 || var != var ? var : 0.0f) + eps)};
}

template <int N, class T, class Y, class W>
__device__ inline void write_normal(const Forward<T, Y, W>& a, std::int64_t row, std::int64_t c, const Moments& m,
                                    const float* x) {
  float w[N], b[N], y[N];
  const std::int64_t at = a.factors(row) + c;
  load_or<N>(a.weight, at, 1.0f, w);
  load_or<N>(a.bias, at, 0.0f, b);
  for (int j = 0; j < N; ++j) y[j] = ((x[j] - m.mean) - m.rest) * m.rstd * w[j] + b[j];
  gpu::store_many<N>(a.y + row * a.columns + c, y);
}

template <class T, class Y, class W>
__device__ inline void write_moments(const Forward<T, Y, W>& a, std::int64_t row, const Moments& m) {
  if (a.mean) a.mean[row] = m.mean + m.rest;
  if (a.rstd) a.rstd[row] = m.rstd;
}

// x[0..N) += r[0..N), as storage rounds it.
template <class T, int N, class Y>
__device__ inline void add_residual(const Y* r, float* x) {
  float v[N];
  gpu::load_many<N>(r, v);
  for (int j = 0; j < N; ++j) x[j] = gpu::load(gpu::Store<T>::from(x[j] + v[j]));
}

// One warp per row, which stays in registers.
template <class T, class Y, class W, int kSteps>
__global__ void __launch_bounds__(kThreads) forward_kept(Forward<T, Y, W> a) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= a.rows) return;  // the whole warp
  const float n = static_cast<float>(a.columns);
  float x[kSteps][kWidth];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int c = k * kStep + lane * kWidth;
    for (int j = 0; j < kWidth; ++j) x[k][j] = 0;
    if (c < a.columns) gpu::load_many<kWidth>(a.x + row * a.columns + c, x[k]);
  }
  if (a.residual) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {  // all loads before the first store
      const int c = k * kStep + lane * kWidth;
      if (c < a.columns) add_residual<T, kWidth>(a.residual + row * a.columns + c, x[k]);
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int c = k * kStep + lane * kWidth;
      if (c < a.columns) gpu::store_many<kWidth>(a.sum + row * a.columns + c, x[k]);
    }
  }
  float mean = 0;
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
    for (int j = 0; j < kWidth; ++j) mean += x[k][j];
  mean = a.rms ? 0.0f : gpu::warp_sum(mean) / n;
  float sum = 0, square = 0;
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
    if (k * kStep + lane * kWidth < a.columns)
      for (int j = 0; j < kWidth; ++j) {
        const float d = x[k][j] - mean;
        sum += d;
        square += d * d;
      }
  const Moments m = moments_of(mean, a.rms ? 0.0f : gpu::warp_sum(sum), gpu::warp_sum(square), n, a.eps);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int c = k * kStep + lane * kWidth;
    if (c < a.columns) write_normal<kWidth>(a, row, c, m, x[k]);
  }
  if (lane == 0) write_moments(a, row, m);
}

// kTeam threads per row, N elements at a time; any number of columns. Blocks of kThreads.
template <class T, class Y, class W, int N, int kTeam>
__global__ void __launch_bounds__(kThreads) forward_read(Forward<T, Y, W> a) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  if (row >= a.rows) return;  // the whole team
  const std::int64_t first = N * static_cast<std::int64_t>(threadIdx.x % kTeam), step = N * kTeam;
  const T* x = a.x + row * a.columns;
  const float n = static_cast<float>(a.columns);
  float mean = 0, v[N];
  if (a.residual) {
    for (std::int64_t c = first; c < a.columns; c += step) {  // a thread reads again only what it wrote itself
      gpu::load_many<N>(x + c, v);
      add_residual<T, N>(a.residual + row * a.columns + c, v);
      gpu::store_many<N>(a.sum + row * a.columns + c, v);
    }
    x = a.sum + row * a.columns;
  }
  if (!a.rms) {
    for (std::int64_t c = first; c < a.columns; c += step) {
      gpu::load_many<N>(x + c, v);
      for (int j = 0; j < N; ++j) mean += v[j];
    }
    mean = gpu::team_sum<kTeam>(mean) / n;
  }
  float sum = 0, square = 0;
  for (std::int64_t c = first; c < a.columns; c += step) {
    gpu::load_many<N>(x + c, v);
    for (int j = 0; j < N; ++j) {
      const float d = v[j] - mean;
      sum += d;
      square += d * d;
    }
  }
  sum = a.rms ? 0.0f : gpu::team_sum<kTeam>(sum);
  const Moments m = moments_of(mean, sum, gpu::team_sum<kTeam>(square), n, a.eps);
  for (std::int64_t c = first; c < a.columns; c += step) {
    gpu::load_many<N>(x + c, v);
    write_normal<N>(a, row, c, m, v);
  }
  if (first == 0) write_moments(a, row, m);
}

template <class T, class Y, class W>
struct Backward {
  const T* x;
  const Y* dy;
  const W* weight;
  const float *mean, *rstd;            // or null: 0
  T* dx;                               // or null
  Y* dr;                               // dx once more; or null
  float *dweight_part, *dbias_part;    // each or null
  std::int64_t rows, columns;
  bool rms;
  const T* dsum;                       // added to dx; or null
  std::int64_t per_sample;             // rows that share one row of weight

  static constexpr bool kStreams = !std::is_same_v<T, Y>;  // else dr is null
  __device__ bool wants_dx() const { return dx || (kStreams && dr); }

  __device__ std::int64_t factors(std::int64_t row) const {
    return per_sample == rows ? 0 : row / per_sample * columns;
  }
};

// The rows of one chunk; all of one sample.
struct Span {
  std::int64_t first, last;
};
template <class T, class Y, class W>
__device__ inline Span rows_of(const Backward<T, Y, W>& a, std::int64_t chunk) {
  const std::int64_t chunks = (a.per_sample + kChunk - 1) / kChunk, sample = chunk / chunks;
  const std::int64_t first = sample * a.per_sample + (chunk - sample * chunks) * kChunk;
  const std::int64_t end = (sample + 1) * a.per_sample;
  return {first, first + kChunk < end ? first + kChunk : end};
}

// With g = dy weight: dx = rstd (g - shift - (x - mean) slope), shift = mean(g), slope = mean(g (x - mean)) rstd^2.
struct Slopes {
  float mean, rstd, shift, slope;
};

// dy becomes dx.
template <int N, class T, class Y, class W>
__device__ inline void to_dx(const Backward<T, Y, W>& a, std::int64_t row, std::int64_t c, const Slopes& s,
                             const float* x, float* dy) {
  float w[N], dsum[N];
  load_or<N>(a.weight, a.factors(row) + c, 1.0f, w);
  load_or<N>(a.dsum, row * a.columns + c, 0.0f, dsum);
  for (int j = 0; j < N; ++j) dy[j] = (dy[j] * w[j] - s.shift - (x[j] - s.mean) * s.slope) * s.rstd + dsum[j];
}

template <int N, class T, class Y, class W>
__device__ inline void write_dx(const Backward<T, Y, W>& a, std::int64_t at, const float* dx) {
  if (!a.kStreams || a.dx) gpu::store_many<N>(a.dx + at, dx);
  if (a.kStreams && a.dr) gpu::store_many<N>(a.dr + at, dx);
}

// Adds what N elements give to the sums of g and of g (x - mean).
template <int N, class T, class Y, class W>
__device__ inline void add_g(const Backward<T, Y, W>& a, std::int64_t row, std::int64_t c, float mean, const float* x,
                             const float* dy, float& g_sum, float& gx_sum) {
  float w[N];
  load_or<N>(a.weight, a.factors(row) + c, 1.0f, w);
  for (int j = 0; j < N; ++j) {
    const float g = dy[j] * w[j];
    g_sum += g;
    gx_sum += g * (x[j] - mean);
  }
}

// own[k][j] of all warps, added up in their order, becomes row `chunk` of part.
template <int kSteps>
__device__ inline void join_warps(const float (&own)[kSteps][kWidth], float* all, float* part, std::int64_t columns) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int c = k * kStep + lane * kWidth;
    if (c < columns)
      for (int j = 0; j < kWidth; ++j) all[warp * columns + c + j] = own[k][j];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < columns; c += kThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += all[w * columns + c];
    part[blockIdx.x * columns + c] = sum;
  }
  __syncthreads();
}

// One block per chunk of rows, one warp per row: x and dy are read once, the weight's sums stay in registers.
template <class T, class Y, class W, int kSteps>
__global__ void __launch_bounds__(kThreads) backward_kept(Backward<T, Y, W> a) {
  CAPO_SHARED_DYNAMIC(carve);
  float* const all = carve.template take<float>(kWarps * static_cast<int>(a.columns));
  const auto [first, last] = rows_of(a, blockIdx.x);
  const int lane = threadIdx.x % kWarp;
  const float n = static_cast<float>(a.columns);
  float dw[kSteps][kWidth] = {}, db[kSteps][kWidth] = {};
  for (std::int64_t row = first + threadIdx.x / kWarp; row < last; row += kWarps) {
    Slopes s{a.mean ? a.mean[row] : 0.0f, a.rstd ? a.rstd[row] : 0.0f, 0, 0};
    float x[kSteps][kWidth], dy[kSteps][kWidth];
    float g_sum = 0, gx_sum = 0;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int c = k * kStep + lane * kWidth;
      for (int j = 0; j < kWidth; ++j) x[k][j] = dy[k][j] = 0;
      if (c >= a.columns) continue;
      gpu::load_many<kWidth>(a.dy + row * a.columns + c, dy[k]);
      if (a.x) gpu::load_many<kWidth>(a.x + row * a.columns + c, x[k]);
      if (a.wants_dx()) add_g<kWidth>(a, row, c, s.mean, x[k], dy[k], g_sum, gx_sum);
      for (int j = 0; j < kWidth; ++j) {
        dw[k][j] += dy[k][j] * ((x[k][j] - s.mean) * s.rstd);
        db[k][j] += dy[k][j];
      }
    }
    if (!a.wants_dx()) continue;
    s.shift = a.rms ? 0.0f : gpu::warp_sum(g_sum) / n;
    s.slope = gpu::warp_sum(gx_sum) * s.rstd * s.rstd / n;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {  // all loads before the first store
      const int c = k * kStep + lane * kWidth;
      if (c < a.columns) to_dx<kWidth>(a, row, c, s, x[k], dy[k]);
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int c = k * kStep + lane * kWidth;
      if (c < a.columns) write_dx<kWidth>(a, row * a.columns + c, dy[k]);
    }
  }
  if (a.dweight_part) join_warps(dw, all, a.dweight_part, a.columns);
  if (a.dbias_part) join_warps(db, all, a.dbias_part, a.columns);
}

template <class T, class Y, class W, int N, int kTeam>
__global__ void __launch_bounds__(kThreads) dx_read(Backward<T, Y, W> a) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  if (row >= a.rows) return;  // the whole team
  const std::int64_t first = N * static_cast<std::int64_t>(threadIdx.x % kTeam), step = N * kTeam, at = row * a.columns;
  const float n = static_cast<float>(a.columns);
  Slopes s{a.mean ? a.mean[row] : 0.0f, a.rstd[row], 0, 0};
  float g_sum = 0, gx_sum = 0, x[N], dy[N];
  for (std::int64_t c = first; c < a.columns; c += step) {
    gpu::load_many<N>(a.x + at + c, x);
    gpu::load_many<N>(a.dy + at + c, dy);
    add_g<N>(a, row, c, s.mean, x, dy, g_sum, gx_sum);
  }
  g_sum = gpu::team_sum<kTeam>(g_sum);
  s.shift = a.rms ? 0.0f : g_sum / n;
  s.slope = gpu::team_sum<kTeam>(gx_sum) * s.rstd * s.rstd / n;
  for (std::int64_t c = first; c < a.columns; c += step) {
    gpu::load_many<N>(a.x + at + c, x);
    gpu::load_many<N>(a.dy + at + c, dy);
    to_dx<N>(a, row, c, s, x, dy);
    write_dx<N>(a, at + c, dy);
  }
}

// One block per chunk of rows and kThreads columns, a thread per column.
template <class T, class Y, class W>
__global__ void __launch_bounds__(kThreads) parts_read(Backward<T, Y, W> a, std::int64_t tiles) {
  const std::int64_t chunk = blockIdx.x / tiles, c = (blockIdx.x - chunk * tiles) * kThreads + threadIdx.x;
  if (c >= a.columns) return;
  const auto [first, last] = rows_of(a, chunk);
  float dw = 0, db = 0;
  for (std::int64_t row = first; row < last; ++row) {
    const float dy = gpu::load(a.dy[row * a.columns + c]);
    db += dy;
    if (a.dweight_part)
      dw += dy * ((gpu::load(a.x[row * a.columns + c]) - (a.mean ? a.mean[row] : 0.0f)) * a.rstd[row]);
  }
  if (a.dweight_part) a.dweight_part[chunk * a.columns + c] = dw;
  if (a.dbias_part) a.dbias_part[chunk * a.columns + c] = db;
}

// The second stage: 32 columns of one sample in one of two tables per block, sixteen rows at a time; then those, in
// order.
constexpr int kJoinRows = 16;
template <class W>
struct Join {
  const float* part[2];
  W* out[2];  // null: nothing to do
};
template <class W>
__global__ void __launch_bounds__(kJoinRows * kWarp) join_chunks(Join<W> a, std::int64_t samples, std::int64_t chunks,
                                                                  std::int64_t columns) {
  CAPO_SHARED(float, sums, kJoinRows * kWarp);
  const std::int64_t tiles = (columns + kWarp - 1) / kWarp;
  const std::int64_t table = blockIdx.x / tiles, sample = table < samples ? table : table - samples;
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const std::int64_t c = (blockIdx.x - table * tiles) * kWarp + lane;
  W* const out = table < samples ? a.out[0] : a.out[1];
  const float* const part = table < samples ? a.part[0] : a.part[1];
  float sum = 0;
  if (out && c < columns) {
#pragma unroll 4
    for (std::int64_t k = row; k < chunks; k += kJoinRows) sum += part[(sample * chunks + k) * columns + c];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (!out || c >= columns || row != 0) return;
  for (int r = 1; r < kJoinRows; ++r) sum += sums[r * kWarp + lane];
  out[sample * columns + c] = gpu::Store<W>::from(sum);
}

// Calls f with the number of steps that hold a row in registers, as a constant; false when none does.
template <class F>
bool with_steps(std::int64_t columns, const F& f) {
  const std::int64_t steps = (columns + kStep - 1) / kStep;
  if (steps > kMostSteps) return false;
  if (steps <= 1) f(std::integral_constant<int, 1>());
  else if (steps == 2) f(std::integral_constant<int, 2>());
  else if (steps == 3) f(std::integral_constant<int, 3>());
  else if (steps == 4) f(std::integral_constant<int, 4>());
  else f(std::integral_constant<int, kMostSteps>());
  return true;
}

template <class T, class Y, class W>
void run_forward(const capo::LayerNormArgs& p, void* stream) {
  const Forward<T, Y, W> a{static_cast<const T*>(p.x), static_cast<const W*>(p.weight), static_cast<const W*>(p.bias),
                        static_cast<Y*>(p.y), static_cast<float*>(p.mean), static_cast<float*>(p.rstd),
                           p.rows, p.columns, static_cast<float>(p.eps), p.rms,
                        static_cast<const Y*>(p.residual), static_cast<T*>(p.sum), p.rows / p.samples};
  const char* name = "layer_norm_forward";
  const std::int64_t by_warps = (p.rows + kWarps - 1) / kWarps;
  if (!gpu::packs(p.columns, kWidth, p.x, p.y, p.weight, p.bias, p.residual, p.sum))
    return gpu::launch(name, forward_read<T, Y, W, 1, kWarp>, by_warps, kThreads, 0, stream, a);
  const auto kept = [&](auto steps) {
    gpu::launch(name, forward_kept<T, Y, W, steps()>, by_warps, kThreads, 0, stream, a);
  };
  if (!with_steps(p.columns, kept))
    gpu::launch(name, forward_read<T, Y, W, kWidth, kThreads>, p.rows, kThreads, 0, stream, a);
}

template <class T, class Y, class W>
void run_backward(const capo::LayerNormBackwardArgs& p, std::int64_t chunks, void* stream) {
  const Backward<T, Y, W> a{static_cast<const T*>(p.x), static_cast<const Y*>(p.dy), static_cast<const W*>(p.weight),
                            p.rms ? nullptr : static_cast<const float*>(p.mean), static_cast<const float*>(p.rstd),
                            static_cast<T*>(p.dx), static_cast<Y*>(p.dr), static_cast<float*>(p.dweight_part),
                            static_cast<float*>(p.dbias_part), p.rows, p.columns, p.rms,
                            static_cast<const T*>(p.dsum), p.rows / p.samples};
  const char* name = "layer_norm_backward";
  const bool parts = p.dweight_part || p.dbias_part;
  const bool packed = gpu::packs(p.columns, kWidth, p.x, p.dy, p.weight, p.dx, p.dr, p.dsum);
  const std::size_t shared = gpu::shared_bytes<float>(static_cast<std::size_t>(kWarps * p.columns));
  const auto kept = [&](auto steps) {
    gpu::launch(name, backward_kept<T, Y, W, steps()>, chunks, kThreads, shared, stream, a);
  };
  if (!packed || !with_steps(p.columns, kept)) {
    if ((p.dx || p.dr) && packed) gpu::launch(name, dx_read<T, Y, W, kWidth, kThreads>, p.rows, kThreads, 0, stream, a);
    if ((p.dx || p.dr) && !packed)
      gpu::launch(name, dx_read<T, Y, W, 1, kWarp>, (p.rows + kWarps - 1) / kWarps, kThreads, 0, stream, a);
    const std::int64_t tiles = (p.columns + kThreads - 1) / kThreads;
    if (parts) gpu::launch(name, parts_read<T, Y, W>, chunks * tiles, kThreads, 0, stream, a, tiles);
  }
  if (!p.dweight && !p.dbias) return;
  const Join<W> join{{a.dweight_part, a.dbias_part}, {static_cast<W*>(p.dweight), static_cast<W*>(p.dbias)}};
  const std::int64_t tiles = (p.columns + kWarp - 1) / kWarp;
  gpu::launch("layer_norm_join", join_chunks<W>, 2 * p.samples * tiles, kJoinRows * kWarp, 0, stream, join, p.samples,
              chunks / p.samples, p.columns);
}

// Calls f(T{}, Y{}, W{}): Y is T, or 16 bits beside f32; W is Y or f32.
template <class F>
void for_types(bool rms, capo::DType dtype, capo::DType y_dtype, capo::DType weight_dtype, const F& f) {
  gpu::for_floating(rms ? "rms_norm" : "layer_norm", y_dtype, [&](auto y) {
    const auto with_weight = [&](auto t) {
      if (weight_dtype == capo::f32)
        f(t, y, float{});
      else
        f(t, y, y);
    };
    if (dtype == capo::f32)
      with_weight(float{});
    else
      with_weight(y);
  });
}

}  // namespace

namespace capo::kernels {

void layer_norm_cuda(const LayerNormArgs& a, std::int64_t, void* stream) {
  if (a.columns == 0) return;
  for_types(a.rms, a.dtype, a.y_dtype, a.weight_dtype,
            [&](auto t, auto y, auto w) { run_forward<decltype(t), decltype(y), decltype(w)>(a, stream); });
}

void layer_norm_backward_cuda(const LayerNormBackwardArgs& a, std::int64_t chunks, void* stream) {
  if (a.columns == 0) return;
  for_types(a.rms, a.dtype, a.y_dtype, a.weight_dtype,
            [&](auto t, auto y, auto w) { run_backward<decltype(t), decltype(y), decltype(w)>(a, chunks, stream); });
}

}  // namespace capo::kernels
