// The pictures of examples/tune.cpp: a sheet of predictions and where the model looks.
#pragma once

#include <capo/datasets/augment.h>
#include <capo/datasets/batch_source.h>
#include <capo/datasets/open.h>
#include <capo/datasets/plot.h>
#include <capo/datasets/png.h>
#include <capo/datasets/subset.h>
#include <capo/models/mobilenet/mobilenet.h>
#include <capo/models/resnet/resnet.h>
#include <capo/models/vit/load.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/index.h>
#include <capo/ops/join.h>
#include <capo/ops/matmul.h>
#include <capo/ops/reduce.h>
#include <capo/ops/softmax.h>
#include <capo/ops/view.h>

#include <cmath>
#include <string>

namespace capo::examples {

// The first n images as the model sees them: pixels for the eye, tensor for the model, where it is.
inline std::pair<std::vector<Image>, Tensor> model_inputs(const nn::Module& model, const ImageDataset& set,
                                                          const Preprocess& p, std::int64_t n) {
  std::vector<Image> images;
  const Tensor x = empty({n, p.size, p.size, 3});
  for (std::int64_t i = 0; i < n; ++i) {
    images.push_back(eval_image(set.image(i * (set.size() / n)), p));
    normalize_into(x.data<float>() + i * p.size * p.size * 3, images.back(), p);
  }
  return {images, to(x, model.build().device)};
}

// 40 test images; green: right, red: wrong, with the true class below.
template <class M>
void prediction_sheet(M& model, const ImageDataset& set, const Preprocess& p, const std::string& path) {
  const NoGrad off;
  const std::int64_t n = std::min<std::int64_t>(40, set.size());
  const auto [images, x] = model_inputs(model, set, p, n);
  const auto predicted = to_vector<std::int64_t>(argmax(model(x), -1, false));
  std::vector<Caption> captions;
  for (std::int64_t i = 0; i < n; ++i) {
    const auto truth = static_cast<std::size_t>(set.label(i * (set.size() / n))),
               guess = static_cast<std::size_t>(predicted[static_cast<std::size_t>(i)]);
    const bool right = truth == guess;
    captions.push_back(
        {right ? set.class_names()[guess] : set.class_names()[guess] + "\nnot " + set.class_names()[truth],
         right ? Color{20, 130, 60} : Color{200, 40, 40}});
  }
  write_png(path, contact_sheet(images, captions, 8, std::max(1, 96 / p.size)));
}

// Keeps q, k and the log-sum-exp of one attention.
class CoreObserver : public nn::Tap {
 public:
  AttentionOut apply(const nn::CoreSite& site) override {
    seen = site;
    return site.out;
  }
  using Tap::apply;
  nn::CoreSite seen;
};

// Eight images, and below each a map [n, h, w] over it.
inline void overlay_sheet(const std::vector<Image>& images, const Tensor& map, const std::string& path) {
  const std::vector<float> values = to_vector<float>(cast(to(map, kCpu), f32));
  const int h = static_cast<int>(map.size(1)), w = static_cast<int>(map.size(2));
  std::vector<Image> shown;
  for (const Image& image : images) shown.push_back(resize_image(image, 128, 128));
  for (std::size_t i = 0; i < images.size(); ++i)
    shown.push_back(heat_overlay(shown[i], values.data() + static_cast<std::int64_t>(i) * h * w, h, w));
  write_png(path, contact_sheet(shown, {}, static_cast<int>(images.size()), 1));
}

// Of a ViT: the last block's attention from the class token (the mean of all tokens where the model has none), averaged
// over heads.
inline void where_picture(vit::Vit& model, const ImageDataset& set, const Preprocess& p, const std::string& path) {
  const NoGrad off;
  const std::int64_t n = std::min<std::int64_t>(8, set.size());
  const auto [images, x] = model_inputs(model, set, p, n);
  CoreObserver observer;
  nn::AttentionCore& core = model.blocks[model.blocks.size() - 1].attn.core;
  core.attach_observer(&observer);
  model.tokens(x);
  core.detach_observers();
  const Tensor map =
      mean(attention_map(observer.seen.q, observer.seen.k, observer.seen.out.lse, observer.seen.scale), {1});
  const int prefix = model.config.prefix_tokens(), grid = model.config.image / model.config.patch;
  const Tensor rows = model.config.class_token ? select(map, 1, 0) : mean(map, {1});
  overlay_sheet(images, reshape(slice(rows, 1, prefix, rows.size(1)), {n, grid, grid}), path);
}

// What each place of the last map [n, h, w, C] adds to the logit of the class that is answered (class activation maps,
// Zhou et al. 2016).
inline Tensor activation_maps(const Tensor& last, const Tensor& head, const Tensor& logits) {
  const Tensor each = linear(last, head);  // [n, h, w, classes]
  const auto answers = to_vector<std::int64_t>(argmax(logits, -1, false));
  std::vector<Tensor> maps;
  for (std::size_t i = 0; i < answers.size(); ++i)
    maps.push_back(select(select(each, 0, static_cast<std::int64_t>(i)), -1, answers[i]));
  return stack(maps, 0);
}

inline void where_picture(resnet::Resnet& model, const ImageDataset& set, const Preprocess& p,
                          const std::string& path) {
  const NoGrad off;
  const auto [images, x] = model_inputs(model, set, p, std::min<std::int64_t>(8, set.size()));
  overlay_sheet(images, activation_maps(model.maps(x).back(), model.head->weight, model(x)), path);
}

// Keeps what a module made.
class OutputObserver : public nn::Tap {
 public:
  Tensor apply(const nn::Site& site) override { return seen = site.y; }
  using Tap::apply;
  Tensor seen;
};

inline void where_picture(mobilenet::Mobilenet& model, const ImageDataset& set, const Preprocess& p,
                          const std::string& path) {
  const NoGrad off;
  const auto [images, x] = model_inputs(model, set, p, std::min<std::int64_t>(8, set.size()));
  OutputObserver observer;
  model.last->attach_observer(&observer);
  const Tensor logits = model(x);
  model.last->detach_observers();
  overlay_sheet(images, activation_maps(observer.seen, model.head->weight, logits), path);
}

}  // namespace capo::examples
