// A small classifier with dropout, and seeded synthetic batches: what the training tests train.
#pragma once

#include <capo/models/nn/layers.h>
#include <capo/models/train/trainer.h>
#include <capo/ops/copy.h>
#include <capo/ops/unary.h>
#include <capo/tests/support.h>

#include <cstring>
#include <string>
#include <vector>

namespace capo::testing {

// [N, 6] -> [N, 4].
struct TinyMlp : nn::Layer<TinyMlp> {
  explicit TinyMlp(const nn::Build& build, double p = 0.3)
      : Layer(build), fc1(this, "fc1", 6, 16, true, nn::Init::normal(0.4)), drop(this, "drop", p),
        path(this, "path", p), head(this, "head", 16, 4, true, nn::Init::normal(0.4)) {}
  Tensor forward(const Tensor& x) { return head(path(drop(tanh(fc1(x))))); }
  nn::Linear fc1;
  nn::Dropout drop;
  nn::DropPath path;
  nn::Linear head;
};

// Batch (epoch, batch) is drawn from (seed, epoch, batch) alone.
class SyntheticSource final : public train::BatchSource {
 public:
  SyntheticSource(std::int64_t batches, std::int64_t size, std::uint64_t seed = 1, DType dtype = f32, bool soft = false)
      : batches_(batches), size_(size), seed_(seed), dtype_(dtype), soft_(soft) {}
  std::int64_t batches_per_epoch() const override { return batches_; }
  void seek(std::int64_t epoch, std::int64_t batch) override { at_ = epoch * batches_ + batch; }
  train::Batch next() override {
    train::Batch b;
    std::vector<std::int64_t> labels;
    std::vector<double> x, soft;
    for (std::int64_t i = 0; i < size_; ++i) {  // samples are numbered through, whatever the batch size
      const auto sample = static_cast<std::uint64_t>(at_ * size_ + i);
      const Philox4 bits = philox(seed_, sample, 0), more = philox(seed_, sample, 1);
      const auto value = [](std::uint32_t w) { return static_cast<double>(w >> 8) / 8388608.0 - 1; };
      labels.push_back(bits.v[0] % 4);
      for (int k = 0; k < 6; ++k)
        x.push_back(value(k < 3 ? bits.v[k + 1] : more.v[k - 3]) + (labels.back() == k ? 1.5 : 0));
      for (int k = 0; k < 4; ++k) soft.push_back(labels.back() == k ? 0.7 : 0.1);
    }
    ++at_;
    b.x = cast(from_vector(x, {size_, 6}), dtype_);
    b.labels = from_vector(labels, {size_});
    if (soft_) b.soft = cast(from_vector(soft, {size_, 4}), dtype_);
    return b;
  }

 private:
  std::int64_t batches_, size_, at_ = 0;
  std::uint64_t seed_;
  DType dtype_;
  bool soft_;
};

inline std::string bytes_of(const nn::StateDict& dict) {
  std::string all;
  for (const auto& t : dict) all += t.name + bytes_of(t.value);
  return all;
}

}  // namespace capo::testing
