// The 2D U-Net of Ronneberger et al. 2015 with padded convolutions, so that the logits have the image's size: two
// 3x3 convolutions with ReLU per level (batch norm between, optionally), 2x2 max pooling down, 2x2 transposed
// convolutions up. Names and shapes are those of the public PyTorch-UNet (github.com/milesial/Pytorch-UNet), which
// has batch norm and no convolution biases; without batch norm the convolutions have biases, as in the paper, and
// double_conv holds them at 0 and 2.
#pragma once

#include <capo/models/nn/conv_layers.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace capo::unet {

struct ClassicConfig {
  int channels = 1;
  int classes = 2;         // background included
  std::int64_t base = 64;  // features of the first level; doubled by each further one
  int depth = 4;           // poolings
  bool batch_norm = false;

  std::int64_t divisor() const { return std::int64_t{1} << depth; }
};

// As JSON text, and back (strict: unknown keys throw).
std::string to_json(const ClassicConfig& c);
ClassicConfig classic_config_from_json(std::string_view text, const std::string& source);

// relu(norm(conv(x))), twice.
class DoubleConv : public nn::Layer<DoubleConv> {
 public:
  DoubleConv(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t out, bool batch_norm);
  Tensor forward(const Tensor& x);

 private:
  struct Sequence : nn::Module {
    Sequence(nn::Module* up, std::int64_t in, std::int64_t out, bool batch_norm);
    nn::Conv conv1;
    std::unique_ptr<nn::BatchNorm> norm1;
    nn::Conv conv2;
    std::unique_ptr<nn::BatchNorm> norm2;
  } double_conv;
};

class ClassicUnet : public nn::Layer<ClassicUnet> {
 public:
  explicit ClassicUnet(const ClassicConfig& config, const nn::Build& build = {});

  // x [B, H, W, channels] -> logits [B, H, W, classes]. Throws when a size is no multiple of config.divisor():
  // sliding_window (models/segment) pads and crops.
  Tensor forward(const Tensor& x);

  struct Down : nn::Layer<Down> {
    Down(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t out, bool batch_norm);
    Tensor forward(const Tensor& x);
    struct Sequence : nn::Module {
      Sequence(nn::Module* up, std::int64_t in, std::int64_t out, bool batch_norm)
          : Module(up, "maxpool_conv"), conv(this, "1", in, out, batch_norm) {}
      DoubleConv conv;
    } maxpool_conv;
  };
  struct Up : nn::Module {
    Up(nn::Module* parent, std::string_view name, std::int64_t in, std::int64_t out, bool batch_norm);
    nn::ConvTranspose up;
    DoubleConv conv;  // of [skip, up]
  };
  struct Out : nn::Layer<Out> {
    Out(nn::Module* up, std::string_view name, std::int64_t in, int classes)
        : Layer(up, name, nn::Kind::head), conv(this, "conv", in, classes, {1, 1}) {}
    Tensor forward(const Tensor& x) { return conv(x); }
    nn::Conv conv;
  };

  const ClassicConfig config;
  DoubleConv inc;
  std::vector<std::unique_ptr<Down>> downs;  // down1, down2, ..
  std::vector<std::unique_ptr<Up>> ups;      // up1, up2, ..; coarsest first
  std::unique_ptr<Out> outc;
};

}  // namespace capo::unet
