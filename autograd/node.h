// The graph: nodes, edges, saved tensors, and record(), which every differentiable op ends with.
//
// A node is one op's call. Edges point to a node or to a leaf's gradient slot, never to a tensor, so the graph keeps
// alive only what gradients read (Saved). docs/autograd.md walks through one backward pass.
#pragma once

#include <capo/engine/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace capo {

using Grads = std::vector<Tensor>;  // one per edge or per output; an undefined Tensor means zero

// Which inputs want a gradient.
class Needs {
 public:
  Needs() = default;
  explicit Needs(std::uint64_t mask) : mask_(mask) {}
  bool operator[](int i) const { return i < 63 ? (mask_ >> i) & 1 : (mask_ >> 63) & 1; }  // from 63 on they share a bit
  bool any() const { return mask_ != 0; }
  std::uint64_t mask() const { return mask_; }

 private:
  std::uint64_t mask_ = 0;
};

// What a pass has summed up so far, from an input's other uses, while a node's gradient runs. A gradient that can add
// to it for nothing (a matrix product) takes it and returns the sum; what nobody takes the pass adds itself, one more
// trip through memory. Undefined when there is nothing yet, or when the gradients are themselves recorded.
class Pending {
 public:
  virtual Tensor take(int input) = 0;

 protected:
  ~Pending() = default;
};

class Node;
using GradHook = void (*)(const Tensor& leaf_grad, void* user);

// What a tensor carries: a leaf's flag, gradient and hook, or the node (and output index) that made the tensor.
class GradSlot final : public GradSlotBase {
 public:
  Shape shape;
  DType dtype = f32;
  bool requires_grad = false;  // leaves only
  Ref<Node> node;              // null for a leaf
  int output = 0;
  Tensor grad;                 // leaves: what backward() stored
  GradHook hook = nullptr;
  void* hook_user = nullptr;
};

struct Edge {
  Ref<Node> node;      // the producer, or
  Ref<GradSlot> leaf;  // the leaf; both null when the input needs nothing
  int output = 0;
  bool needed() const { return node || leaf; }
};

// What a gradient keeps: inputs with their place in the graph, outputs and own intermediates without it.
// Reading checks that nothing was changed in place, swapped or freed since, and says which op did. An input that its
// own node remakes (set_recompute, autograd.h) is not kept but made again at every reading.
class Saved {
 public:
  Saved() = default;
  Saved(std::initializer_list<Tensor> inputs, std::initializer_list<Tensor> outputs = {});
  Saved(std::vector<Tensor> inputs, std::vector<Tensor> outputs);

  // inputs first, then outputs. Undefined entries stay undefined (keep_if).
  Tensor operator[](int i) const;
  int size() const { return static_cast<int>(items_.size()); }

 private:
  friend class Node;
  friend void account_saved(const char* op, const Saved& saved);
  struct Item {
    Tensor tensor;
    const Storage* storage = nullptr;  // at that time: swap_storage() may exchange the tensor's
    std::uint32_t version = 0;
    int output = -1;   // index among the node's outputs, or -1
    bool own = false;  // second list: stored without its node
    Ref<Node> maker;   // not kept: output `made` of this node
    int made = 0;
  };
  static Tensor remade(const Item& item);
  void attach(Node* node, const std::vector<Tensor>& outputs);
  void clear() { items_.clear(), freed_ = true; }

  std::vector<Item> items_;
  Node* node_ = nullptr;
  bool freed_ = false;
};

// Whether Saved would not keep x, as an input, but have it made again.
bool remade_when_saved(const Tensor& x);

// x when its gradient is needed, else undefined: a frozen Linear keeps no input.
inline Tensor keep_if(bool need, const Tensor& x) { return need ? x : Tensor(); }

class Node : public RefCounted {
 public:
  Node(const char* op, std::vector<Edge> edges, Saved saved);

  const char* op() const { return op_; }
  std::uint64_t sequence() const { return sequence_; }
  const std::vector<Edge>& edges() const { return edges_; }
  int outputs() const { return static_cast<int>(outputs_.size()); }
  const Shape& output_shape(int i) const { return outputs_[static_cast<std::size_t>(i)].shape; }
  DType output_dtype(int i) const { return outputs_[static_cast<std::size_t>(i)].dtype; }
  Needs needs() const;

  // The gradient: one cotangent per output in, one gradient per edge out.
  virtual Grads apply(const Grads& cotangents, Needs need, Pending& pending) = 0;
  // Whether one cheap pass over what is saved makes output k again; remake() does so, without its place in the graph.
  virtual bool remakes(int) const { return false; }
  virtual Tensor remake(int output) const;
  // Frees what was saved; a later pass over the node throws.
  virtual void free_saved();
  bool freed() const { return freed_; }

