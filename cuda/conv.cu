// Convolutions as implicit products of matrices: tiles of the im2col matrix are gathered into shared memory and never
// exist in memory. Sums are f32, in the order of (tap, channel) or of positions. 16-bit forwards and data gradients whose
// channels come in eights run on tensor cores, everything else on CUDA cores.
#include <capo/cuda/pack.cuh>
#include <capo/cuda/ptx.h>
#include <capo/cuda/row_lanes.cuh>
#include <capo/ops/conv.h>

#include <type_traits>

namespace {

using std::int64_t;
namespace gpu = capo::gpu;
using gpu::kRowThreads;
using gpu::RowLanes;

constexpr int kThreads = 256;
constexpr int kTile = 64;           // rows and columns of a block's tile
constexpr int kDepth = 16;          // of a step
constexpr int kPitch = kTile + 4;   // of a step's rows in shared memory: 16-byte aligned, other banks
constexpr int kEach = 4;            // rows and columns of a thread; elements that it loads of each operand
static_assert(kTile == capo::kConvCudaTile);
static_assert(kTile * kTile == kThreads * kEach * kEach && kTile * kDepth == kThreads * kEach);

// ConvGeometry in 32 bits.
struct Geometry {
  int batch, groups, cin, cout, taps;
  int in[3], out[3], kernel[3], stride[3], pad[3], dilation[3];
};

Geometry narrow(const capo::ConvGeometry& g) {
  constexpr int64_t kMost = 0x7fffffff;
  CAPO_CHECK(g.batch * g.in[0] * g.in[1] * g.in[2] <= kMost && g.batch * g.out[0] * g.out[1] * g.out[2] <= kMost &&
                 g.kernel[0] * g.kernel[1] * g.kernel[2] * (g.cin > g.cout ? g.cin : g.cout) <= kMost,
             "conv: the CUDA kernels count fewer than 2^31 positions");
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  Geometry n{i(g.batch), i(g.groups), i(g.cin), i(g.cout), i(g.kernel[0] * g.kernel[1] * g.kernel[2]), {}, {}, {}, {}, {}, {}};
  for (int a = 0; a < 3; ++a) {
    n.in[a] = i(g.in[a]), n.out[a] = i(g.out[a]), n.kernel[a] = i(g.kernel[a]);
    n.stride[a] = i(g.stride[a]), n.pad[a] = i(g.pad[a]), n.dilation[a] = i(g.dilation[a]);
  }
  return n;
}

__device__ inline bool inside(int i, int n) { return static_cast<unsigned>(i) < static_cast<unsigned>(n); }

// ---------------------------------------------------------------- the thread tile

struct Tile {
  float sum[kEach][kEach];
};

// sum += the step's product, a and b as [kDepth, kPitch].
__device__ inline void multiply(Tile& t, const float* a, const float* b) {
  using Four = gpu::Pack<float, kEach>;
  const int row = static_cast<int>(threadIdx.x) / (kTile / kEach) * kEach, column = static_cast<int>(threadIdx.x) % (kTile / kEach) * kEach;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const Four u = *reinterpret_cast<const Four*>(a + k * kPitch + row), v = *reinterpret_cast<const Four*>(b + k * kPitch + column);
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) t.sum[i][j] += u.v[i] * v.v[j];
  }
}

// ---------------------------------------------------------------- forward and data gradient

// One spatial axis of one phase, as in ops/cpu/conv.cpp: result positions start, start + step, ..; position number t reads
// the sources t * source_step + offset + j * offset_step for j < taps, under the kernel taps first_tap + j * tap_step.
struct Axis {
  int start, step, count;
  int source_step, offset, offset_step;
  int taps, first_tap, tap_step;
  int source, result;
};

