// Matrix products: tensor cores for 16-bit operands (and f32 rounded to bf16), plain f32 arithmetic for f32. Sums are
// f32; bias and activation are applied before the only rounding. Any strides; blocks of k in a fixed order.
#include <capo/cuda/element.cuh>
#include <capo/cuda/gemm.h>
#include <capo/cuda/math.cuh>
#include <capo/cuda/mma_tile.cuh>
#include <capo/ops/unary_functors.h>

namespace {

using capo::Activation;
using capo::GemmArgs;
using capo::GemmFinishArgs;
using std::int64_t;
namespace gpu = capo::gpu;
using gpu::kWarp;

template <class F, int kCount>
__device__ inline void apply(float (&x)[kCount]) {
  for (int i = 0; i < kCount; ++i) x[i] = F::f(x[i], 0.0f, 0.0f);
}
template <int kCount>
__device__ inline void activate(Activation activation, float (&x)[kCount]) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return apply<Relu>(x);
    case Activation::gelu: return apply<Gelu>(x);
    case Activation::gelu_tanh: return apply<GeluTanh>(x);
    case Activation::quick_gelu: return apply<QuickGelu>(x);
    case Activation::silu: return apply<Silu>(x);
  }
}

// Neighbours to or from memory: in whole packs where `packed` says that all of them exist and lie aligned.
template <class T, int kCount>
__device__ inline void store(T* to, const float (&x)[kCount], bool packed, int64_t left) {
  constexpr int kPart = kCount < gpu::kPack<T> ? kCount : gpu::kPack<T>;
  if (packed) {
    for (int i = 0; i < kCount; i += kPart) {
      gpu::Pack<T, kPart> pack;
      for (int j = 0; j < kPart; ++j) pack.v[j] = gpu::Store<T>::from(x[i + j]);
      *reinterpret_cast<gpu::Pack<T, kPart>*>(to + i) = pack;
    }
    return;
  }
  for (int i = 0; i < kCount; ++i)
    if (i < left) to[i] = gpu::Store<T>::from(x[i]);
}

// x += r[0 .. kCount), read as store writes.
template <class T, int kCount>
__device__ inline void add(const T* r, float (&x)[kCount], bool packed, int64_t left) {
  constexpr int kPart = kCount < gpu::kPack<T> ? kCount : gpu::kPack<T>;
  if (packed) {
    for (int i = 0; i < kCount; i += kPart) {
      const auto pack = *reinterpret_cast<const gpu::Pack<T, kPart>*>(r + i);
      for (int j = 0; j < kPart; ++j) x[i + j] += gpu::load(pack.v[j]);
    }
    return;
  }
  for (int i = 0; i < kCount; ++i)
    if (i < left) x[i] += gpu::load(r[i]);
}

// bias, activation and residual of elements column .. column + kCount of a row that starts at `row` in c, z and
// residual.
template <class T, int kCount>
__device__ inline void finish(const void* bias, void* z, const void* residual, void* c, Activation activation,
                              int64_t row, int64_t column, int64_t n, bool packed, float (&x)[kCount]) {
  const int64_t left = n - column;
  packed = packed && left >= kCount;
  if (bias)
    for (int i = 0; i < kCount; ++i)
      if (i < left) x[i] += gpu::load(static_cast<const T*>(bias)[column + i]);
  if (z) store(static_cast<T*>(z) + row + column, x, packed, left);
  activate(activation, x);
  if (residual) add(static_cast<const T*>(residual) + row + column, x, packed, left);
  store(static_cast<T*>(c) + row + column, x, packed, left);
}

// What one block computes.
struct Place {
  int64_t row, column, k0, k1;  // first row and column, range of k
  int64_t a, b;                 // where its matrices start, in elements
  int64_t out;                  // in rows of c
  int64_t chunk;
};

