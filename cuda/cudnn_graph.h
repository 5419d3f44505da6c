// Operation graphs of cuDNN 9's backend API, their plans, and running them. For cuda/cudnn*.cpp alone.
#pragma once

#include <capo/engine/dtype.h>

#include <cudnn.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

namespace capo::cudnn {

// The environment's CAPO_CUDNN; throws when it is on and the library cannot be loaded.
bool on();

cudnnDataType_t type_of(DType dtype);  // f32, bf16, f16

// One backend descriptor. Setting throws where cuDNN refuses a value; finish() says whether it takes the whole.
class Descriptor {
 public:
  explicit Descriptor(cudnnBackendDescriptorType_t type);
  Descriptor(Descriptor&& other) noexcept : p_(std::exchange(other.p_, nullptr)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(p_, other.p_);
    return *this;
  }
  ~Descriptor();

  cudnnBackendDescriptor_t get() const { return p_; }
  void set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count, const void* values);
  void set(cudnnBackendAttributeName_t name, std::int64_t value) { set(name, CUDNN_TYPE_INT64, 1, &value); }
  void set(cudnnBackendAttributeName_t name, const std::vector<std::int64_t>& values) {
    set(name, CUDNN_TYPE_INT64, static_cast<std::int64_t>(values.size()), values.data());
  }
  void set(cudnnBackendAttributeName_t name, cudnnDataType_t value) { set(name, CUDNN_TYPE_DATA_TYPE, 1, &value); }
  void set(cudnnBackendAttributeName_t name, const Descriptor& value) {
    set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value.p_);
  }
  cudnnStatus_t finish();

 private:
  cudnnBackendDescriptor_t p_ = nullptr;
};

// Operations on tensors, which are named by uids. Parts live as long as the graph. Once cuDNN has refused one, `status`
// says why and there is no plan.
class Graph {
 public:
  // bytes: what the address is a multiple of; 0: a tensor between two operations, never in memory.
  const Descriptor& tensor(std::int64_t uid, cudnnDataType_t type, const std::vector<std::int64_t>& sizes,
                           const std::vector<std::int64_t>& strides, std::int64_t bytes);
  // One f32 of the host's, which run() is given the address of.
  const Descriptor& number(std::int64_t uid);
  // Finish a description, or an operation, and keep it.
  const Descriptor& part(Descriptor d);
  void operation(Descriptor d);
  // y = x mode b in f32, or mode of x alone; returns y.
  const Descriptor& pointwise(cudnnPointwiseMode_t mode, const Descriptor& x, const Descriptor* b, const Descriptor& y);
  // Keeps what is finished.
  const Descriptor& part_done(Descriptor d);

  std::vector<const Descriptor*> operations;
  bool tensor_cores = true;  // allowed; they would round f32 operands to tf32
  cudnnStatus_t status = CUDNN_STATUS_SUCCESS;

 private:
  std::vector<std::unique_ptr<Descriptor>> parts_;
};

// What a problem depends on: kind first, dtype, sizes, alignments. The device is added.
using Key = std::array<std::int64_t, 32>;
using Data = std::initializer_list<std::pair<std::int64_t, const void*>>;  // by uid

// Runs the key's plan, made at the first call from the graph that describe(graph, problem) gives; false, having done
// nothing, when there is none.
using Describe = void (*)(Graph& graph, const void* problem);
bool run(const char* op, const Key& key, Describe describe, const void* problem, Data data, void* stream);

// The greatest power of two up to 16 that divides an address.
std::int64_t alignment(const void* p);

}  // namespace capo::cudnn
