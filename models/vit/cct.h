// Compact convolutional transformers: convolutions make the tokens, a learned weighted mean of them feeds the head, and
// between the two stand ViT's blocks. Source: Hassani et al. 2021 (their blocks add a norm on the residual path; these
// do not).
#pragma once

#include <capo/models/nn/conv_layers.h>
#include <capo/models/nn/model_file.h>
#include <capo/models/vit/vit.h>

#include <memory>
#include <string>
#include <string_view>

namespace capo::vit {

struct CctConfig {
  int image = 32;   // square input, pixels
  int channels = 3;
  std::int64_t dim = 256;
  int depth = 7;
  int heads = 4;
  double mlp_ratio = 2;
  int convs = 1;    // of the tokeniser, each with ReLU and max pooling 3x3 / 2; all but the last make 64 channels
  int kernel = 3;   // their side, odd; stride max(1, kernel / 2 - 1), padding kernel / 2
  int classes = 1000;     // 0: no head, features come out
  double norm_eps = 1e-6;
  double drop_path = 0;   // of the last block; grows linearly over depth; never in a file

  int stride() const { return kernel / 2 > 2 ? kernel / 2 - 1 : 1; }
  int grid() const;  // side of the tokens' grid
};

// "cct_7_3x1": blocks, kernel, convolutions; 2 and 4 blocks are 128 wide, 6 and 7 256, 14 384, as published.
CctConfig cct_config(std::string_view name, int image, int classes);
std::string to_json(const CctConfig& c);
CctConfig cct_from_json(std::string_view text, const std::string& source);  // strict

// image -> [B, h, w, dim]; child conv_layers.i.0 holds the i-th convolution.
class ConvTokenizer : public nn::Layer<ConvTokenizer> {
 public:
  ConvTokenizer(nn::Module* up, std::string_view name, const CctConfig& c);
  Tensor forward(const Tensor& image);

  struct Step : nn::Module {  // container
    Step(nn::Module* up, std::string_view name, const CctConfig& c, std::int64_t in, std::int64_t out);
    nn::Conv conv;
  };
  nn::List<Step> conv_layers;
};

class Cct : public nn::Layer<Cct> {
 public:
  explicit Cct(const CctConfig& config, const nn::Build& build = {});

  // image [B, image, image, channels] -> logits [B, classes] (features [B, dim] when classes is 0).
  Tensor forward(const Tensor& image) { return classify(features(image)); }
  // After the last block and norm: [B, N, dim].
  Tensor tokens(const Tensor& image);
  // Their mean weighted by softmax(attention_pool(tokens)): [B, dim].
  Tensor features(const Tensor& image);
  Tensor classify(const Tensor& features) { return head ? (*head)(features) : features; }
  int heads() const override { return config.heads; }
  std::int64_t width() const override { return config.dim; }

  const CctConfig config;
  ConvTokenizer tokenizer;
  nn::Parameter pos_embed;  // [1, N, dim]
  nn::List<Block> blocks;
  nn::LayerNorm norm;
  nn::Linear attention_pool;  // dim -> 1
  std::unique_ptr<nn::Head> head;
};

struct LoadedCct {
  std::unique_ptr<Cct> model;
  std::string preprocess, classes;  // nn::ModelHeader
};
// A file of ours: its configuration stands in it. classes: -1: the file's head; 0: none; otherwise a new one.
LoadedCct load_cct(const std::string& path, int classes = -1, const nn::Build& build = {});

}  // namespace capo::vit
