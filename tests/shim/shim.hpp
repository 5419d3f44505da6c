// CUDA on the host, for tests: compile cuda/*.cu as C++ with -DCAPO_HOST_SHIM='<capo/tests/shim/shim.hpp>'.
//
// The threads of a block are fibers on one OS thread, blocks run one after another; the order is chosen by Config. A
// broken rule (divergent barrier, wrong mask, deadlock, shuffle from a lane outside the mask, ...) throws capo::Error
// out of launch() naming kernel, block, thread, warp, lane and line. What is absent here (atomics, cooperative groups,
// textures, warpSize) is not for our kernels. docs/cuda.md has the rules.
#pragma once

#include <capo/engine/error.h>
#include <capo/tests/shim/control.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// ---------------------------------------------------------------- qualifiers
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// Each use is one array per block, in an arena with redzones, filled with 0xFF (NaN).
#define CAPO_SHARED(T, name, n) \
  T(&name)[n] = *static_cast<T(*)[n]>(capo::shim::shared_array(sizeof(T) * (n), alignof(T), #name, __FILE__, __LINE__))
#define CAPO_SHARED_DYNAMIC(name) capo::gpu::Carve name

namespace capo::shim {

struct Coordinate {
  unsigned x, y, z;
};

// All state of a launch that kernels can reach.
[[noreturn]] void fail(const std::string& what, const char* file, int line);
void* shared_array(std::size_t bytes, std::size_t align, const char* name, const char* file, int line);
void* dynamic_part(int& index, std::size_t bytes);
void barrier(const char* file, int line);
// One meeting of the lanes of a mask at a line: the last one to arrive runs `complete` over all payloads (by lane).
using Complete = void (*)(void* const payload[32], unsigned mask);
void collective(unsigned mask, const char* kind, std::size_t size, void* payload, Complete complete, bool orders_memory,
                const char* file, int line);
// Lanes 8i..8i+7 give the rows of matrix i; every lane's row is read as the lane itself, so that the checkers name it.
void ldmatrix_x4(std::uint32_t* r, const void* row, bool transposed, const char* file, int line);
void cp_async(void* shared, const void* global, int bytes, int valid_bytes, const char* file, int line);
void cp_async_commit();
void cp_async_wait(int groups_left);

using Invoke = void (*)(void* kernel, const unsigned char* args);
struct Launch {
  std::string name;
  void* kernel;  // null: a copy, whose arguments are dst, src and the number of bytes
  Invoke invoke;
  std::int64_t blocks;
  int threads;
  std::size_t shared;
  std::vector<unsigned char> args;   // the parameters one after another, each at offset[i]
  std::vector<std::size_t> offset;   // parameters + 1 entries
};
void run(const Launch& launch);

// ---------------------------------------------------------------- record and replay: what a captured graph would do
// While a recording is on, launches and copies are kept with their argument bytes; replay() runs them with those bytes.
// They also run when they are recorded, unless it is a capture: then, as in a CUDA graph, they are only kept.
void start_recording();
void start_capture();
std::vector<Launch> stop_recording();  // of either
void replay(const std::vector<Launch>& launches);
// Within device memory, ordered with the launches.
void copy(void* dst, const void* src, std::size_t bytes);
// "kernel, argument i" for each argument whose bytes differ between the recordings of two steps (a by-value rate, seed
// or counter), or the launch whose shape differs: what a graph would freeze.
std::vector<std::string> frozen_arguments(const std::vector<Launch>& a, const std::vector<Launch>& b);

// ---------------------------------------------------------------- device memory
// Exact-size 256-aligned memory filled with 0xFF. In the race build it counts as uninitialised until written.
void* allocate(std::size_t bytes, const char* name);
void release(void* p);
void mark_initialised(const void* p, std::size_t bytes);
// The host takes these bytes: in the race build an error when a kernel left one of them unwritten.
void check_written(const void* p, std::size_t bytes);

template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t n, const char* name = "buffer")
      : n_(n), p_(static_cast<T*>(allocate(n * sizeof(T), name))) {}
  explicit Buffer(const std::vector<T>& v, const char* name = "buffer") : Buffer(v.size(), name) { set(v); }
  ~Buffer() { release(p_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return p_; }
  void set(const std::vector<T>& v) const {
    if (n_) std::memcpy(p_, v.data(), n_ * sizeof(T));
    mark_initialised(p_, n_ * sizeof(T));
  }
  std::vector<T> read() const { return std::vector<T>(p_, p_ + n_); }

 private:
  std::size_t n_;
  T* p_;
};

namespace detail {

template <class... Params, std::size_t... I>
void invoke(void* kernel, const unsigned char* args, std::index_sequence<I...>) {
  constexpr std::size_t sizes[] = {sizeof(Params)..., 0};
  const auto at = [&](std::size_t i) {
    std::size_t offset = 0;
    for (std::size_t j = 0; j < i; ++j) offset += sizes[j];
    return args + offset;
  };
  const auto load = [&]<class T>(std::type_identity<T>, std::size_t i) {
    std::remove_const_t<T> value;
    std::memcpy(static_cast<void*>(&value), at(i), sizeof(value));
    return value;
  };
  reinterpret_cast<void (*)(Params...)>(kernel)(load(std::type_identity<Params>(), I)...);
}

template <class... Params>
void invoke_kernel(void* kernel, const unsigned char* args) {
  invoke<Params...>(kernel, args, std::index_sequence_for<Params...>());
}

template <class Param>
void keep(Launch& launch, const Param& value) {
  static_assert(std::is_trivially_copyable_v<Param>, "kernel arguments are copied as bytes");
  const auto* bytes = reinterpret_cast<const unsigned char*>(&value);
  launch.args.insert(launch.args.end(), bytes, bytes + sizeof(Param));
  launch.offset.push_back(launch.args.size());
}

}  // namespace detail
}  // namespace capo::shim

namespace capo::gpu {

struct Carve {
  int index = 0;
  template <class T>
  T* take(int n) {
    return static_cast<T*>(shim::dynamic_part(index, static_cast<std::size_t>(n) * sizeof(T)));
  }
};

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), std::int64_t blocks, int threads, std::size_t shared, void*,
            const Args&... args) {
  shim::Launch record{name, reinterpret_cast<void*>(kernel), shim::detail::invoke_kernel<Params...>,
                      blocks, threads, shared, {}, {0}};
  (shim::detail::keep<std::remove_const_t<Params>>(record, args), ...);
  shim::run(record);
}

}  // namespace capo::gpu