// Tiles of 8 rows of tiles follow each other down the columns, so that the blocks that run together share operands in
// L2.
template <int kM, int kN>
__device__ inline Place place_of(const GemmArgs& p) {
  const int64_t rows = (p.m + kM - 1) / kM, columns = (p.n + kN - 1) / kN, tiles = rows * columns;
  const int64_t tile = blockIdx.x % tiles, rest = blockIdx.x / tiles;
  constexpr int64_t kGroup = 8;
  const int64_t group = tile / (kGroup * columns), in = tile % (kGroup * columns);
  const int64_t height = rows - group * kGroup < kGroup ? rows - group * kGroup : kGroup;
  Place t{};
  t.row = (group * kGroup + in % height) * kM, t.column = in / height * kN;
  t.chunk = rest % p.k_chunks;
  const int64_t matrix = rest / p.k_chunks;
  t.k0 = t.chunk * p.k_chunk;
  t.k1 = p.k - t.k0 < p.k_chunk ? p.k : t.k0 + p.k_chunk;
  int64_t index = matrix;
  for (int i = p.rank - 1; i >= 0; --i) {
    const int64_t at = index % p.batch[i];
    index /= p.batch[i];
    t.a += at * p.sa[i], t.b += at * p.sb[i];
  }
  t.out = matrix * p.m;
  return t;
}

// kCount sums of one row go where the plan wants them.
template <class T, int kCount>
__device__ inline void emit(const GemmArgs& p, const Place& t, bool packed, int64_t row, int64_t column,
                            float (&x)[kCount]) {
  if (row >= p.m || column >= p.n) return;
  row += t.out;
  if (p.parts)
    store(p.parts + (t.chunk * p.matrices * p.m + row) * p.n + column, x, packed && p.n - column >= kCount,
          p.n - column);
  else
    finish<T>(p.bias, p.z, p.residual, p.c, p.activation, row * p.c_row, column, p.n, packed, x);
}

// Which operand accesses may be 16 bytes wide, decided on the host.
struct Wide {
  bool a, b, c;
};

// An operand seen from the tile: its outer axis (rows of A, columns of B) and k.
struct Operand {
  int64_t outer, k;  // strides
  int64_t outers;    // how many
  bool along_k;      // neighbours in memory are neighbours along k
  bool wide;
};
__device__ inline Operand operand_a(const GemmArgs& p, const Wide& w) {
  return {p.a_row, p.a_k, p.m, p.a_k == 1 || p.a_row != 1, w.a};
}
__device__ inline Operand operand_b(const GemmArgs& p, const Wide& w) {
  return {p.b_col, p.b_k, p.n, p.b_k == 1 || p.b_col != 1, w.b};
}

// ---- f32: a thread's kPart x kPart sums in registers, tiles of k through shared memory, twice buffered.

constexpr int kSimtThreads = 256, kSimtK = 16;

template <int kTile>
struct SimtTile {
  static constexpr int kPacks = kTile * kSimtK / 4 / kSimtThreads;  // of four elements, per thread
  float v[kPacks][4];

  // Pack i of this thread: four neighbours along k, or along the outer axis.
  __device__ static void at(const Operand& o, int i, int& outer, int& k) {
    const int pack = threadIdx.x + i * kSimtThreads;
    if (o.along_k)
      outer = pack / (kSimtK / 4), k = pack % (kSimtK / 4) * 4;
    else
      k = pack / (kTile / 4), outer = pack % (kTile / 4) * 4;
  }
  __device__ void read(const float* from, const Operand& o, int64_t first, int64_t k0, int64_t k1) {
    for (int i = 0; i < kPacks; ++i) {
      int outer, k;
      at(o, i, outer, k);
      const int64_t x = first + outer, y = k0 + k;
      const float* src = from + x * o.outer + y * o.k;
      const int64_t step = o.along_k ? o.k : o.outer, left = o.along_k ? k1 - y : o.outers - x;
      const bool inside = x < o.outers && y < k1;
      if (inside && left >= 4 && o.wide) {
        const auto pack = *reinterpret_cast<const gpu::Pack<float, 4>*>(src);
        for (int j = 0; j < 4; ++j) v[i][j] = pack.v[j];
      } else {
        for (int j = 0; j < 4; ++j) v[i][j] = inside && j < left ? src[j * step] : 0.0f;
      }
    }
  }
  // To shared [k][outer], rows of kTile + 4.
  __device__ void write(float* to, const Operand& o) const {
    for (int i = 0; i < kPacks; ++i) {
      int outer, k;
      at(o, i, outer, k);
      float* dst = to + k * (kTile + 4) + outer;
      for (int j = 0; j < 4; ++j) dst[o.along_k ? j * (kTile + 4) : j] = v[i][j];
    }
  }
};

