// Segmentation with a vision transformer as the encoder, which is frozen or trained elsewhere: tokens of chosen blocks
// are laid out as maps, upsampled by transposed convolutions and joined from coarse to fine, the image itself last.
// After Hatamizadeh et al. 2022 (UNETR), in 2D; names are our own.
#pragma once

#include <capo/models/unet/blocks.h>
#include <capo/models/vit/vit.h>

#include <string>
#include <string_view>
#include <vector>

namespace capo::unet {

struct UnetrConfig {
  int classes = 2;               // background included
  std::vector<int> blocks = {};  // of the encoder whose tokens are read, ascending: log2(patch) of them; empty: evenly
                                 // spread up to the last
  std::int64_t base = 16;        // features at the image's size; doubled at each coarser level
  BlockStyle block = {};
};
// As JSON text, and back (strict).
std::string to_json(const UnetrConfig& c);
UnetrConfig unetr_config_from_json(std::string_view text, const std::string& source);

// The decoder. The encoder is no child: it is neither trained, saved, moved nor set to train() with this module.
// Whether gradients reach it, or tuners that hang on it, is the encoder's own affair: freeze it, and none is made.
class Unetr : public nn::Layer<Unetr> {
 public:
  // encoder: must outlive this; its patch a power of two, 2 or more, and of no more levels than blocks. build is the
  // decoder's; dtype and device must be the encoder's.
  Unetr(vit::Vit& encoder, const UnetrConfig& config, const nn::Build& build = {});

  // x [B, image, image, channels], the encoder's size -> logits [B, image, image, classes]. sliding_window
  // (models/segment) takes other sizes.
  Tensor forward(const Tensor& x);

  // A map of tokens to its level: each step a transposed convolution "up" and a ConvNormAct "conv".
  struct Rise : nn::Module {
    Rise(nn::Module* up, std::string_view name, const BlockStyle& style, std::int64_t in, std::int64_t out);
    Tensor operator()(const Tensor& x) { return conv(up(x)); }
    nn::ConvTranspose up;
    ConvNormAct conv;
  };
  // Up from the level below, joined with what comes from the side.
  struct Join : nn::Module {
    Join(nn::Module* up, std::string_view name, const BlockStyle& style, std::int64_t in, std::int64_t out);
    Tensor operator()(const Tensor& below, const Tensor& side);
    nn::ConvTranspose up;
    ConvStack convs;
  };

  const UnetrConfig config;  // blocks filled in
  ConvStack image;           // at full size
  std::vector<std::unique_ptr<nn::List<Rise>>>
      rises;             // rise0 (the first chosen block's, which rises most), ..; not the last
  nn::List<Join> joins;  // coarsest first
  nn::Conv out;

 private:
  vit::Vit& encoder_;
};

}  // namespace capo::unet
