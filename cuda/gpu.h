// The only header that kernel files (cuda/*.cu) include besides ptx.h, their op's argument struct and functor headers.
//
// Kernels never see a Tensor and never write <<<>>>: launch() is the one way to start them, so that a host build can
// put its own behind it: -DCAPO_HOST_SHIM=<header> compiles the same file with a plain C++ compiler (tests/shim,
// docs/cuda.md). Rules: blocks are multiples of kWarp threads; shared memory only through CAPO_SHARED and
// CAPO_SHARED_DYNAMIC; PTX only in ptx.h; every thread reaches every barrier and every lane of a mask every shuffle.
#pragma once

#include <capo/engine/error.h>

#include <cstdint>

#if defined(CAPO_HOST_SHIM)
#include CAPO_HOST_SHIM
#else

#include <cuda_runtime.h>

// CAPO_SHARED(float, tile, 32 * 33): an array of this block, uninitialised.
#define CAPO_SHARED(T, name, n) __shared__ T name[n]
// CAPO_SHARED_DYNAMIC(carve); float* row = carve.take<float>(columns): parts of the launch's dynamic shared memory,
// taken by every thread in the same order. The host adds up the same parts with shared_bytes<float>(columns) + ...
#define CAPO_SHARED_DYNAMIC(name)                            \
  extern __shared__ __align__(16) unsigned char capo_dynamic[]; \
  capo::gpu::Carve name { capo_dynamic }

namespace capo::gpu {

struct Carve {
  unsigned char* at;
  template <class T>
  __device__ T* take(int n) {
    T* const part = reinterpret_cast<T*>(at);
    at += (n * sizeof(T) + 15) / 16 * 16;
    return part;
  }
};

// Throws capo::Error naming the kernel when the launch failed. CAPO_SYNC=1 in the environment also waits for the
// kernel, so that a fault inside it is reported here and not at some later op.
void check_launch(const char* kernel, cudaStream_t stream);
// Lets a kernel have more than 48 KiB of dynamic shared memory on the current device: all that its static part leaves.
void allow_shared(const void* kernel);

// Starts kernel(args...) on stream: blocks x threads, `shared` bytes of dynamic shared memory. Arguments are copied
// bytes: what changes from step to step goes through a pointer, or a captured graph replays the old value.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), std::int64_t blocks, int threads, std::size_t shared,
            void* stream, const Args&... args) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (shared > 48 * 1024) allow_shared(reinterpret_cast<const void*>(kernel));
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, s>>>(args...);
  check_launch(name, s);
}

}  // namespace capo::gpu

#endif

namespace capo::gpu {

inline constexpr int kWarp = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;
inline constexpr std::int64_t kMaxGrid = 1 << 16;  // blocks of a grid-stride loop: enough to fill any device

// Blocks for a grid-stride loop over n items.
inline std::int64_t blocks_for(std::int64_t n, int threads) {
  const std::int64_t blocks = (n + threads - 1) / threads;
  return blocks < kMaxGrid ? blocks : kMaxGrid;
}

// Dynamic shared memory of one carved part.
template <class T>
constexpr std::size_t shared_bytes(std::size_t n) {
  return (n * sizeof(T) + 15) / 16 * 16;
}

}  // namespace capo::gpu
