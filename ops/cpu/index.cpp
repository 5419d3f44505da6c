#include <capo/ops/cpu/kernel.h>
#include <capo/ops/index.h>
#include <capo/ops/integer_functors.h>

namespace {

using capo::DType;

template <class W>
void select_rows(const capo::IndexSelectArgs& p, std::int64_t begin, std::int64_t end) {
  const W* x = static_cast<const W*>(p.x);
  W* y = static_cast<W*>(p.y);
  for (std::int64_t row = begin; row < end; ++row) {
    const W* from = x + (row / p.count * p.size + p.index[row % p.count]) * p.inner;
    W* to = y + row * p.inner;
    for (std::int64_t i = 0; i < p.inner; ++i) to[i] = from[i];
  }
}

// Both add kernels let one item own its destinations and walk the index in order: duplicates add up in that order.
template <class T>
void add_rows(const capo::IndexAddArgs& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t blocks = (p.inner + 63) / 64;
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t outer = item / blocks, first = item % blocks * 64, n = lesser(std::int64_t{64}, p.inner - first);
    const T* src = static_cast<const T*>(p.src) + outer * p.count * p.inner + first;
    T* y = static_cast<T*>(p.y) + outer * p.size * p.inner + first;
    for (std::int64_t k = 0; k < p.count; ++k) {
      const T* from = src + k * p.inner;
      T* to = y + p.index[k] * p.inner;
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) to[i] = wrap_add(to[i], from[i]);
    }
  }
}

template <class W>
void take(const capo::GatherArgs& p, std::int64_t begin, std::int64_t end) {
  const W* x = static_cast<const W*>(p.x);
  W* y = static_cast<W*>(p.y);
  const int last = p.rank - 1;
  const std::int64_t width = p.shape[last], step = last == p.axis ? 0 : p.sx[last], jump = p.sx[p.axis];
  for (std::int64_t k = begin; k < end;) {
    const std::int64_t first = k % width, n = lesser(width - first, end - k);
    std::int64_t rest = k / width, at = first * step;
    for (int i = last - 1; i >= 0; --i) {
      if (i != p.axis) at += rest % p.shape[i] * p.sx[i];
      rest /= p.shape[i];
    }
    for (std::int64_t i = 0; i < n; ++i) y[k + i] = x[at + i * step + p.index[k + i] * jump];
    k += n;
  }
}

template <class T>
void scatter_columns(const capo::ScatterAddArgs& p, std::int64_t begin, std::int64_t end) {
  const T* src = static_cast<const T*>(p.src);
  T* y = static_cast<T*>(p.y);
  for (std::int64_t column = begin; column < end; column += 64) {
    const std::int64_t n = lesser(std::int64_t{64}, end - column);
    std::int64_t from[64], to[64];
    for (std::int64_t j = 0; j < n; ++j) {
      std::int64_t rest = column + j;
      from[j] = to[j] = 0;
      for (int i = p.rank - 1; i >= 0; --i) {
        from[j] += rest % p.shape[i] * p.ss[i];
        to[j] += rest % p.shape[i] * p.sy[i];
        rest /= p.shape[i];
      }
    }
    for (std::int64_t k = 0; k < p.count; ++k)
      for (std::int64_t j = 0; j < n; ++j) {
        const std::int64_t at = from[j] + k * p.src_step;
        T& sum = y[to[j] + p.index[at] * p.y_step];
        sum = wrap_add(sum, src[at]);
      }
  }
}

// Ranks (a, position i) before (b, position j)?
template <class T>
inline bool before(T a, std::int64_t i, T b, std::int64_t j, bool largest) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan != b_nan) return a_nan == largest;
  if (a_nan || a == b) return i < j;
  return largest ? b < a : a < b;
}

template <class T>
inline void sift_down(const T* x, std::int64_t* heap, std::int64_t size, std::int64_t root, bool largest) {
  const std::int64_t moved = heap[root];
  for (;;) {
    std::int64_t child = 2 * root + 1;
    if (child >= size) break;
    if (child + 1 < size && before(x[heap[child]], heap[child], x[heap[child + 1]], heap[child + 1], largest)) ++child;
    if (before(x[heap[child]], heap[child], x[moved], moved, largest)) break;
    heap[root] = heap[child];
    root = child;
  }
  heap[root] = moved;
}

