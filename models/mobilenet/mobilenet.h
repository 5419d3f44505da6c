// MobileNetV2 with torchvision's names and shapes, and as TensorFlow's quantised file has it.
// Source of the architecture: Sandler et al. 2018.
#pragma once

#include <capo/models/nn/conv_layers.h>
#include <capo/models/nn/head.h>
#include <capo/models/nn/layers.h>
#include <capo/models/nn/model_file.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace capo::mobilenet {

struct MobilenetConfig {
  double width = 1;  // factor of all channel counts, which are rounded to multiples of 8
  int channels = 3;
  int classes = 1000;          // 0: no head, features come out
  bool norms = true;           // false: worked into convolutions with biases, for inference and tuning
  bool pad_after_only = false; // 3x3 convolutions of stride 2 pad one pixel at the bottom and right alone (TensorFlow)
  double drop = 0;             // dropout in front of the head, in training alone; never in a file
};

std::string to_json(const MobilenetConfig& c);
MobilenetConfig config_from_json(std::string_view text, const std::string& source);
// From torchvision's names and shapes; widths are tried in steps of 0.05 up to 4.
MobilenetConfig config_from_names(const std::vector<nn::NamedShape>& names);

// relu6(norm(conv(x))); children "0" and "1".
class ConvNorm : public nn::Layer<ConvNorm> {
 public:
  ConvNorm(nn::Module* up, std::string_view name, const MobilenetConfig& c, std::int64_t in, std::int64_t out,
           std::int64_t kernel, int stride, int groups);
  Tensor forward(const Tensor& x);
  std::int64_t width() const override { return conv.width(); }
  std::int64_t input_width() const override { return conv.input_width(); }
  nn::Conv conv;
  std::unique_ptr<nn::BatchNorm> norm;
};

// Inverted residual: 1x1 to `expansion` times the channels (none where it is 1), 3x3 in each channel by itself, 1x1
// without an activation; plus x where the shape stays. All below a child "conv".
class Block : public nn::Layer<Block> {
 public:
  Block(nn::Module* up, std::string_view name, const MobilenetConfig& c, std::int64_t in, std::int64_t out, int stride,
        int expansion);
  Tensor forward(const Tensor& x);
  std::int64_t width() const override { return project.width(); }
  std::int64_t input_width() const override {
    return expand ? expand->conv.input_width() : depthwise.conv.input_width();
  }
  const bool residual;
  nn::Module conv;  // container
  std::unique_ptr<ConvNorm> expand;
  ConvNorm depthwise;
  nn::Conv project;
  std::unique_ptr<nn::BatchNorm> norm;
};

class Mobilenet : public nn::Layer<Mobilenet> {
 public:
  explicit Mobilenet(const MobilenetConfig& config, const nn::Build& build = {});

  // image [B, H, W, channels], any size -> logits [B, classes] (features when classes is 0).
  Tensor forward(const Tensor& image) { return classify(features(image)); }
  // The last map's mean over space: [B, 1280] (more of widths above 1).
  Tensor features(const Tensor& image);
  Tensor classify(const Tensor& features) { return head ? (*head)(dropout(features)) : features; }

  const MobilenetConfig config;
  nn::Module body;  // "features", a container
  ConvNorm stem;
  std::vector<std::unique_ptr<Block>> blocks;  // features.1 to features.17
  std::unique_ptr<ConvNorm> last;               // features.18
  nn::Module classifier;                        // container
  nn::Dropout dropout;
  std::unique_ptr<nn::Head> head;               // classifier.1
};

struct LoadOptions {
  int classes = -1;  // -1: the file's head; 0: none; otherwise a new head of this many classes
};
struct LoadedMobilenet {
  std::unique_ptr<Mobilenet> model;
  std::string preprocess, classes;  // nn::ModelHeader
};
// A file of ours, torchvision's state dict as safetensors, or INT8 weights: tensors convNN.weight_int8 (i8, OIHW),
// convNN.scale and convNN.bias (f32, one for each output), from the stem to the classifier, with the list of layers in
// the metadata "layers"; weight = weight_int8 * scale, no norms, padding after only. Such a file's inputs are x / 127.5
// - 1, which is stated as its preprocessing. Strict, as nn::load_model.
LoadedMobilenet load_mobilenet(const std::string& path, const LoadOptions& options = {}, const nn::Build& build = {});

}  // namespace capo::mobilenet