  // Makes the tensors outputs of this node.
  void bind_outputs(const std::vector<Tensor>& outputs);

 protected:
  void dispose() const override;  // by work list: long chains must not overflow the stack
  Saved saved_;

 private:
  struct Output {
    Shape shape;
    DType dtype = f32;
  };
  const char* op_;
  std::uint64_t sequence_;
  std::vector<Edge> edges_;
  std::vector<Output> outputs_;
  bool freed_ = false;
};

bool grad_enabled();
// True for a trainable leaf and for anything computed from one while gradients were on.
bool requires_grad(const Tensor& t);
// Which of these tensors need a gradient now: all false under NoGrad.
Needs needs_of(std::initializer_list<Tensor> inputs);
Needs needs_of(const std::vector<Tensor>& inputs);

namespace detail {

Edge edge_of(const Tensor& t);
std::vector<Edge> edges_of(const std::vector<Tensor>& inputs);
void observe(const char* op, const Tensor& y);  // tells this thread's OpObserver (autograd.h), if there is one

// The last argument of record() where no output is remade.
struct RemakesNone {
  bool operator()(int) const { return false; }
  Tensor operator()(const Saved&, int) const { return {}; }
};

template <class F, class R>
class OpNode final : public Node {
 public:
  OpNode(const char* op, std::vector<Edge> edges, Saved saved, F f, R remake)
      : Node(op, std::move(edges), std::move(saved)), f_(f), remake_(remake) {}

  bool remakes(int output) const override { return remake_(output); }
  Tensor remake(int output) const override { return remake_(saved_, output); }

  Grads apply(const Grads& cotangents, Needs need, [[maybe_unused]] Pending& pending) override {
    if constexpr (std::is_invocable_v<F, const Saved&, const Tensor&, Needs, Pending&>)
      return f_(saved_, cotangents[0], need, pending);
    else if constexpr (std::is_invocable_v<F, const Saved&, const Tensor&, Needs>)
      return f_(saved_, cotangents[0], need);
    else
      return f_(saved_, cotangents, need);
  }

 private:
  F f_;
  R remake_;
};

}  // namespace detail

// Puts op's result on the tape when gradients are on and an input needs one; returns it. Every op ends with it whatever
// its inputs need: an OpObserver sees the result in any case.
//   y, outputs  fresh tensors without a gradient slot
//   inputs      in the order of the gradients that f returns
//   f           Grads(const Saved&, const Tensor& dy, Needs), or with const Grads& dys for several outputs; with one
//               output also Grads(const Saved&, const Tensor& dy, Needs, Pending&).
//   remake      how an output is made again from what is saved: bool(int output) says whether, Tensor(const Saved&, int
//               output) does it, in a NoGrad scope. Absent: none is.
// f and remake may hold plain values only (kernel attributes): tensors go through Saved, where they are versioned,
// counted and freed.
template <class F, class R = detail::RemakesNone>
std::vector<Tensor> record_many(const char* op, std::vector<Tensor> outputs, const std::vector<Tensor>& inputs,
                                Saved saved, F f, R remake = {}) {
  static_assert(std::is_trivially_copyable_v<F> && std::is_trivially_copyable_v<R>,
                "a gradient closure must not capture tensors: put them in Saved");
  for (const Tensor& y : outputs) detail::observe(op, y);
  if (!needs_of(inputs).any()) return outputs;
  auto node = make_ref<detail::OpNode<F, R>>(op, detail::edges_of(inputs), std::move(saved), f, remake);
  node->bind_outputs(outputs);
  return outputs;
}

template <class F, class R = detail::RemakesNone>
Tensor record(const char* op, const Tensor& y, const std::vector<Tensor>& inputs, Saved saved, F f, R remake = {}) {
  return record_many(op, {y}, inputs, std::move(saved), f, remake)[0];
}

// For results that have no gradient although an input may need one: throws by name when it does and gradients are on.
// Fused backward kernels end with it ("no second derivative"); so do argmax, one_hot, comparisons on request.
Tensor record_no_gradient(const char* op, const Tensor& y, const std::vector<Tensor>& inputs);

// Guards in-place writes: throws on tensors of the graph, and on trainable leaves while gradients are on; then bumps
// the version. A view or detach() of such a tensor is a tensor of its own and passes: only the version tells.
void write_in_place(const char* op, const Tensor& t);

}  // namespace capo
