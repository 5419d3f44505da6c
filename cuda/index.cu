// Reading and writing at positions. Sums at equal positions go in the order in which the positions stand: index_add
// sorts them first (stable), scatter_add gives each column to one thread.
#include <capo/cuda/pack.cuh>
#include <capo/cuda/row_lanes.cuh>
#include <capo/ops/index.h>
#include <capo/ops/integer_functors.h>

namespace {

using capo::DType;
using std::int64_t;
namespace gpu = capo::gpu;
using gpu::kRowThreads;
using gpu::RowLanes;

constexpr int kThreads = 256;

__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ inline int64_t threads_in_grid() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// ---------------------------------------------------------------- range check

// first_wrong[block]: the lowest place that this block saw with an index neither inside [0, size) nor ignored, or n.
__global__ void __launch_bounds__(kThreads) check_range(capo::IndexCheckArgs p) {
  CAPO_SHARED(int64_t, lowest, kThreads / gpu::kWarp);
  int64_t first = p.n;
  for (int64_t i = thread_index(); i < p.n; i += threads_in_grid()) {
    const int64_t index = p.index[i];
    const bool inside = index >= 0 && index < p.size;
    if (!inside && index != p.ignore && i < first) first = i;
    if (p.safe) p.safe[i] = inside ? index : 0;
  }
  for (int bits = gpu::kWarp / 2; bits > 0; bits /= 2) {
    const int64_t other = __shfl_xor_sync(gpu::kFullMask, first, bits);
    if (other < first) first = other;
  }
  if (threadIdx.x % gpu::kWarp == 0) lowest[threadIdx.x / gpu::kWarp] = first;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / gpu::kWarp; ++i)
    if (lowest[i] < first) first = lowest[i];
  p.first_wrong[blockIdx.x] = first;
}

// One warp tells the graph what the blocks found.
// No sample: captured index ops launch it; tests/graph_test.cpp and check (l) of the op tests run it on the shim.
__global__ void __launch_bounds__(gpu::kWarp) report_wrong(capo::IndexCheckArgs p, int64_t blocks) {
  int64_t first = p.n;
  for (int64_t i = threadIdx.x; i < blocks; i += gpu::kWarp)
    if (p.first_wrong[i] < first) first = p.first_wrong[i];
  for (int bits = gpu::kWarp / 2; bits > 0; bits /= 2) {
    const int64_t other = __shfl_xor_sync(gpu::kFullMask, first, bits);
    if (other < first) first = other;
  }
  if (threadIdx.x != 0) return;
  p.found[0] = first < p.n ? 1 + first : 0;
  p.found[1] = first < p.n ? p.index[first] : 0;
}

// ---------------------------------------------------------------- index_select, gather

template <class W>
__global__ void __launch_bounds__(kRowThreads) select_rows(capo::IndexSelectArgs p, RowLanes lanes) {
  const int64_t row = lanes.row();
  if (row >= lanes.rows) return;
  const int64_t outer = row / p.count;
  const W* from = static_cast<const W*>(p.x) + (outer * p.size + p.index[row - outer * p.count]) * p.inner;
  W* to = static_cast<W*>(p.y) + row * p.inner;
  for (int64_t i = lanes.lane(); i < p.inner; i += lanes.lanes()) to[i] = from[i];
}

template <class W>
void run_select(const capo::IndexSelectArgs& p, int64_t rows, void* stream) {
  const RowLanes lanes = gpu::row_lanes(rows, p.inner);
  gpu::launch("index_select", select_rows<W>, lanes.blocks(), kRowThreads, 0, stream, p, lanes);
}

template <class W>
__global__ void __launch_bounds__(kThreads) take(capo::GatherArgs p, int64_t n) {
  const W* x = static_cast<const W*>(p.x);
  W* y = static_cast<W*>(p.y);
  for (int64_t k = thread_index(); k < n; k += threads_in_grid()) {
    int64_t rest = k, at = p.index[k] * p.sx[p.axis];
    for (int i = p.rank - 1; i >= 0; --i) {
      const int64_t next = rest / p.shape[i];
      if (i != p.axis) at += (rest - next * p.shape[i]) * p.sx[i];
      rest = next;
    }
    y[k] = x[at];
  }
}

template <class W>
void run_take(const capo::GatherArgs& p, int64_t n, void* stream) {
  gpu::launch("gather", take<W>, gpu::blocks_for(n, kThreads), kThreads, 0, stream, p, n);
}

