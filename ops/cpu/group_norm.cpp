#include <capo/ops/cpu/half.h>
#include <capo/ops/cpu/kernel.h>
#include <capo/ops/cpu/math.h>
#include <capo/ops/cpu/wide.h>
#include <capo/ops/group_norm.h>
#include <capo/ops/unary_functors.h>

namespace {

using capo::Activation;
using capo::ChannelNormArgs;
using capo::ChannelNormBackwardArgs;
using capo::kChannelChunk;

constexpr std::int64_t kWidth = 1024;  // columns at a time: their tables stay on the stack, most nets' rows fit
constexpr std::int64_t kTable = kWidth + 16 * 5;  // tables that do not all begin in one set of the first cache
constexpr std::int64_t kJoin = 64;    // columns at a time when chunks are joined

// Where one chunk of rows lies.
struct Chunk {
  std::int64_t outer, first, count;  // first row of the chunk as a row of [outer * rows, columns]
};
template <class Args>
inline Chunk chunk_of(const Args& a, std::int64_t item) {
  const std::int64_t chunks = (a.rows + kChannelChunk - 1) / kChannelChunk, k = item % chunks;
  const std::int64_t outer = item / chunks;
  return {outer, outer * a.rows + k * kChannelChunk, lesser(kChannelChunk, a.rows - k * kChannelChunk)};
}
inline std::int64_t rows_in(std::int64_t chunk, std::int64_t rows) {
  return lesser(kChannelChunk, rows - chunk * kChannelChunk);
}

// table[j] = values[outer, group of column c + j]
template <class T>
inline void spread(const void* values, std::int64_t outer, std::int64_t groups, std::int64_t columns, std::int64_t c,
                   std::int64_t n, T* table) {
  const T* v = static_cast<const T*>(values) + outer * groups;
  const std::int64_t size = columns / groups;
  if (size == 1) {
    for (std::int64_t j = 0; j < n; ++j) table[j] = v[c + j];
    return;
  }
  for (std::int64_t j = 0, group = c / size; j < n; ++group) {
    const std::int64_t stop = lesser((group + 1) * size - c, n);
    for (; j < stop; ++j) table[j] = v[group];
  }
}

// What columns add up over the rows of a chunk stays in registers. In tables it takes half again as long from the
// second cache, and several times as long where a row and its tables lie 4 KiB apart. Rows are read one after the
// other: the processor's prefetching follows nothing else.
constexpr int kBlock = kRegister == 64 ? 8 : 4;  // registers of a sum

template <int n>
struct Count {
  constexpr operator int() const { return n; }
};
// Calls block(at, count, c) until every column was in one: columns [c, c + count registers) where at is wide, else
// [c, c + count). With `again` the last register's may be columns that had their turn.
template <class T, class F>
inline void by_columns(std::int64_t columns, bool again, F block) {
  constexpr std::int64_t width = kWide<T>;
  std::int64_t c = 0;
  for (; c + kBlock * width <= columns; c += kBlock * width) block(wide, Count<kBlock>(), c);
  for (; c + 2 * width <= columns; c += 2 * width) block(wide, Count<2>(), c);
  for (; c + width <= columns; c += width) block(wide, Count<1>(), c);
  if (c < columns && again && columns >= width) return block(wide, Count<1>(), columns - width);
  for (; c + kBlock <= columns; c += kBlock) block(one, Count<kBlock>(), c);
  for (; c < columns; ++c) block(one, Count<1>(), c);
}

// Whether rows come whole and sums stay in memory: of wide rows from afar, a few columns of each are as many places at
// once, of which the processor follows few (half the rate in ResNet-50). The bits are the same.
template <class T, class Args>
inline bool row_by_row(const Args& a) {
  constexpr std::int64_t kInL2 = std::int64_t{1} << 20;
  return a.columns > kBlock * kWide<T> && a.rows * a.columns * static_cast<std::int64_t>(sizeof(T)) > kInL2;
}

template <class T>
void partial_of_rows(const ChannelNormArgs& a, std::int64_t item) {
  const Chunk k = chunk_of(a, item);
  const T inverse = T(1) / static_cast<T>(k.count);
  for (std::int64_t c = 0; c < a.columns; c += kWidth) {
    const std::int64_t n = lesser(kWidth, a.columns - c);
    alignas(64) T first[kTable], rest[kTable], m2[kTable], buffer[kTable];
    const auto row_of = [&](std::int64_t r, T* to) {
      return read_row(a.x, a.dtype, (k.first + r) * a.columns + c, n, to);
    };
    const T* start = row_of(0, first);
    if (start != first)
      for (std::int64_t j = 0; j < n; ++j) first[j] = start[j];
    for (std::int64_t j = 0; j < n; ++j) rest[j] = m2[j] = T(0);
    for (std::int64_t r = 1; r < k.count; ++r) {
      const T* row = row_of(r, buffer);
#pragma omp simd
      for (std::int64_t j = 0; j < n; ++j) {
        const T d = row[j] - first[j];
        rest[j] += d;
        m2[j] += d * d;
      }
    }
    T* out_mean = static_cast<T*>(a.part_mean) + item * a.columns + c;
    T* out_m2 = static_cast<T*>(a.part_m2) + item * a.columns + c;
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) {
      out_mean[j] = first[j] + rest[j] * inverse;
      out_m2[j] = greater(m2[j] - rest[j] * rest[j] * inverse, T(0));
    }
  }
}

