// Walking a strided loop nest over a range of row-major element indices. For ops/cpu files.
#pragma once

#include <capo/ops/cpu/kernel.h>

namespace {

// Calls row(y_index, count, offsets) for the pieces of rows of the innermost axis inside [begin, end); N operands, each
// with its strides and its offset of the piece.
template <int N, class F>
inline void walk_rows(int rank, const std::int64_t* shape, const std::int64_t* const (&strides)[N], std::int64_t begin,
                      std::int64_t end, const F& row) {
  std::int64_t index[8] = {}, rest = begin, offsets[N] = {};
  for (int i = rank - 1; i >= 0; --i) {
    index[i] = rest % shape[i];
    rest /= shape[i];
    for (int j = 0; j < N; ++j) offsets[j] += index[i] * strides[j][i];
  }
  const int last = rank - 1;
  for (std::int64_t k = begin; k < end;) {
    const std::int64_t count = lesser(shape[last] - index[last], end - k);
    row(k, count, offsets);
    k += count;
    index[last] += count;
    for (int j = 0; j < N; ++j) offsets[j] += count * strides[j][last];
    for (int i = last; i > 0 && index[i] == shape[i]; --i) {
      for (int j = 0; j < N; ++j) offsets[j] += strides[j][i - 1] - shape[i] * strides[j][i];
      index[i] = 0;
      ++index[i - 1];
    }
  }
}

// Two operands: row(y_index, count, offset_a, offset_b).
template <class F>
inline void for_rows(int rank, const std::int64_t* shape, const std::int64_t* sa, const std::int64_t* sb,
                     std::int64_t begin, std::int64_t end, const F& row) {
  const std::int64_t* const strides[] = {sa, sb};
  walk_rows(rank, shape, strides, begin, end,
            [&](std::int64_t k, std::int64_t n, const std::int64_t* at) { row(k, n, at[0], at[1]); });
}

}  // namespace
