// The U-Nets, their losses and SGD against PyTorch: tests/golden/make_unet_golden.py says what the files hold.
#include <doctest/doctest.h>

#include <capo/autograd/autograd.h>
#include <capo/models/segment/losses.h>
#include <capo/models/train/optim.h>
#include <capo/models/unet/classic.h>
#include <capo/models/unet/plain.h>
#include <capo/models/unet/resnet_unet.h>
#include <capo/ops/copy.h>
#include <capo/ops/view.h>
#include <capo/tests/golden_file.h>

#include <string>
#include <vector>

using namespace capo;

namespace {

std::vector<Tensor> outputs_of(unet::PlainUnet& m, const Tensor& x) { return m.outputs(x); }
std::vector<Tensor> outputs_of(unet::ClassicUnet& m, const Tensor& x) { return {m(x)}; }
std::vector<Tensor> outputs_of(unet::ResnetUnet& m, const Tensor& x) { return {m(x)}; }
int channels_of(const unet::PlainConfig& c) { return c.channels; }
int channels_of(const unet::ClassicConfig& c) { return c.channels; }
int channels_of(const unet::ResnetUnetConfig& c) { return c.encoder.channels; }

Tensor loss_of(const std::vector<Tensor>& logits, const Tensor& labels) {
  return segment::deep_supervision_loss(logits, labels,
                                        [](const Tensor& z, const Tensor& y) { return segment::dice_ce_loss(z, y); });
}

Dims channels_last(int rank) {  // of a file's [B, C, spatial..]
  Dims d{0};
  for (int i = 2; i < rank; ++i) d.push_back(i);
  d.push_back(1);
  return d;
}
Dims channels_first(int rank) {
  Dims d{0, rank - 1};
  for (int i = 1; i + 1 < rank; ++i) d.push_back(i);
  return d;
}
std::vector<double> file_layout(const Tensor& image) {
  return to_vector<double>(permute(image, channels_first(image.rank())));
}

template <class Model, class Config>
golden::Run run(const Config& config, const Dims& size, DType dtype) {
  Model model(config, {.dtype = dtype});
  nn::StateDict weights;
  for (nn::Parameter* p : model.parameters())
    weights.push_back({p->path(), golden::make(p->path(), nn::file_shape(p->value().shape(), p->layout()))});
  nn::load_state(model, weights, {.skip = {"**.running_*"}});
  model.train();

  Shape shape{2, channels_of(config)}, pixels{2};
  for (auto n : size) shape.push_back(n), pixels.push_back(n);
  const Tensor x = cast(contiguous(permute(golden::make("input", shape), channels_last(shape.size()))), dtype);
  std::vector<std::int64_t> labels(static_cast<std::size_t>(numel(pixels)));
  for (std::size_t i = 0; i < labels.size(); ++i)
    labels[i] = static_cast<std::int64_t>(golden::splitmix64(stream_of("labels") + i) %
                                          static_cast<std::uint64_t>(config.classes));
  const Tensor y = from_vector(labels, pixels);

  golden::Run out;
  set_requires_grad(x, true);
  const std::vector<Tensor> logits = outputs_of(model, x);
  backward(loss_of(logits, y));
  for (std::size_t i = 0; i < logits.size(); ++i) out.values["output." + std::to_string(i)] = file_layout(logits[i]);
  out.values["grad.input"] = file_layout(grad_of(x));
  for (nn::Parameter* p : model.parameters(true)) {
    if (p->is_buffer())
      out.values["running." + p->path()] = to_vector<double>(p->value());
    else if (grad_of(p->value()).defined())
      out.values["grad." + p->path()] = to_vector<double>(nn::to_file_layout(grad_of(p->value()), p->layout()));
  }

  set_requires_grad(x, false);
  train::Sgd optimizer(model, {.momentum = 0.9});
  for (int i = 0; i < 10; ++i) {
    optimizer.zero_grad();
    const Tensor loss = loss_of(outputs_of(model, x), y);
    out.losses.push_back(loss.item());
    backward(loss);
    optimizer.step(0.05);
  }
  return out;
}

template <class Model, class Config>
void check_case(const std::string& name, const Config& config, const Dims& size, double factor = 2) {
  const golden::File file(name);
  const golden::Run wide = run<Model>(config, size, f64);
  golden::check_f64(name, file, wide);
  golden::check_f32(name, file, wide, run<Model>(config, size, f32), factor);
}

}  // namespace

TEST_CASE("the classic U-Net agrees with PyTorch") {
  check_case<unet::ClassicUnet>(
      "unet_classic", unet::ClassicConfig{.channels = 3, .classes = 2, .base = 4, .depth = 2, .batch_norm = true},
      {12, 16});
}

TEST_CASE("nnU-Net's 2D U-Net agrees with PyTorch") {
  const unet::PlainConfig c{
      .channels = 1,
      .classes = 3,
      .stages = {{6, {3, 3}, {1, 1}, 2, 1}, {8, {3, 3}, {2, 2}, 1, 2}, {12, {3, 3}, {2, 2}, 2, 1}}};
  check_case<unet::PlainUnet>("unet_plain_2d", c, {24, 16});
}

TEST_CASE("nnU-Net's 3D U-Net agrees with PyTorch") {
  const unet::PlainConfig c{
      .channels = 2,
      .classes = 3,
      .stages = {{4, {1, 3, 3}, {1, 1, 1}}, {6, {3, 3, 3}, {1, 2, 2}}, {8, {3, 3, 3}, {2, 2, 2}}}};
  check_case<unet::PlainUnet>("unet_plain_3d", c, {4, 12, 8});
}

TEST_CASE("U-Net and U-Net++ on a ResNet agree with PyTorch") {
  unet::ResnetUnetConfig c;
  c.encoder.blocks.assign(4, 1);
  c.widths.assign({16, 12, 8, 8, 4});
  // Batch norm's sums are f32 here and f64 in PyTorch: in 174 keys one comes to 2.2 times its error.
  check_case<unet::ResnetUnet>("unet_resnet", c, {64, 96}, 3);
  c.plusplus = true;
  check_case<unet::ResnetUnet>("unetpp_resnet", c, {64, 96}, 3);
}
