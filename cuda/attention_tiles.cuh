// What the tensor-core kernels of attention share: a block of four warps owns 64 rows (queries, or keys for their
// gradients), 16 to a warp, and tiles of the others pass by in shared memory, twice buffered. Scores and probabilities
// stay in registers: the sums of one product are the A fragments of the next (FlashAttention-2, Dao 2023).
#pragma once

#include <capo/cuda/mma.cuh>
#include <capo/ops/attention.h>

namespace capo::gpu::attention {

constexpr int kOwn = 64;        // rows of a block
constexpr int kThreads = 128;   // four warps of 16 rows
constexpr int kMostHead = 256;  // the widest bucket
constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// Of a shared row of a head, in elements: 16-byte aligned, and the eight rows of an 8x8 matrix in distinct banks.
template <int kHead>
constexpr int kStride = kHead + 8;

// Rows that pass by in a step: half as many where the head leaves little room in registers and shared memory.
template <int kHead>
constexpr int kStep = kHead > 128 ? 32 : 64;

// Blocks that an SM's registers must hold at once.
template <int kHead>
constexpr int kBlocks = kHead > 64 ? 2 : 3;

// Vectors of one (b, h): rows of `width` elements, `stride` apart. wide: their packs of eight are 16-byte aligned.
template <class T>
struct Rows {
  const T* p;
  std::int64_t stride;
  int rows, width;
  bool wide;
};

// Starts the copy of rows first .. +kRows to shared [kRows][kStride]; zeros fill up both. There for all after
// cp_async_wait and a barrier.
template <int kHead, int kRows, class T>
__device__ inline void load_tile(T* shared, const Rows<T>& x, int first) {
  constexpr int kLanes = kHead % 64 == 0 ? 8 : 4;  // of a row, eight elements each
  constexpr int kAtOnce = kThreads / kLanes;
  static_assert(kRows % kAtOnce == 0 && kHead % (8 * kLanes) == 0);
  const int me = static_cast<int>(threadIdx.x), column = me % kLanes * 8;
#pragma unroll
  for (int pass = 0; pass < kRows / kAtOnce; ++pass) {
    const int r = me / kLanes + pass * kAtOnce;
    const int width = first + r < x.rows ? x.width - column : 0;
    const T* const row = x.p + (width > 0 ? (first + r) * x.stride + column : 0);
    T* const to = shared + r * kStride<kHead> + column;
#pragma unroll
    for (int c = 0; c < kHead; c += 8 * kLanes) {
      const int left = width - c, count = left >= 8 ? 8 : left > 0 ? left : 0;
      if (x.wide) {
        cp_async_16(to + c, count ? row + c : x.p, 2 * count);
        continue;
      }
      Pack<T, 8> pack{};
      for (int j = 0; j < 8; ++j)
        if (j < count) pack.v[j] = row[c + j];
      *reinterpret_cast<Pack<T, 8>*>(to + c) = pack;
    }
  }
}

// Tiles of kRows rows of two operands pass by, twice buffered: one step is computed while the next is copied.
template <int kHead, int kRows, class T>
class Passing {
 public:
  template <class Carve>
  __device__ Passing(Carve& carve, const Rows<T>& first, const Rows<T>& second, int end)
      : x_(carve.template take<T>(2 * kRows * kStride<kHead>)), y_(carve.template take<T>(2 * kRows * kStride<kHead>)),
        first_(first), second_(second), end_(end) {}
  // Starts with the tiles of rows row .. and what else the caller has begun to copy.
  __device__ void begin(int row) {
    if (row < end_) load(row, now_);
    cp_async_commit();
  }
  // Sends for the tiles after those of rows row .., which are there for all on return.
  __device__ void arrive(int row) {
    if (row + kRows < end_) {
      load(row + kRows, kRows * kStride<kHead> - now_);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
  }
  // All have read this step's tiles: they are free for the copy after next.
  __device__ void leave() {
    __syncthreads();
    now_ = kRows * kStride<kHead> - now_;
  }
  __device__ const T* x() const { return x_ + now_; }
  __device__ const T* y() const { return y_ + now_; }

 private:
  __device__ void load(int row, int at) {
    load_tile<kHead, kRows>(x_ + at, first_, row);
    load_tile<kHead, kRows>(y_ + at, second_, row);
  }
  T *x_, *y_;
  const Rows<T> first_, second_;
  const int end_;
  int now_ = 0;
};

// s[16][8 kN] += x y^T of a warp's 16 rows and 8 kN rows of y, both kHead long, in shared memory.
template <int kHead, class T, int kN>
__device__ inline void multiply_rows(float (&s)[kN][4], const T* x, const T* y) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int d = 0; d < kHead; d += 16) {
    std::uint32_t xa[4];
    ldmatrix(xa, x + lane % 16 * kStride<kHead> + d + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      std::uint32_t yb[4];
      ldmatrix(yb, y + (n * 8 + lane / 16 * 8 + lane % 8) * kStride<kHead> + d + lane / 8 % 2 * 8);
      mma<T>(s[n], s[n + 1], xa, yb);
    }
  }
}