// ---------------------------------------------------------------- builtins
extern capo::shim::Coordinate threadIdx, blockIdx, blockDim, gridDim;

#define CAPO_SHIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CAPO_SHIM_HERE) { capo::shim::barrier(file, line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CAPO_SHIM_HERE) {
  capo::shim::collective(mask, "__syncwarp", 0, nullptr, [](void* const*, unsigned) {}, true, file, line);
}

namespace capo::shim::detail {

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

template <class T>
struct Shuffle {
  T in, out;
  int source;  // lane, or -1 when it is not there
};

template <class T>
T shuffle(unsigned mask, T value, int source, const char* kind, const char* file, int line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  if ((mask >> lane() & 1) && (source < 0 || source > 31 || !(mask >> source & 1)))
    fail(cat(kind, " reads lane ", source, ", which is not in the mask"), file, line);
  Shuffle<T> s{value, value, source};
  collective(mask, kind, sizeof(T), &s,
             [](void* const payload[32], unsigned m) {
               for (int i = 0; i < 32; ++i)
                 if (m >> i & 1) {
                   auto* to = static_cast<Shuffle<T>*>(payload[i]);
                   to->out = static_cast<Shuffle<T>*>(payload[to->source])->in;
                 }
             },
             false, file, line);
  return s.out;
}

}  // namespace capo::shim::detail

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CAPO_SHIM_HERE) {
  using namespace capo::shim::detail;
  return shuffle(mask, value, (lane() & -width) + (source & (width - 1)), "__shfl_sync", file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CAPO_SHIM_HERE) {
  using namespace capo::shim::detail;
  const int from = lane() ^ bits;
  return shuffle(mask, value, from / width > lane() / width ? lane() : from, "__shfl_xor_sync", file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, CAPO_SHIM_HERE) {
  using namespace capo::shim::detail;
  const bool inside = lane() % width + by < width;
  return shuffle(mask, value, inside ? lane() + by : lane(), "__shfl_down_sync", file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32, CAPO_SHIM_HERE) {
  using namespace capo::shim::detail;
  const bool inside = lane() % width - by >= 0;
  return shuffle(mask, value, inside ? lane() - by : lane(), "__shfl_up_sync", file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CAPO_SHIM_HERE) {
  unsigned both[2] = {predicate != 0, 0};
  capo::shim::collective(mask, "__ballot_sync", 0, both,
                         [](void* const payload[32], unsigned m) {
                           unsigned bits = 0;
                           for (int i = 0; i < 32; ++i)
                             if (m >> i & 1) bits |= static_cast<unsigned*>(payload[i])[0] << i;
                           for (int i = 0; i < 32; ++i)
                             if (m >> i & 1) static_cast<unsigned*>(payload[i])[1] = bits;
                         },
                         false, file, line);
  return both[1];
}
inline int __any_sync(unsigned mask, int predicate, CAPO_SHIM_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CAPO_SHIM_HERE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

// ---------------------------------------------------------------- vector types and intrinsics
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32);
}
template <class T>
T __ldg(const T* p) { return *p; }
inline void __trap(CAPO_SHIM_HERE) { capo::shim::fail("__trap()", file, line); }
