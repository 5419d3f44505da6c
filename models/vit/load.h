// A ViT from a weight file: ours (with its configuration in the metadata) or any timm state dict in safetensors.
#pragma once

#include <capo/engine/safetensors.h>
#include <capo/models/vit/vit.h>

#include <memory>
#include <string>

namespace capo::vit {

struct LoadOptions {
  int classes = -1;  // -1: the file's head; 0: none; otherwise a new head of this many classes
  int image = 0;     // 0: the file's; otherwise position embeddings are resized to this image size
  int patch = 0;     // 0: the file's; otherwise the patch projection is resampled to this size (see resize_patch_embed)
  int heads = 0;     // where the file does not say and the guess of config_from_names is wrong
  double drop_path = 0, patch_drop = 0;  // training only, never in a file
};

struct LoadedVit {
  std::unique_ptr<Vit> model;
  std::string preprocess;  // metadata "preprocess" (datasets::Preprocess as JSON); "" in files that have none
  std::string classes;     // metadata "classes": names, one a line; "" likewise
};

// Strict: every tensor of the file must find its place, but for the head when options.classes asks for a new one.
// dtype of the model: build.dtype, whatever the file stores.
LoadedVit load_vit(const std::string& path, const LoadOptions& options = {}, const nn::Build& build = {});

// Writes weights with their configuration, preprocessing and class names, so that load_vit needs nothing else.
void save_vit(Vit& model, const std::string& path, DType dtype, const std::string& preprocess,
              const std::string& classes, const Metadata& more = {});

// A patch projection [O, I, p, p] (file layout) for patches of another size: bicubic with antialias, rescaled by the
// ratio of the areas, so that tokens keep their size.
Tensor resize_patch_embed(const Tensor& weight, int patch);

}  // namespace capo::vit