template <class T>
void partial(const ChannelNormArgs& a, std::int64_t item) {
  if (row_by_row<T>(a)) return partial_of_rows<T>(a, item);
  const Chunk k = chunk_of(a, item);
  const T inverse = T(1) / static_cast<T>(k.count);
  by_columns<T>(a.columns, true, [&](auto at, auto count, std::int64_t c) {
    using V = decltype(at(static_cast<const T*>(nullptr)));
    constexpr std::int64_t width = sizeof(V) / sizeof(T);
    alignas(64) T buffer[count * width];
    const auto row_of = [&](std::int64_t r) {
      return read_row(a.x, a.dtype, (k.first + r) * a.columns + c, count * width, buffer);
    };
    // Deviations from the first row, in one pass: (first - mean)^2 <= (count - 1) m2, so at most 64 times the rounding.
    V first[count], rest[count] = {}, m2[count] = {};
    const T* start = row_of(0);
    for (int j = 0; j < count; ++j) first[j] = at(start + j * width);
    for (std::int64_t r = 1; r < k.count; ++r) {
      const T* row = row_of(r);
      for (int j = 0; j < count; ++j) {
        const V d = at(row + j * width) - first[j];
        rest[j] += d;
        m2[j] += d * d;
      }
    }
    T* out_mean = static_cast<T*>(a.part_mean) + item * a.columns + c;
    T* out_m2 = static_cast<T*>(a.part_m2) + item * a.columns + c;
    for (int j = 0; j < count; ++j) {
      const V zero = {}, sum = m2[j] - rest[j] * rest[j] * inverse;
      put(out_mean + j * width, V(first[j] + rest[j] * inverse));
      put(out_m2 + j * width, V(sum < zero ? zero : sum));
    }
  });
}

// Of `groups` groups of size columns, how many are joined at once.
inline std::int64_t groups_together(std::int64_t size, std::int64_t groups) {
  return size < kJoin ? lesser(kJoin / size, groups) : 1;
}

