// Convolutions as implicit products of matrices: tiles of the im2col matrix are gathered into shared memory and never
// exist in memory. Sums are f32, in the order of (tap, channel) or of positions. 16-bit elements go to tensor cores,
// f32 to CUDA cores; depthwise has kernels of its own.
#include <capo/cuda/cudnn.h>
#include <capo/cuda/mma_tile.cuh>
#include <capo/cuda/pack.cuh>
#include <capo/cuda/row_lanes.cuh>
#include <capo/ops/conv.h>
#include <capo/ops/conv_axis_internal.h>

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
  Geometry n{};
  n.batch = i(g.batch), n.groups = i(g.groups), n.cin = i(g.cin), n.cout = i(g.cout);
  n.taps = i(g.kernel[0] * g.kernel[1] * g.kernel[2]);
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
  const int row = static_cast<int>(threadIdx.x) / (kTile / kEach) * kEach,
            column = static_cast<int>(threadIdx.x) % (kTile / kEach) * kEach;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const Four u = *reinterpret_cast<const Four*>(a + k * kPitch + row),
               v = *reinterpret_cast<const Four*>(b + k * kPitch + column);
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) t.sum[i][j] += u.v[i] * v.v[j];
  }
}

// ---------------------------------------------------------------- forward and data gradient

using Axis = ConvAxis<int>;

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
// Cuts into tiles of rows x columns; returns the blocks of all groups and phases.
int64_t cut(Apply& p, int64_t positions, int n_all, int rows, int columns) {
  p.row_tiles = (positions + rows - 1) / rows;
  p.column_tiles = (n_all + columns - 1) / columns;
  return p.g.groups * p.phases * p.row_tiles * p.column_tiles;
}

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
    axis[me] = conv_axis(p.g, kTransposed, me, kTransposed ? number % p.g.stride[me] : 0);
  }
  __syncthreads();
  return at;
}