template <int kTile>
__global__ void __launch_bounds__(kSimtThreads) gemm_simt(GemmArgs p, Wide wide) {
  constexpr int kGroups = kTile / 64,
                kBuffer = kSimtK * (kTile + 4);  // a thread has 4 rows and 4 columns of each group
  CAPO_SHARED(float, a_shared, 2 * kBuffer);
  CAPO_SHARED(float, b_shared, 2 * kBuffer);
  const Place t = place_of<kTile, kTile>(p);
  const Operand ao = operand_a(p, wide), bo = operand_b(p, wide);
  const float *a = static_cast<const float*>(p.a) + t.a, *b = static_cast<const float*>(p.b) + t.b;
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  float sum[kGroups * 4][kGroups * 4] = {};
  SimtTile<kTile> at, bt;
  if (t.k0 < t.k1) {
    at.read(a, ao, t.row, t.k0, t.k1);
    bt.read(b, bo, t.column, t.k0, t.k1);
    at.write(a_shared, ao);
    bt.write(b_shared, bo);
  }
  __syncthreads();
  int now = 0;
  for (int64_t k0 = t.k0; k0 < t.k1; k0 += kSimtK, now = kBuffer - now) {
    const bool more = k0 + kSimtK < t.k1;
    if (more) {
      at.read(a, ao, t.row, k0 + kSimtK, t.k1);
      bt.read(b, bo, t.column, k0 + kSimtK, t.k1);
    }
#pragma unroll
    for (int k = 0; k < kSimtK; ++k) {
      float x[kGroups * 4], y[kGroups * 4];
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const auto xp = *reinterpret_cast<const gpu::Pack<float, 4>*>(a_shared + now + k * (kTile + 4) + i * 64 + row);
        const auto yp =
            *reinterpret_cast<const gpu::Pack<float, 4>*>(b_shared + now + k * (kTile + 4) + i * 64 + column);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[4 * i + j] = xp.v[j], y[4 * i + j] = yp.v[j];
      }
#pragma unroll
      for (int i = 0; i < kGroups * 4; ++i)
#pragma unroll
        for (int j = 0; j < kGroups * 4; ++j) sum[i][j] += x[i] * y[j];
    }
    if (more) {
      at.write(a_shared + kBuffer - now, ao);
      bt.write(b_shared + kBuffer - now, bo);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kGroups * 4; ++i)
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = sum[i][4 * j + e];
      emit<float>(p, t, wide.c, t.row + i / 4 * 64 + row + i % 4, t.column + j * 64 + column, x);
    }
}

// ---- tensor cores

// Eight neighbours of an operand at a time to its stage, zeros outside.
template <class T, int kTile, int kThreads>
__device__ inline void load_stage(std::uint16_t* stage, const T* from, const Operand& o, int64_t first, int64_t k0,
                                  int64_t k1) {
  using Eight = gpu::Pack<std::uint16_t, 8>;
  constexpr int kEach = kTile * gpu::kMmaK / 8 / kThreads;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = static_cast<int>(threadIdx.x) + e * kThreads;
    const int outer = o.along_k ? i / (gpu::kMmaK / 8) : i % (kTile / 8) * 8;
    const int k = o.along_k ? i % (gpu::kMmaK / 8) * 8 : i / (kTile / 8);
    std::uint16_t* const to = stage + gpu::MmaOperand<kTile>::at(o.along_k, outer, k);
    const int64_t x = first + outer, y = k0 + k, left = o.along_k ? k1 - y : o.outers - x;
    const int count = x < o.outers && y < k1 ? (left < 8 ? static_cast<int>(left) : 8) : 0;
    const T* const src = from + x * o.outer + y * o.k;
    if constexpr (sizeof(T) == 2)
      if (o.wide) {
        gpu::cp_async_16(to, count > 0 ? src : from, 2 * count);
        continue;
      }
    Eight pack{};
    if (o.wide && count == 8) {  // f32
      for (int j = 0; j < 8; j += gpu::kPack<T>) {
        const auto part = reinterpret_cast<const gpu::Pack<T, gpu::kPack<T>>*>(src + j)[0];
        for (int l = 0; l < gpu::kPack<T>; ++l) pack.v[j + l] = gpu::half_bits(part.v[l]);
      }
    } else {
      const int64_t step = o.along_k ? o.k : o.outer;
      for (int j = 0; j < 8; ++j)
        if (j < count) pack.v[j] = gpu::half_bits(src[j * step]);
    }
    *reinterpret_cast<Eight*>(to) = pack;
  }
}

