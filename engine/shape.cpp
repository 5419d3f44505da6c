#include <capo/engine/shape.h>

namespace capo {

std::string to_string(const Dims& d) {
  std::string out = "[";
  for (int i = 0; i < d.size(); ++i) {
    if (i) out += ", ";
    out += std::to_string(d[i]);
  }
  return out + "]";
}

std::int64_t numel(const Shape& s) {
  std::int64_t n = 1;
  bool empty = false;
  for (auto x : s) {
    CAPO_CHECK(x >= 0, "shape: sizes must not be negative, got ", s);
    empty |= x == 0;
    CAPO_CHECK(x == 0 || (!__builtin_mul_overflow(n, x, &n) && n < (std::int64_t{1} << 62)), "shape: ", s,
               " has too many elements");
  }
  return empty ? 0 : n;
}

Dims contiguous_strides(const Shape& s) {
  Dims strides = Dims::filled(s.size(), 1);
  for (int i = s.size() - 2; i >= 0; --i) strides[i] = strides[i + 1] * (s[i + 1] > 0 ? s[i + 1] : 1);
  return strides;
}

Shape broadcast_shapes(const char* op, const Shape& a, const Shape& b) {
  const int rank = a.size() > b.size() ? a.size() : b.size();
  Shape out = Dims::filled(rank, 1);
  for (int i = 1; i <= rank; ++i) {
    const std::int64_t x = i <= a.size() ? a[a.size() - i] : 1, y = i <= b.size() ? b[b.size() - i] : 1;
    CAPO_CHECK(x == y || x == 1 || y == 1, op, ": shapes must broadcast, got ", a, " and ", b);
    out[rank - i] = x == 1 ? y : x;
  }
  return out;
}

int normalize_axis(const char* op, std::int64_t axis, int rank) {
  CAPO_CHECK(axis >= -rank && axis < rank, op, ": axis must be in [", -rank, ", ", rank, "), got ", axis);
  return static_cast<int>(axis < 0 ? axis + rank : axis);
}

}  // namespace capo
