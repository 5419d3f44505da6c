// Convolutions and their data gradients: f32 on CUDA cores, as implicit products of matrices that sum in the order of
// (tap, channel), and depthwise. 16-bit elements go to tensor cores (conv_mma.cu); weight gradients: conv_weight.cu.
#include <capo/cuda/conv_tiles.cuh>
#include <capo/cuda/cudnn.h>
#include <capo/cuda/gemm.h>
#include <capo/cuda/kernels.h>
#include <capo/cuda/row_lanes.cuh>

namespace {

namespace gpu = capo::gpu;
using namespace capo::gpu::conv;
using gpu::kRowThreads;
using gpu::RowLanes;

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
  const int64_t source_pitch = static_cast<int64_t>(depth) * g.groups;
  const T* const source = static_cast<const T*>(p.source) + static_cast<int64_t>(group) * depth;
  const T* const w = static_cast<const T*>(p.w) + static_cast<int64_t>(group) * g.cout * g.taps * g.cin;
  const Extent all(p, place, axis, depth);

  // Of a: one column and kEach rows a thread.
  Position row[kEach];
  bool row_valid[kEach];
  for (int i = 0; i < kEach; ++i) {
    const int64_t m = m0 + me / kDepth + i * (kThreads / kDepth);
    row_valid[i] = m < all.rows;
    row[i] = row_valid[i] ? source_of(axis, static_cast<int>(m)) : Position{};
  }

  Tile tile{};
  if (me < kDepth) columns[me] = column_of(g, axis, depth, all.begin + me, all.end);
  __syncthreads();
  for (int k0 = all.begin; k0 < all.end; k0 += kDepth) {
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
    if (me < kDepth) columns[me] = column_of(g, axis, depth, k0 + kDepth + me, all.end);
    __syncthreads();
  }

  const Target<T> target(p, place, n_all);
  for (int i = 0; i < kEach; ++i) {
    const int64_t m = m0 + me / (kTile / kEach) * kEach + i;
    if (m >= all.rows) continue;
    T* const to = (target.part ? target.part : target.result) + result_of(axis, static_cast<int>(m)) * target.pitch;
    for (int j = 0; j < kEach; ++j) {
      const int n = n0 + me % (kTile / kEach) * kEach + j;
      if (n < n_all) to[n] = tile.sum[i][j] + (target.bias ? target.bias[n] : 0.0f);
    }
  }
}
void run_f32(const capo::ConvDirectArgs& p, void* stream) {
  Apply a = apply_of(p);
  const int64_t blocks = cut(a, positions_of(p), p.transposed ? a.g.cin : a.g.cout, kTile, kTile);
  p.transposed ? gpu::launch("conv_data_gradient", apply<true>, blocks, kThreads, 0, stream, a)
               : gpu::launch("conv", apply<false>, blocks, kThreads, 0, stream, a);
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
void run_depthwise(const capo::ConvDirectArgs& p, void* stream) {
  const Apply a = apply_of(p);
  const Geometry& g = a.g;
  const int* const result = kTransposed ? g.in : g.out;
  const RowLanes lanes =
      gpu::row_lanes(static_cast<int64_t>(g.batch) * result[0] * result[1] * result[2], (g.groups + N - 1) / N);
  gpu::launch("conv_depthwise", apply_depthwise<T, N, kTransposed>, lanes.blocks(), kRowThreads, 0, stream, a, lanes);
}

template <class T, int N>
void run_depthwise(const capo::ConvDirectArgs& p, void* stream) {
  p.transposed ? run_depthwise<T, N, true>(p, stream) : run_depthwise<T, N, false>(p, stream);
}

template <class T>
void run_depthwise(const capo::ConvDirectArgs& p, void* stream) {
  constexpr int kMany = gpu::kPack<T>;
  const bool packed = gpu::packs(p.g.groups, kMany, p.source, p.result);
  packed ? run_depthwise<T, kMany>(p, stream) : run_depthwise<T, 1>(p, stream);
}

}  // namespace

namespace capo::kernels {

// cuDNN first where it is switched on; on the host shim always the kernels here.
void conv_direct_cuda(const ConvDirectArgs& p, int64_t items, void* stream) {
#if !defined(CAPO_HOST_SHIM)
  if (cudnn_conv(p, stream)) return;
#endif
  gpu::for_floating("conv", p.dtype, [&](auto type) {
    using T = decltype(type);
    if (is_depthwise(narrow(p.g))) return run_depthwise<T>(p, stream);
    if constexpr (sizeof(T) == 2)
      conv_mma(p, stream);
    else
      run_f32(p, stream);
  });
  if (!p.parts) return;
  const int64_t channels = p.g.groups * (p.transposed ? p.g.cin : p.g.cout);
  gemm_finish_cuda({p.dtype, f32, p.parts, p.bias, nullptr, p.result, Activation::none, p.chunks, items / channels,
                    channels, nullptr, channels},
                   stream);
}

}  // namespace capo::kernels