template <int kTile, int kWarpsM, int kWarpsN>
using Block = gpu::MmaBlock<kTile, kTile, kWarpsM, kWarpsN>;

template <class T, int kTile, int kWarpsM, int kWarpsN>
__global__ void __launch_bounds__(kWarpsM* kWarpsN* kWarp, sizeof(T) == 2 ? Block<kTile, kWarpsM, kWarpsN>::kBlocks : 1)
    gemm_mma(GemmArgs p, Wide wide) {
  constexpr int kThreads = Block<kTile, kWarpsM, kWarpsN>::kThreads;
  CAPO_SHARED_DYNAMIC(carve);
  Block<kTile, kWarpsM, kWarpsN> block(carve);
  const Place t = place_of<kTile, kTile>(p);
  const Operand ao = operand_a(p, wide), bo = operand_b(p, wide);
  const T *a = static_cast<const T*>(p.a) + t.a, *b = static_cast<const T*>(p.b) + t.b;
  const int64_t steps = (t.k1 - t.k0 + gpu::kMmaK - 1) / gpu::kMmaK;
  block.template run<T>(steps, ao.along_k, bo.along_k,
                        [&](int64_t step, std::uint16_t* a_stage, std::uint16_t* b_stage) {
                          const int64_t k = t.k0 + step * gpu::kMmaK;
                          load_stage<T, kTile, kThreads>(a_stage, a, ao, t.row, k, t.k1);
                          load_stage<T, kTile, kThreads>(b_stage, b, bo, t.column, k, t.k1);
                        });
  block.each_eight(
      [&](int row, int column, float(&x)[8]) { emit<T>(p, t, wide.c, t.row + row, t.column + column, x); });
}

// ---- the second stage: c = act(sum of the chunks + bias)

constexpr int kFinishThreads = 256;

template <class S, class T>
__global__ void __launch_bounds__(kFinishThreads) gemm_finish(GemmFinishArgs p, bool wide) {
  const int64_t packs = (p.n + 3) / 4, total = p.rows * packs, plane = p.rows * p.n;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kFinishThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x; i < total; i += step) {
    const int64_t row = i / packs, column = (i - row * packs) * 4, left = p.n - column;
    const S* src = static_cast<const S*>(p.src) + row * p.n + column;
    float x[4] = {};
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk, src += plane) {
      if (wide && left >= 4) {
        const auto pack = *reinterpret_cast<const gpu::Pack<S, 4>*>(src);
        for (int j = 0; j < 4; ++j) x[j] += gpu::load(pack.v[j]);
      } else {
        for (int j = 0; j < 4; ++j)
          if (j < left) x[j] += gpu::load(src[j]);
      }
    }
    finish<T>(p.bias, p.z, p.residual, p.c, p.activation, row * p.c_row, column, p.n, wide, x);
  }
}

template <class S, class T>
void start_finish(const GemmFinishArgs& p, void* stream) {
  const bool wide = p.n % 4 == 0 && p.c_row % 4 == 0 && gpu::aligned(p.src) && gpu::aligned(p.z) && gpu::aligned(p.c) &&
                    gpu::aligned(p.residual);
  gpu::launch("gemm_finish", gemm_finish<S, T>, gpu::blocks_for(p.rows * ((p.n + 3) / 4), kFinishThreads),
              kFinishThreads, 0, stream, p, wide);
}