// ---------------------------------------------------------------- stable sort of positions

// An Order gives the key at (row, position) and says which of two (key, position) comes first; it is strict and total.
struct Ascending {
  using Key = int64_t;
  const int64_t* index;
  __device__ Key key(int64_t, int64_t i) const { return index[i]; }
  __device__ bool before(Key a, int64_t i, Key b, int64_t j) const { return a < b || (a == b && i < j); }
};

// topk's: NaN counts as the greatest.
template <class T>
struct Best {
  using Key = gpu::Compute<T>;
  const T* x;
  int64_t size;
  bool largest;
  __device__ Key key(int64_t row, int64_t i) const { return gpu::load(x[row * size + i]); }
  __device__ bool before(Key a, int64_t i, Key b, int64_t j) const {
    const bool a_nan = a != a, b_nan = b != b;
    if (a_nan != b_nan) return a_nan == largest;
    if (a_nan || a == b) return i < j;
    return largest ? b < a : a < b;
  }
};

// One step of a sort by runs: rows of `size` positions are cut into runs, of which only the first `keep` are kept, in
// place. out_row: elements between rows of out.
struct Runs {
  int64_t size, keep, out_row;
  int64_t chunks;  // of kThreads, per row: one block each
};

__device__ inline int64_t kept(const Runs& r, int64_t start, int64_t width) {
  const int64_t length = r.size - start < width ? r.size - start : width;
  return length < 0 ? 0 : length < r.keep ? length : r.keep;
}

// Runs of kThreads: a position's rank is the number of keys before its own.
template <class Order>
__global__ void __launch_bounds__(kThreads) sort_chunk(Order order, Runs r, int64_t* out) {
  CAPO_SHARED(typename Order::Key, keys, kThreads);
  const int64_t row = blockIdx.x / r.chunks, start = (blockIdx.x - row * r.chunks) * kThreads;
  const int64_t n = r.size - start < kThreads ? r.size - start : kThreads, me = threadIdx.x;
  if (me < n) keys[me] = order.key(row, start + me);
  __syncthreads();
  if (me >= n) return;
  int64_t rank = 0;
  for (int64_t i = 0; i < n; ++i) rank += order.before(keys[i], i, keys[me], me);
  if (rank < r.keep) out[row * r.out_row + start + rank] = start + me;
}

// Runs of `width` become runs of twice that: a position's rank is its place in its own run and the number of positions
// before it in the neighbouring run, by bisection.
template <class Order>
__global__ void __launch_bounds__(kThreads)
    merge_runs(Order order, Runs r, int64_t width, const int64_t* in, int64_t* out) {
  const int64_t row = blockIdx.x / r.chunks, i = (blockIdx.x - row * r.chunks) * kThreads + threadIdx.x;
  const int64_t run = i / width, place = i - run * width;
  if (i >= r.size || place >= kept(r, run * width, width)) return;
  in += row * r.size;
  const int64_t me = in[i], other = (run ^ 1) * width;
  const typename Order::Key key = order.key(row, me);
  int64_t low = 0, high = kept(r, other, width);
  while (low < high) {
    const int64_t middle = (low + high) / 2, position = in[other + middle];
    if (order.before(order.key(row, position), position, key, me))
      low = middle + 1;
    else
      high = middle;
  }
  if (place + low < r.keep) out[row * r.out_row + run / 2 * (2 * width) + place + low] = me;
}

// The first `keep` positions of every row, in order, to out [rows, keep]. scratch: [2, rows, size], not read when one
// run holds a row.
template <class Order>
void sort(const char* name, const Order& order, int64_t rows, int64_t size, int64_t keep, int64_t* scratch,
          int64_t* out, void* stream) {
  const int64_t chunks = (size + kThreads - 1) / kThreads;
  const Runs middle{size, keep, size, chunks}, last{size, keep, keep, chunks};
  const bool one = size <= kThreads;
  gpu::launch(name, sort_chunk<Order>, rows * chunks, kThreads, 0, stream, order, one ? last : middle,
              one ? out : scratch);
  int64_t *from = scratch, *to = scratch + rows * size;
  for (int64_t width = kThreads; width < size; width *= 2) {
    const bool end = 2 * width >= size;
    gpu::launch(name, merge_runs<Order>, rows * chunks, kThreads, 0, stream, order, end ? last : middle, width,
                static_cast<const int64_t*>(from), end ? out : to);
    int64_t* const swap = from;
    from = to, to = swap;
  }
}

