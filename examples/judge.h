// A network of a weight file that says what it sees in every image of a data set, and the options that tell which.
#pragma once

#include <capo/datasets/batch_source.h>
#include <capo/engine/backend.h>
#include <capo/engine/files.h>
#include <capo/examples/command_line.h>
#include <capo/examples/named_model.h>
#include <capo/examples/progress.h>
#include <capo/models/train/to_device.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>

#include <cstdio>
#include <string>
#include <vector>

namespace capo::examples {

struct JudgeOptions {
  std::string model = "", weights = "";
  std::string preprocess = "";  // a JSON file; "": what the weights state
  int image = 0, batch = 250, workers = 1;
  std::string device = "cpu";
};

inline void add_options(CLI::App& app, JudgeOptions& o) {
  app.add_option("--model", o.model, std::string("vit (any), or ") + kModelNames);
  app.add_option("--weights", o.weights, "safetensors: ours, torchvision's, timm's or akamaster's names")->required();
  app.add_option("--preprocess", o.preprocess,
                 "a JSON file (size, mean, std, crop_pct, interpolation) in place of what the weights state");
  app.add_option("--image", o.image, "input size in pixels; 0: the weights' own, else 32")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--batch", o.batch, "images at once in the network")->check(at_least_one());
  app.add_option("--workers", o.workers, "loader threads");
  app.add_option("--device", o.device, "of the network: cpu, cuda or cuda:N");
}

// Stated by the weights, or told; ImageNet's statistics otherwise, which the published CIFAR ResNets use as well.
inline Preprocess preprocess_of(const NamedModel& model, const JudgeOptions& o) {
  const std::string& stated = model.texts.preprocess;
  Preprocess p{.mean = {0.485f, 0.456f, 0.406f}, .std = {0.229f, 0.224f, 0.225f}};
  if (!o.preprocess.empty()) p = preprocess_from_json(read_file(o.preprocess, 4096), o.preprocess);
  else if (!stated.empty()) p = preprocess_from_json(stated, o.weights);
  if (model.image > 0) p.size = model.image;
  if (o.image > 0) p.size = o.image;
  if (o.preprocess.empty() && stated.empty())
    std::printf("%s states no preprocessing (see --preprocess): taken as %s\n", o.weights.c_str(), to_json(p).c_str());
  return p;
}

struct Judged {
  Tensor logits, labels;  // [n, classes] f32, [n] i64, on the host
};

struct Judge {
  explicit Judge(const JudgeOptions& o)
      : device(usable_device(o.device)),
        model(open_model(o.model, {.weights = o.weights, .image = o.image}, {.device = device})),
        preprocess(preprocess_of(model, o)),
        loading{.batch_size = o.batch, .workers = o.workers} {}

  Judged operator()(const DatasetPtr& set) const {
    LoaderSource images(set, preprocess, loading);
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

  Device device;
  NamedModel model;
  Preprocess preprocess;
  LoaderOptions loading;
};

}  // namespace capo::examples
