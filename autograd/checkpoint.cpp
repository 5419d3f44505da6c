// Checkpointing: keep a segment's inputs, run it again for its gradient.
#include <capo/autograd/autograd.h>
#include <capo/engine/rng.h>

#include <unordered_set>

namespace capo {
namespace {

thread_local bool replay = false;

// Sets generators back to where they stood at the segment's first run, and forward again when done.
class Replay {
 public:
  explicit Replay(const std::vector<GeneratorLog::Entry>& entries) : before_(std::exchange(replay, true)) {
    for (const auto& e : entries) {
      restore_.push_back({e.generator, e.generator->seed(), e.generator->offset()});
      set(e);
    }
  }
  ~Replay() {
    for (const auto& e : restore_) set(e);
    replay = before_;
  }

 private:
  static void set(const GeneratorLog::Entry& e) {
    e.generator->reseed(e.seed);
    e.generator->set_offset(e.offset);
  }

  bool before_;
  std::vector<GeneratorLog::Entry> restore_;
};

class CheckpointNode final : public Node {
 public:
  CheckpointNode(Ref<Segment> segment, const std::vector<Tensor>& inputs, const std::vector<Tensor>& parameters,
                 std::vector<GeneratorLog::Entry> draws, const std::vector<Tensor>& all)
      : Node("checkpoint", detail::edges_of(all), Saved(inputs, {})), segment_(std::move(segment)),
        parameters_(parameters), draws_(std::move(draws)), inputs_(inputs.size()) {}

  Grads apply(const Grads& cotangents, Needs need, Pending&) override {
    CAPO_CHECK(!grad_enabled(), "checkpoint: has no second derivative");
    std::vector<Tensor> inputs, wanted, outputs, seeds;
    std::vector<std::size_t> place;
    for (std::size_t i = 0; i < inputs_; ++i) {
      const Tensor x = saved_[static_cast<int>(i)];
      inputs.push_back(x.defined() ? x.detach() : x);
      if (!need[static_cast<int>(i)]) continue;
      set_requires_grad(inputs.back(), true);
      wanted.push_back(inputs.back());
      place.push_back(i);
    }
    for (std::size_t i = 0; i < parameters_.size(); ++i)
      if (requires_grad(parameters_[i])) {
        wanted.push_back(parameters_[i]);
        place.push_back(inputs_ + i);
      }
    const Replay back(draws_);
    std::vector<Tensor> again;
    {
      const WithGrad on;
      again = segment_->run(inputs);
    }
    CAPO_CHECK(again.size() == cotangents.size(), "checkpoint: the segment returned ", cotangents.size(),
               " tensors, run again ", again.size());
    check_named(again, wanted);
    for (std::size_t k = 0; k < again.size(); ++k)
      if (cotangents[k].defined() && requires_grad(again[k])) {
        outputs.push_back(again[k]);
        seeds.push_back(cotangents[k]);
      }
    Grads grads(inputs_ + parameters_.size());
    if (outputs.empty()) return grads;
    const auto inner = grad(outputs, wanted, seeds);
    for (std::size_t i = 0; i < inner.size(); ++i) grads[place[i]] = inner[i];
    return grads;
  }

  void free_saved() override {
    Node::free_saved();
    segment_ = nullptr;
  }

 private:
  // What the segment read of the graph must be among `known`: anything else would silently get no gradient.
  void check_named(const std::vector<Tensor>& outputs, const std::vector<Tensor>& known) const {
    std::unordered_set<const Node*> seen;
    std::unordered_set<const GradSlot*> leaves;
    for (const Tensor& t : known) {
      const Edge e = detail::edge_of(t);
      if (e.node) seen.insert(e.node.get());
      if (e.leaf) leaves.insert(e.leaf.get());
    }
    std::vector<const Node*> todo;
    const auto visit = [&](const Edge& e) {
      CAPO_CHECK(!e.leaf || leaves.count(e.leaf.get()), "checkpoint: the segment reads a trainable leaf ",
                 e.leaf->shape, " that is not among its inputs and parameters");
      if (!e.node || !seen.insert(e.node.get()).second) return;
      CAPO_CHECK(e.node->sequence() > sequence(), "checkpoint: the segment reads a tensor that ", e.node->op(),
                 " made outside of it and that is not among its inputs and parameters");
      todo.push_back(e.node.get());
    };
    for (const Tensor& y : outputs) visit(detail::edge_of(y));
    while (!todo.empty()) {
      const Node* node = todo.back();
      todo.pop_back();
      for (const Edge& e : node->edges()) visit(e);
    }
  }

  Ref<Segment> segment_;
  std::vector<Tensor> parameters_;
  std::vector<GeneratorLog::Entry> draws_;
  std::size_t inputs_;
};

}  // namespace

bool replaying() { return replay; }

std::vector<Tensor> checkpoint(Ref<Segment> segment, const std::vector<Tensor>& inputs,
                               const std::vector<Tensor>& parameters) {
  std::vector<Tensor> all = inputs;
  all.insert(all.end(), parameters.begin(), parameters.end());
  if (!needs_of(all).any()) return segment->run(inputs);
  for (const Tensor& p : parameters)
    if (const Edge e = detail::edge_of(p); e.node)
      CAPO_CHECK(false, "checkpoint: parameters must be leaves, got a tensor ", p.shape(), " that ", e.node->op(),
                 " made: it belongs among the inputs");
  std::vector<Tensor> outputs;
  std::vector<GeneratorLog::Entry> draws;
  {
    const NoGrad off;
    const GeneratorLog log;
    outputs = segment->run(inputs);
    draws = log.entries();
  }
  for (auto& y : outputs) y = y.detach();
  auto node = make_ref<CheckpointNode>(std::move(segment), inputs, parameters, std::move(draws), all);
  node->bind_outputs(outputs);
  return outputs;
}

}  // namespace capo