// o[16][kHead] += p y: p is rounded to T, y are 8 kN rows in shared memory.
template <int kHead, class T, int kN>
__device__ inline void add_weighted(float (&o)[kHead / 8][4], const float (&p)[kN][4], const T* y) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int j = 0; j < kN; j += 2) {
    const std::uint32_t pa[4] = {pair<T>(p[j][0], p[j][1]), pair<T>(p[j][2], p[j][3]),
                                 pair<T>(p[j + 1][0], p[j + 1][1]), pair<T>(p[j + 1][2], p[j + 1][3])};
#pragma unroll
    for (int n = 0; n < kHead / 8; n += 2) {
      std::uint32_t yb[4];
      ldmatrix_transposed(yb, y + (j * 8 + lane % 16) * kStride<kHead> + n * 8 + lane / 16 * 8);
      mma<T>(o[n], o[n + 1], pa, yb);
    }
  }
}

// Makes scores of the products of queries and keys.
template <class T>
struct Scores {
  const T* bias;  // of this (b, h), or null
  std::int64_t query_stride, key_stride;
  float scale;    // times log2(e)
  int nq, nk, shift;
  bool causal;

  // Whether this query, and with it all later ones, sees this key and all before it.
  __device__ bool sees(int query, int key) const { return !causal || key <= query + shift; }
  __device__ float of(float product, int query, int key) const {
    if (query >= nq || key >= nk || !sees(query, key)) return -INFINITY;
    return product * scale + (bias ? load(bias[query * query_stride + key * key_stride]) * kLog2e : 0.0f);
  }
  // In place: log2(e) times the scores; -inf where a query does not see a key, unless the caller knows that all matter
  // or that what does not exist does no harm. s[0][0] is at (row, column): query and key, with kKeyRows key and query.
  template <bool kKeyRows, int kN>
  __device__ void apply(float (&s)[kN][4], int row, int column, bool all_seen) const {
    if (all_seen && !bias) {
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] *= scale;
      return;
    }
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + i / 2 * 8, c = column + n * 8 + i % 2;
        s[n][i] = kKeyRows ? of(s[n][i], c, r) : of(s[n][i], r, c);
      }
  }
};

// A block's (b, h) and its first row.
struct Block {
  int bh, b, h, first;
};
__device__ inline Block block_of(const AttentionArgs& a, std::int64_t rows) {
  const int tiles = static_cast<int>((rows + kOwn - 1) / kOwn), heads = static_cast<int>(a.heads);
  const int block = static_cast<int>(blockIdx.x), bh = block / tiles;
  return {bh, bh / heads, bh % heads, block % tiles * kOwn};
}

// Which operands' rows may be read 16 bytes at a time, decided on the host.
struct Wide {
  bool q, k, v, d_o;
};
inline bool wide_rows(const void* p, const std::int64_t (&strides)[3]) {
  return aligned(p) && strides[0] % 8 == 0 && strides[1] % 8 == 0 && strides[2] % 8 == 0;
}
inline Wide wide_of(const AttentionArgs& a, const void* d_o = nullptr) {
  return {wide_rows(a.q, a.qs), wide_rows(a.k, a.ks), wide_rows(a.v, a.vs), aligned(d_o) && a.dv % 8 == 0};
}

