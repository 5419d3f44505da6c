// Residual networks, MobileNetV2 and CCT in training mode against PyTorch (torchvision, timm):
// tests/golden/make_conv_golden.py says what the files hold.
#include <doctest/doctest.h>

#include <capo/autograd/autograd.h>
#include <capo/models/mobilenet/mobilenet.h>
#include <capo/models/resnet/resnet.h>
#include <capo/models/train/optim.h>
#include <capo/models/vit/cct.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>
#include <capo/ops/view.h>
#include <capo/tests/golden_file.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

using namespace capo;

namespace {

struct Run : golden::Run {
  std::map<std::string, std::vector<double>> means;  // running means by norm: judged by the size of what they average
};

template <class Model, class Config>
Run run(const Config& config, std::int64_t side, double lr, DType dtype) {
  Model model(config, {.dtype = dtype});
  nn::StateDict weights;
  for (nn::Parameter* p : model.parameters())
    weights.push_back({p->path(), golden::make(p->path(), nn::file_shape(p->value().shape(), p->layout()))});
  nn::load_state(model, weights, {.skip = {"**.running_*"}});
  const nn::StateDict start = nn::state_dict(model);
  model.train();

  const Tensor x = cast(contiguous(permute(golden::make("input", {4, 3, side, side}), {0, 2, 3, 1})), dtype);
  std::vector<std::int64_t> labels(4);
  for (std::size_t i = 0; i < labels.size(); ++i)
    labels[i] = static_cast<std::int64_t>(golden::splitmix64(stream_of("labels") + i) % 5);
  const Tensor y = from_vector(labels, {4});

  Run out;
  set_requires_grad(x, true);
  const Tensor logits = model(x);
  backward(cross_entropy(logits, y));
  out.values["logits"] = to_vector<double>(logits);
  out.values["grad.input"] = to_vector<double>(permute(grad_of(x), {0, 3, 1, 2}));
  for (nn::Parameter* p : model.parameters(true)) {
    if (p->name() == "running_mean")
      out.means[p->owner().path()] = to_vector<double>(p->value());
    else if (p->is_buffer())
      out.values["stat." + p->path()] = to_vector<double>(p->value());
    else
      out.values["grad." + p->path()] = to_vector<double>(nn::to_file_layout(grad_of(p->value()), p->layout()));
  }

  set_requires_grad(x, false);
  nn::load_state(model, start);
  train::Sgd optimizer(model, {.momentum = 0.9, .weight_decay = 1e-4});
  for (int i = 0; i < 10; ++i) {
    optimizer.zero_grad();
    const Tensor loss = cross_entropy(model(x), y);
    out.losses.push_back(loss.item());
    backward(loss);
    optimizer.step(lr);
  }
  model.train(false);
  const NoGrad off;
  out.values["eval"] = to_vector<double>(model(x));
  return out;
}

// The largest error of a running mean over its scale.
double mean_error(const golden::File& file, const std::string& norm, const std::vector<double>& got) {
  const auto want = file["mean." + norm];
  REQUIRE(got.size() == want.size());
  double error = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double d = std::abs(got[i] - want[i]);
    error = std::isnan(d) ? HUGE_VAL : std::max(error, d);
  }
  return error / file["mean." + norm + ".scale"][0];
}

template <class Model, class Config>
void check_case(const std::string& name, const Config& config, std::int64_t side, double lr = 0.05) {
  const golden::File file(name);
  const Run wide = run<Model>(config, side, lr, f64), narrow = run<Model>(config, side, lr, f32);
  golden::check_f64(name, file, wide);
  golden::check_f32(name, file, wide, narrow);
  for (const auto& [norm, mean] : wide.means) {
    CHECK_MESSAGE(mean_error(file, norm, mean) <= 1e-9, norm);
    const double error = mean_error(file, norm, narrow.means.at(norm)), theirs = file["f32.err.mean." + norm][0];
    CHECK_MESSAGE(error <= std::max(2 * theirs, 1e-6),
                  norm << " f32 running mean: error " << error << ", PyTorch's " << theirs);
  }
}

resnet::ResnetConfig small(bool bottleneck) {
  resnet::ResnetConfig c;
  c.blocks = {1, 2};
  c.width = 8;
  c.classes = 5;
  c.bottleneck = bottleneck;
  return c;
}

}  // namespace

TEST_CASE("ResNet of basic blocks") { check_case<resnet::Resnet>("resnet_basic", small(false), 32); }

TEST_CASE("ResNeXt of bottlenecks") {
  resnet::ResnetConfig c = small(true);
  c.groups = 4;
  c.width_per_group = 16;
  check_case<resnet::Resnet>("resnext_bottleneck", c, 32);
}

TEST_CASE("SE-ResNet-D, an odd side") {
  resnet::ResnetConfig c = small(true);
  c.squeeze = true;
  c.stem = resnet::Stem::deep;
  c.shortcut = resnet::Shortcut::pool;
  check_case<resnet::Resnet>("seresnet_d", c, 33);
}

TEST_CASE("CIFAR ResNet with option A shortcuts") {
  resnet::ResnetConfig c = small(false);
  c.blocks = {1, 2, 1};
  c.stem = resnet::Stem::cifar;
  c.shortcut = resnet::Shortcut::pad;
  check_case<resnet::Resnet>("resnet_cifar", c, 16);
}

TEST_CASE("MobileNetV2") {
  mobilenet::MobilenetConfig c;
  c.width = 0.25;
  c.classes = 5;
  check_case<mobilenet::Mobilenet>("mobilenet_v2", c, 64, 2e-4);
}

TEST_CASE("CCT") {
  vit::CctConfig c;
  c.image = 17;
  c.dim = 32;
  c.depth = 2;
  c.heads = 2;
  c.mlp_ratio = 1;
  c.convs = 2;
  c.classes = 5;
  check_case<vit::Cct>("cct", c, 17);
}
