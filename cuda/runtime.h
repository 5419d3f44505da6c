// Calls of the CUDA runtime from host code of cuda/.
#pragma once

#include <capo/engine/error.h>

#include <cstddef>

namespace capo::gpu {

// Scratch of each stream for libraries: what cuBLAS recommends for Hopper. Made at first use by the caching allocator
// and counted as DeviceMemory::workspace. All ask for this size: one that grew would leave its memory to tensors while
// captured graphs still write there.
inline constexpr std::size_t kWorkspace = std::size_t{32} << 20;

// Throws capo::Error "what: name, text" unless `code` (a cudaError_t) says success, and clears the error.
void check_cuda(int code, const char* what);

}  // namespace capo::gpu
