#include <capo/autograd/autograd.h>
#include <capo/bench/gpu/models.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>
#include <capo/tuners/spec.h>

namespace capo::bench {
namespace {

constexpr double kRate = 1e-4;

vit::VitConfig config_of(const Row& row, bool tiny) {
  vit::VitConfig c = vit::config(tiny ? "vit_ti" : row.size, tiny ? 32 : row.image, tiny ? 16 : row.patch, row.classes);
  c.checkpoint = row.checkpoint;
  if (tiny) c.depth = 2;
  return c;
}

}  // namespace

const Row& row(const std::string& name) {
  std::string known;
  for (const Row& r : kRows) {
    if (name == r.name) return r;
    known += cat(" ", r.name);
  }
  detail::fail("bench: no row \"", name, "\"; there are", known);
}

TrainStep::TrainStep(const Row& row, DType dtype, Device device, bool tiny, int batch)
    : config_(config_of(row, tiny)), model_(config_, {.dtype = dtype, .device = device}) {
  tuners::apply_spec(model_, row.spec);
  model_.train();
  optimizer_ = std::make_unique<train::AdamW>(model_);
  const std::int64_t n = batch > 0 ? batch : tiny ? 4 : row.batch;
  images_ = random({n, config_.image, config_.image, 3}, dtype, device);
  std::vector<std::int64_t> labels;
  for (std::int64_t i = 0; i < n; ++i) labels.push_back(i * 37 % config_.classes);
  labels_ = to(from_vector(labels, {n}), device);
}

Tensor TrainStep::forward_backward() {
  const Tensor loss = cross_entropy(cast(model_(images_), f32), labels_);
  backward(loss);
  return loss.detach();
}

void TrainStep::infer() {
  model_.train(false);
  optimizer_.reset();
  forward_only_ = true;
}

void TrainStep::run() {
  if (forward_only_) {
    NoGrad no_grad;
    loss_ = cross_entropy(cast(model_(images_), f32), labels_);
    return;
  }
  if (graph_) {
    optimizer_->next_replay(kRate);
    graph_->replay();
    optimizer_->count_step();
    return;
  }
  loss_ = forward_backward();
  optimizer_->step(kRate);
  optimizer_->zero_grad();
}

void TrainStep::capture() {
  loss_ = Tensor();
  auto graph = std::make_unique<Graph>(images_.device());
  graph->capture([&] {
    loss_ = forward_backward();
    verdict_ = optimizer_->grad_verdict({loss_}, 0);
    optimizer_->capture_step(*graph, verdict_);
    optimizer_->zero_grad();
  });
  graph_ = std::move(graph);
}

double TrainStep::loss() { return loss_.item(); }

std::int64_t TrainStep::parameters(bool trainable) { return nn::parameter_count(model_, trainable); }

double TrainStep::flops_per_image() const {
  const double dim = static_cast<double>(config_.dim), patches = config_.tokens(), tokens = patches + config_.prefix_tokens();
  const double block = tokens * dim * dim * (4 + 2 * config_.mlp_ratio) + 2 * tokens * tokens * dim;
  const double patch = static_cast<double>(config_.patch * config_.patch * config_.channels);
  return 6 * (config_.depth * block + patches * patch * dim + dim * config_.classes);
}

}  // namespace capo::bench