__device__ inline Axis axis_of(const Geometry& g, bool transposed, int a, int phase) {
  if (!transposed)
    return {0, 1, g.out[a], g.stride[a], -g.pad[a], g.dilation[a], g.kernel[a], 0, 1, g.in[a], g.out[a]};
  // Result i gets tap k from source (i + pad - k dilation) / stride where that is whole. phase = (i + pad) mod stride.
  const int s = g.stride[a], d = g.dilation[a];
  Axis x{};
  x.source = g.out[a];
  x.result = g.in[a];
  x.step = s;
  x.start = ((phase - g.pad[a]) % s + s) % s;
  x.count = x.start < x.result ? (x.result - x.start + s - 1) / s : 0;
  x.source_step = 1;
  x.tap_step = 1;
  while (x.tap_step * d % s != 0) ++x.tap_step;
  for (int k = 0; k < g.kernel[a]; ++k)
    if (k * d % s == phase && x.taps++ == 0) x.first_tap = k;
  x.offset = (x.start + g.pad[a] - x.first_tap * d) / s;
  x.offset_step = -(x.tap_step * d / s);
  return x;
}

// Row m of the im2col matrix: its image and the sources under its first tap; or the place of its result.
struct Position {
  int image, at[3];
};
__device__ inline Position position_of(const Axis* axis, int m) {
  Position p;
  for (int a = 2; a >= 0; --a) {
    const int rest = m / axis[a].count;
    p.at[a] = m - rest * axis[a].count;
    m = rest;
  }
  p.image = m;
  return p;
}
__device__ inline Position source_of(const Axis* axis, int m) {
  Position p = position_of(axis, m);
  for (int a = 0; a < 3; ++a) p.at[a] = p.at[a] * axis[a].source_step + axis[a].offset;
  return p;
}
__device__ inline int64_t result_of(const Axis* axis, int m) {
  const Position p = position_of(axis, m);
  int64_t pixel = p.image;
  for (int a = 0; a < 3; ++a) pixel = pixel * axis[a].result + axis[a].start + p.at[a] * axis[a].step;
  return pixel;
}

// Column k of it: a channel, how far its tap moves the sources, and the tap's place in the weights.
struct Column {
  int channel, move[3], tap;
  bool valid;
};
__device__ inline Column column_of(const Geometry& g, const Axis* axis, int depth, int k, int columns) {
  Column c{};
  c.valid = k < columns;
  if (!c.valid) return c;
  int rest = k / depth, scale = 1;
  c.channel = k - rest * depth;
  for (int a = 2; a >= 0; --a) {
    const int next = rest / axis[a].taps, j = rest - next * axis[a].taps;
    c.move[a] = j * axis[a].offset_step;
    c.tap += (axis[a].first_tap + j * axis[a].tap_step) * scale;
    scale *= g.kernel[a];
    rest = next;
  }
  return c;
}

struct Apply {
  Geometry g;
  const void *source, *w, *bias;
  void* result;
  int phases;
  int64_t row_tiles, column_tiles;
};

// The first row and column, group and phase of a block; fills axis[3] and meets the other threads.
struct Place {
  int64_t m0;
  int n0, group;
};
template <bool kTransposed>
__device__ inline Place place_of(const Apply& p, int rows, int columns, Axis* axis) {
  int64_t block = blockIdx.x;
  Place at{};
  at.n0 = static_cast<int>(block % p.column_tiles) * columns;
  block /= p.column_tiles;
  at.m0 = block % p.row_tiles * rows;
  block /= p.row_tiles;
  at.group = static_cast<int>(block) / p.phases;
  const int me = static_cast<int>(threadIdx.x), phase = static_cast<int>(block) % p.phases;
  if (me < 3) {
    int number = phase;
    for (int a = 2; a > me; --a) number /= kTransposed ? p.g.stride[a] : 1;
    axis[me] = axis_of(p.g, kTransposed, me, kTransposed ? number % p.g.stride[me] : 0);
  }
  __syncthreads();
  return at;
}

