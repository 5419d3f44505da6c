// What the kernels of convolutions share: geometry in 32 bits, positions of the im2col matrix, a block's place and
// where its sums go, and the copies of a stage. Tiles of that matrix are gathered into shared memory; it never exists
// in memory.
#pragma once

#include <capo/cuda/mma_tile.cuh>
#include <capo/cuda/pack.cuh>
#include <capo/engine/error.h>
#include <capo/ops/conv.h>
#include <capo/ops/conv_axis_internal.h>

namespace capo::gpu::conv {

using std::int64_t;

// ConvGeometry in 32 bits.
struct Geometry {
  int batch, groups, cin, cout, taps;
  int in[3], out[3], kernel[3], stride[3], pad[3], dilation[3];
};

inline Geometry narrow(const ConvGeometry& g) {
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
inline bool is_depthwise(const Geometry& g) { return g.groups > 1 && g.cin == 1 && g.cout == 1; }

// ---------------------------------------------------------------- f32: a thread's sums in registers

constexpr int kThreads = 256;
constexpr int kTile = 64;           // rows and columns of a block's tile
constexpr int kDepth = 16;          // of a step
constexpr int kPitch = kTile + 4;   // of a step's rows in shared memory: 16-byte aligned, other banks
constexpr int kEach = 4;            // rows and columns of a thread; elements that it loads of each operand
static_assert(kTile == kConvCudaTile);
static_assert(kTile * kTile == kThreads * kEach * kEach && kTile * kDepth == kThreads * kEach);

struct Tile {
  float sum[kEach][kEach];
};

// sum += the step's product, a and b as [kDepth, kPitch].
__device__ inline void multiply(Tile& t, const float* a, const float* b) {
  using Four = Pack<float, kEach>;
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

struct Apply {
  Geometry g;
  const void *source, *w, *bias;
  void* result;
  float* parts;    // [chunks, part] in place of the result, or null
  int64_t part;    // elements of the result
  int64_t chunk;   // columns of the im2col matrix to a part, of each phase
  int chunks, phases;
  int64_t row_tiles, column_tiles;
};
inline Apply apply_of(const ConvDirectArgs& p) {
  Apply a{narrow(p.g), p.source, p.w, p.parts ? nullptr : p.bias, p.result, p.parts, 0, p.chunk,
          static_cast<int>(p.chunks), 1, 0, 0};
  const auto& result = p.transposed ? p.g.in : p.g.out;
  a.part = p.g.batch * result[0] * result[1] * result[2] * p.g.groups * (p.transposed ? p.g.cin : p.g.cout);
  if (p.transposed)
    for (const auto s : p.g.stride) a.phases *= static_cast<int>(s);
  return a;
}
// Rows of the im2col matrix of the largest phase.
inline int64_t positions_of(const ConvDirectArgs& p) {
  int64_t n = p.g.batch;
  for (int i = 0; i < 3; ++i) n *= p.transposed ? (p.g.in[i] + p.g.stride[i] - 1) / p.g.stride[i] : p.g.out[i];
  return n;
}
// Cuts into tiles of rows x columns; returns the blocks of all chunks, groups and phases.
inline int64_t cut(Apply& p, int64_t positions, int n_all, int rows, int columns) {
  p.row_tiles = (positions + rows - 1) / rows;
  p.column_tiles = (n_all + columns - 1) / columns;
  return p.chunks * p.g.groups * p.phases * p.row_tiles * p.column_tiles;
}

// The first row and column, group, chunk and phase of a block; fills axis[3] and meets the other threads.
struct Place {
  int64_t m0;
  int n0, group, chunk;
};
template <bool kTransposed>
__device__ inline Place place_of(const Apply& p, int rows, int columns, Axis* axis) {
  int64_t block = blockIdx.x;
  Place at{};
  at.n0 = static_cast<int>(block % p.column_tiles) * columns;
  block /= p.column_tiles;
  at.m0 = block % p.row_tiles * rows;
  block /= p.row_tiles;
  const int me = static_cast<int>(threadIdx.x), rest = static_cast<int>(block) / p.phases,
            phase = static_cast<int>(block) % p.phases;
  at.chunk = rest / p.g.groups;
  at.group = rest - at.chunk * p.g.groups;
  if (me < 3) {
    int number = phase;
    for (int a = 2; a > me; --a) number /= kTransposed ? p.g.stride[a] : 1;
    axis[me] = conv_axis(p.g, kTransposed, me, kTransposed ? number % p.g.stride[me] : 0);
  }
  __syncthreads();
  return at;
}

// The im2col matrix as a block sees it: its rows (of one phase), and of its columns (tap, source channel) those of a
// chunk.
struct Extent {
  int64_t rows;
  int columns, begin, end;
  __device__ Extent(const Apply& p, const Place& at, const Axis* axis, int depth)
      : rows(static_cast<int64_t>(p.g.batch) * axis[0].count * axis[1].count * axis[2].count),
        columns(at.m0 < rows ? axis[0].taps * axis[1].taps * axis[2].taps * depth : 0),
        begin(static_cast<int>(at.chunk * p.chunk)),
        end(begin + p.chunk < columns ? static_cast<int>(begin + p.chunk) : columns) {}
};

// Where a block's sums go: to its group's channels of the result, with the bias, or to those of its chunk's part.
template <class T>
struct Target {
  T* result;
  float* part;    // or null
  const T* bias;  // or null
  int64_t pitch;
  __device__ Target(const Apply& p, const Place& at, int n_all) : part(nullptr), bias(nullptr) {
    const int64_t first = static_cast<int64_t>(at.group) * n_all;
    result = static_cast<T*>(p.result) + first;
    if (p.parts) part = p.parts + at.chunk * p.part + first;
    if (p.bias) bias = static_cast<const T*>(p.bias) + first;
    pitch = static_cast<int64_t>(n_all) * p.g.groups;
  }
};

// ---------------------------------------------------------------- stages of tensor-core blocks

// Which 16-byte accesses are allowed, decided on the host.
struct Wide {
  bool source, w, result;
};

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

using Eight = Pack<std::uint16_t, 8>;

// Eight elements to shared memory: f(j) gives number j's address, or null for zero.
template <class F>
__device__ inline void copy_singly(std::uint16_t* to, const F& f) {
  Eight pack{};
  for (int j = 0; j < 8; ++j)
    if (const auto* const from = f(j)) pack.v[j] = half_bits(*from);
  *reinterpret_cast<Eight*>(to) = pack;
}
// Eight neighbours from `from` on, of which `left` exist.
template <class T>
__device__ inline void copy_eight(std::uint16_t* to, const T* from, int left, bool wide, const T* anywhere) {
  if (wide)
    cp_async_16(to, left > 0 ? from : anywhere, left > 0);
  else
    copy_singly(to, [&](int j) { return j < left ? from + j : nullptr; });
}

}  // namespace capo::gpu::conv
