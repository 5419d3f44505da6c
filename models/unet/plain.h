// The convolutional U-Net of nnU-Net, in 2D and 3D: every stage is a stack of [convolution, instance norm, leaky
// ReLU], its first convolution strided; up again by transposed convolutions; a 1x1 convolution to classes at each
// resolution. Source: Isensee et al. 2021 (nnU-Net). Parameter names, shapes and initial values are those of
// PlainConvUNet in the authors' package dynamic-network-architectures, without the second names that its state dict
// holds (decoder.encoder.*, *.all_modules.*).
#pragma once

#include <capo/models/unet/blocks.h>

#include <string>
#include <string_view>
#include <vector>

namespace capo::unet {

struct PlainStage {  // one resolution
  std::int64_t features;
  Dims kernel;            // odd
  Dims stride;            // from the stage above; 1 in the first stage
  int convs = 2;          // of the encoder
  int decoder_convs = 2;  // of the decoder; the last stage has none, whatever this says
};

struct PlainConfig {
  int channels = 1;
  int classes = 2;                 // background included
  std::vector<PlainStage> stages;  // finest first, two or more; every kernel and stride has an entry per axis, 2 or 3
  BlockStyle block = {};

  int axes() const { return stages.empty() ? 0 : stages[0].kernel.size(); }
  Dims divisor() const;  // that sizes must be multiples of: the product of all strides, per axis
};

// nnU-Net's topology for patches of this size and cubic voxels: kernels of 3, an axis is halved while that leaves 4 or
// more (and no rest), features double from `base` up to 512 in 2D and 320 in 3D.
//   PlainUnet model(plain_config({32, 48, 48}, 1, 3, 16));
PlainConfig plain_config(const Dims& patch, int channels, int classes, std::int64_t base = 32);
// As JSON text, and back (strict: unknown keys throw). "kernels" and "strides" hold `axes` numbers for each stage, one
// stage after the other.
std::string to_json(const PlainConfig& c);
PlainConfig plain_config_from_json(std::string_view text, const std::string& source);

class PlainUnet : public nn::Layer<PlainUnet> {
 public:
  explicit PlainUnet(const PlainConfig& config, const nn::Build& build = {});

  // x [B, spatial.., channels] -> logits [B, spatial.., classes]. Throws when a size is no multiple of
  // config.divisor(): sliding_window (models/segment) pads and crops.
  Tensor forward(const Tensor& x);
  // Deep supervision: the logits of each decoder stage, finest first (the first one is forward's).
  std::vector<Tensor> outputs(const Tensor& x);

  struct Encoder : nn::Module {
    Encoder(nn::Module* up, const PlainConfig& c);
    struct Stage : nn::Layer<Stage> {
      Stage(nn::Module* up, std::string_view name, const PlainConfig& c, std::int64_t in, const PlainStage& s)
          : Layer(up, name), stack(this, "0", c.block, s.convs, in, s.features, s.kernel, s.stride) {}
      Tensor forward(const Tensor& x) { return stack(x); }
      ConvStack stack;
    };
    nn::List<Stage> stages;
  };
  struct Decoder : nn::Module {  // stages coarsest first
    Decoder(nn::Module* up, const PlainConfig& c);
    nn::List<ConvStack> stages;
    nn::List<nn::ConvTranspose> transpconvs;
    nn::List<nn::Conv> seg_layers;
  };

  const PlainConfig config;
  Encoder encoder;
  Decoder decoder;

 private:
  std::vector<Tensor> run(const Tensor& x, bool supervise);
};

}  // namespace capo::unet