// A block: a tile of (positions of one phase) x (result channels of one group). Its depth is (tap, source channel).
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kThreads) apply(Apply p) {
  CAPO_SHARED(Axis, axis, 3);
  CAPO_SHARED(Column, columns, kDepth);
  using Four = gpu::Pack<float, kEach>;
  CAPO_SHARED(Four, a_tile, kDepth * kPitch / kEach);
  CAPO_SHARED(Four, b_tile, kDepth * kPitch / kEach);
  float *const a = &a_tile[0].v[0], *const b = &b_tile[0].v[0];

  const Geometry& g = p.g;
  const int me = static_cast<int>(threadIdx.x);
  const Place place = place_of<kTransposed>(p, kTile, kTile, axis);
  const int64_t m0 = place.m0;
  const int n0 = place.n0, group = place.group;

  const int depth = kTransposed ? g.cout : g.cin, n_all = kTransposed ? g.cin : g.cout;
  const int64_t source_pitch = static_cast<int64_t>(depth) * g.groups, result_pitch = static_cast<int64_t>(n_all) * g.groups;
  const T* const source = static_cast<const T*>(p.source) + static_cast<int64_t>(group) * depth;
  const T* const w = static_cast<const T*>(p.w) + static_cast<int64_t>(group) * g.cout * g.taps * g.cin;
  const int64_t m_all = static_cast<int64_t>(g.batch) * axis[0].count * axis[1].count * axis[2].count;
  const int k_all = m0 < m_all ? axis[0].taps * axis[1].taps * axis[2].taps * depth : 0;

  // Of a: one column and kEach rows a thread.
  Position row[kEach];
  bool row_valid[kEach];
  for (int i = 0; i < kEach; ++i) {
    const int64_t m = m0 + me / kDepth + i * (kThreads / kDepth);
    row_valid[i] = m < m_all;
    row[i] = row_valid[i] ? source_of(axis, static_cast<int>(m)) : Position{};
  }

  Tile tile{};
  if (me < kDepth) columns[me] = column_of(g, axis, depth, me, k_all);
  __syncthreads();
  for (int k0 = 0; k0 < k_all; k0 += kDepth) {
    {
      const int k = me % kDepth;
      const Column c = columns[k];
      for (int i = 0; i < kEach; ++i) {
        const int s0 = row[i].at[0] + c.move[0], s1 = row[i].at[1] + c.move[1], s2 = row[i].at[2] + c.move[2];
        float v = 0;
        if (row_valid[i] && c.valid && inside(s0, axis[0].source) && inside(s1, axis[1].source) && inside(s2, axis[2].source)) {
          const int pixel = ((row[i].image * axis[0].source + s0) * axis[1].source + s1) * axis[2].source + s2;
          v = gpu::load(source[pixel * source_pitch + c.channel]);
        }
        a[k * kPitch + me / kDepth + i * (kThreads / kDepth)] = v;
      }
    }
    for (int i = 0; i < kEach; ++i) {
      // Neighbouring threads take neighbouring weights: along the depth, or along the result's channels.
      const int k = kTransposed ? me / kTile + i * (kThreads / kTile) : me % kDepth;
      const int n = kTransposed ? me % kTile : me / kDepth + i * (kThreads / kDepth);
      const Column c = columns[k];
      float v = 0;
      if (c.valid && n0 + n < n_all) {
        const int64_t out = kTransposed ? c.channel : n0 + n, in = kTransposed ? n0 + n : c.channel;
        v = gpu::load(w[(out * g.taps + c.tap) * g.cin + in]);
      }
      b[k * kPitch + n] = v;
    }
    __syncthreads();
    multiply(tile, a, b);
    if (me < kDepth) columns[me] = column_of(g, axis, depth, k0 + kDepth + me, k_all);
    __syncthreads();
  }

  T* const result = static_cast<T*>(p.result) + static_cast<int64_t>(group) * n_all;
  const T* const bias = p.bias ? static_cast<const T*>(p.bias) + static_cast<int64_t>(group) * n_all : nullptr;
  for (int i = 0; i < kEach; ++i) {
    const int64_t m = m0 + me / (kTile / kEach) * kEach + i;
    if (m >= m_all) continue;
    T* const to = result + result_of(axis, static_cast<int>(m)) * result_pitch;
    for (int j = 0; j < kEach; ++j) {
      const int n = n0 + me % (kTile / kEach) * kEach + j;
      if (n < n_all) to[n] = gpu::Store<T>::from(tile.sum[i][j] + (bias ? gpu::load(bias[n]) : 0.0f));
    }
  }
}

// ---- the same on tensor cores: stages of kMmaDepth in flight, 16 bytes (eight channels of one tap) a copy

constexpr int kMmaRows = 128, kMmaColumns = 64, kMmaDepth = 32, kStages = 3;
constexpr int kAlongK = kMmaDepth + 8, kAlongN = kMmaColumns + 8;  // pitches; the 16 bytes put an ldmatrix in distinct banks
constexpr int kStageA = kMmaRows * kAlongK, kStageB = kMmaColumns * kAlongK;
static_assert(kMmaDepth * kAlongN <= kStageB);