// ---- host

bool whole(int64_t stride, int64_t pack) { return stride % pack == 0; }

// 16-byte loads: neighbours along one axis, everything else a whole number of packs apart.
bool wide_operand(const void* p, int64_t along, int64_t across, int rank, const int64_t* batch, int64_t pack) {
  bool ok = gpu::aligned(p) && along == 1 && whole(across, pack);
  for (int i = 0; i < rank; ++i) ok = ok && whole(batch[i], pack);
  return ok;
}

template <class T>
Wide wide_of(const GemmArgs& p) {
  constexpr int64_t kPack = gpu::kPack<T>;
  const bool a_along_k = p.a_k == 1, b_along_k = p.b_k == 1;
  return {
      wide_operand(p.a, a_along_k ? p.a_k : p.a_row, a_along_k ? p.a_row : p.a_k, p.rank, p.sa, kPack),
      wide_operand(p.b, b_along_k ? p.b_k : p.b_col, b_along_k ? p.b_col : p.b_k, p.rank, p.sb, kPack),
      whole(p.n, kPack) && whole(p.c_row, kPack) && gpu::aligned(p.c) && gpu::aligned(p.z) && gpu::aligned(p.residual)};
}

int64_t blocks_of(const GemmArgs& p, int64_t tile) {
  return (p.m + tile - 1) / tile * ((p.n + tile - 1) / tile) * p.matrices * p.k_chunks;
}
bool large(const GemmArgs& p) { return blocks_of(p, 128) >= 128; }  // enough of them to fill the device

template <class T, int kTile, int kWarpsM, int kWarpsN>
void start_mma(const GemmArgs& p, void* stream) {
  using B = Block<kTile, kWarpsM, kWarpsN>;
  gpu::launch("gemm", gemm_mma<T, kTile, kWarpsM, kWarpsN>, blocks_of(p, kTile), B::kThreads, B::shared(), stream, p,
              wide_of<T>(p));
}

template <class T>
void multiply(const GemmArgs& p, void* stream) {
  if constexpr (std::is_same_v<T, float>)
    if (!p.bf16) {
      if (large(p))
        gpu::launch("gemm", gemm_simt<128>, blocks_of(p, 128), kSimtThreads, 0, stream, p, wide_of<float>(p));
      else
        gpu::launch("gemm", gemm_simt<64>, blocks_of(p, 64), kSimtThreads, 0, stream, p, wide_of<float>(p));
      return;
    }
  if (large(p))
    start_mma<T, 128, 2, 4>(p, stream);
  else
    start_mma<T, 64, 2, 2>(p, stream);
}

}  // namespace

namespace capo::kernels {

void gemm_finish_cuda(const GemmFinishArgs& p, void* stream) {
  gpu::for_floating("matmul", p.dtype, [&](auto t) {
    using T = decltype(t);
    p.src_dtype == f32 ? start_finish<float, T>(p, stream) : start_finish<T, T>(p, stream);
  });
}

// Who multiplies: cuBLASLt whenever it takes the product, else the kernels here; on the host shim always these.
bool gemm_in_library([[maybe_unused]] const GemmArgs& p, [[maybe_unused]] void* stream) {
#if defined(CAPO_HOST_SHIM)
  return false;
#else
  return cublaslt_takes(p, stream);
#endif
}

void gemm_cuda(const GemmArgs& p, std::int64_t, void* stream) {
#if !defined(CAPO_HOST_SHIM)
  if (p.k_chunks == 1 && cublaslt_multiply(p, stream)) return;
#endif
  CAPO_CHECK(!p.a_sums, "matmul: only cuBLASLt gives the sums of a, and it does not take this product");
  gpu::for_floating("matmul", p.dtype, [&](auto t) { multiply<decltype(t)>(p, stream); });
  if (!p.parts) return;
  gemm_finish_cuda(
      {p.dtype, f32, p.parts, p.bias, p.z, p.c, p.activation, p.k_chunks, p.matrices * p.m, p.n, p.residual, p.c_row},
      stream);
}

}  // namespace capo::kernels