// Joins the chunks of groups [begin, end): Chan, Golub and LeVeque's update with all counts known, in f64.
template <class T>
void moments(const ChannelNormArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t chunks = (a.rows + kChannelChunk - 1) / kChannelChunk, size = a.columns / a.groups;
  const double count = static_cast<double>(a.rows) * static_cast<double>(size);
  const double inverse = count > 0 ? 1.0 / count : 0.0;
  const auto store = [&](std::int64_t item, double mean, double m2) {
    const double var = m2 * inverse;
    static_cast<T*>(a.mean)[item] = static_cast<T>(mean);
    static_cast<T*>(a.var)[item] = static_cast<T>(var);
    static_cast<T*>(a.rstd)[item] = static_cast<T>(1.0 / __builtin_sqrt(var + a.eps));
  };
  const auto part = [&](const void* values, std::int64_t item, std::int64_t chunk) {
    return static_cast<const T*>(values) + (item / a.groups * chunks + chunk) * a.columns + item % a.groups * size;
  };
  for (std::int64_t item = begin; item < end;) {
    // Whole groups: several of few columns, or one in blocks of columns.
    const std::int64_t together = groups_together(size, lesser(end - item, a.groups - item % a.groups));
    const std::int64_t width = together * size;
    double mean[kJoin], m2[kJoin], centre[kJoin];  // of each group; and of a column's group
    for (int g = 0; g < kJoin; ++g) mean[g] = m2[g] = 0;
    const auto add_up = [&](double* total, auto add) {  // add(sums, chunk, column, n)
      for (std::int64_t c = 0; c < width; c += kJoin) {
        const std::int64_t n = lesser(kJoin, width - c);
        double sum[kJoin];
        for (int j = 0; j < kJoin; ++j) sum[j] = 0;
        for (std::int64_t k = 0; k < chunks; ++k) add(sum, k, c, n);
        for (std::int64_t j = 0; j < n; ++j) total[together == 1 ? 0 : j / size] += sum[j];
      }
    };
    add_up(mean, [&](double* sum, std::int64_t k, std::int64_t c, std::int64_t n) {
      const T* pm = part(a.part_mean, item, k) + c;
      const double rows = static_cast<double>(rows_in(k, a.rows));
#pragma omp simd
      for (std::int64_t j = 0; j < n; ++j) sum[j] += rows * static_cast<double>(pm[j]);
    });
    for (std::int64_t g = 0; g < together; ++g) mean[g] *= inverse;
    for (std::int64_t j = 0; j < kJoin; ++j) centre[j] = mean[together == 1 ? 0 : lesser(j / size, together - 1)];
    add_up(m2, [&](double* sum, std::int64_t k, std::int64_t c, std::int64_t n) {
      const T *pm = part(a.part_mean, item, k) + c, *ps = part(a.part_m2, item, k) + c;
      const double rows = static_cast<double>(rows_in(k, a.rows));
#pragma omp simd
      for (std::int64_t j = 0; j < n; ++j) {
        const double d = static_cast<double>(pm[j]) - centre[j];
        sum[j] += static_cast<double>(ps[j]) + rows * d * d;
      }
    });
    for (std::int64_t g = 0; g < together; ++g) store(item + g, mean[g], m2[g]);
    item += together;
  }
}

struct Same {  // no activation
  template <class T>
  static inline T f(T z, T, T) { return z; }
};

// Calls run with the functor of an activation; the op lets no other one pass.
template <class Run>
inline void with_activation(Activation activation, double below_zero, double ceiling, const Run& run) {
  switch (activation) {
    case Activation::relu: return ceiling > 0 ? run(Clamp{}) : below_zero == 0 ? run(Relu{}) : run(LeakyRelu{});
    case Activation::silu: return run(Silu{});
    default: return run(Same{});
  }
}

// z = (x - mean) scale + shift of n columns from column c.
template <class T, class Args>
inline void affine_tables(const Args& a, std::int64_t outer, std::int64_t c, std::int64_t n, T* mean, T* scale,
                          T* shift) {
  const T* w = static_cast<const T*>(a.weight);
  const T* b = static_cast<const T*>(a.bias);
  spread(a.mean, outer, a.groups, a.columns, c, n, mean);
  spread(a.rstd, outer, a.groups, a.columns, c, n, scale);
  for (std::int64_t j = 0; j < n; ++j) {
    scale[j] = w ? scale[j] * w[c + j] : scale[j];
    shift[j] = b ? b[c + j] : T(0);
  }
}