// A block: a tile of (positions of one phase) x (result channels of one group). Its depth is (tap, source channel).
template <bool kTransposed>
__global__ void __launch_bounds__(kThreads) apply(Apply p) {
  using T = float;
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
  const int64_t source_pitch = static_cast<int64_t>(depth) * g.groups,
                result_pitch = static_cast<int64_t>(n_all) * g.groups;
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
        if (row_valid[i] && c.valid && inside(s0, axis[0].source) && inside(s1, axis[1].source) &&
            inside(s2, axis[2].source)) {
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

// ---- the same on tensor cores: blocks of MmaBlock, whose stages are gathered 16 bytes (eight channels of one tap) at
// a time where channels come in eights and lie aligned, else one by one

// A number in digits: position as image and places, column as tap places and channel. The first digit has no radix.
struct Digits {
  int d[4];
};
__device__ inline Digits digits_of(int n, const int (&radix)[3]) {
  Digits x;
  for (int i = 3; i > 0; --i) {
    const int rest = n / radix[i - 1];
    x.d[i] = n - rest * radix[i - 1];
    n = rest;
  }
  x.d[0] = n;
  return x;
}
__device__ inline void add(Digits& x, const Digits& by, const int (&radix)[3]) {
  int carry = 0;
#pragma unroll
  for (int i = 3; i > 0; --i) {
    const int v = x.d[i] + by.d[i] + carry;
    carry = v >= radix[i - 1];
    x.d[i] = carry ? v - radix[i - 1] : v;
  }
  x.d[0] += by.d[0] + carry;
}

using Eight = gpu::Pack<std::uint16_t, 8>;

// Eight elements to shared memory: f(j) gives number j's address, or null for zero.
template <class F>
__device__ inline void copy_singly(std::uint16_t* to, const F& f) {
  Eight pack{};
  for (int j = 0; j < 8; ++j)
    if (const auto* const from = f(j)) pack.v[j] = gpu::half_bits(*from);
  *reinterpret_cast<Eight*>(to) = pack;
}
// Eight neighbours from `from` on, of which `left` exist.
template <class T>
__device__ inline void copy_eight(std::uint16_t* to, const T* from, int left, bool wide, const T* anywhere) {
  if (wide)
    gpu::cp_async_16(to, left > 0 ? from : anywhere, left > 0);
  else
    copy_singly(to, [&](int j) { return j < left ? from + j : nullptr; });
}

// The im2col matrix's columns (tap, channel): a thread's place in them moves on with the stages.
struct Columns {
  int radix[3];  // taps of axes 1 and 2, channels
  int all;
  __device__ Columns(const Axis* axis, int depth, bool any)
      : radix{axis[1].taps, axis[2].taps, depth}, all(any ? axis[0].taps * axis[1].taps * axis[2].taps * depth : 0) {
    for (int& r : radix) r = r > 0 ? r : 1;  // a phase without taps has no columns
  }
  __device__ Digits at(int k) const { return digits_of(k, radix); }
};

// Where a source lies, in pixels; negative when it is outside.
__device__ inline int source_pixel(const Axis* axis, const Position& row, const Digits& column) {
  const int s0 = row.at[0] + column.d[0] * axis[0].offset_step, s1 = row.at[1] + column.d[1] * axis[1].offset_step,
            s2 = row.at[2] + column.d[2] * axis[2].offset_step;
  if (!inside(s0, axis[0].source) || !inside(s1, axis[1].source) || !inside(s2, axis[2].source)) return -1;
  return ((row.image * axis[0].source + s0) * axis[1].source + s1) * axis[2].source + s2;
}
__device__ inline int tap_of(const Geometry& g, const Axis* axis, const Digits& column) {
  int tap = 0;
#pragma unroll
  for (int a = 0; a < 3; ++a) tap = tap * g.kernel[a] + axis[a].first_tap + column.d[a] * axis[a].tap_step;
  return tap;
}

// Which 16-byte accesses are allowed, decided on the host.
struct Wide {
  bool source, w, result;
};

// Positions by result channels. The weights lie [channel][k] in a stage, or [k][channel] when transposed.
template <class T, class Block, bool kTransposed, bool kWide>
__global__ void __launch_bounds__(Block::kThreads, kWide ? Block::kBlocks : 1) apply_mma(Apply p, Wide wide) {
  constexpr int kEights = gpu::kMmaK / 8, kBlockThreads = Block::kThreads;
  CAPO_SHARED(Axis, axis, 3);
  CAPO_SHARED_DYNAMIC(carve);
  Block block(carve);
  const Geometry& g = p.g;
  const int me = static_cast<int>(threadIdx.x);
  const Place place = place_of<kTransposed>(p, Block::kRows, Block::kColumns, axis);
  const int depth = kTransposed ? g.cout : g.cin, n_all = kTransposed ? g.cin : g.cout;
  const int64_t source_pitch = static_cast<int64_t>(depth) * g.groups;
  const int64_t result_pitch = static_cast<int64_t>(n_all) * g.groups;
  const T* const source = static_cast<const T*>(p.source) + static_cast<int64_t>(place.group) * depth;
  const T* const w = static_cast<const T*>(p.w) + static_cast<int64_t>(place.group) * g.cout * g.taps * g.cin;
  const int64_t m_all = static_cast<int64_t>(g.batch) * axis[0].count * axis[1].count * axis[2].count;
  const Columns columns(axis, depth, place.m0 < m_all);

  // Of the sources a thread copies eight columns, always the same of a stage, of these rows.
  constexpr int kRowStep = kBlockThreads / kEights, kCopies = Block::kRows / kRowStep;
  Position row[kCopies];
  bool exists[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int64_t m = place.m0 + me / kEights + i * kRowStep;
    exists[i] = m < m_all;
    row[i] = exists[i] ? source_of(axis, static_cast<int>(m)) : Position{};
  }
  const int k_mine = me % kEights * 8;
  const Digits stage_step = columns.at(gpu::kMmaK);
  Digits column = columns.at(k_mine);
  const auto load_source = [&](int k0, std::uint16_t* to) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      std::uint16_t* const at = to + Block::A::at(true, me / kEights + i * kRowStep, k_mine);
      if (kWide || wide.source) {
        const int pixel = exists[i] && k0 + k_mine < columns.all ? source_pixel(axis, row[i], column) : -1;
        gpu::cp_async_16(at, pixel >= 0 ? source + pixel * source_pitch + column.d[3] : source, pixel >= 0);
        continue;
      }
      Digits c = column;
      copy_singly(at, [&](int j) -> const T* {
        const int pixel = exists[i] && k0 + k_mine + j < columns.all ? source_pixel(axis, row[i], c) : -1;
        const T* const from = pixel >= 0 ? source + pixel * source_pitch + c.d[3] : nullptr;
        add(c, {{0, 0, 0, 1}}, columns.radix);
        return from;
      });
    }
    add(column, stage_step, columns.radix);
  };

  // Of transposed weights it copies eight channels, always the same, of one column after the other.
  constexpr int kChannelEights = Block::kColumns / 8, kColumnStep = kBlockThreads / kChannelEights;
  const Digits column_step = columns.at(kColumnStep);
  Digits w_column = columns.at(me / kChannelEights);
  const auto load_transposed = [&](int k0, std::uint16_t* to) {
    const int n = me % kChannelEights * 8;
#pragma unroll
    for (int pass = 0; pass < gpu::kMmaK / kColumnStep; ++pass) {
      const int k = me / kChannelEights + pass * kColumnStep;
      const T* const from = w + (static_cast<int64_t>(w_column.d[3]) * g.taps + tap_of(g, axis, w_column)) * g.cin +
                            place.n0 + n;
      copy_eight(to + Block::B::at(false, n, k), from, k0 + k < columns.all ? n_all - place.n0 - n : 0,
                 kWide || wide.w, w);
      add(w_column, column_step, columns.radix);
    }
  };
  const auto load_weights = [&](int k0, std::uint16_t* to) {  // the matrix [n][k] as it lies
#pragma unroll
    for (int pass = 0; pass < Block::kColumns / kRowStep; ++pass) {
      const int n = me / kEights + pass * kRowStep;
      const T* const from = w + static_cast<int64_t>(place.n0 + n) * columns.all + k0 + k_mine;
      copy_eight(to + Block::B::at(true, n, k_mine), from, place.n0 + n < n_all ? columns.all - k0 - k_mine : 0,
                 kWide || wide.w, w);
    }
  };
  block.template run<T>((columns.all + gpu::kMmaK - 1) / gpu::kMmaK, true, !kTransposed,
                        [&](int64_t step, std::uint16_t* a, std::uint16_t* b) {
                          const int k0 = static_cast<int>(step) * gpu::kMmaK;
                          load_source(k0, a);
                          if constexpr (kTransposed)
                            load_transposed(k0, b);
                          else
                            load_weights(k0, b);
                        });

  T* const result = static_cast<T*>(p.result) + static_cast<int64_t>(place.group) * n_all;
  const T* const bias =
      p.bias ? static_cast<const T*>(p.bias) + static_cast<int64_t>(place.group) * n_all : nullptr;
  block.each_eight([&](int r, int c, float(&x)[8]) {
    const int64_t m = place.m0 + r;
    const int n = place.n0 + c;
    if (m >= m_all || n >= n_all) return;
    if (bias)
      for (int j = 0; j < 8; ++j) x[j] += n + j < n_all ? gpu::load(bias[n + j]) : 0.0f;
    T* const to = result + result_of(axis, static_cast<int>(m)) * result_pitch + n;
    if (kWide || wide.result) {
      gpu::store_many<8>(to, x);
    } else {
      for (int j = 0; j < 8; ++j)
        if (n + j < n_all) to[j] = gpu::Store<T>::from(x[j]);
    }
  });
}

