#include <capo/engine/backend.h>
#include <capo/engine/profile_internal.h>
#include <capo/engine/tensor.h>

#include <cstdio>
#include <cstring>
#include <utility>

namespace capo {

Storage::Storage(std::size_t bytes, Device device)
    : bytes_(bytes), device_(device), allocator_(&allocator(device)) {
  data_ = allocator_->allocate(bytes);
  if (detail::profiling()) detail::count_allocation(device, bytes);
}

Storage::~Storage() { allocator_->release(data_, bytes_); }

std::int64_t Tensor::size(std::int64_t axis) const { return shape()[normalize_axis("size", axis, rank())]; }

void* Tensor::data() const {
  const Impl& t = get();
  CAPO_CHECK(!t.storage->device().is_meta(), "data: a meta tensor ", t.shape, " has no values");
  return static_cast<char*>(t.storage->data()) + static_cast<std::size_t>(t.offset) * size_of(t.dtype);
}

Tensor Tensor::detach() const { return strided_view(*this, shape(), strides(), offset()); }

void Tensor::swap_storage(Tensor& other) {
  Impl &a = get(), &b = other.get();
  CAPO_CHECK(a.shape == b.shape && a.dtype == b.dtype && a.strides == b.strides && device() == other.device(),
             "swap_storage: shapes, dtypes and strides must be equal, and devices, got ", describe(*this), " and ",
             describe(other));
  std::swap(a.storage, b.storage);
  std::swap(a.offset, b.offset);
}

Tensor empty(const Shape& shape, DType dtype, Device device) {
  Tensor t;
  t.impl_ = make_ref<Tensor::Impl>();
  t.impl_->numel = numel(shape);
  CAPO_CHECK(t.impl_->numel <= (std::int64_t{1} << 60) / static_cast<std::int64_t>(size_of(dtype)), "shape: ", shape,
             " of ", dtype, " has too many bytes");
  t.impl_->storage = make_ref<Storage>(static_cast<std::size_t>(t.impl_->numel) * size_of(dtype), device);
  t.impl_->shape = shape;
  t.impl_->strides = contiguous_strides(shape);
  t.impl_->dtype = dtype;
  return t;
}

Tensor strided_view(const Tensor& base, const Shape& shape, const Dims& strides, std::int64_t offset) {
  CAPO_CHECK(shape.size() == strides.size(), "view: shape ", shape, " and strides ", strides, " differ in rank");
  Tensor t;
  t.impl_ = make_ref<Tensor::Impl>();
  auto& v = *t.impl_;
  v.storage = base.storage();
  v.shape = shape;
  v.strides = strides;
  v.offset = offset;
  v.numel = numel(shape);
  v.dtype = base.dtype();
  std::int64_t last = offset, expected = 1;
  v.contiguous = true;
  for (int i = shape.size() - 1; i >= 0; --i) {
    CAPO_CHECK(strides[i] >= 0, "view: strides must not be negative, got ", strides);
    if (shape[i] != 1 && v.numel > 0) {
      if (strides[i] != expected) v.contiguous = false;
      last += (shape[i] - 1) * strides[i];
    }
    expected *= shape[i];
  }
  if (v.numel > 0) {
    const auto room = static_cast<std::int64_t>(v.storage->bytes() / size_of(v.dtype));
    CAPO_CHECK(offset >= 0 && last < room, "view: ", shape, " strides ", strides, " offset ", offset,
               " leaves the storage of ", room, " elements");
  }
  return t;
}

namespace {

template <class T>
double read_as_double(const void* p) {
  const T v = *static_cast<const T*>(p);
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>)
    return to_f32(v);
  else
    return static_cast<double>(v);
}

double read_element(DType t, const char* p) {
  switch (t) {
    case DType::f32: return read_as_double<float>(p);
    case DType::f64: return read_as_double<double>(p);
    case DType::bf16: return read_as_double<BFloat16>(p);
    case DType::f16: return read_as_double<Half>(p);
    case DType::i32: return read_as_double<std::int32_t>(p);
    case DType::i64: return read_as_double<std::int64_t>(p);
    case DType::u8: return read_as_double<std::uint8_t>(p);
    case DType::i8: return read_as_double<std::int8_t>(p);
    case DType::boolean: return *p != 0;
  }
  return 0;
}

// The same tensor on the CPU: itself, or a copy of the span of memory from its first to its last element.
Tensor on_host(const char* op, const Tensor& t) {
  if (t.device().is_cpu()) return t;
  CAPO_CHECK(!t.device().is_meta(), op, ": a meta tensor ", t.shape(), " has no values");
  refuse_capture(op);
  std::int64_t span = t.numel() > 0 ? 1 : 0;
  for (int i = 0; i < t.rank() && span > 0; ++i) span += (t.shape()[i] - 1) * t.strides()[i];
  const Tensor copy = empty({span}, t.dtype());
  copy_bytes(copy.data(), kCpu, t.data(), t.device(), copy.nbytes());
  return strided_view(copy, t.shape(), t.strides(), 0);
}

// Calls f(pointer) for every element of a CPU tensor in row-major order.
template <class F>
void for_each_element(const Tensor& t, const F& f) {
  const auto* base = static_cast<const char*>(t.data());
  const std::size_t width = size_of(t.dtype());
  const int rank = t.rank();
  Dims index = Dims::filled(rank, 0);
  std::int64_t at = 0;
  for (std::int64_t k = 0; k < t.numel(); ++k) {
    f(base + static_cast<std::size_t>(at) * width);
    for (int i = rank - 1; i >= 0; --i) {
      at += t.strides()[i];
      if (++index[i] < t.shape()[i]) break;
      at -= t.shape()[i] * t.strides()[i];
      index[i] = 0;
    }
  }
}

void print(const Tensor& t, std::int64_t at, int axis, std::string& out) {
  if (axis == t.rank()) {
    const auto* base = static_cast<const char*>(t.storage()->data());
    char text[32];
    std::snprintf(text, sizeof text, "%.6g",
                  read_element(t.dtype(), base + static_cast<std::size_t>(at) * size_of(t.dtype())));
    out += text;
    return;
  }
  const std::int64_t n = t.shape()[axis];
  out += '[';
  for (std::int64_t i = 0; i < n; ++i) {
    if (n > 8 && i == 4) {
      out += ", ...";
      i = n - 4;
    }
    if (i) out += axis + 1 == t.rank() ? ", " : ",\n " + std::string(static_cast<std::size_t>(axis), ' ');
    print(t, at + i * t.strides()[axis], axis + 1, out);
  }
  out += ']';
}

}  // namespace