template <class T, class F>
void apply(const ChannelNormArgs& a, std::int64_t item) {
  const Chunk k = chunk_of(a, item);
  const T p = static_cast<T>(a.below_zero), q = static_cast<T>(a.ceiling);
  const bool streamed = streams(a.dtype, a.outer * a.rows * a.columns);
  for (std::int64_t c = 0; c < a.columns; c += kWidth) {
    const std::int64_t n = lesser(kWidth, a.columns - c);
    alignas(64) T mean[kTable], scale[kTable], shift[kTable], buffer[2][kTable];
    affine_tables(a, k.outer, c, n, mean, scale, shift);
    for (std::int64_t r = k.first; r < k.first + k.count; ++r) {
      const std::int64_t at = r * a.columns + c;
      const T* x = read_row(a.x, a.dtype, at, n, buffer[0]);
      const T* s = a.residual ? read_row(a.residual, a.dtype, at, n, buffer[1]) : nullptr;
      write_row(a.y, a.dtype, at, n, buffer[0], streamed, [&](std::int64_t from, std::int64_t to, T* y) {
        if (s) {
#pragma omp simd
          for (std::int64_t j = from; j < to; ++j)
            y[j - from] = F::f((x[j] - mean[j]) * scale[j] + shift[j] + s[j], p, q);
        } else {
#pragma omp simd
          for (std::int64_t j = from; j < to; ++j) y[j - from] = F::f((x[j] - mean[j]) * scale[j] + shift[j], p, q);
        }
      });
    }
  }
  end_stream(streamed);
}

// dz of n columns from element `at` on, in a row of its own: what is summed is rounded as the composite's dz is.
template <class T>
inline const T* dz_row(Same, const ChannelNormBackwardArgs& a, std::int64_t at, std::int64_t n, const T*, const T*,
                       const T*, T* buffer) {
  return read_row(a.dy, a.dtype, at, n, buffer);
}
template <class T, class F>
inline const T* dz_row(F, const ChannelNormBackwardArgs& a, std::int64_t at, std::int64_t n, const T* mean,
                       const T* scale, const T* shift, T* buffer) {
  const T p = static_cast<T>(a.below_zero), q = static_cast<T>(a.ceiling);
  T other[2][kWidth];
  const T* dy = read_row(a.dy, a.dtype, at, n, buffer);
  T* dz = a.dz ? open_row(a.dz, a.dtype, at, buffer) : buffer;
  if (a.y) {
    const T* y = read_row(a.y, a.dtype, at, n, other[0]);
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) dz[j] = dy[j] * F::df(y[j], y[j], p, q);
    if (a.dz) close_row(a.dz, a.dtype, at, n, dz);
    return dz;
  }
  const T* x = read_row(a.x, a.dtype, at, n, other[0]);
  if (a.residual) {
    const T* s = read_row(a.residual, a.dtype, at, n, other[1]);
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) {
      const T z = (x[j] - mean[j]) * scale[j] + shift[j] + s[j];
      dz[j] = dy[j] * F::df(z, z, p, q);
    }
  } else {
#pragma omp simd
    for (std::int64_t j = 0; j < n; ++j) {
      const T z = (x[j] - mean[j]) * scale[j] + shift[j];
      dz[j] = dy[j] * F::df(z, z, p, q);
    }
  }
  if (a.dz) close_row(a.dz, a.dtype, at, n, dz);
  return dz;
}
inline bool remakes_z(const ChannelNormBackwardArgs& a) { return a.activation != Activation::none && !a.y; }