template <class T, class Block, bool kWide>
void start_mma(Apply a, bool transposed, int64_t positions, int n_all, const Wide& wide, void* stream) {
  const int64_t blocks = cut(a, positions, n_all, Block::kRows, Block::kColumns);
  const auto start = [&](const char* name, auto kernel) {
    gpu::launch(name, kernel, blocks, Block::kThreads, Block::shared(), stream, a, wide);
  };
  transposed ? start("conv_data_gradient", apply_mma<T, Block, true, kWide>)
             : start("conv", apply_mma<T, Block, false, kWide>);
}

template <class T>
void run_mma(Apply a, bool transposed, int64_t positions, void* stream) {
  using Broad = gpu::MmaBlock<128, 128, 2, 4>;
  using Narrow = gpu::MmaBlock<128, 64, 4, 2>;
  constexpr int64_t kFull = 128;  // blocks that fill a device
  const int depth = transposed ? a.g.cout : a.g.cin, n_all = transposed ? a.g.cin : a.g.cout;
  const Wide wide{depth % 8 == 0 && gpu::aligned(a.source), a.g.cin % 8 == 0 && gpu::aligned(a.w),
                  n_all % 8 == 0 && gpu::aligned(a.result)};
  if (!wide.source || !wide.w || !wide.result)
    start_mma<T, Narrow, false>(a, transposed, positions, n_all, wide, stream);
  else if (n_all > Narrow::kColumns && cut(a, positions, n_all, Broad::kRows, Broad::kColumns) >= kFull)
    start_mma<T, Broad, true>(a, transposed, positions, n_all, wide, stream);
  else
    start_mma<T, Narrow, true>(a, transposed, positions, n_all, wide, stream);
}

