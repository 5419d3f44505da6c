// How a segmentation network is trained: a recipe file (JSON, strict), as the parts of the library take it.
#pragma once

#include <capo/datasets/patch_source.h>
#include <capo/engine/files.h>
#include <capo/engine/json.h>
#include <capo/models/segment/sliding_window.h>
#include <capo/models/train/trainer.h>
#include <capo/models/unet/plain.h>

#include <string>
#include <vector>

namespace capo::examples {

struct SegmentRecipe {
  std::string dataset = "isbi2012";  // or hippocampus
  int folds = 5;                     // of cross-validation; 0: the set's own test split
  std::vector<int> patch{1, 256, 256};
  int base = 16;   // features of the first stage
  int stages = 0;  // at most; 0: as many as nnU-Net's rule makes for the patch
  bool deep_supervision = true;
  bool dice_background = false;                        // class 0 counts in the Dice loss, too
  int epochs = 10, batches_per_epoch = 50, batch = 2;  // an epoch is what lies between two validations
  double foreground = 1.0 / 3;                         // share of patches around a labelled voxel
  std::string optimizer = "adamw", decay = "cosine";
  double lr = 1e-3, weight_decay = 0.01, warmup = 0.5, clip_norm = 12, ema = 0;
  enum class Augmentation { none, nnunet } augment = Augmentation::nnunet;
  std::vector<int> mirror{0, 1, 1};          // axes z, y, x, in training and in the last evaluation
  double elastic = 0, elastic_spacing = 32;  // sd in voxels of control points so far apart, in 3 of 10 patches
  Border border = Border::constant;
  Sampling sampling = Sampling::linear;
  double overlap = 0.5;  // of the windows
  int seed = 0;

  bool flat() const { return patch[0] == 1; }
  Extent extent() const { return {patch[0], patch[1], patch[2]}; }
};

inline SegmentRecipe read_segment_recipe(const std::string& path) {
  SegmentRecipe r;
  JsonFields f(read_file(path, 65536), path);
  f.take("dataset", r.dataset);
  f.take("folds", r.folds, 0, 100);
  f.take("patch", r.patch, 1, 4096);
  f.take("base", r.base, 1, 1024);
  f.take("stages", r.stages, 0, 12);
  f.take("deep_supervision", r.deep_supervision);
  f.take("dice_background", r.dice_background);
  f.take("epochs", r.epochs, 1, 1'000'000);
  f.take("batches_per_epoch", r.batches_per_epoch, 1, 1'000'000);
  f.take("batch", r.batch, 1, 65536);
  f.take("foreground", r.foreground, 0, 1);
  f.take("optimizer", r.optimizer);
  f.take("decay", r.decay);
  f.take("lr", r.lr, 0, 1e3);
  f.take("weight_decay", r.weight_decay, 0, 1e3);
  f.take("warmup", r.warmup, 0, 1e6);
  f.take("clip_norm", r.clip_norm, 0, 1e9);
  f.take("ema", r.ema, 0, 0.999999);
  f.choose("augment", r.augment, {"none", "nnunet"});
  f.take("mirror", r.mirror, 0, 1);
  f.take("elastic", r.elastic, 0, 1000);
  f.take("elastic_spacing", r.elastic_spacing, 2, 4096);
  f.choose("border", r.border, {"constant", "mirror"});
  f.choose("sampling", r.sampling, {"linear", "cubic"});
  f.take("overlap", r.overlap, 0, 0.9);
  f.take("seed", r.seed, 0, 1 << 30);
  f.finish();
  CAPO_CHECK(r.patch.size() == 3 && r.mirror.size() == 3, path, ": patch and mirror must be lists of 3 (z, y, x), got ",
             r.patch.size(), " and ", r.mirror.size());
  CAPO_CHECK(r.decay == "cosine" || r.decay == "linear" || r.decay == "constant", path,
             ": decay must be cosine, linear or constant, got ", r.decay);
  return r;
}

// Sizes of a patch without the axis that a flat one does not have.
inline Dims patch_dims(const SegmentRecipe& r) {
  Dims d;
  for (std::size_t i = r.flat() ? 1 : 0; i < 3; ++i) d.push_back(r.patch[i]);
  return d;
}

inline unet::PlainConfig model_config(const SegmentRecipe& r, int channels, int classes) {
  unet::PlainConfig c = unet::plain_config(patch_dims(r), channels, classes, r.base);
  if (r.stages > 0 && c.stages.size() > static_cast<std::size_t>(r.stages))
    c.stages.resize(static_cast<std::size_t>(r.stages));
  return c;
}

inline PatchOptions patch_options(const SegmentRecipe& r, int workers) {
  PatchOptions o{
      .patch = r.extent(), .batch_size = r.batch, .batches_per_epoch = r.batches_per_epoch, .foreground = r.foreground};
  if (r.augment == SegmentRecipe::Augmentation::nnunet) o.augment = nnunet_augment(r.flat());
  for (std::size_t i = 0; i < 3; ++i) o.augment.mirror[i] = r.mirror[i] ? 0.5f : 0.0f;
  if (r.elastic > 0) o.augment.elastic = {0.3f, 0, static_cast<float>(r.elastic)};
  o.augment.elastic_spacing = static_cast<float>(r.elastic_spacing);
  o.augment.border = r.border;
  o.augment.sampling = r.sampling;
  o.seed = static_cast<std::uint64_t>(r.seed);
  o.workers = workers;
  return o;
}

inline segment::SlidingWindow windows(const SegmentRecipe& r, bool mirrored) {
  segment::SlidingWindow w{.patch = patch_dims(r), .overlap = r.overlap};
  const std::size_t first = r.flat() ? 1 : 0;
  for (std::size_t i = first; mirrored && i < 3; ++i)
    if (r.mirror[i]) w.mirror.push_back(static_cast<std::int64_t>(i - first));
  return w;
}

inline train::TrainOptions train_options(const SegmentRecipe& r) {
  train::TrainOptions o{.epochs = r.epochs, .optimizer = train::optimizer_kind(r.optimizer)};
  o.adamw.weight_decay = o.sgd.weight_decay = o.muon.weight_decay = r.weight_decay;
  o.sgd.momentum = 0.99;  // nnU-Net's
  o.sgd.nesterov = true;
  o.schedule = {.lr = r.lr, .min_lr = r.lr * 0.01};
  o.schedule.decay = r.decay == "cosine"   ? train::Decay::cosine
                     : r.decay == "linear" ? train::Decay::linear
                                           : train::Decay::constant;
  o.warmup_epochs = r.warmup;
  o.clip_norm = r.clip_norm;
  o.ema_decay = r.ema;
  o.ema_warm_up = true;
  o.seed = static_cast<std::uint64_t>(r.seed);
  return o;
}

}  // namespace capo::examples
