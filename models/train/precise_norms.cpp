#include <capo/models/nn/batch_norms.h>
#include <capo/models/train/precise_norms.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/unary.h>

#include <utility>
#include <vector>

namespace capo::train {
namespace {

// One norm's statistics, f64; put back at the end unless committed.
class Gathered {
 public:
  explicit Gathered(nn::BatchNorm& norm)
      : norm_(norm), mean_before_(clone(norm.running_mean.value())), var_before_(clone(norm.running_var.value())) {}
  ~Gathered() {
    if (!committed_) put(mean_before_, var_before_);
  }
  Gathered(const Gathered&) = delete;
  Gathered& operator=(const Gathered&) = delete;

  // From zeros one training forward leaves momentum times the batch's statistics.
  void before_batch() {
    fill_(norm_.running_mean.value(), 0);
    fill_(norm_.running_var.value(), 0);
  }
  void after_batch(double samples) {
    const Tensor mean = cast(norm_.running_mean.value(), f64) / norm_.momentum;
    const Tensor var = cast(norm_.running_var.value(), f64) / norm_.momentum;
    weight_ += samples;
    add(mean_, mean * samples);
    add(second_, (var + square(mean)) * samples);
  }
  void commit() {
    const DType dtype = mean_before_.dtype();
    const Tensor mean = mean_ / weight_;
    put(cast(mean, dtype), cast(second_ / weight_ - square(mean), dtype));
    committed_ = true;
  }

 private:
  static void add(Tensor& sum, const Tensor& t) { sum = sum.defined() ? sum + t : t; }
  void put(const Tensor& mean, const Tensor& var) {
    copy_into(norm_.running_mean.value(), mean);
    copy_into(norm_.running_var.value(), var);
  }

  nn::BatchNorm& norm_;
  const Tensor mean_before_, var_before_;
  Tensor mean_, second_;  // sums over samples, of the means and of var + mean^2
  double weight_ = 0;
  bool committed_ = false;
};

// The norms in train(), all else in eval(); as it was afterwards.
class Modes {
 public:
  Modes(nn::Module& module, const std::vector<nn::BatchNorm*>& norms) {
    for (nn::Module* m : module.modules()) before_.emplace_back(m, m->training());
    module.train(false);
    for (nn::BatchNorm* norm : norms) norm->train(true);
  }
  ~Modes() {
    for (const auto& [m, on] : before_) m->train(on);  // parents come before their children
  }
  Modes(const Modes&) = delete;
  Modes& operator=(const Modes&) = delete;

 private:
  std::vector<std::pair<nn::Module*, bool>> before_;
};

}  // namespace

void precise_batch_norms(Classifier& classifier, BatchSource& source, std::int64_t batches) {
  CAPO_CHECK(batches > 0, "precise_batch_norms: needs at least one batch, got ", batches);
  const NoGrad off;
  std::vector<nn::BatchNorm*> norms;
  std::vector<std::unique_ptr<Gathered>> gathered;
  for (nn::BatchNorm* norm : nn::batch_norms(classifier.module())) {
    if (!norm->trained()) continue;
    CAPO_CHECK(norm->momentum > 0, "precise_batch_norms: ", norm->path(), " must have a momentum above 0");
    norms.push_back(norm);
    gathered.push_back(std::make_unique<Gathered>(*norm));
  }
  CAPO_CHECK(!norms.empty(), "precise_batch_norms: no batch norm of the model trains");
  const Modes modes(classifier.module(), norms);
  for (std::int64_t i = 0; i < batches; ++i) {
    const Batch batch = source.next();
    for (auto& g : gathered) g->before_batch();
    classifier.forward(batch.x);
    for (auto& g : gathered) g->after_batch(static_cast<double>(batch.size()));
  }
  for (auto& g : gathered) g->commit();
}

}  // namespace capo::train
