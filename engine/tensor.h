// Tensor: a counted handle to {storage, shape, strides, offset, dtype, device, gradient slot}.
//
// Only metadata lives here; computation is free functions in ops/. Copies of a handle are the same tensor. Layout
// convention: images [B, H, W, C], volumes [B, D, H, W, C], weights [O, kh, kw, I], tokens [B, N, C].
#pragma once

#include <capo/engine/allocator.h>
#include <capo/engine/atomic.h>
#include <capo/engine/device.h>
#include <capo/engine/dtype.h>
#include <capo/engine/error.h>
#include <capo/engine/ref.h>
#include <capo/engine/shape.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace capo {

// A block of memory, shared by views. version() counts in-place writes, so that a stale saved tensor is found, and
// last_writer() names the op that made the newest one (a string literal).
class Storage final : public RefCounted {
 public:
  Storage(std::size_t bytes, Device device);
  ~Storage() override;

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  Device device() const { return device_; }
  std::uint32_t version() const { return version_.load(); }
  const char* last_writer() const { return writer_.load(); }
  void bump_version(const char* op) {
    version_.add(1);
    writer_.store(op);
  }

 private:
  void* data_;
  std::size_t bytes_;
  Device device_;
  Allocator* allocator_;
  Atomic<std::uint32_t> version_{0};
  Atomic<const char*> writer_{""};
};

// What autograd hangs on a tensor; engine only keeps it alive (see autograd/node.h).
class GradSlotBase : public RefCounted {};

class Tensor {
 public:
  Tensor() = default;  // undefined: in gradients it means zero

  bool defined() const { return static_cast<bool>(impl_); }
  const Shape& shape() const { return get().shape; }
  std::int64_t size(std::int64_t axis) const;  // -1 is the last axis
  int rank() const { return get().shape.size(); }
  std::int64_t numel() const { return get().numel; }
  const Dims& strides() const { return get().strides; }  // in elements, never negative
  std::int64_t offset() const { return get().offset; }   // in elements
  DType dtype() const { return get().dtype; }
  Device device() const { return get().storage->device(); }
  std::size_t nbytes() const { return static_cast<std::size_t>(numel()) * size_of(dtype()); }
  bool is_contiguous() const { return get().contiguous; }
  const Ref<Storage>& storage() const { return get().storage; }

  // First element. The typed form checks the dtype; both throw on meta tensors.
  void* data() const;
  template <class T>
  T* data() const {
    CAPO_CHECK(dtype() == dtype_of<T>::value, "data: tensor is ", dtype(), ", asked for ", dtype_of<T>::value);
    return static_cast<T*>(data());
  }
  // The only element, as double. Waits for the device where it is not the CPU.
  double item() const;

  const Ref<GradSlotBase>& grad_slot() const { return get().slot; }
  void set_grad_slot(Ref<GradSlotBase> slot) const { get().slot = std::move(slot); }

  // Same storage and metadata, no gradient slot, not recorded.
  Tensor detach() const;
  bool same(const Tensor& o) const { return impl_ == o.impl_; }
  // No other handle or view sees this memory: it may be overwritten in place.
  bool unique() const { return get().use_count() == 1 && storage()->use_count() == 1; }

  // Exchanges the storages of two tensors of equal shape, dtype, strides and device: how merge() and Ema swap weights.
  // Views made before keep the old storage; a gradient that saved either tensor throws when it reads it.
  void swap_storage(Tensor& other);

 private:
  struct Impl final : RefCounted {
    Ref<Storage> storage;
    Shape shape;
    Dims strides;
    std::int64_t offset = 0;
    std::int64_t numel = 0;
    DType dtype = f32;
    bool contiguous = true;
    Ref<GradSlotBase> slot;
  };
  Impl& get() const {
    CAPO_CHECK(impl_, "tensor: used while undefined");
    return *impl_;
  }
  Ref<Impl> impl_;

  friend Tensor empty(const Shape&, DType, Device);
  friend Tensor strided_view(const Tensor&, const Shape&, const Dims&, std::int64_t);
};

// Uninitialised memory. Every factory throws on sizes < 0, on 2^62 elements and on more than 2^60 bytes.
Tensor empty(const Shape& shape, DType dtype = f32, Device device = kCpu);
inline Tensor empty_like(const Tensor& t) { return empty(t.shape(), t.dtype(), t.device()); }

// A view of t's storage; offset in elements from the storage's start. Not recorded: ops build views with it.
// Throws when the view would leave the storage.
Tensor strided_view(const Tensor& t, const Shape& shape, const Dims& strides, std::int64_t offset);

// Copies host values in (CPU): from_vector<float>({1, 2, 3, 4}, {2, 2}). Here and below T is float, double, int32_t,
// int64_t or uint8_t.
template <class T>
Tensor from_vector(const std::vector<T>& values, const Shape& shape);
// Elements in row-major order, whatever the strides, converted to T. Waits for the device where it is not the CPU.
template <class T>
std::vector<T> to_vector(const Tensor& t);

// "f32 [2, 3] cpu" and, with values, the corner elements of each axis.
std::string describe(const Tensor& t);
std::string to_string(const Tensor& t);

}  // namespace capo