template <class T, class F>
void dots_of_rows(const ChannelNormBackwardArgs& a, std::int64_t item) {
  const Chunk k = chunk_of(a, item);
  for (std::int64_t c = 0; c < a.columns; c += kWidth) {
    const std::int64_t n = lesser(kWidth, a.columns - c);
    alignas(64) T mean[kTable], scale[kTable], shift[kTable], buffer[kTable], wide_x[kTable], sum[kTable],
        dot[kTable];
    for (std::int64_t j = 0; j < n; ++j) sum[j] = dot[j] = T(0);
    if (remakes_z(a))
      affine_tables(a, k.outer, c, n, mean, scale, shift);
    else if (a.part_dyx)
      spread(a.mean, k.outer, a.groups, a.columns, c, n, mean);
    for (std::int64_t r = k.first; r < k.first + k.count; ++r) {
      const T* dz = dz_row(F{}, a, r * a.columns + c, n, mean, scale, shift, buffer);
      if (a.part_dyx) {
        const T* x = read_row(a.x, a.dtype, r * a.columns + c, n, wide_x);
#pragma omp simd
        for (std::int64_t j = 0; j < n; ++j) {
          sum[j] += dz[j];
          dot[j] += dz[j] * (x[j] - mean[j]);
        }
      } else {
#pragma omp simd
        for (std::int64_t j = 0; j < n; ++j) sum[j] += dz[j];
      }
    }
    T* out = static_cast<T*>(a.part_dy) + item * a.columns + c;
    for (std::int64_t j = 0; j < n; ++j) out[j] = sum[j];
    if (!a.part_dyx) continue;
    out = static_cast<T*>(a.part_dyx) + item * a.columns + c;
    for (std::int64_t j = 0; j < n; ++j) out[j] = dot[j];
  }
}

template <class T, class F>
void dots(const ChannelNormBackwardArgs& a, std::int64_t item) {
  if (row_by_row<T>(a)) return dots_of_rows<T, F>(a, item);
  const Chunk k = chunk_of(a, item);
  alignas(64) T mean[kTable], scale[kTable], shift[kTable];
  // dz may lie where dy does: it is made once.
  for (std::int64_t from = 0; from < a.columns; from += kWidth) {
    const std::int64_t n = lesser(kWidth, a.columns - from);
    if (remakes_z(a))
      affine_tables(a, k.outer, from, n, mean, scale, shift);
    else if (a.part_dyx)
      spread(a.mean, k.outer, a.groups, a.columns, from, n, mean);
    by_columns<T>(n, !a.dz, [&](auto at, auto count, std::int64_t c) {
      using V = decltype(at(static_cast<const T*>(nullptr)));
      constexpr std::int64_t width = sizeof(V) / sizeof(T);
      alignas(64) T buffer[2][count * width];
      V sum[count] = {}, dot[count] = {}, m[count];
      for (int j = 0; j < count; ++j) m[j] = at(mean + c + j * width);
      for (std::int64_t r = k.first; r < k.first + k.count; ++r) {
        const std::int64_t place = r * a.columns + from + c;
        const T* dz = dz_row(F{}, a, place, count * width, mean + c, scale + c, shift + c, buffer[0]);
        if (a.part_dyx) {
          const T* x = read_row(a.x, a.dtype, place, count * width, buffer[1]);
          for (int j = 0; j < count; ++j) {
            const V v = at(dz + j * width);
            sum[j] += v;
            dot[j] += v * (at(x + j * width) - m[j]);
          }
        } else {
          for (int j = 0; j < count; ++j) sum[j] += at(dz + j * width);
        }
      }
      const std::int64_t place = item * a.columns + from + c;
      for (int j = 0; j < count; ++j) {
        put(static_cast<T*>(a.part_dy) + place + j * width, sum[j]);
        if (a.part_dyx) put(static_cast<T*>(a.part_dyx) + place + j * width, dot[j]);
      }
    });
  }
}

