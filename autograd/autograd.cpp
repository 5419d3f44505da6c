// The backward pass: a heap of nodes by descending sequence number (consumers are newer than producers), so there is
// no topological sort and no recursion, and the order of every sum is fixed.
#include <capo/autograd/autograd.h>
#include <capo/engine/profile_internal.h>

#include <algorithm>
#include <queue>
#include <unordered_map>

namespace capo {
namespace {

thread_local bool recording = true;

GradSlot* slot_of(const Tensor& t) { return static_cast<GradSlot*>(t.grad_slot().get()); }

GradSlot& leaf_slot(const char* op, const Tensor& t) {
  if (!t.grad_slot()) {
    auto slot = make_ref<GradSlot>();
    slot->shape = t.shape();
    slot->dtype = t.dtype();
    t.set_grad_slot(slot);
  }
  GradSlot& slot = *slot_of(t);
  CAPO_CHECK(!slot.node, op, ": needs a leaf, got a tensor ", t.shape(), " that ", slot.node->op(), " made");
  return slot;
}

// sum += g, in place when nobody else sees the sum. differentiable: recorded, whatever the caller's scope.
void accumulate(Tensor& sum, const Tensor& g, bool differentiable) {
  if (!g.defined()) return;
  if (!sum.defined()) {
    sum = g;
  } else if (differentiable) {
    const WithGrad on;
    sum = autograd_ops.add(sum, g);
  } else if (sum.unique() && sum.is_contiguous() && !requires_grad(sum)) {  // an earlier pass may have recorded it
    autograd_ops.add_in_place(sum, g);
  } else {
    sum = autograd_ops.add(sum, g);
  }
}

// One backward pass. All its state but the leaves' slots is local: passes may nest (checkpointing) and run on several
// threads, those of backward() when they share no leaf.
class Pass {
 public:
  Pass(const std::vector<Tensor>& outputs, GradOptions options) : options_(options) {
    options_.keep_graph |= options_.create_graph;
    for (const auto& t : outputs) {
      CAPO_CHECK(requires_grad(t), "grad: an output ", describe(t),
                 " does not depend on anything that needs a gradient");
      if (Node* node = slot_of(t)->node.get()) roots_.push_back(node);
    }
  }

  // Asks for the gradient of t; results land in captured()[index of the call].
  void want(const Tensor& t) {
    captured_.emplace_back();
    if (!t.grad_slot()) return;
    GradSlot* slot = slot_of(t);
    if (slot->node)
      wanted_outputs_[slot->node.get()].push_back({slot->output, captured_.size() - 1});
    else
      wanted_leaves_[slot].push_back(captured_.size() - 1);
  }
  void want_all_leaves() { all_leaves_ = true; }

  void run(const std::vector<Tensor>& outputs, const std::vector<Tensor>& cotangents) {
    const detail::TimedBackward timed;
    explore();
    for (const auto& t : outputs)  // an output that is itself a leaf: its seed is one more use
      if (const Edge e = detail::edge_of(t); e.leaf && wants(e)) count_use(e.leaf.get());
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      Tensor seed = cotangents.empty() ? Tensor() : cotangents[i];
      if (!seed.defined()) {
        CAPO_CHECK(outputs[i].numel() == 1, "grad: output ", outputs[i].shape(),
                   outputs[i].numel() ? " has more than one element and needs a cotangent"
                                      : " is empty and needs a cotangent");
        seed = autograd_ops.ones_like(outputs[i]);
      }
      CAPO_CHECK(seed.shape() == outputs[i].shape(), "grad: cotangent must be ", outputs[i].shape(),
                 " like its output, got ", seed.shape());
      CAPO_CHECK(seed.dtype() == outputs[i].dtype() && seed.device() == outputs[i].device(), "grad: cotangent must be ",
                 outputs[i].dtype(), " on ", outputs[i].device(), " like its output, got ", describe(seed));
      deliver(detail::edge_of(outputs[i]), seed, "grad");
    }
    while (!heap_.empty()) {
      Node* node = heap_.top();
      heap_.pop();
      step(node);
    }
    for (GradSlot* slot : leaf_order_) finish_leaf(*slot, leaves_[slot]);
  }

  const std::vector<Tensor>& captured() const { return captured_; }