template <class T>
__device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, capo::BFloat16>)
    gpu::mma_bf16(d, a, b);
  else
    gpu::mma_f16(d, a, b);
}

// Eight warps, 4 x 2, of 32 x 32 sums each. Weights lie [n][k] in shared memory, or [k][n] when transposed.
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kThreads) apply_mma(Apply p) {
  CAPO_SHARED(Axis, axis, 3);
  using Eight = gpu::Pack<std::uint16_t, 8>;
  CAPO_SHARED(Eight, a_stages, kStages * kStageA / 8);
  CAPO_SHARED(Eight, b_stages, kStages * kStageB / 8);
  std::uint16_t *const a_shared = &a_stages[0].v[0], *const b_shared = &b_stages[0].v[0];
  const Geometry& g = p.g;
  const int me = static_cast<int>(threadIdx.x), lane = me % gpu::kWarp, warp = me / gpu::kWarp;
  const Place place = place_of<kTransposed>(p, kMmaRows, kMmaColumns, axis);

  const int depth = kTransposed ? g.cout : g.cin, n_all = kTransposed ? g.cin : g.cout;
  const int64_t source_pitch = static_cast<int64_t>(depth) * g.groups, result_pitch = static_cast<int64_t>(n_all) * g.groups;
  const T* const source = static_cast<const T*>(p.source) + static_cast<int64_t>(place.group) * depth;
  const T* const w = static_cast<const T*>(p.w) + static_cast<int64_t>(place.group) * g.cout * g.taps * g.cin;
  const int64_t m_all = static_cast<int64_t>(g.batch) * axis[0].count * axis[1].count * axis[2].count;
  const int k_all = place.m0 < m_all ? axis[0].taps * axis[1].taps * axis[2].taps * depth : 0;

  // A thread copies eight columns of two rows of a, and eight weights.
  constexpr int kPieces = kMmaDepth / 8, kRowStep = kThreads / kPieces, kCopies = kMmaRows / kRowStep;
  static_assert(kRowStep == kMmaColumns && kMmaDepth * kMmaColumns == 8 * kThreads);
  Position row[kCopies];
  bool row_valid[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int64_t m = place.m0 + me / kPieces + i * kRowStep;
    row_valid[i] = m < m_all;
    row[i] = row_valid[i] ? source_of(axis, static_cast<int>(m)) : Position{};
  }
  const auto copy_step = [&](int k0) {
    const int stage = k0 / kMmaDepth % kStages, k = me % kPieces * 8;
    const Column c = column_of(g, axis, depth, k0 + k, k_all);
    std::uint16_t* const a = a_shared + stage * kStageA + me / kPieces * kAlongK + k;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int s0 = row[i].at[0] + c.move[0], s1 = row[i].at[1] + c.move[1], s2 = row[i].at[2] + c.move[2];
      const bool valid = row_valid[i] && c.valid && inside(s0, axis[0].source) && inside(s1, axis[1].source) && inside(s2, axis[2].source);
      const int pixel = ((row[i].image * axis[0].source + s0) * axis[1].source + s1) * axis[2].source + s2;
      gpu::cp_async_16(a + i * kRowStep * kAlongK, valid ? source + pixel * source_pitch + c.channel : source, valid);
    }
    std::uint16_t* const b = b_shared + stage * kStageB;
    if (kTransposed) {
      const int kb = me / (kMmaColumns / 8), n = me % (kMmaColumns / 8) * 8;
      const Column cb = column_of(g, axis, depth, k0 + kb, k_all);
      const bool valid = cb.valid && place.n0 + n < n_all;
      const int64_t at = (static_cast<int64_t>(cb.channel) * g.taps + cb.tap) * g.cin + place.n0 + n;
      gpu::cp_async_16(b + kb * kAlongN + n, valid ? w + at : w, valid);
    } else {
      const int n = me / kPieces;
      const bool valid = c.valid && place.n0 + n < n_all;
      const int64_t at = (static_cast<int64_t>(place.n0 + n) * g.taps + c.tap) * g.cin + c.channel;
      gpu::cp_async_16(b + n * kAlongK + k, valid ? w + at : w, valid);
    }
  };

  const int m_warp = warp % 4 * 32, n_warp = warp / 4 * 32;
  float sum[2][4][4] = {};
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s * kMmaDepth < k_all) copy_step(s * kMmaDepth);
    gpu::cp_async_commit();
  }
  for (int k0 = 0; k0 < k_all; k0 += kMmaDepth) {
    gpu::cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and nobody reads the one that is filled next
    if (k0 + (kStages - 1) * kMmaDepth < k_all) copy_step(k0 + (kStages - 1) * kMmaDepth);
    gpu::cp_async_commit();
    const std::uint16_t* const a = a_shared + k0 / kMmaDepth % kStages * kStageA;
    const std::uint16_t* const b = b_shared + k0 / kMmaDepth % kStages * kStageB;
#pragma unroll
    for (int k = 0; k < kMmaDepth; k += 16) {
      std::uint32_t u[2][4], v[2][4];  // v[j]: columns 16 j .. + 8 in its first two registers, the next eight in the others
#pragma unroll
      for (int i = 0; i < 2; ++i) gpu::ldmatrix(u[i], a + (m_warp + 16 * i + lane % 16) * kAlongK + k + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = n_warp + 16 * j + lane / 16 * 8, half = lane / 8 % 2 * 8;
        if (kTransposed)
          gpu::ldmatrix_transposed(v[j], b + (k + half + lane % 8) * kAlongN + n);
        else
          gpu::ldmatrix(v[j], b + (n + lane % 8) * kAlongK + k + half);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const std::uint32_t pair[2] = {v[j / 2][j % 2 * 2], v[j / 2][j % 2 * 2 + 1]};
          mma<T>(sum[i][j], u[i], pair);
        }
    }
  }
  gpu::cp_async_wait<0>();

  T* const result = static_cast<T*>(p.result) + static_cast<int64_t>(place.group) * n_all;
  const T* const bias = p.bias ? static_cast<const T*>(p.bias) + static_cast<int64_t>(place.group) * n_all : nullptr;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = place.m0 + m_warp + 8 * i + lane / 4;
    if (m >= m_all) continue;
    T* const to = result + result_of(axis, static_cast<int>(m)) * result_pitch;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = place.n0 + n_warp + 8 * j + lane % 4 * 2;
      if (n >= n_all) continue;  // n_all comes in eights
      float pair[2];
      for (int e = 0; e < 2; ++e) pair[e] = sum[i / 2][j][i % 2 * 2 + e] + (bias ? gpu::load(bias[n + e]) : 0.0f);
      gpu::store_many<2>(to + n, pair);
    }
  }
}

