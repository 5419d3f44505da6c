// The only header that kernel files (cuda/*.cu) include besides their op's argument struct and functor headers.
//
// Kernels never see a Tensor and never write <<<>>>: launch() is the one way to start them, so that a host build can
// put its own behind it (a kernel is then a plain function of (args, thread coordinates)). Rules: block sizes are
// multiples of kWarp; shared memory only through CAPO_SHARED; no inline PTX here; every thread reaches every barrier.
#pragma once

#include <capo/engine/error.h>

#include <cuda_runtime.h>

#include <cstdint>

#define CAPO_SHARED(T, name, n) __shared__ T name[n]

namespace capo::gpu {

inline constexpr int kWarp = 32;
inline constexpr std::int64_t kMaxGrid = 1 << 16;  // blocks of a grid-stride loop: enough to fill any device

// Throws capo::Error naming the kernel when the launch failed. CAPO_SYNC=1 in the environment also waits for the
// kernel, so that a fault inside it is reported here and not at some later op.
void check_launch(const char* kernel, cudaStream_t stream);

// Starts kernel(args...) on stream: blocks x threads, `shared` bytes of dynamic shared memory.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), std::int64_t blocks, int threads, std::size_t shared,
            void* stream, const Args&... args) {
  const auto s = static_cast<cudaStream_t>(stream);
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, s>>>(args...);
  check_launch(name, s);
}

// Blocks for a grid-stride loop over n items.
inline std::int64_t blocks_for(std::int64_t n, int threads) {
  const std::int64_t blocks = (n + threads - 1) / threads;
  return blocks < kMaxGrid ? blocks : kMaxGrid;
}

}  // namespace capo::gpu
