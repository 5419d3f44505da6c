// A U-Net, or U-Net++, on a residual network: the encoder's weights load from any torchvision file, the whole from
// segmentation-models-pytorch's Unet and UnetPlusPlus, whose names it has.
#pragma once

#include <capo/models/nn/state.h>
#include <capo/models/resnet/resnet.h>
#include <capo/models/unet/pyramid.h>

#include <string>
#include <string_view>
#include <vector>

namespace capo::unet {

struct ResnetUnetConfig {
  resnet::ResnetConfig encoder = {};                 // with a pooling stem; its classes do not count
  std::vector<int> widths = {256, 128, 64, 32, 16};  // of the decoder, coarsest first: one more than stages
  bool plusplus = false;
  int classes = 2;  // background included

  std::int64_t divisor() const { return std::int64_t{1} << (encoder.blocks.size() + 1); }
};
// As JSON text, and back (strict). "encoder" is the text of resnet::to_json.
std::string to_json(const ResnetUnetConfig& c);
ResnetUnetConfig resnet_unet_config_from_json(std::string_view text, const std::string& source);

class ResnetUnet : public nn::Layer<ResnetUnet> {
 public:
  explicit ResnetUnet(const ResnetUnetConfig& config, const nn::Build& build = {});

  // x [B, H, W, channels] -> logits [B, H, W, classes]. Throws when a size is no multiple of config.divisor():
  // sliding_window (models/segment) pads and crops.
  Tensor forward(const Tensor& x);
  // The encoder's weights from those of a ResNet (nn::state_dict or nn::read_tensors), whose classifier is left out.
  // Strict in all else.
  void load_encoder(const nn::StateDict& resnet);

  const ResnetUnetConfig config;
  resnet::Resnet encoder;  // without a head; taps hang on its parts: on the whole, forward refuses them
  PyramidDecoder decoder;
  struct Head : nn::Layer<Head> {
    Head(nn::Module* up, std::string_view name, std::int64_t in, int classes);
    Tensor forward(const Tensor& x) { return conv(x); }
    nn::Conv conv;
  } segmentation_head;
};

}  // namespace capo::unet