 private:
  struct Newest {
    bool operator()(const Node* a, const Node* b) const { return a->sequence() < b->sequence(); }
  };
  struct NodeState {
    Grads cotangents;
    bool leads_on = false;  // an edge leads to something wanted
    bool queued = false;
  };
  struct LeafState {
    Tensor sum;
    std::int64_t uses = 0;  // edges that may still deliver
    bool done = false;
  };
  struct Capture {
    int output;
    std::size_t index;
  };

  // The sums that wait at the ends of one node's edges.
  class Started final : public Pending {
   public:
    Started(Pass& pass, const std::vector<Edge>& edges) : pass_(pass), edges_(edges) {}
    Tensor take(int input) override {
      const Edge& e = edges_[static_cast<std::size_t>(input)];
      if (pass_.options_.create_graph || !pass_.wants(e)) return {};
      if (e.leaf) return std::exchange(pass_.leaves_[e.leaf.get()].sum, Tensor());
      Grads& waiting = pass_.states_[e.node.get()].cotangents;
      return waiting.empty() ? Tensor() : std::exchange(waiting[static_cast<std::size_t>(e.output)], Tensor());
    }

   private:
    Pass& pass_;
    const std::vector<Edge>& edges_;
  };

  bool wants(const Edge& e) const {
    if (e.leaf) return all_leaves_ || wanted_leaves_.count(e.leaf.get());
    if (!e.node) return false;
    auto it = states_.find(e.node.get());
    return it != states_.end() && (it->second.leads_on || wanted_outputs_.count(e.node.get()));
  }

  // Finds the nodes below the outputs and which of them lead to something wanted; counts the uses of each leaf.
  void explore() {
    std::vector<Node*> order, todo = roots_;
    while (!todo.empty()) {
      Node* node = todo.back();
      todo.pop_back();
      if (!states_.try_emplace(node).second) continue;
      order.push_back(node);
      for (const auto& e : node->edges())
        if (e.node) todo.push_back(e.node.get());
    }
    std::sort(order.begin(), order.end(), [](Node* a, Node* b) { return a->sequence() < b->sequence(); });
    for (Node* node : order) {
      auto& state = states_[node];
      for (const auto& e : node->edges()) state.leads_on |= wants(e);
      if (!state.leads_on) continue;
      for (const auto& e : node->edges())
        if (e.leaf && wants(e)) count_use(e.leaf.get());
    }
  }

  void count_use(GradSlot* leaf) {
    if (leaves_[leaf].uses++ == 0) leaf_order_.push_back(leaf);
  }

  void deliver(const Edge& e, const Tensor& g, const char* from) {
    if (e.leaf) {
      if (!wants(e)) return;
      auto& state = leaves_[e.leaf.get()];
      check(g, e.leaf->shape, e.leaf->dtype, from);
      accumulate(state.sum, g, options_.create_graph);
      if (--state.uses == 0) finish_leaf(*e.leaf, state);
      return;
    }
    if (!e.node || !g.defined()) return;
    auto it = states_.find(e.node.get());
    if (it == states_.end() || !wants(e)) return;
    check(g, e.node->output_shape(e.output), e.node->output_dtype(e.output), from);
    auto& state = it->second;
    if (state.cotangents.empty()) state.cotangents.resize(static_cast<std::size_t>(e.node->outputs()));
    accumulate(state.cotangents[static_cast<std::size_t>(e.output)], g, options_.create_graph);
    if (!state.queued) {
      state.queued = true;
      heap_.push(e.node.get());
    }
  }

  static void check(const Tensor& g, const Shape& shape, DType dtype, const char* from) {
    if (!g.defined()) return;
    CAPO_CHECK(g.shape() == shape, from, ": its gradient must be ", shape, ", got ", g.shape());
    CAPO_CHECK(g.dtype() == dtype, from, ": its gradient must be ", dtype, " like its input, got ", g.dtype());
  }

