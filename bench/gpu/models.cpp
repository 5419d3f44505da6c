#include <capo/autograd/autograd.h>
#include <capo/bench/gpu/models.h>
#include <capo/models/mobilenet/mobilenet.h>
#include <capo/models/nn/batch_norms.h>
#include <capo/models/resnet/resnet.h>
#include <capo/models/unet/plain.h>
#include <capo/models/vit/vit.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>
#include <capo/ops/view.h>
#include <capo/tuners/spec.h>

namespace capo::bench {
namespace {

constexpr double kRate = 1e-4;

struct Built {
  std::unique_ptr<nn::Module> module;
  std::function<Tensor(const Tensor&)> forward;
  Shape image;  // one, with its channels
};

// Multiply-adds that convolutions do for what passes through them.
class Counter : public nn::Tap {
 public:
  explicit Counter(nn::Module& model) {
    for (nn::Module* m : model.modules())
      if (dynamic_cast<nn::Conv*>(m) || dynamic_cast<nn::ConvTranspose*>(m)) watch(*m);
  }
  double count = 0;

 private:
  struct Watch : nn::Tap {
    Watch(double* c, double per) : count(c), per_element(per) {}
    Tensor apply(const nn::Site& site) override {
      *count += per_element * static_cast<double>((per_input ? site.z : site.y).numel());
      return site.y;
    }
    using Tap::apply;
    double* count;
    double per_element;
    bool per_input = false;
  };
  void watch(nn::Module& m) {
    const Shape& w = m.own_parameters()[0]->value().shape();  // [out, k.., in / groups], or transposed [in, k.., out]
    double each = 1;
    for (int i = 1; i < w.size(); ++i) each *= static_cast<double>(w[i]);
    watches_.push_back(std::make_unique<Watch>(&count, each));
    watches_.back()->per_input = dynamic_cast<nn::ConvTranspose*>(&m) != nullptr;
    m.attach_observer(watches_.back().get());
  }
  std::vector<std::unique_ptr<Watch>> watches_;
};

vit::VitConfig vit_config(const Row& row, bool tiny) {
  const std::string name = row.model;
  const auto slash = name.find('/');
  vit::VitConfig c = vit::config(tiny ? "vit_ti" : name.substr(0, slash), tiny ? 32 : row.image,
                                 tiny ? 16 : std::stoi(name.substr(slash + 1)), row.classes);
  c.checkpoint = row.checkpoint;
  if (tiny) c.depth = 2;
  return c;
}

double vit_flops(const vit::VitConfig& c) {
  const double dim = static_cast<double>(c.dim), patches = c.tokens(), tokens = patches + c.prefix_tokens();
  const double block = tokens * dim * dim * (4 + 2 * c.mlp_ratio) + 2 * tokens * tokens * dim;
  const double patch = static_cast<double>(c.patch * c.patch * c.channels);
  return 6 * (c.depth * block + patches * patch * dim + dim * c.classes);
}

resnet::ResnetConfig resnet_config(const Row& row, bool tiny) {
  resnet::ResnetConfig c = resnet::config(row.model, row.classes);
  if (row.image == 32) c.stem = resnet::Stem::cifar;
  if (tiny) c.width = 8;
  return c;
}

unet::PlainConfig unet_config(const Row& row, bool tiny) {
  const std::int64_t side = tiny ? 32 : row.image;
  return row.model == std::string("unet3d") ? unet::plain_config({side, side, side}, 1, row.classes, tiny ? 4 : 32)
                                            : unet::plain_config({side, side}, 1, row.classes, tiny ? 4 : 32);
}

Built build(const Row& row, bool tiny, const nn::Build& how) {
  const std::string name = row.model;
  const std::int64_t side = tiny ? 32 : row.image;
  const auto built = [&](auto model, Shape image) {
    auto* m = model.get();
    const std::int64_t classes = row.classes;
    // Every voxel of a segmentation is a row of logits.
    return Built{std::move(model), [m, classes](const Tensor& x) { return reshape((*m)(x), {-1, classes}); }, image};
  };
  if (name.starts_with("vit")) return built(std::make_unique<vit::Vit>(vit_config(row, tiny), how), {side, side, 3});
  if (name.starts_with("resnet"))
    return built(std::make_unique<resnet::Resnet>(resnet_config(row, tiny), how), {side, side, 3});
  if (name == "mobilenet_v2")
    return built(std::make_unique<mobilenet::Mobilenet>(
                     mobilenet::MobilenetConfig{.width = tiny ? 0.25 : 1, .classes = row.classes}, how),
                 {side, side, 3});
  return built(std::make_unique<unet::PlainUnet>(unet_config(row, tiny), how),
               name == "unet3d" ? Shape{side, side, side, 1} : Shape{side, side, 1});
}

Shape batch_of(std::int64_t n, const Shape& image) {
  Shape s{n};
  for (auto d : image) s.push_back(d);
  return s;
}

double flops_of(const Row& row, bool tiny) {
  if (std::string(row.model).starts_with("vit")) return vit_flops(vit_config(row, tiny));
  const Built b = build(row, tiny, {.device = kMeta});
  Counter counter(*b.module);
  const NoGrad off;
  b.forward(empty(batch_of(1, b.image), f32, kMeta));
  b.module->detach_observers();
  return 6 * counter.count;
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

TrainStep::TrainStep(const Row& row, DType dtype, Device device, bool tiny, int batch) : flops_(flops_of(row, tiny)) {
  Built b = build(row, tiny, {.dtype = dtype, .device = device});
  model_ = std::move(b.module);
  forward_ = std::move(b.forward);
  tuners::apply_spec(*model_, row.spec);
  model_->train();
  optimizer_ = std::make_unique<train::AdamW>(*model_);
  const std::int64_t n = batch > 0 ? batch : tiny ? 4 : row.batch;
  images_ = random(batch_of(n, b.image), dtype, device);
  std::vector<std::int64_t> labels(
      static_cast<std::size_t>(std::string(row.model).starts_with("unet") ? images_.numel() : n));
  for (std::size_t i = 0; i < labels.size(); ++i) labels[i] = static_cast<std::int64_t>(i) * 37 % row.classes;
  labels_ = to(from_vector(labels, {static_cast<std::int64_t>(labels.size())}), device);
}

Tensor TrainStep::forward_loss() { return cross_entropy(cast(forward_(images_), f32), labels_); }

Tensor TrainStep::forward_backward() {
  const Tensor loss = forward_loss();
  backward(loss);
  return loss.detach();
}

void TrainStep::infer() {
  model_->train(false);
  nn::fold_batch_norms(*model_);
  optimizer_.reset();
  forward_only_ = true;
}

void TrainStep::run() {
  if (forward_only_) {
    NoGrad no_grad;
    loss_ = forward_loss();
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

std::int64_t TrainStep::parameters(bool trainable) { return nn::parameter_count(*model_, trainable); }

}  // namespace capo::bench