template <class T>
void sums(const ChannelNormBackwardArgs& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t chunks = (a.rows + kChannelChunk - 1) / kChannelChunk, size = a.columns / a.groups;
  const double count = static_cast<double>(a.rows) * static_cast<double>(size);
  const double inverse = count > 0 ? 1.0 / count : 0.0;
  const T* w = static_cast<const T*>(a.weight);
  for (std::int64_t item = begin; item < end;) {
    // Whole groups: several of one column, or one of several columns in blocks.
    const std::int64_t outer = item / a.groups,
                       together = size == 1 ? lesser(lesser(kJoin, end - item), a.groups - item % a.groups) : 1;
    double total = 0, along = 0;
    for (std::int64_t c = 0; c < together * size; c += kJoin) {
      const std::int64_t n = lesser(kJoin, together * size - c), column = item % a.groups * size + c;
      double s[kJoin], d[kJoin];
      for (int j = 0; j < kJoin; ++j) s[j] = d[j] = 0;
      for (std::int64_t k = 0; k < chunks; ++k) {
        const std::int64_t at = (outer * chunks + k) * a.columns + column;
        const T* ps = static_cast<const T*>(a.part_dy) + at;
#pragma omp simd
        for (std::int64_t j = 0; j < n; ++j) s[j] += static_cast<double>(ps[j]);
        if (!a.part_dyx) continue;
        const T* pd = static_cast<const T*>(a.part_dyx) + at;
#pragma omp simd
        for (std::int64_t j = 0; j < n; ++j) d[j] += static_cast<double>(pd[j]);
      }
      for (std::int64_t j = 0; j < n; ++j) {
        const std::int64_t group = size == 1 ? item + j : item;
        const double scale = w ? static_cast<double>(w[column + j]) : 1.0;
        const double rstd = a.rstd ? static_cast<double>(static_cast<const T*>(a.rstd)[group]) : 0.0;
        if (a.dweight) static_cast<T*>(a.dweight)[outer * a.columns + column + j] = static_cast<T>(d[j] * rstd);
        if (a.dbias) static_cast<T*>(a.dbias)[outer * a.columns + column + j] = static_cast<T>(s[j]);
        total = (size == 1 ? 0.0 : total) + scale * s[j];
        along = (size == 1 ? 0.0 : along) + scale * d[j];
        if (!a.shift || (size > 1 && c + j + 1 < size)) continue;
        static_cast<T*>(a.shift)[group] = static_cast<T>(total * inverse);
        static_cast<T*>(a.slope)[group] = static_cast<T>(along * rstd * rstd * inverse);
      }
    }
    item += together;
  }
}

template <class T, class F>
void dx_rows(const ChannelNormBackwardArgs& a, std::int64_t item) {
  const Chunk k = chunk_of(a, item);
  const T* w = static_cast<const T*>(a.weight);
  const bool streamed = streams(a.dtype, a.outer * a.rows * a.columns);
  for (std::int64_t c = 0; c < a.columns; c += kWidth) {
    const std::int64_t n = lesser(kWidth, a.columns - c);
    alignas(64) T mean[kTable], rstd[kTable], scale[kTable], bias[kTable], shift[kTable], slope[kTable], buffer[kTable],
        wide_x[kTable], result[kTable];
    if (remakes_z(a)) affine_tables(a, k.outer, c, n, mean, scale, bias);
    if (a.dx) {
      spread(a.rstd, k.outer, a.groups, a.columns, c, n, rstd);
      for (std::int64_t j = 0; j < n; ++j) scale[j] = w ? rstd[j] * w[c + j] : rstd[j];
    }
    if (a.shift) {  // else the statistics are constants
      spread(a.mean, k.outer, a.groups, a.columns, c, n, mean);
      spread(a.shift, k.outer, a.groups, a.columns, c, n, shift);
      spread(a.slope, k.outer, a.groups, a.columns, c, n, slope);
      for (std::int64_t j = 0; j < n; ++j) {
        shift[j] *= rstd[j];
        slope[j] *= rstd[j];
      }
    }
    for (std::int64_t r = k.first; r < k.first + k.count; ++r) {
      const T* dz = dz_row(F{}, a, r * a.columns + c, n, mean, scale, bias, buffer);
      if (!a.dx) continue;
      const T* x = a.shift ? read_row(a.x, a.dtype, r * a.columns + c, n, wide_x) : nullptr;
      write_row(a.dx, a.dtype, r * a.columns + c, n, result, streamed, [&](std::int64_t from, std::int64_t to, T* dx) {
        if (x) {
#pragma omp simd
          for (std::int64_t j = from; j < to; ++j)
            dx[j - from] = dz[j] * scale[j] - shift[j] - (x[j] - mean[j]) * slope[j];
        } else {
#pragma omp simd
          for (std::int64_t j = from; j < to; ++j) dx[j - from] = dz[j] * scale[j];
        }
      });
    }
  }
  end_stream(streamed);
}

