// Convolutions and their data gradients of 16-bit elements on tensor cores: blocks of MmaBlock, whose stages are
// gathered 16 bytes (eight channels of one tap) at a time where channels come in eights and lie aligned, else one by
// one.
#include <capo/cuda/conv_tiles.cuh>
#include <capo/cuda/kernels.h>

namespace {

namespace gpu = capo::gpu;
using namespace capo::gpu::conv;

// The im2col matrix's columns (tap, channel) as digits: a thread's place in them moves on with the stages.
struct Columns {
  int radix[3];  // taps of axes 1 and 2, channels
  __device__ Columns(const Axis* axis, int depth) : radix{axis[1].taps, axis[2].taps, depth} {
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

constexpr int kEights = gpu::kMmaK / 8;

// A thread's part of the sources: eight columns, always the same of a stage, of some rows.
template <class T, class Block, bool kWide>
struct Sources {
  static constexpr int kRowStep = Block::kThreads / kEights, kCopies = Block::kRows / kRowStep;
  const T* source;
  int64_t pitch;
  const Axis* axis;
  int end, mine;
  bool wide;
  Position row[kCopies];
  bool exists[kCopies];
  Digits column, step;

  __device__ Sources(const Apply& p, const Place& at, const Axis* axes, const Extent& all, const Columns& columns,
                     int depth, bool may)
      : source(static_cast<const T*>(p.source) + static_cast<int64_t>(at.group) * depth),
        pitch(static_cast<int64_t>(depth) * p.g.groups), axis(axes), end(all.end),
        mine(static_cast<int>(threadIdx.x) % kEights * 8), wide(may), column(columns.at(all.begin + mine)),
        step(columns.at(gpu::kMmaK)) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t m = at.m0 + first_row(i);
      exists[i] = m < all.rows;
      row[i] = exists[i] ? source_of(axis, static_cast<int>(m)) : Position{};
    }
  }
  __device__ static int first_row(int i) { return static_cast<int>(threadIdx.x) / kEights + i * kRowStep; }

  // Columns k0 .. of the stage; the stages come in order.
  __device__ void load(int k0, std::uint16_t* to, const Columns& columns) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      std::uint16_t* const at = to + Block::A::at(true, first_row(i), mine);
      if (kWide || wide) {
        const int pixel = exists[i] && k0 + mine < end ? source_pixel(axis, row[i], column) : -1;
        gpu::cp_async_16(at, pixel >= 0 ? source + pixel * pitch + column.d[3] : source, pixel >= 0);
        continue;
      }
      Digits c = column;
      copy_singly(at, [&](int j) -> const T* {
        const int pixel = exists[i] && k0 + mine + j < end ? source_pixel(axis, row[i], c) : -1;
        const T* const from = pixel >= 0 ? source + pixel * pitch + c.d[3] : nullptr;
        add(c, {{0, 0, 0, 1}}, columns.radix);
        return from;
      });
    }
    add(column, step, columns.radix);
  }
};

// Its part of the weights, which lie [channel][k] in a stage as in memory; transposed [k][channel], where it copies
// eight channels, always the same, of one column after the other.
template <class T, class Block, bool kTransposed, bool kWide>
struct Weights {
  static constexpr int kChannelEights = Block::kColumns / 8, kColumnStep = Block::kThreads / kChannelEights;
  const T* w;
  const Axis* axis;
  int n0, n_all, columns_all, end;
  bool wide;
  Digits column, step;  // transposed

  __device__ Weights(const Apply& p, const Place& at, const Axis* axes, const Extent& all, const Columns& columns,
                     int channels, bool may)
      : w(static_cast<const T*>(p.w) + static_cast<int64_t>(at.group) * p.g.cout * p.g.taps * p.g.cin), axis(axes),
        n0(at.n0), n_all(channels), columns_all(all.columns), end(all.end), wide(may),
        column(columns.at(all.begin + static_cast<int>(threadIdx.x) / kChannelEights)), step(columns.at(kColumnStep)) {}

  __device__ void load(int k0, std::uint16_t* to, const Geometry& g, const Columns& columns) {
    const int me = static_cast<int>(threadIdx.x);
    if constexpr (kTransposed) {
      const int n = me % kChannelEights * 8;
#pragma unroll
      for (int pass = 0; pass < gpu::kMmaK / kColumnStep; ++pass) {
        const int k = me / kChannelEights + pass * kColumnStep;
        const T* const from =
            w + (static_cast<int64_t>(column.d[3]) * g.taps + tap_of(g, axis, column)) * g.cin + n0 + n;
        copy_eight(to + Block::B::at(false, n, k), from, k0 + k < end ? n_all - n0 - n : 0, kWide || wide,
                   w);
        add(column, step, columns.radix);
      }
    } else {
      constexpr int kRowStep = Block::kThreads / kEights;
      const int k = me % kEights * 8;
#pragma unroll
      for (int pass = 0; pass < Block::kColumns / kRowStep; ++pass) {
        const int n = me / kEights + pass * kRowStep;
        const T* const from = w + static_cast<int64_t>(n0 + n) * columns_all + k0 + k;
        copy_eight(to + Block::B::at(true, n, k), from, n0 + n < n_all ? end - k0 - k : 0, kWide || wide, w);
      }
    }
  }
};