// ---------------------------------------------------------------- index_add, scatter_add

// One row of lanes per (outer, place in the sorted order); the first of equal indices adds all of them, in order, in
// registers: 16-bit sums are rounded once.
template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) add_rows(capo::IndexAddArgs p, RowLanes lanes) {
  const int64_t row = lanes.row();
  if (row >= lanes.rows) return;
  const int64_t* order = p.scratch;
  const int64_t outer = row / p.count, place = row - outer * p.count, target = p.index[order[place]];
  if (place > 0 && p.index[order[place - 1]] == target) return;
  const T* src = static_cast<const T*>(p.src) + outer * p.count * p.inner;
  T* y = static_cast<T*>(p.y) + (outer * p.size + target) * p.inner;
  for (int64_t c = lanes.lane() * N; c < p.inner; c += lanes.lanes() * N) {
    gpu::Compute<T> sum[N], v[N];
    gpu::load_many<N>(y + c, sum);
    for (int64_t k = place; k < p.count && p.index[order[k]] == target; ++k) {
      gpu::load_many<N>(src + order[k] * p.inner + c, v);
      for (int j = 0; j < N; ++j) sum[j] = wrap_add(sum[j], v[j]);
    }
    gpu::store_many<N>(y + c, sum);
  }
}

template <class T, int N>
void run_add(const capo::IndexAddArgs& p, int64_t outer, void* stream) {
  const RowLanes lanes = gpu::row_lanes(outer * p.count, (p.inner + N - 1) / N);
  gpu::launch("index_add", add_rows<T, N>, lanes.blocks(), kRowThreads, 0, stream, p, lanes);
}

template <class T>
__global__ void __launch_bounds__(kThreads) scatter_columns(capo::ScatterAddArgs p, int64_t columns) {
  const T* src = static_cast<const T*>(p.src);
  T* y = static_cast<T*>(p.y);
  for (int64_t column = thread_index(); column < columns; column += threads_in_grid()) {
    int64_t rest = column, from = 0, to = 0;
    for (int i = p.rank - 1; i >= 0; --i) {
      const int64_t next = rest / p.shape[i], at = rest - next * p.shape[i];
      from += at * p.ss[i], to += at * p.sy[i];
      rest = next;
    }
    for (int64_t k = 0; k < p.count; ++k) {
      const int64_t at = from + k * p.src_step;
      T& sum = y[to + p.index[at] * p.y_step];
      sum = gpu::Store<T>::from(wrap_add(gpu::load(sum), gpu::load(src[at])));
    }
  }
}

// ---------------------------------------------------------------- arg_extreme

// Does (a, position i) win over (b, position j)? NaN beats all numbers; the lower position wins among equals.
template <class S>
__device__ inline bool wins(S a, int64_t i, S b, int64_t j, bool largest) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan != b_nan) return a_nan;
  if (a_nan || a == b) return i < j;
  return largest ? b < a : a < b;
}

// inner = 1: a warp per row.
template <class T>
__global__ void __launch_bounds__(kThreads) extreme_of_row(capo::ArgExtremeArgs p, int64_t rows) {
  using S = gpu::Compute<T>;
  const int64_t row = thread_index() / gpu::kWarp;
  const int lane = static_cast<int>(threadIdx.x) % gpu::kWarp;
  if (row >= rows) return;  // the whole warp
  const T* x = static_cast<const T*>(p.x) + row * p.size;
  int64_t at = lane < p.size ? lane : 0;
  S best = gpu::load(x[at]);
  for (int64_t i = at + gpu::kWarp; i < p.size; i += gpu::kWarp) {
    const S v = gpu::load(x[i]);
    if (wins(v, i, best, at, p.largest)) best = v, at = i;
  }
  for (int bits = gpu::kWarp / 2; bits > 0; bits /= 2) {
    const S other = __shfl_xor_sync(gpu::kFullMask, best, bits);
    const int64_t other_at = __shfl_xor_sync(gpu::kFullMask, at, bits);
    if (wins(other, other_at, best, at, p.largest)) best = other, at = other_at;
  }
  if (lane == 0) p.y[row] = at;
}

