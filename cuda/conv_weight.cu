// The weight gradient of convolutions: fixed chunks of positions in f32, added in order.
#include <capo/cuda/conv_tiles.cuh>
#include <capo/cuda/cudnn.h>

namespace {

namespace gpu = capo::gpu;
using namespace capo::gpu::conv;

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
__global__ void __launch_bounds__(Block::kThreads, kWide ? Block::kBlocks : 1)
    weight_parts_mma(WeightParts p, Wide wide) {
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

}  // namespace

namespace capo::kernels {

// cuDNN first where it is switched on; on the host shim always the kernels here.
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