template <class T>
__device__ inline void write_eight(T* to, const float (&x)[8], int left, bool wide) {
  if (wide) return gpu::store_many<8>(to, x);
  for (int j = 0; j < 8; ++j)
    if (j < left) to[j] = gpu::Store<T>::from(x[j]);
}

// Positions by result channels.
template <class T, class Block, bool kTransposed, bool kWide>
__global__ void __launch_bounds__(Block::kThreads, Block::kBlocks) apply_mma(Apply p, Wide wide) {
  CAPO_SHARED(Axis, axis, 3);
  CAPO_SHARED_DYNAMIC(carve);
  Block block(carve);
  const Geometry& g = p.g;
  const Place place = place_of<kTransposed>(p, Block::kRows, Block::kColumns, axis);
  const int depth = kTransposed ? g.cout : g.cin, n_all = kTransposed ? g.cin : g.cout;
  const Extent all(p, place, axis, depth);
  const Columns columns(axis, depth);
  Sources<T, Block, kWide> sources(p, place, axis, all, columns, depth, wide.source);
  Weights<T, Block, kTransposed, kWide> weights(p, place, axis, all, columns, n_all, wide.w);
  const int steps = all.end > all.begin ? (all.end - all.begin + gpu::kMmaK - 1) / gpu::kMmaK : 0;
  block.template run<T>(steps, true, !kTransposed, [&](int64_t step, std::uint16_t* a, std::uint16_t* b) {
    const int k0 = all.begin + static_cast<int>(step) * gpu::kMmaK;
    sources.load(k0, a, columns);
    weights.load(k0, b, g, columns);
  });

  const Target<T> target(p, place, n_all);
  block.each_eight([&](int r, int c, float(&x)[8]) {
    const int64_t m = place.m0 + r;
    const int n = place.n0 + c, left = n_all - n;
    if (m >= all.rows || left <= 0) return;
    if (target.bias)
      for (int j = 0; j < 8; ++j) x[j] += j < left ? gpu::load(target.bias[n + j]) : 0.0f;
    const int64_t at = result_of(axis, static_cast<int>(m)) * target.pitch + n;
    if (target.part)
      write_eight(target.part + at, x, left, kWide || wide.result);
    else
      write_eight(target.result + at, x, left, kWide || wide.result);
  });
}

template <class T, class Block, bool kWide>
void start(Apply a, bool transposed, int64_t positions, int n_all, const Wide& wide, void* stream) {
  const int64_t blocks = cut(a, positions, n_all, Block::kRows, Block::kColumns);
  const auto start_one = [&](const char* name, auto kernel) {
    gpu::launch(name, kernel, blocks, Block::kThreads, Block::shared(), stream, a, wide);
  };
  transposed ? start_one("conv_data_gradient", apply_mma<T, Block, true, kWide>)
             : start_one("conv", apply_mma<T, Block, false, kWide>);
}

template <class T>
void run(const capo::ConvDirectArgs& p, void* stream) {
  using Broad = gpu::MmaBlock<128, 128, 2, 4>;
  using Narrow = gpu::MmaBlock<128, 64, 4, 2>;
  constexpr int64_t kFull = 128;  // blocks that fill a device
  Apply a = apply_of(p);
  const int64_t positions = positions_of(p);
  const int depth = p.transposed ? a.g.cout : a.g.cin, n_all = p.transposed ? a.g.cin : a.g.cout;
  const Wide wide{depth % 8 == 0 && gpu::aligned(a.source), a.g.cin % 8 == 0 && gpu::aligned(a.w),
                  n_all % 8 == 0 && gpu::aligned(a.result)};
  if (!wide.source || !wide.w || !wide.result)
    start<T, Narrow, false>(a, p.transposed, positions, n_all, wide, stream);
  else if (n_all > Narrow::kColumns && cut(a, positions, n_all, Broad::kRows, Broad::kColumns) >= kFull)
    start<T, Broad, true>(a, p.transposed, positions, n_all, wide, stream);
  else
    start<T, Narrow, true>(a, p.transposed, positions, n_all, wide, stream);
}

}  // namespace

namespace capo::kernels {

void conv_mma(const ConvDirectArgs& p, void* stream) {
  p.dtype == bf16 ? run<BFloat16>(p, stream) : run<Half>(p, stream);
}

}  // namespace capo::kernels
