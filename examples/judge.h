// What a model says of every image of a data set.
#pragma once

#include <capo/datasets/batch_source.h>
#include <capo/engine/files.h>
#include <capo/examples/named_model.h>
#include <capo/examples/progress.h>
#include <capo/models/train/to_device.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>

#include <cstdio>
#include <string>
#include <vector>

namespace capo::examples {

// Stated by the weights, or told; ImageNet's statistics otherwise, which the published CIFAR ResNets use as well.
inline Preprocess preprocess_of(const NamedModel& model, const std::string& weights, const std::string& told, int image) {
  Preprocess p{.mean = {0.485f, 0.456f, 0.406f}, .std = {0.229f, 0.224f, 0.225f}};
  if (!told.empty()) p = preprocess_from_json(read_file(told, 4096), told);
  else if (!model.texts.preprocess.empty()) p = preprocess_from_json(model.texts.preprocess, weights);
  if (model.image > 0) p.size = model.image;
  if (image > 0) p.size = image;
  if (told.empty() && model.texts.preprocess.empty())
    std::printf("%s states no preprocessing (see --preprocess): taken as %s\n", weights.c_str(), to_json(p).c_str());
  return p;
}

struct Judged {
  Tensor logits, labels;  // [n, classes] f32, [n] i64, on the host
};

inline Judged judge(const NamedModel& model, const DatasetPtr& set, const Preprocess& preprocess, const LoaderOptions& options, Device device) {
  LoaderSource images(set, preprocess, options);
  train::ToDevice source(images, device);
  const NoGrad off;
  std::vector<Tensor> logits, labels;
  ProgressBar bar;
  const std::int64_t batches = source.batches_per_epoch();
  for (std::int64_t i = 0; i < batches; ++i) {
    const train::Batch b = source.next();
    logits.push_back(cast(to(model.classifier->forward(b.x), kCpu), f32));
    labels.push_back(to(b.labels, kCpu));
    bar.count(i + 1, batches, "batches");
  }
  bar.clear();
  return {concat(logits, 0), concat(labels, 0)};
}

}  // namespace capo::examples
