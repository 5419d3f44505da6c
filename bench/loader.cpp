// Whether the loader keeps up with training at 32 x 32: images per second that one thread decodes and augments (its own
// processor time), beside those of a training step, alone and with the loader on the same processors.
//   bench_loader [size=vit_ti] [patch=4] [batch=64] [steps=20]
#include <capo/datasets/batch_source.h>
#include <capo/datasets/png.h>
#include <capo/engine/threads.h>
#include <capo/models/train/optim.h>
#include <capo/models/vit/vit.h>
#include <capo/ops/cross_entropy.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>

using namespace capo;

namespace {

double wall() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
double own_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}
double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

constexpr int kSide = 32, kClasses = 100, kImages = 4096;

// Smooth pictures with some noise, as photographs have, held as PNG files or as pixels.
class Pictures final : public ImageDataset {
 public:
  explicit Pictures(bool encoded) : ImageDataset(encoded ? "png" : "pixels", names()) {
    std::uint32_t state = 1;
    for (int i = 0; i < kImages; ++i) {
      Image im(kSide, kSide, 3);
      for (int y = 0; y < kSide; ++y)
        for (int x = 0; x < kSide; ++x)
          for (int c = 0; c < 3; ++c) {
            state = state * 1664525u + 1013904223u;
            im.at(y, x)[c] =
                static_cast<std::uint8_t>((x * (i % 7) + y * (i % 5) + 40 * c + static_cast<int>(state >> 28)) & 255);
          }
      if (encoded)
        files_.push_back(encode_png(im));
      else
        images_.push_back(std::move(im));
    }
  }
  std::int64_t size() const override { return kImages; }
  Image image(std::int64_t i) const override {
    const auto k = static_cast<std::size_t>(i);
    return files_.empty() ? images_[k] : decode_image(files_[k], name());
  }
  std::int64_t label(std::int64_t i) const override { return i % kClasses; }

 private:
  static std::vector<std::string> names() {
    std::vector<std::string> out;
    for (int i = 0; i < kClasses; ++i) out.push_back(cat("class ", i));
    return out;
  }
  std::vector<std::string> files_;
  std::vector<Image> images_;
};

LoaderOptions loading(std::int64_t batch, int rand_ops, bool mixes, int workers) {
  LoaderOptions o{.batch_size = batch, .shuffle = true, .drop_last = true, .workers = workers};
  o.augment = Augment{.crop = Augment::Crop::pad, .rand_ops = rand_ops};
  if (mixes) o.mixing = {.mixup_alpha = 0.8f, .cutmix_alpha = 1};
  return o;
}

// Images per second of one thread.
double loader_rate(const DatasetPtr& set, const LoaderOptions& options) {
  LoaderSource source(set, Preprocess{}, options);
  std::vector<double> rates;
  source.next();
  for (int round = 0; round < 5; ++round) {
    const double start = own_time();
    std::int64_t images = 0;
    for (int i = 0; i < 16; ++i) images += source.next().size();
    rates.push_back(static_cast<double>(images) / (own_time() - start));
  }
  return median(rates);
}

// Images per second of training on one batch again and again (fixed), or on what the loader brings; waited: the time
// spent in next().
double step_rate(vit::Vit& model, train::AdamW& optimizer, LoaderSource& source, bool fixed, int steps,
                 double& waited) {
  train::Batch batch = source.next();
  waited = 0;
  double start = 0;
  for (int i = -2; i < steps; ++i) {
    if (i == 0) start = wall();
    const double before = wall();
    if (!fixed) batch = source.next();
    if (i >= 0) waited += wall() - before;
    const Tensor loss = batch.soft.defined() ? cross_entropy_soft(model(batch.x), batch.soft)
                                             : cross_entropy(model(batch.x), batch.labels);
    backward(loss);
    optimizer.step(1e-4);
    optimizer.zero_grad();
  }
  const double seconds = wall() - start;
  waited /= seconds;
  return static_cast<double>(steps * batch.size()) / seconds;
}

}  // namespace

int main(int argc, char** argv) {
  const char* size = argc > 1 ? argv[1] : "vit_ti";
  const int patch = argc > 2 ? std::atoi(argv[2]) : 4, batch = argc > 3 ? std::atoi(argv[3]) : 64;
  const int steps = argc > 4 ? std::atoi(argv[4]) : 20;
  const DatasetPtr pixels = std::make_shared<Pictures>(false), files = std::make_shared<Pictures>(true);
  const double plain = loader_rate(pixels, loading(batch, 0, false, 0)),
               decoded = loader_rate(files, loading(batch, 0, false, 0)),
               all = loader_rate(files, loading(batch, 2, true, 0));
  std::printf(
      "one thread: %.0f images/s crop and flip, %.0f with PNG, %.0f with PNG, RandAugment(2), mixup and cutmix\n",
      plain, decoded, all);

  vit::Vit model(vit::config(size, kSide, patch, kClasses));
  model.train();
  train::AdamW optimizer(model);
  LoaderSource source(files, Preprocess{}, loading(batch, 2, true, 1));
  std::vector<double> alone, together, waits;
  for (int round = 0; round < 3; ++round) {  // in turns: a busy moment hits both
    double waited = 0;
    alone.push_back(step_rate(model, optimizer, source, true, steps, waited));
    together.push_back(step_rate(model, optimizer, source, false, steps, waited));
    waits.push_back(waited);
  }
  const double rate = median(alone), with_loader = median(together), wait = median(waits);
  std::printf(
      "%s/%d, batch %d, %d threads: %.0f images/s on a fixed batch, %.0f with one loader thread (%.1f %% waiting for "
      "data);\n"
      "the loader needs %.1f %% of one processor at that rate\n",
      size, patch, batch, num_threads(), rate, with_loader, 100 * wait, 100 * with_loader / all);
  std::printf(
      "RESULT "
      "{\"bench\":\"loader\",\"model\":\"%s/"
      "%d\",\"batch\":%d,\"threads\":%d,\"loader_images_per_s\":%.0f,\"png_images_per_s\":%.0f,"
      "\"full_images_per_s\":%.0f,\"step_images_per_s\":%.1f,\"step_with_loader_images_per_s\":%.1f,\"wait_share\":%."
      "4f}\n",
      size, patch, batch, num_threads(), plain, decoded, all, rate, with_loader, wait);
}