template <class T>
void run_apply(const capo::ConvDirectArgs& p, const Geometry& g, void* stream) {
  Apply a{g, p.source, p.w, p.bias, p.result, 1, 0, 0};
  int64_t positions = g.batch;  // of the largest phase
  for (int i = 0; i < 3; ++i) {
    positions *= p.transposed ? (g.in[i] + g.stride[i] - 1) / g.stride[i] : g.out[i];
    if (p.transposed) a.phases *= g.stride[i];
  }
  if constexpr (sizeof(T) == 2) {
    run_mma<T>(a, p.transposed, positions, stream);
  } else {
    const int64_t blocks = cut(a, positions, p.transposed ? g.cin : g.cout, kTile, kTile);
    p.transposed ? gpu::launch("conv_data_gradient", apply<true>, blocks, kThreads, 0, stream, a)
                 : gpu::launch("conv", apply<false>, blocks, kThreads, 0, stream, a);
  }
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
  const T *const x = static_cast<const T*>(p.source), *const w = static_cast<const T*>(p.w),
                 *const bias = static_cast<const T*>(p.bias);
  for (int c = lanes.lane() * N; c < channels; c += lanes.lanes() * N) {
    float sum[N] = {}, v[N];
    for (int k0 = 0; k0 < g.kernel[0]; ++k0) {
      const int s0 = under(0, k0);
      for (int k1 = 0; s0 >= 0 && k1 < g.kernel[1]; ++k1) {
        const int s1 = under(1, k1);
        for (int k2 = 0; s1 >= 0 && k2 < g.kernel[2]; ++k2) {
          const int s2 = under(2, k2);
          if (s2 < 0) continue;
          const int pixel = ((rest * source[0] + s0) * source[1] + s1) * source[2] + s2,
                    tap = (k0 * g.kernel[1] + k1) * g.kernel[2] + k2;
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
  const RowLanes lanes =
      gpu::row_lanes(static_cast<int64_t>(g.batch) * result[0] * result[1] * result[2], (g.groups + N - 1) / N);
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

// What a block sums: output channels from m0 and (tap, input channel) columns from n0 of one group, over the positions
// begin .. end of one chunk.
struct WeightPlace {
  int m0, n0, group, columns;
  int64_t begin, end;
  float* part;  // [cout, columns]
};
__device__ inline WeightPlace weight_place(const WeightParts& p, int rows, int columns) {
  const Geometry& g = p.g;
  WeightPlace at{};
  int64_t block = blockIdx.x;
  at.n0 = static_cast<int>(block % p.column_tiles) * columns;
  block /= p.column_tiles;
  at.m0 = static_cast<int>(block % p.row_tiles) * rows;
  block /= p.row_tiles;
  at.group = static_cast<int>(block % g.groups);
  at.columns = g.taps * g.cin;
  const int64_t chunk = block / g.groups, positions = static_cast<int64_t>(g.batch) * g.out[0] * g.out[1] * g.out[2];
  at.begin = chunk * p.chunk;
  at.end = at.begin + p.chunk < positions ? at.begin + p.chunk : positions;
  at.part = p.parts + (chunk * g.groups + at.group) * g.cout * at.columns;
  return at;
}

// A tile of f32.
__global__ void __launch_bounds__(kThreads) weight_parts(WeightParts p) {
  using T = float;
  CAPO_SHARED(Sample, samples, kDepth);
  using Four = gpu::Pack<float, kEach>;
  CAPO_SHARED(Four, a_tile, kDepth * kPitch / kEach);
  CAPO_SHARED(Four, b_tile, kDepth * kPitch / kEach);
  float *const a = &a_tile[0].v[0], *const b = &b_tile[0].v[0];

  const Geometry& g = p.g;
  const int me = static_cast<int>(threadIdx.x);
  const WeightPlace place = weight_place(p, kTile, kTile);
  const int m0 = place.m0, n0 = place.n0, group = place.group, columns = place.columns;
  const int64_t begin = place.begin, end = place.end;
  const int64_t x_pitch = static_cast<int64_t>(g.cin) * g.groups, dy_pitch = static_cast<int64_t>(g.cout) * g.groups;

  // A thread loads one channel of dy and one column of x, at kEach positions.
  const int m = m0 + me % kTile, n = n0 + me % kTile;
  const int tap = n / g.cin, tap_row = tap / g.kernel[2];
  const int move[3] = {tap_row / g.kernel[1] * g.dilation[0], tap_row % g.kernel[1] * g.dilation[1],
                       tap % g.kernel[2] * g.dilation[2]};
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

  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const int row = m0 + me / (kTile / kEach) * kEach + i, column = n0 + me % (kTile / kEach) * kEach + j;
      if (row < g.cout && column < columns) place.part[static_cast<int64_t>(row) * columns + column] = tile.sum[i][j];
    }
}

// The same on tensor cores: in a stage both operands lie [position][channel].
template <class T, class Block, bool kWide>
__global__ void __launch_bounds__(Block::kThreads, kWide ? Block::kBlocks : 1) weight_parts_mma(WeightParts p, Wide wide) {
  constexpr int kEights = Block::kRows / 8, kStep = Block::kThreads / kEights;  // positions that are copied at a time
  static_assert(Block::kRows == Block::kColumns && gpu::kMmaK % kStep == 0);
  CAPO_SHARED_DYNAMIC(carve);
  Block block(carve);
  const Geometry& g = p.g;
  const WeightPlace place = weight_place(p, Block::kRows, Block::kColumns);
  const int me = static_cast<int>(threadIdx.x), eight = me % kEights * 8, m = place.m0 + eight, n = place.n0 + eight;
  const int64_t x_pitch = static_cast<int64_t>(g.cin) * g.groups, dy_pitch = static_cast<int64_t>(g.cout) * g.groups;
  const T* const x = static_cast<const T*>(p.x) + static_cast<int64_t>(place.group) * g.cin;
  const T* const dy = static_cast<const T*>(p.dy) + static_cast<int64_t>(place.group) * g.cout;

  // A thread copies eight channels of dy and eight columns of x, always the same, at one position after the other.
  const int taps[3] = {g.kernel[1], g.kernel[2], g.cin}, places[3] = {g.out[0], g.out[1], g.out[2]};
  const Digits column = digits_of(n, taps), step_by = digits_of(kStep, places);
  Digits position = digits_of(static_cast<int>(place.begin) + me / kEights, places);
  const auto pixel_of = [&](const Digits& c) {
    int pixel = position.d[0];
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      const int s = position.d[a + 1] * g.stride[a] - g.pad[a] + c.d[a] * g.dilation[a];
      if (!inside(s, g.in[a])) return -1;
      pixel = pixel * g.in[a] + s;
    }
    return pixel;
  };
  const auto load_x = [&](bool exists, std::uint16_t* to) {
    if (kWide || wide.source) {
      const int pixel = exists && n < place.columns ? pixel_of(column) : -1;
      gpu::cp_async_16(to, pixel >= 0 ? x + pixel * x_pitch + column.d[3] : x, pixel >= 0);
      return;
    }
    Digits c = column;
    copy_singly(to, [&](int j) {
      const int pixel = exists && n + j < place.columns ? pixel_of(c) : -1;
      const T* const from = pixel >= 0 ? x + pixel * x_pitch + c.d[3] : nullptr;
      add(c, {{0, 0, 0, 1}}, taps);
      return from;
    });
  };
  const int64_t steps = (place.end - place.begin + gpu::kMmaK - 1) / gpu::kMmaK;
  block.template run<T>(steps, false, false, [&](int64_t step, std::uint16_t* a, std::uint16_t* b) {
#pragma unroll
    for (int pass = 0; pass < gpu::kMmaK / kStep; ++pass) {
      const int k = me / kEights + pass * kStep;
      const int64_t at = place.begin + step * gpu::kMmaK + k;
      const bool exists = at < place.end;
      copy_eight(a + Block::A::at(false, eight, k), dy + at * dy_pitch + m, exists ? g.cout - m : 0,
                 kWide || wide.result, dy);
      load_x(exists, b + Block::B::at(false, eight, k));
      add(position, step_by, places);
    }
  });

  const bool packed = place.columns % 8 == 0;
  block.each_eight([&](int r, int c, float(&sums)[8]) {
    const int left = place.columns - place.n0 - c;
    if (place.m0 + r >= g.cout || left <= 0) return;
    float* const to = place.part + static_cast<int64_t>(place.m0 + r) * place.columns + place.n0 + c;
    if (packed) {
      gpu::store_many<8>(to, sums);
    } else {
      for (int j = 0; j < 8; ++j)
        if (j < left) to[j] = sums[j];
    }
  });
}

template <class T, class Block>
void start_weight_parts(const WeightParts& a, int64_t blocks, void* stream) {
  const Wide wide{a.g.cin % 8 == 0 && gpu::aligned(a.x), true, a.g.cout % 8 == 0 && gpu::aligned(a.dy)};
  const auto start = [&](auto kernel) {
    gpu::launch("conv_weight_gradient", kernel, blocks, Block::kThreads, Block::shared(), stream, a, wide);
  };
  wide.source && wide.result ? start(weight_parts_mma<T, Block, true>) : start(weight_parts_mma<T, Block, false>);
}

template <class T>
void run_weight_parts(WeightParts a, const capo::ConvWeightPartsArgs& p, void* stream) {
  a.row_tiles = (a.g.cout + p.tile - 1) / p.tile;
  a.column_tiles = (static_cast<int64_t>(a.g.taps) * a.g.cin + p.tile - 1) / p.tile;
  const int64_t blocks = p.chunks * a.g.groups * a.row_tiles * a.column_tiles;
  if constexpr (sizeof(T) == 4)
    gpu::launch("conv_weight_gradient", weight_parts, blocks, kThreads, 0, stream, a);
  else if (p.tile == 2 * kTile)
    start_weight_parts<T, gpu::MmaBlock<2 * kTile, 2 * kTile, 2, 4>>(a, blocks, stream);
  else
    start_weight_parts<T, gpu::MmaBlock<kTile, kTile, 2, 2>>(a, blocks, stream);
}

constexpr int kRows = kThreads / gpu::kWarp;

// Depthwise: a block sums 32 channels over one chunk of lines of the last axis; warp r takes the positions r, r + 8, ..
// of each line, and the warps' sums are added in order.
template <class T>
__global__ void __launch_bounds__(kThreads) weight_parts_depthwise(WeightParts p) {
  CAPO_SHARED(float, sums, kThreads);
  const Geometry& g = p.g;
  const int lane = static_cast<int>(threadIdx.x) % gpu::kWarp, r = static_cast<int>(threadIdx.x) / gpu::kWarp,
            channels = g.groups;
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
      const T* const x = static_cast<const T*>(p.x) +
                         static_cast<int64_t>((image * g.in[0] + s0) * g.in[1] + s1) * g.in[2] * channels + c;
      const T* const dy = static_cast<const T*>(p.dy) + line * g.out[2] * channels + c;
      for (int o = r; o < g.out[2]; o += kRows) {
        const int s2 = o * g.stride[2] - g.pad[2] + k2 * g.dilation[2];
        if (inside(s2, g.in[2]))
          sum += gpu::load(x[static_cast<int64_t>(s2) * channels]) * gpu::load(dy[static_cast<int64_t>(o) * channels]);
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

// cuDNN first where it is switched on; on the host shim always the kernels here.
void conv_direct_cuda(const ConvDirectArgs& p, int64_t, void* stream) {
#if !defined(CAPO_HOST_SHIM)
  if (cudnn_conv(p, stream)) return;
#endif
  const Geometry g = narrow(p.g);
  gpu::for_floating("conv", p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kMany = gpu::kPack<T>;
    if (!is_depthwise(g)) return run_apply<T>(p, g, stream);
    gpu::packs(g.groups, kMany, p.source, p.result) ? run_depthwise<T, kMany>(p, g, stream)
                                                    : run_depthwise<T, 1>(p, g, stream);
  });
}

void conv_weight_parts_cuda(const ConvWeightPartsArgs& p, int64_t n, void* stream) {
#if !defined(CAPO_HOST_SHIM)
  if (cudnn_conv_weight_gradient(p, stream)) return;
#endif
  WeightParts a{narrow(p.g), p.x, p.dy, p.parts, p.chunk, 0, 0};
  gpu::for_floating("conv", p.dtype, [&](auto type) {
    using T = decltype(type);
    if (is_depthwise(a.g)) {
      a.column_tiles = (a.g.groups + gpu::kWarp - 1) / gpu::kWarp;
      gpu::launch("conv_weight_gradient", weight_parts_depthwise<T>, p.chunks * a.column_tiles, kThreads, 0, stream, a);
    } else {
      run_weight_parts<T>(a, p, stream);
    }
    gpu::launch("conv_weight_gradient_join", join<T>, gpu::blocks_for(n, kThreads), kThreads, 0, stream,
                static_cast<const float*>(p.parts), static_cast<T*>(p.dw), p.chunks, n);
  });
}

}  // namespace capo::kernels
