// Residual networks with torchvision's, timm's and, for the CIFAR ones, akamaster's names and shapes.
// Source of the architecture: He et al. 2016 (ResNet; section 4.2 for CIFAR), Zagoruyko and Komodakis 2016 (wide), Xie
// et al. 2017 (ResNeXt), Hu et al. 2018 (SE), He et al. 2019 (ResNet-D).
#pragma once

#include <capo/models/nn/conv_layers.h>
#include <capo/models/nn/head.h>
#include <capo/models/nn/model_file.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace capo::resnet {

enum class Stem {
  conv7,  // 7x7 / 2, then max pooling 3x3 / 2
  deep,   // three 3x3, the first / 2, then the pooling (ResNet-D)
  cifar,  // one 3x3, no pooling
};
enum class Shortcut {  // where a block changes the shape
  conv,  // 1x1 convolution with the stride, and a norm (option B)
  pool,  // 2x2 means with the stride, then 1x1 convolution and norm (ResNet-D)
  pad,   // every second pixel, as many zero channels before as after (option A)
};

struct ResnetConfig {
  std::vector<int> blocks = {2, 2, 2, 2};  // of each stage
  bool bottleneck = false;                 // 1x1, 3x3 with the stride (v1.5), 1x1 to 4 times the width; else two 3x3
  std::int64_t width = 64;                 // of the stem and of the first stage's blocks; doubled in each further stage
  int groups = 1;                          // of a bottleneck's 3x3 convolution
  int width_per_group = 64;                // its channels: groups * floor(width * width_per_group / 64)
  Stem stem = Stem::conv7;
  Shortcut shortcut = Shortcut::conv;
  bool squeeze = false;                    // SE, reduction 16, hidden width rounded to a multiple of 8 as timm does
  int channels = 3;
  int classes = 1000;                      // 0: no head, features come out
};

// resnet18/34/50/101/152, wide_resnet50_2 and 101_2, resnext50_32x4d, resnext101_32x8d and 101_64x4d; with "se" before
// it (seresnet50) or "d" behind resnetN (resnet50d); CIFAR: resnet20/32/44/56/110.
ResnetConfig config(std::string_view name, int classes);
// As JSON text, and back (strict: unknown keys throw).
std::string to_json(const ResnetConfig& c);
ResnetConfig config_from_json(std::string_view text, const std::string& source);
// What the names and shapes of a state dict tell, which is all.
ResnetConfig config_from_names(const std::vector<nn::NamedShape>& names);

// x * sigmoid(fc2(relu(fc1(mean of x)))), for each channel of each image.
class Squeeze : public nn::Layer<Squeeze> {
 public:
  Squeeze(nn::Module* up, std::string_view name, std::int64_t dim);
  Tensor forward(const Tensor& x);
  nn::Conv fc1, fc2;
};

// A shortcut with weights: children "0" and "1" (torchvision), or, behind the pooling, "1" and "2" (timm).
class Downsample : public nn::Layer<Downsample> {
 public:
  Downsample(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t out, int stride, bool pool);
  Tensor forward(const Tensor& x);
  const bool halves;
  nn::Conv conv;
  nn::BatchNorm norm;
};

// relu(f(x) + shortcut(x)), f of two (basic) or three (bottleneck) convolutions, each with its norm.
class Block : public nn::Layer<Block> {
 public:
  Block(nn::Module* up, std::string_view name, const ResnetConfig& c, std::int64_t in, std::int64_t width, int stride);
  Tensor forward(const Tensor& x);
  std::int64_t width() const override { return out; }
  std::int64_t input_width() const override { return in; }
  const int stride;
  const std::int64_t in, out;
  nn::Conv conv1;
  nn::BatchNorm bn1;
  nn::Conv conv2;
  nn::BatchNorm bn2;
  std::unique_ptr<nn::Conv> conv3;
  std::unique_ptr<nn::BatchNorm> bn3;
  std::unique_ptr<Squeeze> se;
  std::unique_ptr<Downsample> downsample;

 private:
  Tensor shortcut(const Tensor& x);
};

// Children "0", "1", "3", "4", "6": the numbers of timm's sequence, in which 2 and 5 are ReLUs.
class DeepStem : public nn::Layer<DeepStem> {
 public:
  DeepStem(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t out);
  Tensor forward(const Tensor& x);
  nn::Conv conv0;
  nn::BatchNorm norm1;
  nn::Conv conv3;
  nn::BatchNorm norm4;
  nn::Conv conv6;
};

class Resnet : public nn::Layer<Resnet> {
 public:
  explicit Resnet(const ResnetConfig& config, const nn::Build& build = {});
  // Below another module: an encoder.
  Resnet(nn::Module* up, std::string_view name, const ResnetConfig& config);

  // image [B, H, W, channels], any size -> logits [B, classes] (features [B, C] when classes is 0).
  Tensor forward(const Tensor& image) { return classify(features(image)); }
  // What each stage makes, [B, h, w, C] from fine to coarse; in front of them the stem's, before its pooling.
  std::vector<Tensor> maps(const Tensor& image);
  // The last map's mean over space: [B, C].
  Tensor features(const Tensor& image);
  Tensor classify(const Tensor& features) { return head ? (*head)(features) : features; }

  const ResnetConfig config;
  std::unique_ptr<nn::Conv> conv1;
  std::unique_ptr<DeepStem> deep_stem;  // in its place, under the same name
  nn::BatchNorm bn1;
  std::vector<std::unique_ptr<nn::List<Block>>> stages;  // layer1, layer2, ...
  std::unique_ptr<nn::Head> head;                          // fc; of CIFAR networks: linear

 private:
  void add_stages();
  Tensor stem(const Tensor& image);
  Tensor stage(std::size_t i, Tensor x);
};

struct LoadOptions {
  int classes = -1;  // -1: the file's head; 0: none; otherwise a new head of this many classes
};
struct LoadedResnet {
  std::unique_ptr<Resnet> model;
  std::string preprocess, classes;  // nn::ModelHeader
};
// A file of ours or a published state dict as safetensors. Strict (nn::load_model); dtype: build.dtype.
LoadedResnet load_resnet(const std::string& path, const LoadOptions& options = {}, const nn::Build& build = {});

}  // namespace capo::resnet