template <class T>
__device__ inline Rows<T> rows_of(const void* p, const std::int64_t (&s)[3], const Block& at, std::int64_t rows,
                                  std::int64_t width, bool wide) {
  return {static_cast<const T*>(p) + at.b * s[0] + at.h * s[2], s[1], static_cast<int>(rows), static_cast<int>(width),
          wide};
}
template <class T>
__device__ inline Rows<T> queries(const AttentionArgs& a, const Block& at, const Wide& w) {
  return rows_of<T>(a.q, a.qs, at, a.nq, a.d, w.q);
}
template <class T>
__device__ inline Rows<T> keys(const AttentionArgs& a, const Block& at, const Wide& w) {
  return rows_of<T>(a.k, a.ks, at, a.nk, a.d, w.k);
}
template <class T>
__device__ inline Rows<T> vectors(const AttentionArgs& a, const Block& at, const Wide& w) {
  return rows_of<T>(a.v, a.vs, at, a.nk, a.dv, w.v);
}
template <class T>
__device__ inline Scores<T> scores(const AttentionArgs& a, const Block& at) {
  return {a.bias ? static_cast<const T*>(a.bias) + at.b * a.bs[0] + at.h * a.bs[1] : nullptr,
          a.bs[2],
          a.bs[3],
          static_cast<float>(a.scale) * kLog2e,
          static_cast<int>(a.nq),
          static_cast<int>(a.nk),
          static_cast<int>(a.nk - a.nq),
          a.causal};
}
// The end of the keys that a block of queries sees.
template <class T>
__device__ inline int seen_keys(const Scores<T>& s, int first) {
  const int seen = s.causal ? first + kOwn + s.shift : s.nk;
  return seen < s.nk ? seen : s.nk;
}

// A warp's fragment times `factor` (of its rows g and g + 8) to rows of y [b, rows, heads, width], contiguous.
template <class T, int kN>
__device__ inline void store_rows(void* y, const float (&x)[kN][4], const Block& at, const AttentionArgs& a, int row,
                                  std::int64_t rows, std::int64_t width, const float (&factor)[2]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + half * 8 >= rows) continue;
    T* const to = static_cast<T*>(y) + ((at.b * rows + row + half * 8) * a.heads + at.h) * width;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int column = n * 8 + 2 * t;
      const float low = x[n][2 * half] * factor[half], high = x[n][2 * half + 1] * factor[half];
      if (width % 2 == 0) {
        if (column < width) *reinterpret_cast<std::uint32_t*>(to + column) = pair<T>(low, high);
      } else {
        if (column < width) to[column] = Store<T>::from(low);
        if (column + 1 < width) to[column + 1] = Store<T>::from(high);
      }
    }
  }
}

// ---- host

// Whether the kernels here take the call: 16-bit elements, heads of at most kMostHead.
inline bool takes(const AttentionArgs& a) {
  constexpr std::int64_t kMost = 1 << 30;
  return is_half(a.dtype) && a.d <= kMostHead && a.dv <= kMostHead && a.nq < kMost && a.nk < kMost;
}

template <class T, int kH>
struct Bucket {
  using type = T;
  static constexpr int kHead = kH;
};
// f(Bucket) of the narrowest bucket that holds both head sizes.
template <class T, class F>
void for_bucket(const AttentionArgs& a, const F& f) {
  const std::int64_t widest = a.d > a.dv ? a.d : a.dv;
  if (widest <= 32) return f(Bucket<T, 32>{});
  if (widest <= 64) return f(Bucket<T, 64>{});
  if (widest <= 96) return f(Bucket<T, 96>{});
  if (widest <= 128) return f(Bucket<T, 128>{});
  if (widest <= 160) return f(Bucket<T, 160>{});
  f(Bucket<T, kMostHead>{});
}
template <class F>
void for_bucket(const AttentionArgs& a, const F& f) {
  a.dtype == bf16 ? for_bucket<BFloat16>(a, f) : for_bucket<Half>(a, f);
}

inline std::int64_t blocks_of(std::int64_t items, std::int64_t rows) { return items * ((rows + kOwn - 1) / kOwn); }

}  // namespace capo::gpu::attention