// A heap of the k best with the worst on top, kept in the result row; then heap sort.
template <class T>
void best_k(const capo::TopKArgs& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.size;
    std::int64_t* heap = p.indices + row * p.k;
    for (std::int64_t i = 0; i < p.k; ++i) heap[i] = i;
    for (std::int64_t i = p.k / 2 - 1; i >= 0; --i) sift_down(x, heap, p.k, i, p.largest);
    for (std::int64_t i = p.k; i < p.size; ++i) {
      if (!before(x[i], i, x[heap[0]], heap[0], p.largest)) continue;
      heap[0] = i;
      sift_down(x, heap, p.k, 0, p.largest);
    }
    for (std::int64_t n = p.k - 1; n > 0; --n) {
      const std::int64_t worst = heap[0];
      heap[0] = heap[n];
      heap[n] = worst;
      sift_down(x, heap, n, 0, p.largest);
    }
  }
}

template <class T>
void arg_extreme(const capo::ArgExtremeArgs& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t blocks = (p.inner + 63) / 64;
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t outer = item / blocks, first = item % blocks * 64, n = lesser(std::int64_t{64}, p.inner - first);
    const T* x = static_cast<const T*>(p.x) + outer * p.size * p.inner + first;
    std::int64_t* y = p.y + outer * p.inner + first;
    T best[64];
    for (std::int64_t j = 0; j < n; ++j) best[j] = x[j], y[j] = 0;
    for (std::int64_t k = 1; k < p.size; ++k) {
      const T* at = x + k * p.inner;
      for (std::int64_t j = 0; j < n; ++j) {
        const T v = at[j], b = best[j];
        // A NaN beats all numbers; later equals (and later NaN) lose.
        const bool better = b == b && (v != v || (p.largest ? b < v : v < b));
        best[j] = better ? v : b;
        y[j] = better ? k : y[j];
      }
    }
  }
}

}  // namespace

CAPO_CPU_KERNEL(index_select, capo::IndexSelectArgs) {
  switch (args.element_bytes) {
    case 8:
      return select_rows<std::int64_t>(args, begin, end);
    case 4:
      return select_rows<std::int32_t>(args, begin, end);
    case 2:
      return select_rows<std::int16_t>(args, begin, end);
    default:
      return select_rows<std::int8_t>(args, begin, end);
  }
}

CAPO_CPU_KERNEL(index_add, capo::IndexAddArgs) {
  switch (args.dtype) {
    case DType::f32:
      return add_rows<float>(args, begin, end);
    case DType::f64:
      return add_rows<double>(args, begin, end);
    case DType::i32:
      return add_rows<std::int32_t>(args, begin, end);
    case DType::i64:
      return add_rows<std::int64_t>(args, begin, end);
    default:
      return;
  }
}

CAPO_CPU_KERNEL(gather, capo::GatherArgs) {
  switch (args.element_bytes) {
    case 8:
      return take<std::int64_t>(args, begin, end);
    case 4:
      return take<std::int32_t>(args, begin, end);
    case 2:
      return take<std::int16_t>(args, begin, end);
    default:
      return take<std::int8_t>(args, begin, end);
  }
}

CAPO_CPU_KERNEL(scatter_add, capo::ScatterAddArgs) {
  switch (args.dtype) {
    case DType::f32:
      return scatter_columns<float>(args, begin, end);
    case DType::f64:
      return scatter_columns<double>(args, begin, end);
    case DType::i32:
      return scatter_columns<std::int32_t>(args, begin, end);
    case DType::i64:
      return scatter_columns<std::int64_t>(args, begin, end);
    default:
      return;
  }
}

CAPO_CPU_KERNEL(topk, capo::TopKArgs) {
  switch (args.dtype) {
    case DType::f32:
      return best_k<float>(args, begin, end);
    case DType::f64:
      return best_k<double>(args, begin, end);
    case DType::i32:
      return best_k<std::int32_t>(args, begin, end);
    case DType::i64:
      return best_k<std::int64_t>(args, begin, end);
    default:
      return;
  }
}

CAPO_CPU_KERNEL(arg_extreme, capo::ArgExtremeArgs) {
  switch (args.dtype) {
    case DType::f32:
      return arg_extreme<float>(args, begin, end);
    case DType::f64:
      return arg_extreme<double>(args, begin, end);
    case DType::i32:
      return arg_extreme<std::int32_t>(args, begin, end);
    case DType::i64:
      return arg_extreme<std::int64_t>(args, begin, end);
    default:
      return;
  }
}