template <class T>
void run_apply(const capo::ConvDirectArgs& p, const Geometry& g, void* stream) {
  Apply a{g, p.source, p.w, p.bias, p.result, 1, 0, 0};
  int64_t positions = g.batch;  // of the largest phase
  for (int i = 0; i < 3; ++i) {
    positions *= p.transposed ? (g.in[i] + g.stride[i] - 1) / g.stride[i] : g.out[i];
    if (p.transposed) a.phases *= g.stride[i];
  }
  const bool tensor_cores = sizeof(T) == 2 && g.cin % 8 == 0 && g.cout % 8 == 0 && gpu::aligned(p.source) &&
                            gpu::aligned(p.w) && gpu::aligned(p.result);
  const int rows = tensor_cores ? kMmaRows : kTile, columns = tensor_cores ? kMmaColumns : kTile;
  a.row_tiles = (positions + rows - 1) / rows;
  a.column_tiles = ((p.transposed ? g.cin : g.cout) + columns - 1) / columns;
  const int64_t blocks = g.groups * a.phases * a.row_tiles * a.column_tiles;
  if constexpr (sizeof(T) == 2)
    if (tensor_cores) {
      p.transposed ? gpu::launch("conv_data_gradient", apply_mma<T, true>, blocks, kThreads, 0, stream, a)
                   : gpu::launch("conv", apply_mma<T, false>, blocks, kThreads, 0, stream, a);
      return;
    }
  if (p.transposed)
    gpu::launch("conv_data_gradient", apply<T, true>, blocks, kThreads, 0, stream, a);
  else
    gpu::launch("conv", apply<T, false>, blocks, kThreads, 0, stream, a);
}

