// How an op reaches its kernels: one constant table of typed function pointers per kernel, indexed by device.
//
// A kernel is a plain function of (argument struct, range): it never sees a Tensor. On the CPU it is built once per
// instruction set (ops/cpu/<stem>.cpp, compiled as v2, v3 and v4) and called for chunks [begin, end) of its work items
// by parallel_for; the chunk size never depends on the thread count, so neither do the bits. On CUDA it is one launch
// over all items on a stream.
#pragma once

#include <capo/engine/cpu.h>
#include <capo/engine/device.h>
#include <capo/engine/error.h>
#include <capo/engine/profile_internal.h>
#include <capo/engine/threads.h>

#include <cstdint>

namespace capo {

template <class Args>
struct Kernel {
  using Cpu = void (*)(const Args& args, std::int64_t begin, std::int64_t end);
  using Cuda = void (*)(const Args& args, std::int64_t items, void* stream);
  const char* name;
  Cpu cpu[3];  // by Isa
  Cuda cuda;   // null when this build has none
  Work (*work)(const Args& args, std::int64_t items) = nullptr;  // what a launch does, for profiles; null: unknown
};

namespace detail {
[[noreturn]] void fail_no_kernel(const char* name, Device device);
void* current_stream(Device device);
}  // namespace detail

// Runs a kernel over `items` work items in chunks of `grain`; does nothing on the meta device. Never falls back to
// another device.
template <class Args>
void launch(const Kernel<Args>& kernel, Device device, const Args& args, std::int64_t items, std::int64_t grain) {
  if (device.is_meta() || items <= 0) return;
  if (device.is_cpu()) {
    const auto f = kernel.cpu[static_cast<int>(isa())];
    if (detail::profiling()) {
      detail::TimedLaunch timed(kernel.name, device, kernel.work ? kernel.work(args, items) : Work{});
      parallel_for(items, grain, [&](std::int64_t begin, std::int64_t end) {
        const detail::TimedChunk part(timed);
        f(args, begin, end);
      });
      return;
    }
    parallel_for(items, grain, [&](std::int64_t begin, std::int64_t end) { f(args, begin, end); });
    return;
  }
  if (!kernel.cuda) detail::fail_no_kernel(kernel.name, device);
  void* const stream = detail::current_stream(device);
  if (detail::profiling()) {
    const detail::TimedLaunch timed(kernel.name, device, kernel.work ? kernel.work(args, items) : Work{}, stream);
    kernel.cuda(args, items, stream);
    return;
  }
  kernel.cuda(args, items, stream);
}

}  // namespace capo

#if defined(CAPO_ONE_ISA)  // not an x86-64 build: one portable set
#define CAPO_CPU_SLOTS(name) {name##_v2, name##_v2, name##_v2}
#else
#define CAPO_CPU_SLOTS(name) {name##_v2, name##_v3, name##_v4}
#endif

// CAPO_KERNEL(relu_forward, UnaryArgs) at namespace capo scope of an op's .cpp declares the kernel's builds and the
// table `relu_forward`. CAPO_KERNEL_CUDA also fills the CUDA slot (a missing definition is then a link error). A last
// argument is the table's `work`: CAPO_KERNEL(relu_forward, UnaryArgs, unary_work).
#define CAPO_DECLARE_CPU_KERNEL(name, Args)                               \
  namespace kernels {                                                     \
  void name##_v2(const Args& args, std::int64_t begin, std::int64_t end); \
  void name##_v3(const Args& args, std::int64_t begin, std::int64_t end); \
  void name##_v4(const Args& args, std::int64_t begin, std::int64_t end); \
  }
#define CAPO_KERNEL(name, Args, ...)  \
  CAPO_DECLARE_CPU_KERNEL(name, Args) \
  namespace kernels {                 \
  static constexpr Kernel<Args> name{#name, CAPO_CPU_SLOTS(name), nullptr __VA_OPT__(, ) __VA_ARGS__}; \
  }
#if defined(CAPO_WITH_CUDA)
#define CAPO_KERNEL_CUDA(name, Args, ...)                                  \
  CAPO_DECLARE_CPU_KERNEL(name, Args)                                      \
  namespace kernels {                                                      \
  void name##_cuda(const Args& args, std::int64_t items, void* stream);    \
  static constexpr Kernel<Args> name{#name, CAPO_CPU_SLOTS(name), name##_cuda __VA_OPT__(, ) __VA_ARGS__}; \
  }
#else
#define CAPO_KERNEL_CUDA(name, Args, ...) CAPO_KERNEL(name, Args __VA_OPT__(, ) __VA_ARGS__)
#endif

// A kernel that CUDA alone has, where the CPU's plan is another one: the op branches by device before it launches.
#if defined(CAPO_WITH_CUDA)
#define CAPO_KERNEL_CUDA_ONLY(name, Args, ...)                          \
  namespace kernels {                                                   \
  void name##_cuda(const Args& args, std::int64_t items, void* stream); \
  static constexpr Kernel<Args> name{#name, {}, name##_cuda __VA_OPT__(, ) __VA_ARGS__}; \
  }
#else
#define CAPO_KERNEL_CUDA_ONLY(name, Args, ...)           \
  namespace kernels {                                    \
  static constexpr Kernel<Args> name{#name, {}, nullptr __VA_OPT__(, ) __VA_ARGS__}; \
  }
#endif