// Calls run(functor, T(), item) for items [begin, end) of a kernel whose loops hold the activation.
template <class Args, class Run>
inline void each(const Args& a, std::int64_t begin, std::int64_t end, const Run& run) {
  with_activation(a.activation, a.below_zero, a.ceiling, [&](auto f) {
    for (std::int64_t i = begin; i < end; ++i) a.dtype == capo::DType::f64 ? run(f, 0.0, i) : run(f, 0.0f, i);
  });
}

// Calls f(chunk, chunk's end, group, group's end) for samples [begin, end), one after the other.
template <class Args, class F>
inline void samples(const Args& a, std::int64_t begin, std::int64_t end, F f) {
  const std::int64_t chunks = (a.rows + kChannelChunk - 1) / kChannelChunk;
  for (std::int64_t i = begin; i < end; ++i) f(i * chunks, (i + 1) * chunks, i * a.groups, (i + 1) * a.groups);
}

}  // namespace

CAPO_CPU_KERNEL(group_norm_partial, capo::ChannelNormArgs) {
  for (std::int64_t i = begin; i < end; ++i)
    args.dtype == capo::DType::f64 ? partial<double>(args, i) : partial<float>(args, i);
}
CAPO_CPU_KERNEL(group_norm_moments, capo::ChannelNormArgs) {
  args.dtype == capo::DType::f64 ? moments<double>(args, begin, end) : moments<float>(args, begin, end);
}
CAPO_CPU_KERNEL(group_norm_apply, capo::ChannelNormArgs) {
  each(args, begin, end, [&](auto f, auto t, std::int64_t i) { apply<decltype(t), decltype(f)>(args, i); });
}
CAPO_CPU_KERNEL(group_norm_dots, capo::ChannelNormBackwardArgs) {
  each(args, begin, end, [&](auto f, auto t, std::int64_t i) { dots<decltype(t), decltype(f)>(args, i); });
}
CAPO_CPU_KERNEL(group_norm_sums, capo::ChannelNormBackwardArgs) {
  args.dtype == capo::DType::f64 ? sums<double>(args, begin, end) : sums<float>(args, begin, end);
}
CAPO_CPU_KERNEL(group_norm_dx, capo::ChannelNormBackwardArgs) {
  each(args, begin, end, [&](auto f, auto t, std::int64_t i) { dx_rows<decltype(t), decltype(f)>(args, i); });
}

// The three steps of a sample while it lies in the second cache.
CAPO_CPU_KERNEL(group_norm_sample, capo::ChannelNormArgs) {
  samples(args, begin, end, [&](std::int64_t chunk, std::int64_t chunks, std::int64_t group, std::int64_t groups) {
    capo::kernels::CAPO_JOIN(group_norm_partial, CAPO_ISA)(args, chunk, chunks);
    capo::kernels::CAPO_JOIN(group_norm_moments, CAPO_ISA)(args, group, groups);
    capo::kernels::CAPO_JOIN(group_norm_apply, CAPO_ISA)(args, chunk, chunks);
  });
}
CAPO_CPU_KERNEL(group_norm_sample_backward, capo::ChannelNormBackwardArgs) {
  samples(args, begin, end, [&](std::int64_t chunk, std::int64_t chunks, std::int64_t group, std::int64_t groups) {
    capo::kernels::CAPO_JOIN(group_norm_dots, CAPO_ISA)(args, chunk, chunks);
    capo::kernels::CAPO_JOIN(group_norm_sums, CAPO_ISA)(args, group, groups);
    capo::kernels::CAPO_JOIN(group_norm_dx, CAPO_ISA)(args, chunk, chunks);
  });
}
