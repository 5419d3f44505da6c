// Walking a strided loop nest over a range of row-major element indices. For ops/cpu files.
#pragma once

#include <capo/ops/cpu/kernel.h>

namespace {

// Calls row(y_index, count, offset_a, offset_b) for the pieces of rows of the innermost axis inside [begin, end).
template <class F>
inline void for_rows(int rank, const std::int64_t* shape, const std::int64_t* sa, const std::int64_t* sb,
                     std::int64_t begin, std::int64_t end, const F& row) {
  std::int64_t index[8] = {}, rest = begin, oa = 0, ob = 0;
  for (int i = rank - 1; i >= 0; --i) {
    index[i] = rest % shape[i];
    rest /= shape[i];
    oa += index[i] * sa[i];
    ob += index[i] * sb[i];
  }
  const int last = rank - 1;
  for (std::int64_t k = begin; k < end;) {
    const std::int64_t count = lesser(shape[last] - index[last], end - k);
    row(k, count, oa, ob);
    k += count;
    index[last] += count;
    oa += count * sa[last];
    ob += count * sb[last];
    for (int i = last; i > 0 && index[i] == shape[i]; --i) {
      oa += sa[i - 1] - shape[i] * sa[i];
      ob += sb[i - 1] - shape[i] * sb[i];
      index[i] = 0;
      ++index[i - 1];
    }
  }
}

}  // namespace
