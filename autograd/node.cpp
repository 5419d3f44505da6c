#include <capo/autograd/autograd.h>
#include <capo/autograd/node.h>
#include <capo/engine/profile_internal.h>

#include <atomic>

namespace capo {

void account_saved(const char* op, const Saved& saved);  // memory.cpp

namespace {
std::atomic<std::uint64_t> next_sequence{1};
std::atomic<bool> recomputes{true};

const GradSlot* slot_of(const Tensor& t) { return static_cast<const GradSlot*>(t.grad_slot().get()); }

// y in its place in the graph: output k of a node.
Tensor linked_to(const Tensor& y, Node* node, int k) {
  Tensor linked = y.detach();
  auto slot = make_ref<GradSlot>();
  slot->shape = linked.shape();
  slot->dtype = linked.dtype();
  slot->node = Ref<Node>(node);
  slot->output = k;
  linked.set_grad_slot(slot);
  return linked;
}
}  // namespace

bool recompute() { return recomputes.load(std::memory_order_relaxed); }
void set_recompute(bool on) { recomputes = on; }

bool requires_grad(const Tensor& t) {
  if (!t.defined()) return false;
  const GradSlot* slot = slot_of(t);
  return slot && (slot->node || slot->requires_grad);
}

Needs needs_of(const std::vector<Tensor>& inputs) {
  std::uint64_t mask = 0;
  if (grad_enabled())
    for (std::size_t i = 0; i < inputs.size(); ++i)
      if (requires_grad(inputs[i])) mask |= std::uint64_t{1} << (i < 63 ? i : 63);
  return Needs(mask);
}
Needs needs_of(std::initializer_list<Tensor> inputs) { return needs_of(std::vector<Tensor>(inputs)); }

bool remade_when_saved(const Tensor& x) {
  const GradSlot* slot = x.defined() && recompute() ? slot_of(x) : nullptr;
  return slot && slot->node && slot->node->remakes(slot->output);
}

Saved::Saved(std::initializer_list<Tensor> inputs, std::initializer_list<Tensor> outputs)
    : Saved(std::vector<Tensor>(inputs), std::vector<Tensor>(outputs)) {}

Saved::Saved(std::vector<Tensor> inputs, std::vector<Tensor> outputs) {
  items_.reserve(inputs.size() + outputs.size());
  for (auto* list : {&inputs, &outputs})
    for (auto& t : *list) {
      Item item;
      item.own = list == &outputs;
      if (!item.own && remade_when_saved(t)) {
        const GradSlot* slot = slot_of(t);
        item.maker = slot->node;
        item.made = slot->output;
      } else {
        if (t.defined()) item.storage = t.storage().get(), item.version = item.storage->version();
        item.tensor = std::move(t);
      }
      items_.push_back(std::move(item));
    }
}

void Saved::attach(Node* node, const std::vector<Tensor>& outputs) {
  node_ = node;
  for (auto& item : items_) {
    if (!item.own || !item.tensor.defined()) continue;
    for (std::size_t k = 0; k < outputs.size(); ++k)
      if (item.tensor.same(outputs[k])) item.output = static_cast<int>(k);
    item.tensor = item.tensor.detach();  // an output must not keep its own node alive
  }
}

Tensor Saved::remade(const Item& item) {
  Tensor y;
  {
    const NoGrad off;
    y = item.maker->remake(item.made);
  }
  // create_graph: it depends on the maker's inputs.
  return grad_enabled() ? linked_to(y, item.maker.get(), item.made) : y;
}

Tensor Saved::operator[](int i) const {
  const char* op = node_ ? node_->op() : "saved";
  CAPO_CHECK(!freed_, op, ": its saved tensors were freed by an earlier backward pass; ask that pass to keep_graph");
  CAPO_CHECK(i >= 0 && i < size(), op, ": saved tensor ", i, " of ", size());
  const Item& item = items_[static_cast<std::size_t>(i)];
  if (item.maker) return remade(item);
  if (!item.tensor.defined()) return {};
  const Storage& storage = *item.tensor.storage();
  CAPO_CHECK(&storage == item.storage, op, ": a tensor ", item.tensor.shape(),
             " saved for its gradient was exchanged by swap_storage");
  CAPO_CHECK(storage.version() == item.version, op, ": a tensor ", item.tensor.shape(),
             " saved for its gradient was changed in place by ", storage.last_writer());
  // create_graph: the output depends on the inputs through this node.
  if (item.output >= 0 && grad_enabled()) return linked_to(item.tensor, node_, item.output);
  return item.tensor;
}

Node::Node(const char* op, std::vector<Edge> edges, Saved saved)
    : saved_(std::move(saved)), op_(op), sequence_(next_sequence.fetch_add(1, std::memory_order_relaxed)),
      edges_(std::move(edges)) {}

Needs Node::needs() const {
  std::uint64_t mask = 0;
  for (std::size_t i = 0; i < edges_.size(); ++i)
    if (edges_[i].needed()) mask |= std::uint64_t{1} << (i < 63 ? i : 63);
  return Needs(mask);
}

void Node::bind_outputs(const std::vector<Tensor>& outputs) {
  for (std::size_t k = 0; k < outputs.size(); ++k) {
    if (!outputs[k].defined()) {
      outputs_.emplace_back();
      continue;
    }
    CAPO_CHECK(!outputs[k].grad_slot(), op_, ": record needs fresh outputs, output ", k, " is already on the tape");
    auto slot = make_ref<GradSlot>();
    slot->shape = outputs[k].shape();
    slot->dtype = outputs[k].dtype();
    slot->node = Ref<Node>(this);
    slot->output = static_cast<int>(k);
    outputs_.push_back({outputs[k].shape(), outputs[k].dtype()});
    outputs[k].set_grad_slot(slot);
  }
  saved_.attach(this, outputs);
  account_saved(op_, saved_);
  if (detail::profiling()) detail::remember_node(sequence_, current_module());
}

Tensor Node::remake(int output) const { detail::fail(op_, ": output ", output, " is not remade"); }

void Node::free_saved() {
  saved_.clear();
  freed_ = true;
}

void Node::dispose() const {
  // The outermost call on this thread owns the list. A plain pointer leads to it: a graph in static storage may die
  // after the thread's objects.
  thread_local std::vector<const Node*>* doomed = nullptr;
  if (doomed) {
    doomed->push_back(this);
    return;
  }
  std::vector<const Node*> list{this};
  doomed = &list;
  while (!list.empty()) {
    const Node* node = list.back();
    list.pop_back();
    delete node;  // its edges and saved tensors may push more
  }
  doomed = nullptr;
}

namespace detail {

Edge edge_of(const Tensor& t) {
  Edge e;
  if (!requires_grad(t)) return e;
  const GradSlot* slot = slot_of(t);
  if (slot->node) {
    e.node = slot->node;
    e.output = slot->output;
  } else {
    e.leaf = Ref<GradSlot>(const_cast<GradSlot*>(slot));
  }
  return e;
}

std::vector<Edge> edges_of(const std::vector<Tensor>& inputs) {
  std::vector<Edge> edges;
  edges.reserve(inputs.size());
  for (const auto& t : inputs) edges.push_back(edge_of(t));
  return edges;
}

}  // namespace detail

Tensor record_no_gradient(const char* op, const Tensor& y, const std::vector<Tensor>& inputs) {
  if (!needs_of(inputs).any()) {
    detail::observe(op, y);
    return y;
  }
  // On the tape, so that only a backward pass that really asks for it throws.
  return record(op, y, inputs, Saved(), [op](const Saved&, const Tensor&, Needs) -> Grads {
    detail::fail(op, ": has no derivative (a fused backward has no second one: use its composite form)");
  });
}

void write_in_place(const char* op, const Tensor& t) {
  const GradSlot* slot = slot_of(t);
  CAPO_CHECK(!slot || !slot->node, op, ": must not write into a tensor of the graph ", t.shape());
  CAPO_CHECK(!slot || !slot->requires_grad || !grad_enabled(), op, ": writing into a trainable leaf ", t.shape(),
             " needs a NoGrad scope");
  t.storage()->bump_version(op);
}

}  // namespace capo