// ---------------------------------------------------------------- depthwise

// One row of lanes per result pixel, N channels a thread.
template <class T, int N, bool kTransposed>
__global__ void __launch_bounds__(kRowThreads) apply_depthwise(Apply p, RowLanes lanes) {
  const Geometry& g = p.g;
  const int64_t row = lanes.row();
  if (row >= lanes.rows) return;
  const int* const result = kTransposed ? g.in : g.out;
  const int* const source = kTransposed ? g.out : g.in;
  int at[3], rest = static_cast<int>(row);
  for (int a = 2; a >= 0; --a) {
    const int next = rest / result[a];
    at[a] = rest - next * result[a];
    rest = next;
  }
  // The source under a tap of one axis, or -1.
  const auto under = [&](int a, int tap) {
    int s = kTransposed ? at[a] + g.pad[a] - tap * g.dilation[a] : at[a] * g.stride[a] - g.pad[a] + tap * g.dilation[a];
    if (kTransposed) s = s >= 0 && s % g.stride[a] == 0 ? s / g.stride[a] : -1;
    return inside(s, source[a]) ? s : -1;
  };
  const int channels = g.groups;
  const T *const x = static_cast<const T*>(p.source), *const w = static_cast<const T*>(p.w), *const bias = static_cast<const T*>(p.bias);
  for (int c = lanes.lane() * N; c < channels; c += lanes.lanes() * N) {
    float sum[N] = {}, v[N];
    for (int k0 = 0; k0 < g.kernel[0]; ++k0) {
      const int s0 = under(0, k0);
      for (int k1 = 0; s0 >= 0 && k1 < g.kernel[1]; ++k1) {
        const int s1 = under(1, k1);
        for (int k2 = 0; s1 >= 0 && k2 < g.kernel[2]; ++k2) {
          const int s2 = under(2, k2);
          if (s2 < 0) continue;
          const int pixel = ((rest * source[0] + s0) * source[1] + s1) * source[2] + s2, tap = (k0 * g.kernel[1] + k1) * g.kernel[2] + k2;
          gpu::load_many<N>(x + static_cast<int64_t>(pixel) * channels + c, v);
          for (int j = 0; j < N; ++j) sum[j] += v[j] * gpu::load(w[static_cast<int64_t>(c + j) * g.taps + tap]);
        }
      }
    }
    if (bias)
      for (int j = 0; j < N; ++j) sum[j] += gpu::load(bias[c + j]);
    gpu::store_many<N>(static_cast<T*>(p.result) + row * channels + c, sum);
  }
}

template <class T, int N, bool kTransposed>
void run_depthwise(const capo::ConvDirectArgs& p, const Geometry& g, void* stream) {
  const Apply a{g, p.source, p.w, p.bias, p.result, 1, 0, 0};
  const int* const result = kTransposed ? g.in : g.out;
  const RowLanes lanes = gpu::row_lanes(static_cast<int64_t>(g.batch) * result[0] * result[1] * result[2], (g.groups + N - 1) / N);
  gpu::launch("conv_depthwise", apply_depthwise<T, N, kTransposed>, lanes.blocks(), kRowThreads, 0, stream, a, lanes);
}

template <class T, int N>
void run_depthwise(const capo::ConvDirectArgs& p, const Geometry& g, void* stream) {
  p.transposed ? run_depthwise<T, N, true>(p, g, stream) : run_depthwise<T, N, false>(p, g, stream);
}

// ---------------------------------------------------------------- weight gradient

struct WeightParts {
  Geometry g;
  const void *x, *dy;
  float* parts;  // [chunks, groups * cout, taps, cin]
  int64_t chunk;
  int64_t row_tiles, column_tiles;
};

struct Sample {
  int image, at[3];  // the x under its tap 0
  bool valid;
};
__device__ inline Sample sample_of(const Geometry& g, int64_t position, int64_t end) {
  Sample s{};
  s.valid = position < end;
  if (!s.valid) return s;
  int rest = static_cast<int>(position);
  for (int a = 2; a >= 0; --a) {
    const int next = rest / g.out[a];
    s.at[a] = (rest - next * g.out[a]) * g.stride[a] - g.pad[a];
    rest = next;
  }
  s.image = rest;
  return s;
}

