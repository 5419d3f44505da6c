// Copies between views, casts, fills and random numbers.
#include <capo/cuda/element.cuh>
#include <capo/cuda/math.cuh>
#include <capo/cuda/philox.cuh>
#include <capo/ops/copy.h>
#include <capo/ops/integer_functors.h>

namespace {

using capo::BFloat16;
using capo::CopyArgs;
using capo::DType;
using capo::FillArgs;
using capo::Half;
using capo::RandomArgs;
namespace gpu = capo::gpu;

constexpr int kThreads = 256;

struct Offsets {
  std::int64_t src, dst, mask;
};
// Where element `index` (row-major over p.shape) lies.
__device__ inline Offsets offsets_of(const CopyArgs& p, std::int64_t index) {
  Offsets o{0, 0, 0};
  for (int d = p.rank - 1; d > 0; --d) {
    const std::int64_t rest = index / p.shape[d], i = index - rest * p.shape[d];
    o.src += i * p.ss[d], o.dst += i * p.sd[d], o.mask += i * p.sm[d];
    index = rest;
  }
  o.src += index * p.ss[0], o.dst += index * p.sd[0], o.mask += index * p.sm[0];
  return o;
}

// Equal dtypes move words of their size.
template <class W>
__global__ void __launch_bounds__(kThreads) move(CopyArgs p, std::int64_t n) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    const Offsets o = offsets_of(p, i);
    if (!p.mask || p.mask[o.mask]) static_cast<W*>(p.dst)[o.dst] = static_cast<const W*>(p.src)[o.src];
  }
}

// 16 bytes at a time, both sides without gaps.
template <class W>
__global__ void __launch_bounds__(kThreads) move_packed(const W* src, W* dst, std::int64_t n) {
  using Pack = gpu::Pack<W, gpu::kPack<W>>;
  const std::int64_t packs = n / gpu::kPack<W>, step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t i = first; i < packs; i += step)
    reinterpret_cast<Pack*>(dst)[i] = reinterpret_cast<const Pack*>(src)[i];
  const std::int64_t rest = packs * gpu::kPack<W> + first;
  if (rest < n) dst[rest] = src[rest];
}

template <class S>
__device__ inline void store_as(const CopyArgs& p, std::int64_t at, S v) {
  switch (p.dst_dtype) {
    case DType::f32: static_cast<float*>(p.dst)[at] = gpu::Store<float>::from(v); return;
    case DType::f64: static_cast<double*>(p.dst)[at] = gpu::Store<double>::from(v); return;
    case DType::bf16: static_cast<BFloat16*>(p.dst)[at] = gpu::Store<BFloat16>::from(v); return;
    case DType::f16: static_cast<Half*>(p.dst)[at] = gpu::Store<Half>::from(v); return;
    case DType::i32: static_cast<std::int32_t*>(p.dst)[at] = convert_to<std::int32_t>(v); return;
    case DType::i64: static_cast<std::int64_t*>(p.dst)[at] = convert_to<std::int64_t>(v); return;
    case DType::u8: static_cast<std::uint8_t*>(p.dst)[at] = convert_to<std::uint8_t>(v); return;
    case DType::i8: static_cast<std::int8_t*>(p.dst)[at] = convert_to<std::int8_t>(v); return;
    case DType::boolean: static_cast<bool*>(p.dst)[at] = gpu::Store<bool>::from(v); return;
  }
}

// Different dtypes. S is templated for the speed of the load, the destination is one switch that all threads take
// alike.
template <class S>
__global__ void __launch_bounds__(kThreads) convert(CopyArgs p, std::int64_t n) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    const Offsets o = offsets_of(p, i);
    if (!p.mask || p.mask[o.mask]) store_as(p, o.dst, gpu::load(static_cast<const S*>(p.src)[o.src]));
  }
}

// f32 and 16-bit floats without gaps: eight elements a thread.
template <class S, class D>
__global__ void __launch_bounds__(kThreads) convert_packed(const S* src, D* dst, std::int64_t n) {
  constexpr int kCount = 4;
  using From = gpu::Pack<S, kCount>;
  using To = gpu::Pack<D, kCount>;
  const std::int64_t packs = n / kCount, step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t i = first; i < packs; i += step) {
    const From x = reinterpret_cast<const From*>(src)[i];
    To y;
    for (int j = 0; j < kCount; ++j) y.v[j] = gpu::Store<D>::from(gpu::load(x.v[j]));
    reinterpret_cast<To*>(dst)[i] = y;
  }
  const std::int64_t rest = packs * kCount + first;
  if (rest < n) dst[rest] = gpu::Store<D>::from(gpu::load(src[rest]));
}

bool plain(const CopyArgs& p) {
  return p.rank == 1 && p.ss[0] == 1 && p.sd[0] == 1 && !p.mask && gpu::aligned(p.src) && gpu::aligned(p.dst);
}

template <class W>
void run_move(const CopyArgs& p, std::int64_t n, void* stream) {
  if (plain(p))
    gpu::launch("copy", move_packed<W>, gpu::blocks_for(n / gpu::kPack<W> + 1, kThreads), kThreads, 0, stream,
                static_cast<const W*>(p.src), static_cast<W*>(p.dst), n);
  else
    gpu::launch("copy", move<W>, gpu::blocks_for(n, kThreads), kThreads, 0, stream, p, n);
}

