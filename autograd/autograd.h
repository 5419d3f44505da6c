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

 private:
  bool before_;
};
// Recording on again inside a NoGrad scope (checkpointing, create_graph).
class WithGrad {
 public:
  WithGrad();
  ~WithGrad();

 private:
  bool before_;
};

// Makes t a trainable leaf (or a frozen one). Throws on a tensor that an op made, and on non-floating dtypes.
void set_requires_grad(const Tensor& t, bool value);
// What backward() left on a leaf; undefined before.
Tensor grad_of(const Tensor& leaf);
void set_grad(const Tensor& leaf, const Tensor& grad);
inline void clear_grad(const Tensor& leaf) { set_grad(leaf, Tensor()); }

// Calls hook(gradient, user) once per backward() when the leaf's gradient is complete (its last use), in place of
// storing it: an optimiser may step and free it at once. nullptr removes it.
void on_grad(const Tensor& leaf, GradHook hook, void* user);

struct GradOptions {
  bool keep_graph = false;    // another pass over the same graph will follow
  bool create_graph = false;  // the gradients are themselves differentiable (implies keep_graph)
};

// Gradients of sum_i <outputs[i], cotangents[i]> with respect to inputs (leaves or any tensor on the graph), in the
// order of inputs; undefined where an output does not depend on the input. Leaves' own slots are not touched.
// cotangents: same shapes as outputs; may be left out when every output has one element (then ones).
std::vector<Tensor> grad(const std::vector<Tensor>& outputs, const std::vector<Tensor>& inputs,
                         const std::vector<Tensor>& cotangents = {}, GradOptions options = {});

// grad() for every trainable leaf, added into the leaves' slots.
void backward(const Tensor& output, const Tensor& cotangent = {}, GradOptions options = {});

// True while a checkpointed segment is being recomputed: buffers (batch-norm statistics) must not be updated again.
bool replaying();

// Runs `segment` without keeping anything but its inputs; its gradient runs it again. `parameters` are the trainable
// tensors used inside (they become edges; with a frozen input they are the only ones). Random draws repeat exactly.
// The segment is called with as many tensors as `inputs` and must not change state besides buffers guarded by
// replaying().
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

// Names the module that is running on this thread, for accounting and error texts. Nested scopes replace each other.
class ModuleScope {
 public:
  explicit ModuleScope(const std::string* path);
  ~ModuleScope();

 private:
  const std::string* before_;
};
const std::string& current_module();

// The three computations autograd itself needs; ops/ defines them.
struct AutogradOps {
  Tensor (*add)(const Tensor&, const Tensor&);         // recorded
  void (*add_in_place)(const Tensor&, const Tensor&);  // first += second
  Tensor (*ones_like)(const Tensor&);
};
extern const AutogradOps autograd_ops;

}  // namespace capo
