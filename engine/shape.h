// Dims: up to eight sizes or strides, inline, no heap.
#pragma once

#include <capo/engine/error.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace capo {

inline constexpr int kMaxDims = 8;

// A short vector of int64: a shape, strides, axes, kernel sizes. Trivially copyable, so closures may hold it.
class Dims {
 public:
  Dims() = default;
  Dims(std::initializer_list<std::int64_t> v) {
    CAPO_CHECK(v.size() <= kMaxDims, "Dims: at most 8 dimensions, got ", v.size());
    for (auto x : v) v_[n_++] = x;
  }
  static Dims filled(int n, std::int64_t value) {
    Dims d;
    for (int i = 0; i < n; ++i) d.push_back(value);
    return d;
  }

  int size() const { return n_; }
  bool empty() const { return n_ == 0; }
  // No negative indices here (Tensor::size takes them).
  std::int64_t operator[](int i) const { return v_[i]; }
  std::int64_t& operator[](int i) { return v_[i]; }
  std::int64_t back() const { return v_[last()]; }
  std::int64_t& back() { return v_[last()]; }
  const std::int64_t* begin() const { return v_; }
  const std::int64_t* end() const { return v_ + n_; }
  std::int64_t* begin() { return v_; }
  std::int64_t* end() { return v_ + n_; }
  const std::int64_t* data() const { return v_; }

  void push_back(std::int64_t x) {
    CAPO_CHECK(n_ < kMaxDims, "Dims: at most 8 dimensions");
    v_[n_++] = x;
  }
  void pop_back() { n_ = last(); }
  void insert(int at, std::int64_t x) {
    CAPO_CHECK(n_ < kMaxDims, "Dims: at most 8 dimensions");
    for (int i = n_; i > at; --i) v_[i] = v_[i - 1];
    v_[at] = x;
    ++n_;
  }
  void erase(int at) {
    for (int i = at; i + 1 < n_; ++i) v_[i] = v_[i + 1];
    --n_;
  }

  friend bool operator==(const Dims& a, const Dims& b) {
    if (a.n_ != b.n_) return false;
    for (int i = 0; i < a.n_; ++i)
      if (a.v_[i] != b.v_[i]) return false;
    return true;
  }

 private:
  int last() const {
    CAPO_DCHECK(n_ > 0, "Dims: is empty");
    return n_ - 1;
  }

  std::int64_t v_[kMaxDims] = {};
  int n_ = 0;
};

using Shape = Dims;

std::string to_string(const Dims& d);  // "[4, 196, 768]"

// Product of sizes (1 for rank 0). Throws on a negative one, and when the product of those that are not 0 reaches 2^62
// (strides are such products, in an empty shape too).
std::int64_t numel(const Shape& s);
// Row-major strides, in elements, of sizes that numel() accepts.
Dims contiguous_strides(const Shape& s);
// NumPy broadcasting of two shapes; op names the caller in the error.
Shape broadcast_shapes(const char* op, const Shape& a, const Shape& b);
// -1 counts from the end; throws "op: axis 3 is outside [-3, 3) for ..." otherwise.
int normalize_axis(const char* op, std::int64_t axis, int rank);

}  // namespace capo