double Tensor::item() const {
  CAPO_CHECK(numel() == 1, "item: needs exactly one element, got ", shape());
  return read_element(dtype(), static_cast<const char*>(on_host("item", *this).data()));
}

template <class T>
Tensor from_vector(const std::vector<T>& values, const Shape& shape) {
  CAPO_CHECK(static_cast<std::int64_t>(values.size()) == numel(shape), "from_vector: ", shape, " needs ", numel(shape),
             " values, got ", values.size());
  Tensor t = empty(shape, dtype_of<T>::value);
  if (!values.empty()) std::memcpy(t.data(), values.data(), values.size() * sizeof(T));
  return t;
}

template <class T>
std::vector<T> to_vector(const Tensor& source) {
  const Tensor t = on_host("to_vector", source);
  std::vector<T> out;
  out.reserve(static_cast<std::size_t>(t.numel()));
  for_each_element(t, [&](const char* p) {
    if (t.dtype() == DType::i64)  // not through double: 64-bit integers must survive
      out.push_back(static_cast<T>(*reinterpret_cast<const std::int64_t*>(p)));
    else
      out.push_back(static_cast<T>(read_element(t.dtype(), p)));
  });
  return out;
}

template Tensor from_vector(const std::vector<float>&, const Shape&);
template Tensor from_vector(const std::vector<double>&, const Shape&);
template Tensor from_vector(const std::vector<std::int32_t>&, const Shape&);
template Tensor from_vector(const std::vector<std::int64_t>&, const Shape&);
template Tensor from_vector(const std::vector<std::uint8_t>&, const Shape&);
template std::vector<float> to_vector(const Tensor&);
template std::vector<double> to_vector(const Tensor&);
template std::vector<std::int32_t> to_vector(const Tensor&);
template std::vector<std::int64_t> to_vector(const Tensor&);
template std::vector<std::uint8_t> to_vector(const Tensor&);

std::string describe(const Tensor& t) {
  if (!t.defined()) return "undefined";
  return cat(t.dtype(), " ", t.shape(), " ", t.device());
}

std::string to_string(const Tensor& source) {
  std::string out = describe(source);
  if (!source.defined() || source.device().is_meta()) return out;
  const Tensor t = on_host("to_string", source);
  out += '\n';
  print(t, t.offset(), 0, out);
  return out;
}

}  // namespace capo