// inner > 1: a thread per column.
template <class T>
__global__ void __launch_bounds__(kRowThreads) extreme_of_column(capo::ArgExtremeArgs p, RowLanes lanes) {
  using S = gpu::Compute<T>;
  const int64_t outer = lanes.row();
  if (outer >= lanes.rows) return;
  for (int64_t c = lanes.lane(); c < p.inner; c += lanes.lanes()) {
    const T* x = static_cast<const T*>(p.x) + outer * p.size * p.inner + c;
    int64_t at = 0;
    S best = gpu::load(*x);
    for (int64_t i = 1; i < p.size; ++i) {
      const S v = gpu::load(x[i * p.inner]);
      if (wins(v, i, best, at, p.largest)) best = v, at = i;
    }
    p.y[outer * p.inner + c] = at;
  }
}

// f32, bf16, f16, i32 and i64.
template <class F>
void for_summable(const char* op, DType dtype, const F& f) {
  if (dtype == DType::i32) return f(std::int32_t{});
  if (dtype == DType::i64) return f(int64_t{});
  gpu::for_floating(op, dtype, f);
}

}  // namespace

namespace capo::kernels {

void index_check_cuda(const IndexCheckArgs& p, int64_t blocks, void* stream) {
  gpu::launch("index_check", check_range, blocks, kThreads, 0, stream, p);
  if (p.found) gpu::launch("index_check", report_wrong, 1, gpu::kWarp, 0, stream, p, blocks);
}

void index_select_cuda(const IndexSelectArgs& args, int64_t rows, void* stream) {
  const int64_t bytes = args.inner * args.element_bytes;
  if (bytes % 16 == 0 && gpu::aligned(args.x) && gpu::aligned(args.y)) {
    IndexSelectArgs wide = args;
    wide.inner = bytes / 16;
    return run_select<uint4>(wide, rows, stream);
  }
  switch (args.element_bytes) {
    case 8: return run_select<std::uint64_t>(args, rows, stream);
    case 4: return run_select<std::uint32_t>(args, rows, stream);
    case 2: return run_select<std::uint16_t>(args, rows, stream);
    default: return run_select<std::uint8_t>(args, rows, stream);
  }
}

void gather_cuda(const GatherArgs& args, int64_t n, void* stream) {
  switch (args.element_bytes) {
    case 8: return run_take<std::uint64_t>(args, n, stream);
    case 4: return run_take<std::uint32_t>(args, n, stream);
    case 2: return run_take<std::uint16_t>(args, n, stream);
    default: return run_take<std::uint8_t>(args, n, stream);
  }
}

void index_add_cuda(const IndexAddArgs& p, int64_t items, void* stream) {
  for_summable("index_add", p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kMany = gpu::kPack<T>;
    const int64_t outer = items / ((p.inner + 63) / 64);
    sort("index_add_sort", Ascending{p.index}, 1, p.count, p.count, p.scratch + p.count, p.scratch, stream);
    if (gpu::packs(p.inner, kMany, p.src, p.y))
      run_add<T, kMany>(p, outer, stream);
    else
      run_add<T, 1>(p, outer, stream);
  });
}

void scatter_add_cuda(const ScatterAddArgs& p, int64_t columns, void* stream) {
  for_summable("scatter_add", p.dtype, [&](auto type) {
    gpu::launch("scatter_add", scatter_columns<decltype(type)>, gpu::blocks_for(columns, kThreads), kThreads, 0, stream,
                p, columns);
  });
}

void topk_cuda(const TopKArgs& p, int64_t rows, void* stream) {
  for_summable("topk", p.dtype, [&](auto type) {
    using T = decltype(type);
    sort("topk", Best<T>{static_cast<const T*>(p.x), p.size, p.largest}, rows, p.size, p.k, p.scratch, p.indices,
         stream);
  });
}

void arg_extreme_cuda(const ArgExtremeArgs& p, int64_t items, void* stream) {
  const int64_t outer = items / ((p.inner + 63) / 64);
  for_summable("arg_extreme", p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.inner == 1) {
      const int64_t per_block = kThreads / gpu::kWarp;
      return gpu::launch("arg_extreme", extreme_of_row<T>, (outer + per_block - 1) / per_block, kThreads, 0, stream, p,
                         outer);
    }
    const RowLanes lanes = gpu::row_lanes(outer, p.inner);
    gpu::launch("arg_extreme", extreme_of_column<T>, lanes.blocks(), kRowThreads, 0, stream, p, lanes);
  });
}

}  // namespace capo::kernels
