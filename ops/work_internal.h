// Counting what a launch does, for profiles: the functions <kernel>_work in ops/*.cpp (Kernel::work in kernel.h).
#pragma once

#include <capo/engine/dtype.h>
#include <capo/engine/profile_internal.h>
#include <capo/ops/copy.h>

namespace capo {

inline std::int64_t bytes_of(DType t, std::int64_t n) { return n * static_cast<std::int64_t>(size_of(t)); }

// Elements of a loop nest that lie at different places: axes of stride 0 count once.
inline std::int64_t places(int rank, const std::int64_t* shape, const std::int64_t* strides) {
  std::int64_t n = 1;
  for (int i = 0; i < rank; ++i)
    if (strides[i] != 0) n *= shape[i];
  return n;
}

inline Work copy_work(const CopyArgs& p, std::int64_t items) {
  return Work::moved(bytes_of(p.src_dtype, places(p.rank, p.shape, p.ss)) + bytes_of(p.dst_dtype, items) +
                     (p.mask ? items : 0));
}

}  // namespace capo