// A block: a tile of (output channels of one group) x (tap, input channel) summed over one chunk of positions.
template <class T>
__global__ void __launch_bounds__(kThreads) weight_parts(WeightParts p) {
  CAPO_SHARED(Sample, samples, kDepth);
  using Four = gpu::Pack<float, kEach>;
  CAPO_SHARED(Four, a_tile, kDepth * kPitch / kEach);
  CAPO_SHARED(Four, b_tile, kDepth * kPitch / kEach);
  float *const a = &a_tile[0].v[0], *const b = &b_tile[0].v[0];

  const Geometry& g = p.g;
  const int me = static_cast<int>(threadIdx.x);
  int64_t block = blockIdx.x;
  const int n0 = static_cast<int>(block % p.column_tiles) * kTile;
  block /= p.column_tiles;
  const int m0 = static_cast<int>(block % p.row_tiles) * kTile;
  block /= p.row_tiles;
  const int group = static_cast<int>(block % g.groups);
  const int64_t chunk = block / g.groups, positions = static_cast<int64_t>(g.batch) * g.out[0] * g.out[1] * g.out[2];
  const int64_t begin = chunk * p.chunk, end = begin + p.chunk < positions ? begin + p.chunk : positions;
  const int columns = g.taps * g.cin;
  const int64_t x_pitch = static_cast<int64_t>(g.cin) * g.groups, dy_pitch = static_cast<int64_t>(g.cout) * g.groups;

  // A thread loads one channel of dy and one column of x, at kEach positions.
  const int m = m0 + me % kTile, n = n0 + me % kTile;
  const int tap = n / g.cin, tap_row = tap / g.kernel[2];
  const int move[3] = {tap_row / g.kernel[1] * g.dilation[0], tap_row % g.kernel[1] * g.dilation[1], tap % g.kernel[2] * g.dilation[2]};
  const T* const dy = static_cast<const T*>(p.dy) + static_cast<int64_t>(group) * g.cout + m;
  const T* const x = static_cast<const T*>(p.x) + static_cast<int64_t>(group) * g.cin + (n - tap * g.cin);

  Tile tile{};
  if (me < kDepth) samples[me] = sample_of(g, begin + me, end);
  __syncthreads();
  for (int64_t k0 = begin; k0 < end; k0 += kDepth) {
    for (int i = 0; i < kEach; ++i) {
      const int k = me / kTile + i * (kThreads / kTile);
      const Sample s = samples[k];
      const int s0 = s.at[0] + move[0], s1 = s.at[1] + move[1], s2 = s.at[2] + move[2];
      float u = 0, v = 0;
      if (s.valid && m < g.cout) u = gpu::load(dy[(k0 + k) * dy_pitch]);
      if (s.valid && n < columns && inside(s0, g.in[0]) && inside(s1, g.in[1]) && inside(s2, g.in[2])) {
        const int pixel = ((s.image * g.in[0] + s0) * g.in[1] + s1) * g.in[2] + s2;
        v = gpu::load(x[pixel * x_pitch]);
      }
      a[k * kPitch + me % kTile] = u;
      b[k * kPitch + me % kTile] = v;
    }
    __syncthreads();
    multiply(tile, a, b);
    if (me < kDepth) samples[me] = sample_of(g, k0 + kDepth + me, end);
    __syncthreads();
  }

  float* const part = p.parts + (chunk * g.groups + group) * g.cout * columns;
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const int row = m0 + me / (kTile / kEach) * kEach + i, column = n0 + me % (kTile / kEach) * kEach + j;
      if (row < g.cout && column < columns) part[static_cast<int64_t>(row) * columns + column] = tile.sum[i][j];
    }
}

constexpr int kRows = kThreads / gpu::kWarp;