  void step(Node* node) {
    auto& state = states_[node];
    const Grads cotangents = std::move(state.cotangents);
    if (auto it = wanted_outputs_.find(node); it != wanted_outputs_.end())
      for (const auto& c : it->second) captured_[c.index] = cotangents[static_cast<std::size_t>(c.output)];
    if (!state.leads_on) return;
    CAPO_CHECK(!node->freed(), node->op(),
               ": its saved tensors were freed by an earlier backward pass; ask that pass to keep_graph");
    std::uint64_t mask = 0;
    const auto& edges = node->edges();
    for (std::size_t i = 0; i < edges.size(); ++i)
      if (wants(edges[i])) mask |= std::uint64_t{1} << (i < 63 ? i : 63);
    Grads grads;
    Started started(*this, edges);
    {
      const detail::TimedNode timed(node->op(), node->sequence());
      if (options_.create_graph) {
        const WithGrad on;
        grads = node->apply(cotangents, Needs(mask), started);
      } else {
        const NoGrad off;
        grads = node->apply(cotangents, Needs(mask), started);
      }
    }
    CAPO_CHECK(grads.size() <= edges.size(), node->op(), ": returned ", grads.size(), " gradients for ", edges.size(),
               " inputs");
    if (!options_.keep_graph) node->free_saved();
    for (std::size_t i = 0; i < edges.size(); ++i)
      deliver(edges[i], i < grads.size() ? std::exchange(grads[i], Tensor()) : Tensor(), node->op());
  }

  void finish_leaf(GradSlot& slot, LeafState& state) {
    if (state.done) return;
    state.done = true;
    if (auto it = wanted_leaves_.find(&slot); it != wanted_leaves_.end())
      for (std::size_t index : it->second) captured_[index] = state.sum;
    if (!all_leaves_ || !state.sum.defined()) return;
    if (slot.hook) {
      slot.hook(state.sum, slot.hook_user);
    } else if (slot.grad.defined()) {
      accumulate(slot.grad, state.sum, options_.create_graph);
    } else {
      slot.grad = state.sum;
    }
    state.sum = Tensor();
  }

  GradOptions options_;
  bool all_leaves_ = false;
  std::vector<Node*> roots_;
  std::unordered_map<Node*, NodeState> states_;
  std::unordered_map<GradSlot*, LeafState> leaves_;
  std::vector<GradSlot*> leaf_order_;  // of leaves_, the same in every run
  std::unordered_map<Node*, std::vector<Capture>> wanted_outputs_;
  std::unordered_map<GradSlot*, std::vector<std::size_t>> wanted_leaves_;
  std::vector<Tensor> captured_;
  std::priority_queue<Node*, std::vector<Node*>, Newest> heap_;
};

}  // namespace

bool grad_enabled() { return recording; }
NoGrad::NoGrad() : before_(std::exchange(recording, false)) {}
NoGrad::~NoGrad() { recording = before_; }
WithGrad::WithGrad() : before_(std::exchange(recording, true)) {}
WithGrad::~WithGrad() { recording = before_; }

void set_requires_grad(const Tensor& t, bool value) {
  CAPO_CHECK(!value || is_floating(t.dtype()), "set_requires_grad: needs a floating tensor, got ", t.dtype());
  leaf_slot("set_requires_grad", t).requires_grad = value;
}

Tensor grad_of(const Tensor& leaf) { return leaf.grad_slot() ? slot_of(leaf)->grad : Tensor(); }

void set_grad(const Tensor& leaf, const Tensor& grad) {
  CAPO_CHECK(!grad.defined() || grad.shape() == leaf.shape(), "set_grad: gradient must be ", leaf.shape(), ", got ",
             grad.defined() ? grad.shape() : Shape());
  CAPO_CHECK(!grad.defined() || (grad.dtype() == leaf.dtype() && grad.device() == leaf.device()),
             "set_grad: gradient must be ", leaf.dtype(), " on ", leaf.device(), " like its leaf, got ",
             describe(grad));
  leaf_slot("set_grad", leaf).grad = grad;
}

void on_grad(const Tensor& leaf, GradHook hook, void* user) {
  GradSlot& slot = leaf_slot("on_grad", leaf);
  slot.hook = hook;
  slot.hook_user = user;
}

std::vector<Tensor> grad(const std::vector<Tensor>& outputs, const std::vector<Tensor>& inputs,
                         const std::vector<Tensor>& cotangents, GradOptions options) {
  CAPO_CHECK(cotangents.empty() || cotangents.size() == outputs.size(), "grad: ", outputs.size(),
             " outputs need as many cotangents, got ", cotangents.size());
  Pass pass(outputs, options);
  for (const auto& t : inputs) {
    CAPO_CHECK(requires_grad(t), "grad: an input ", describe(t), " does not require a gradient");
    pass.want(t);
  }
  pass.run(outputs, cotangents);
  return pass.captured();
}

void backward(const Tensor& output, const Tensor& cotangent, GradOptions options) {
  Pass pass({output}, options);
  pass.want_all_leaves();
  pass.run({output}, {cotangent});
}

}  // namespace capo
