// Reverse-mode differentiation: grad(), backward(), scopes, hooks, accounting.
#pragma once

#include <capo/autograd/node.h>

#include <string>
#include <vector>

namespace capo {

// No recording on this thread while alive.
class NoGrad {
 public:
  NoGrad();
  ~NoGrad();
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};
// Recording on again inside a NoGrad scope (checkpointing, create_graph).
class WithGrad {
 public:
  WithGrad();
  ~WithGrad();
  WithGrad(const WithGrad&) = delete;
  WithGrad& operator=(const WithGrad&) = delete;

 private:
  bool before_;
};

// Whether what one cheap pass makes again from tensors that are kept anyway (an activation from its argument, a norm's
// output from its input) is made again where a gradient needs it, not kept beside them. On unless set: a ViT keeps a
// third less, for 1 to 3 % of its step. Off: kept, as in PyTorch. For the whole process; what is recorded keeps the
// rule of its time. A second backward pass over part of a graph may then ask for keep_graph where it did not have to.
bool recompute();
void set_recompute(bool on);

// Makes t a trainable leaf (or a frozen one). Throws on a tensor that an op made, and on non-floating dtypes.
void set_requires_grad(const Tensor& t, bool value);
// What backward() left on a leaf; undefined before. It may share its memory with another leaf's, and have any strides.
Tensor grad_of(const Tensor& leaf);
// Replaces it; leaf's shape, dtype and device, or undefined.
void set_grad(const Tensor& leaf, const Tensor& grad);
inline void clear_grad(const Tensor& leaf) { set_grad(leaf, Tensor()); }

// Calls hook(gradient, user) once per backward() when the leaf's gradient is complete (its last use), in place of
// storing it: an optimiser may step and free it at once. nullptr removes it.
void on_grad(const Tensor& leaf, GradHook hook, void* user);

struct GradOptions {
  bool keep_graph = false;    // another pass over the same graph will follow
  // The gradients are themselves differentiable (implies keep_graph). With backward() the gradient in a leaf's slot
  // then leads back to the leaf: clear_grad() breaks the circle.
  bool create_graph = false;
};

// Gradients of sum_i <outputs[i], cotangents[i]> with respect to inputs (leaves or any tensor on the graph), in the
// order of inputs; undefined where an output does not depend on the input. Leaves' own slots are not touched.
// cotangents: shapes, dtypes and devices of the outputs; an undefined one, or none at all, means ones for outputs of
// one element.
std::vector<Tensor> grad(const std::vector<Tensor>& outputs, const std::vector<Tensor>& inputs,
                         const std::vector<Tensor>& cotangents = {}, GradOptions options = {});

// grad() for every trainable leaf, added into the leaves' slots. Passes on several threads at once must not share
// leaves.
void backward(const Tensor& output, const Tensor& cotangent = {}, GradOptions options = {});

// True while a checkpointed segment is being recomputed: buffers (batch-norm statistics) must not be updated again.
bool replaying();

// Runs `segment` without keeping anything but its inputs; its gradient runs it again. `parameters` are the trainable
// leaves used inside (they become edges; with a frozen input they are the only ones). Random draws repeat exactly.
// The segment is called with as many tensors as `inputs` and must not change state besides buffers guarded by
// replaying(). The backward pass throws when it read a tensor of the graph that is not named here. Generators that it
// draws from must outlive the graph.
class Segment : public RefCounted {
 public:
  virtual std::vector<Tensor> run(const std::vector<Tensor>& inputs) = 0;
};
std::vector<Tensor> checkpoint(Ref<Segment> segment, const std::vector<Tensor>& inputs,
                               const std::vector<Tensor>& parameters);

template <class F>
std::vector<Tensor> checkpoint(F f, const std::vector<Tensor>& inputs, const std::vector<Tensor>& parameters) {
  struct Call final : Segment {
    explicit Call(F fn) : f(std::move(fn)) {}
    std::vector<Tensor> run(const std::vector<Tensor>& in) override { return f(in); }
    F f;
  };
  return checkpoint(Ref<Segment>(new Call(std::move(f))), inputs, parameters);
}

// Saved bytes per (module path, op) of everything recorded on this thread while alive. Each storage counts once; those
// in `ignore` (weights) never.
class SavedBytes {
 public:
  explicit SavedBytes(const std::vector<Tensor>& ignore = {});
  ~SavedBytes();
  SavedBytes(const SavedBytes&) = delete;
  SavedBytes& operator=(const SavedBytes&) = delete;
  struct Row {
    std::string module, op;
    std::int64_t bytes = 0;
    std::int64_t tensors = 0;
  };
  std::vector<Row> rows() const;  // in order of first record
  std::int64_t total() const;

 private:
  friend void account_saved(const char* op, const Saved& saved);
  struct State;
  State* state_;
  SavedBytes* outer_;
};

// Names the module that is running on this thread, for accounting. Nested scopes replace each other; the
// path must outlive the scope.
class ModuleScope {
 public:
  explicit ModuleScope(const std::string* path);
  ~ModuleScope();
  ModuleScope(const ModuleScope&) = delete;
  ModuleScope& operator=(const ModuleScope&) = delete;

 private:
  const std::string* before_;
};
const std::string& current_module();

// Calls hook(op, result, user) for every result that an op hands to record(), record_many() or record_no_gradient() on
// this thread while alive, in order, whether it goes on the tape or not; current_module() tells where. Ops made of
// others show those. The hook must not change the result; ops that it runs are not shown; what it throws leaves the op.
// Nested observers replace each other.
class OpObserver {
 public:
  using Hook = void (*)(const char* op, const Tensor& result, void* user);
  OpObserver(Hook hook, void* user);
  ~OpObserver();
  OpObserver(const OpObserver&) = delete;
  OpObserver& operator=(const OpObserver&) = delete;

 private:
  friend void detail::observe(const char* op, const Tensor& y);
  Hook hook_;
  void* user_;
  OpObserver* outer_;
};

// The three computations autograd itself needs; ops/ defines them.
struct AutogradOps {
  Tensor (*add)(const Tensor&, const Tensor&);         // recorded
  void (*add_in_place)(const Tensor&, const Tensor&);  // first += second
  Tensor (*ones_like)(const Tensor&);
};
extern const AutogradOps autograd_ops;

}  // namespace capo
