// Calls of the CUDA runtime from host code of cuda/.
#pragma once

#include <capo/engine/error.h>

namespace capo::gpu {

// Throws capo::Error "what: name, text" unless `code` (a cudaError_t) says success, and clears the error.
void check_cuda(int code, const char* what);

}  // namespace capo::gpu