template <class S, class D>
void run_packed(const CopyArgs& p, std::int64_t n, void* stream) {
  gpu::launch("cast", convert_packed<S, D>, gpu::blocks_for(n / 4 + 1, kThreads), kThreads, 0, stream,
              static_cast<const S*>(p.src), static_cast<D*>(p.dst), n);
}

template <class S>
void run_convert(const CopyArgs& p, std::int64_t n, void* stream) {
  gpu::launch("cast", convert<S>, gpu::blocks_for(n, kThreads), kThreads, 0, stream, p, n);
}

template <class T>
constexpr bool kInteger = capo::is_integer(capo::dtype_of<T>::value);

template <class T, class S>
__device__ inline T element_of(S v) {
  if constexpr (kInteger<T>)
    return convert_to<T>(v);
  else
    return gpu::Store<T>::from(v);
}

template <class T>
__global__ void __launch_bounds__(kThreads) fill(T* dst, double value, bool iota, std::int64_t n) {
  const T v = element_of<T>(value);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step)
    dst[i] = iota ? element_of<T>(i) : v;
}

template <class T>
void run_fill(const FillArgs& p, std::int64_t n, void* stream) {
  gpu::launch("fill", fill<T>, gpu::blocks_for(n, kThreads), kThreads, 0, stream, static_cast<T*>(p.dst), p.value,
              p.iota, n);
}

// One thread, one Philox block: four elements, by the formulas of ops/cpu/copy.cpp.
template <class T>
__global__ void __launch_bounds__(kThreads) random(RandomArgs p, std::int64_t blocks) {
  T* dst = static_cast<T*>(p.dst);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < blocks; i += step) {
    std::uint32_t words[4];
    gpu::philox_block(p.range, static_cast<std::uint64_t>(i), words);
    double u[4];
    for (int j = 0; j < 4; ++j) u[j] = (static_cast<double>(words[j]) + 0.5) * 0x1p-32;
    if (p.normal) {
      for (int j = 0; j < 4; j += 2) {
        const double r = m::sqrt(-2.0 * m::log(u[j])), angle = 6.283185307179586476925 * u[j + 1];
        dst[4 * i + j] = static_cast<T>(p.a + p.b * r * m::cos(angle));
        dst[4 * i + j + 1] = static_cast<T>(p.a + p.b * r * m::sin(angle));
      }
    } else {
      for (int j = 0; j < 4; ++j) {  // rounding to T may reach the upper bound, which is excluded
        const T v = static_cast<T>(p.a + (p.b - p.a) * u[j]);
        dst[4 * i + j] = v < static_cast<T>(p.b) ? v : static_cast<T>(p.a);
      }
    }
  }
}

}  // namespace

namespace capo::kernels {

void copy_cuda(const CopyArgs& p, std::int64_t n, void* stream) {
  if (p.src_dtype == p.dst_dtype) switch (size_of(p.dst_dtype)) {
      case 8: return run_move<std::uint64_t>(p, n, stream);
      case 4: return run_move<std::uint32_t>(p, n, stream);
      case 2: return run_move<std::uint16_t>(p, n, stream);
      default: return run_move<std::uint8_t>(p, n, stream);
    }
  if (plain(p)) {
    const auto is = [&](DType s, DType d) { return p.src_dtype == s && p.dst_dtype == d; };
    if (is(f32, bf16)) return run_packed<float, BFloat16>(p, n, stream);
    if (is(bf16, f32)) return run_packed<BFloat16, float>(p, n, stream);
    if (is(f32, f16)) return run_packed<float, Half>(p, n, stream);
    if (is(f16, f32)) return run_packed<Half, float>(p, n, stream);
  }
  switch (p.src_dtype) {
    case DType::f32: return run_convert<float>(p, n, stream);
    case DType::f64: return run_convert<double>(p, n, stream);
    case DType::bf16: return run_convert<BFloat16>(p, n, stream);
    case DType::f16: return run_convert<Half>(p, n, stream);
    case DType::i32: return run_convert<std::int32_t>(p, n, stream);
    case DType::i64: return run_convert<std::int64_t>(p, n, stream);
    case DType::u8: return run_convert<std::uint8_t>(p, n, stream);
    case DType::i8: return run_convert<std::int8_t>(p, n, stream);
    case DType::boolean: return run_convert<bool>(p, n, stream);
  }
}

void fill_cuda(const FillArgs& p, std::int64_t n, void* stream) {
  switch (p.dtype) {
    case DType::f32: return run_fill<float>(p, n, stream);
    case DType::f64: return run_fill<double>(p, n, stream);
    case DType::bf16: return run_fill<BFloat16>(p, n, stream);
    case DType::f16: return run_fill<Half>(p, n, stream);
    case DType::i32: return run_fill<std::int32_t>(p, n, stream);
    case DType::i64: return run_fill<std::int64_t>(p, n, stream);
    case DType::u8: return run_fill<std::uint8_t>(p, n, stream);
    case DType::i8: return run_fill<std::int8_t>(p, n, stream);
    case DType::boolean: return run_fill<bool>(p, n, stream);
  }
}

void random_cuda(const RandomArgs& p, std::int64_t blocks, void* stream) {
  const std::int64_t grid = gpu::blocks_for(blocks, kThreads);
  if (p.dtype == f32)
    gpu::launch("random", random<float>, grid, kThreads, 0, stream, p, blocks);
  else
    gpu::launch("random", random<double>, grid, kThreads, 0, stream, p, blocks);
}

}  // namespace capo::kernels