// Depthwise: a block sums 32 channels over one chunk of lines of the last axis; warp r takes the positions r, r + 8, .. of
// each line, and the warps' sums are added in order.
template <class T>
__global__ void __launch_bounds__(kThreads) weight_parts_depthwise(WeightParts p) {
  CAPO_SHARED(float, sums, kThreads);
  const Geometry& g = p.g;
  const int lane = static_cast<int>(threadIdx.x) % gpu::kWarp, r = static_cast<int>(threadIdx.x) / gpu::kWarp, channels = g.groups;
  const int c = static_cast<int>(blockIdx.x % p.column_tiles) * gpu::kWarp + lane;
  const int64_t chunk = blockIdx.x / p.column_tiles, lines = static_cast<int64_t>(g.batch) * g.out[0] * g.out[1];
  const int64_t begin = chunk * p.chunk, end = begin + p.chunk < lines ? begin + p.chunk : lines;
  for (int tap = 0; tap < g.taps; ++tap) {
    const int k2 = tap % g.kernel[2], k1 = tap / g.kernel[2] % g.kernel[1], k0 = tap / g.kernel[2] / g.kernel[1];
    float sum = 0;
    for (int64_t line = begin; line < end && c < channels; ++line) {
      const int plane = static_cast<int>(line) / g.out[1], image = plane / g.out[0];
      const int s0 = (plane - image * g.out[0]) * g.stride[0] - g.pad[0] + k0 * g.dilation[0];
      const int s1 = (static_cast<int>(line) - plane * g.out[1]) * g.stride[1] - g.pad[1] + k1 * g.dilation[1];
      if (!inside(s0, g.in[0]) || !inside(s1, g.in[1])) continue;
      const T* const x = static_cast<const T*>(p.x) + static_cast<int64_t>((image * g.in[0] + s0) * g.in[1] + s1) * g.in[2] * channels + c;
      const T* const dy = static_cast<const T*>(p.dy) + line * g.out[2] * channels + c;
      for (int o = r; o < g.out[2]; o += kRows) {
        const int s2 = o * g.stride[2] - g.pad[2] + k2 * g.dilation[2];
        if (inside(s2, g.in[2])) sum += gpu::load(x[static_cast<int64_t>(s2) * channels]) * gpu::load(dy[static_cast<int64_t>(o) * channels]);
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (r == 0 && c < channels) {
      for (int i = 1; i < kRows; ++i) sum += sums[i * gpu::kWarp + lane];
      p.parts[(chunk * channels + c) * g.taps + tap] = sum;
    }
    __syncthreads();
  }
}

// dw = the parts added in order.
template <class T>
__global__ void __launch_bounds__(kThreads) join(const float* parts, T* dw, int64_t chunks, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    float sum = parts[i];
    for (int64_t c = 1; c < chunks; ++c) sum += parts[c * n + i];
    dw[i] = gpu::Store<T>::from(sum);
  }
}

bool is_depthwise(const Geometry& g) { return g.groups > 1 && g.cin == 1 && g.cout == 1; }

}  // namespace

namespace capo::kernels {

void conv_direct_cuda(const ConvDirectArgs& p, int64_t, void* stream) {
  const Geometry g = narrow(p.g);
  gpu::for_floating("conv", p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kMany = gpu::kPack<T>;
    if (!is_depthwise(g)) return run_apply<T>(p, g, stream);
    gpu::packs(g.groups, kMany, p.source, p.result) ? run_depthwise<T, kMany>(p, g, stream) : run_depthwise<T, 1>(p, g, stream);
  });
}

void conv_weight_parts_cuda(const ConvWeightPartsArgs& p, int64_t n, void* stream) {
  WeightParts a{narrow(p.g), p.x, p.dy, p.parts, p.chunk, 0, 0};
  gpu::for_floating("conv", p.dtype, [&](auto type) {
    using T = decltype(type);
    if (is_depthwise(a.g)) {
      a.column_tiles = (a.g.groups + gpu::kWarp - 1) / gpu::kWarp;
      gpu::launch("conv_weight_gradient", weight_parts_depthwise<T>, p.chunks * a.column_tiles, kThreads, 0, stream, a);
    } else {
      a.row_tiles = (a.g.cout + kTile - 1) / kTile;
      a.column_tiles = (a.g.taps * a.g.cin + kTile - 1) / kTile;
      gpu::launch("conv_weight_gradient", weight_parts<T>, p.chunks * a.g.groups * a.row_tiles * a.column_tiles, kThreads, 0, stream, a);
    }
    gpu::launch("conv_weight_gradient_join", join<T>, gpu::blocks_for(n, kThreads), kThreads, 0, stream,
                static_cast<const float*>(p.parts), static_cast<T*>(p.dw), p.chunks, n);
  });
}

}  // namespace capo::kernels
