// Decoders over the maps of any encoder, 2D: nearest-neighbour upsampling, concatenation, two [3x3 convolution, batch
// norm, ReLU]. Names, shapes and initial values are those of the public segmentation-models-pytorch (Unet and
// UnetPlusPlus).
#pragma once

#include <capo/models/nn/conv_layers.h>

#include <memory>
#include <string_view>
#include <vector>

namespace capo::unet {

// relu(norm(conv(x))): children "0" and "1".
class ConvNormRelu : public nn::Layer<ConvNormRelu> {
 public:
  ConvNormRelu(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t out);
  Tensor forward(const Tensor& x) { return norm.after(conv, x, Activation::relu); }
  nn::Conv conv;
  nn::BatchNorm norm;
};

// conv2(conv1([x twice as large, skips..])).
class UpBlock : public nn::Module {
 public:
  UpBlock(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t skip, std::int64_t out);
  Tensor operator()(const Tensor& x, const std::vector<Tensor>& skips);
  ConvNormRelu conv1, conv2;
};

// maps: [B, h, w, C_i] from fine to coarse, each half as large as the one before, two or more -> [B, 2h, 2w, last of
// `widths`], twice as large as the finest.
//   unet      a row of blocks "blocks.0", .. (coarsest first), each with one skip; the last one has none
//   plusplus  U-Net++ (Zhou et al. 2018): block "blocks.x_d_l" reads x_d_(l-1) and the skips x_(d+1)_l, .., x_l_l and
//   map l + 1,
//             maps counted from the coarsest, 0
class PyramidDecoder : public nn::Module {
 public:
  // channels: of the maps, fine to coarse; widths: of the row x_0, as many as maps, coarsest first.
  PyramidDecoder(nn::Module* up, std::string_view name, std::vector<std::int64_t> channels,
                 const std::vector<int>& widths, bool plusplus);
  Tensor operator()(const std::vector<Tensor>& maps);

 private:
  UpBlock& add(std::int64_t in, std::int64_t skip, std::int64_t out, const std::string& name);
  UpBlock& dense(int d, int l) { return *dense_[static_cast<std::size_t>(d)][static_cast<std::size_t>(l - d)]; }
  Tensor unet(const std::vector<Tensor>& from_coarse);
  Tensor plusplus(const std::vector<Tensor>& from_coarse);

  const bool plusplus_;
  const int maps_;
  nn::Module blocks_;
  std::vector<std::unique_ptr<UpBlock>> owned_;
  std::vector<UpBlock*> row_;                 // unet
  std::vector<std::vector<UpBlock*>> dense_;  // plusplus: [d][l - d]
};

}  // namespace capo::unet
