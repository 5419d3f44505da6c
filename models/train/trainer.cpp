#include <capo/engine/graph.h>
#include <capo/engine/profile.h>
#include <capo/models/train/out_of_memory_internal.h>
#include <capo/models/train/tensorboard.h>
#include <capo/models/train/trainer.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

namespace capo::train {
namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Until the loss scale doubles (Micikevicius et al. 2018; PyTorch's GradScaler).
constexpr std::int64_t kCleanSteps = 2000;

double host_item(const Tensor& t) { return to_host(t.detach()).item(); }

// How many elements are not finite, and the first of them.
struct NotFinite {
  std::int64_t count = 0;
  double first = 0;
};
NotFinite count_not_finite(const Tensor& t) {
  NotFinite r;
  if (!t.defined() || !is_floating(t.dtype())) return r;
  for (const double v : to_vector<double>(to_host(t.detach()))) {
    if (std::isfinite(v)) continue;
    if (r.count++ == 0) r.first = v;
  }
  return r;
}
std::string text_of(const NotFinite& r, const Tensor& t) {
  return cat(r.count, " of ", t.numel(), " values, the first is ", r.first);
}

// Looks at every op's result while the failing step is run again.
struct Watch {
  std::string finding;
  static void hook(const char* op, const Tensor& y, void* user) {
    auto* w = static_cast<Watch*>(user);
    if (!w->finding.empty()) return;
    if (const NotFinite r = count_not_finite(y); r.count > 0)
      w->finding =
          cat("the output of ", op, current_module().empty() ? "" : " in ", current_module(), " (", text_of(r, y), ")");
  }
};

struct GradWatch {
  const nn::Parameter* parameter;
  std::string* finding;
  static void hook(const Tensor& g, void* user) {
    auto* w = static_cast<GradWatch*>(user);
    if (!w->finding->empty()) return;
    if (const NotFinite r = count_not_finite(g); r.count > 0)
      *w->finding = cat("the gradient of ", w->parameter->path(), " (", text_of(r, g), ")");
  }
};

// What a captured step depends on: how many batches, of which shapes.
std::vector<Shape> shapes_of(const std::vector<Batch>& batches) {
  std::vector<Shape> shapes;
  for (const Batch& b : batches)
    for (const Tensor* t : {&b.x, &b.labels, &b.soft}) shapes.push_back(t->defined() ? t->shape() : Shape());
  return shapes;
}
std::int64_t elements(const std::vector<Shape>& shapes) {
  std::int64_t n = 0;
  for (const Shape& s : shapes) n += numel(s);
  return n;
}

// Runs the step again and says where the first value that is not finite comes from.
std::string find_not_finite(Task& task, const Batch& batch) {
  if (const NotFinite r = count_not_finite(batch.x); r.count > 0)
    return cat("the batch itself (", text_of(r, batch.x), ")");
  nn::Module& root = task.module();
  const auto parameters = root.parameters(true);
  for (nn::Parameter* p : parameters)
    if (const NotFinite r = count_not_finite(p->value()); r.count > 0)
      return cat(p->is_buffer() ? "the buffer " : "the parameter ", p->path(), " (", text_of(r, p->value()), ")");

  Watch watch;
  Tensor loss;
  {
    const OpObserver observer(Watch::hook, &watch);
    loss = task.loss(batch);
  }
  if (!watch.finding.empty()) return watch.finding;
  if (count_not_finite(loss).count > 0) return "the loss (every op's output is finite)";

  std::string finding;
  std::vector<GradWatch> grads;
  for (nn::Parameter* p : parameters)
    if (p->trainable()) grads.push_back({p, &finding});
  struct Unhook {
    const std::vector<GradWatch>& grads;
    ~Unhook() {
      for (const auto& g : grads) on_grad(g.parameter->value(), nullptr, nullptr);
    }
  } const at_end{grads};
  for (auto& g : grads) on_grad(g.parameter->value(), GradWatch::hook, &g);
  backward(loss);
  return finding.empty() ? "nothing that a second run of the batch shows: sums over batches or parameters overflow"
                         : finding;
}

}  // namespace

Tensor classification_loss(const Tensor& logits, const Batch& batch, double label_smoothing) {
  const Tensor z = is_half(logits.dtype()) ? cast(logits, f32) : logits;
  CrossEntropyOptions options;
  options.label_smoothing = label_smoothing;
  return batch.soft.defined() ? cross_entropy_soft(z, cast(batch.soft, z.dtype()), options)
                              : cross_entropy(z, batch.labels, options);
}

Metrics evaluate_classifier(Classifier& classifier, BatchSource& source) {
  const NoGrad off;
  Metrics m;
  double loss = 0;
  std::int64_t top1 = 0, top5 = 0;
  for (std::int64_t i = 0; i < source.batches_per_epoch(); ++i) {
    const Batch batch = source.next();
    const Tensor logits = to_host(classifier.forward(batch.x));
    CAPO_CHECK(logits.rank() == 2 && logits.size(0) == batch.size(), "evaluate: logits must be [", batch.size(),
               ", K], got ", logits.shape());
    const auto z = to_vector<double>(logits);
    const auto labels = to_vector<std::int64_t>(to_host(batch.labels));
    const std::int64_t classes = logits.size(1);
    for (std::int64_t n = 0; n < batch.size(); ++n) {
      const double* row = z.data() + n * classes;
      const std::int64_t label = labels[static_cast<std::size_t>(n)];
      CAPO_CHECK(label >= 0 && label < classes, "evaluate: label must be in [0, ", classes, "), got ", label);
      double top = -std::numeric_limits<double>::infinity(), total = 0;
      for (std::int64_t k = 0; k < classes; ++k) top = std::max(top, row[k]);
      for (std::int64_t k = 0; k < classes; ++k) total += std::exp(row[k] - top);
      loss += std::log(total) + top - row[label];
      std::int64_t better = 0;  // classes ranked before the label; a NaN never wins
      for (std::int64_t k = 0; k < classes; ++k) better += row[k] > row[label] || (row[k] == row[label] && k < label);
      const bool known = row[label] == row[label];
      top1 += known && better < 1;
      top5 += known && better < 5;
    }
    m.samples += batch.size();
  }
  const double n = static_cast<double>(std::max<std::int64_t>(m.samples, 1));
  m.loss = loss / n;
  m.top1 = static_cast<double>(top1) / n;
  m.top5 = static_cast<double>(top5) / n;
  m.score = m.top1;
  return m;
}

ClassificationTask::ClassificationTask(Classifier& classifier, double label_smoothing)
    : classifier_(classifier), smoothing_(label_smoothing) {
  CAPO_CHECK(label_smoothing >= 0 && label_smoothing < 1, "label_smoothing must be in [0, 1), got ", label_smoothing);
}

struct Trainer::Logs {
  std::unique_ptr<CsvLog> csv;
  std::unique_ptr<TensorBoard> board;

  void train(std::int64_t step, std::int64_t epoch, double lr, double loss, double norm, double rate) {
    if (csv) {
      char line[256];
      std::snprintf(line, sizeof line, "%lld,%lld,train,%.9g,%.9g,%.9g,,,%.1f", static_cast<long long>(step),
                    static_cast<long long>(epoch), lr, loss, norm, rate);
      csv->row(line);
    }
    if (board) {
      board->scalar("train/loss", step, loss);
      board->scalar("train/lr", step, lr);
      board->scalar("train/grad_norm", step, norm);
      board->scalar("train/images_per_s", step, rate);
    }
  }
  void validation(std::int64_t step, std::int64_t epoch, double lr, const Metrics& m, double rate) {
    if (csv) {
      char line[256];
      std::snprintf(line, sizeof line, "%lld,%lld,validation,%.9g,%.9g,,%.9g,%.9g,%.1f", static_cast<long long>(step),
                    static_cast<long long>(epoch), lr, m.loss, m.top1, m.top5, rate);
      csv->row(line);
    }
    if (board) {
      board->scalar("validation/loss", step, m.loss);
      board->scalar("validation/top1", step, m.top1);
      board->scalar("validation/top5", step, m.top5);
    }
  }
};

// One optimiser step as a graph, with what it reads and leaves.
struct Trainer::Captured {
  explicit Captured(Device device) : graph(device) {}
  Graph graph;
  std::vector<Shape> shapes;
  std::vector<Batch> batches;
  TensorList losses;
  GradVerdict verdict;
  Graph::Numbers seed = {}, loss_scale = {};  // when scaling: loss_scale / batches, loss_scale
};

Trainer::Trainer(Task& task, BatchSource& train, BatchSource* validation, const TrainOptions& options)
    : task_(task), train_(train), validation_(validation), options_(options), schedule_(options.schedule) {
  CAPO_CHECK(options.epochs > 0 && options.accumulate > 0, "trainer: epochs and accumulate must be positive, got ",
             options.epochs, " and ", options.accumulate);
  CAPO_CHECK(options.log_every > 0 && options.validate_every > 0,
             "trainer: log_every and validate_every must be positive, got ", options.log_every, " and ",
             options.validate_every);
  CAPO_CHECK(options.warmup_epochs >= 0 && options.clip_norm >= 0,
             "trainer: warmup_epochs and clip_norm must not be negative, got ", options.warmup_epochs, " and ",
             options.clip_norm);
  CAPO_CHECK(options.schedule.lr >= 0 && options.ema_decay >= 0, "trainer: lr and ema_decay must not be negative, got ",
             options.schedule.lr, " and ", options.ema_decay);
  const std::int64_t per_epoch = (train.batches_per_epoch() + options.accumulate - 1) / options.accumulate;
  CAPO_CHECK(per_epoch > 0, "trainer: the training source is empty");
  if (schedule_.total_steps == 0) schedule_.total_steps = options.epochs * per_epoch;
  if (schedule_.warmup_steps == 0)
    schedule_.warmup_steps =
        static_cast<std::int64_t>(std::llround(options.warmup_epochs * static_cast<double>(per_epoch)));
  int exponent = 0;
  CAPO_CHECK(options.loss_scale == 0 || (options.loss_scale >= 1 && std::frexp(options.loss_scale, &exponent) == 0.5),
             "trainer: loss_scale must be 0 or a power of two from 1, got ", options.loss_scale);
  if (options.loss_scale > 0) at_.loss_scale = options.loss_scale;
  nn::Module& module = task.module();
  CAPO_CHECK(!options.graph || module.build().device.is_cuda(),
             "trainer: graph needs a model on a CUDA device, it is on ", module.build().device);
  optimizer_ = make_optimizer(options.optimizer, module, options.adamw, options.sgd, options.muon);
  CAPO_CHECK(!optimizer_->parameters().empty(), "trainer: the model has no trainable parameter");
  if (options.ema_decay > 0) ema_ = std::make_unique<Ema>(module, options.ema_decay, options.ema_warm_up);
  // All else that the bits depend on.
  settings_ =
      cat(optimizer_->settings(), " accumulate ", options.accumulate, " batches ", train.batches_per_epoch(), " clip ",
          options.clip_norm, " ema ", options.ema_decay, options.ema_warm_up ? " warm" : "",
          options.loss_scale > 0 ? cat(" loss scale ", options.loss_scale) : std::string(), " ", options.settings);
  generators_ = generators(module);
  logs_ = std::make_unique<Logs>();
  if (!options.checkpoint_dir.empty()) checkpointer_ = std::make_unique<Checkpointer>(options.checkpoint_dir);
}

Trainer::~Trainer() = default;

TrainState Trainer::state() {
  return {&task_.module(), optimizer_.get(), ema_.get(), options_.seed, schedule_, at_, settings_};
}

void Trainer::save() {
  if (!checkpointer_) return;
  at_.csv_rows = logs_->csv ? logs_->csv->rows() : 0;
  checkpointer_->save(state());
}

void Trainer::fail_not_finite(const char* what, double value, const Batch& batch,
                              const std::vector<std::uint64_t>& offsets) {
  // The same random draws as in the failing step.
  for (std::size_t i = 0; i < generators_.size(); ++i) generators_[i].second->set_offset(offsets[i]);
  optimizer_->zero_grad();
  const std::string finding = find_not_finite(task_, batch);
  optimizer_->zero_grad();
  detail::fail("train: the ", what, " is ", value, " in step ", at_.step, " (epoch ", at_.epoch, ", batch ", at_.batch,
               "); first not finite: ", finding);
}

void Trainer::fail_out_of_memory(const OutOfMemory& error) {
  captured_.reset();
  optimizer_->zero_grad();
  Batch batch;
  try {
    train_.seek(at_.epoch, at_.batch);
    batch = train_.next();
  } catch (const Error&) {  // no room for the batch alone
  }
  const std::string held = what_is_held(task_, *optimizer_, ema_.get(), batch);
  throw OutOfMemory(cat(error.what(), "\ntrain: no memory in step ", at_.step, " (epoch ", at_.epoch, ", batch ",
                        at_.batch, ")", held, options_.memory_plan.empty() ? "" : "\nplanned:\n",
                        options_.memory_plan));
}

Batch Trainer::next_batch(double& waited) {
  const ProfileScope scope("wait for data");
  const auto wait = Clock::now();
  Batch batch = train_.next();
  waited += since(wait);
  const Device device = task_.module().build().device;
  CAPO_CHECK(batch.x.device() == device, "trainer: the model is on ", device, ", the batch on ", batch.x.device());
  return batch;
}

void Trainer::account(const Batch& batch, double loss) {
  at_.loss_sum += loss * static_cast<double>(batch.size());
  at_.loss_count += batch.size();
  ++at_.batch;
}

double Trainer::forward_backward(const Batch& batch, std::int64_t count) {
  std::vector<std::uint64_t> offsets;
  for (const auto& g : generators_) offsets.push_back(g.second->offset());
  Tensor loss = task_.loss(batch);
  CAPO_CHECK(loss.numel() == 1, "trainer: a loss must have one element, got ", loss.shape());
  CAPO_CHECK(!scaling() || loss.dtype() == f32, "trainer: a scaled loss must be f32, got ", describe(loss));
  const double value = host_item(loss);
  if (!std::isfinite(value)) fail_not_finite("loss", value, batch, offsets);
  const double seed = at_.loss_scale / static_cast<double>(count);
  backward(loss, seed == 1 ? Tensor() : full(loss.shape(), seed, loss.dtype(), loss.device()));
  loss = Tensor();
  // After each batch, so that the one to blame is still at hand.
  grad_norm_ = optimizer_->grad_norm() / at_.loss_scale;
  if (!std::isfinite(grad_norm_) && at_.loss_scale == 1) fail_not_finite("gradient norm", grad_norm_, batch, offsets);
  return value;
}

void Trainer::update() {
  const ProfileScope scope("optimizer");
  const bool clip = options_.clip_norm > 0 && grad_norm_ > options_.clip_norm;
  optimizer_->step(lr_, (clip ? options_.clip_norm / grad_norm_ : 1) / at_.loss_scale);
  if (ema_) ema_->update();
}

void Trainer::next_loss_scale(bool clean) {
  if (!scaling()) return;
  ++at_.clean_steps;
  if (clean && at_.clean_steps < kCleanSteps) return;
  at_.loss_scale *= clean ? 2 : 0.5;
  at_.clean_steps = 0;
}

bool Trainer::take_graph(const std::vector<Batch>& batches) {
  if (!options_.graph) return false;
  auto shapes = shapes_of(batches);
  if (captured_) return captured_->shapes == shapes;
  if (warm_ == shapes) {
    capture(batches);
    return true;
  }
  if (elements(shapes) >= elements(warm_)) warm_ = std::move(shapes);
  return false;
}

void Trainer::capture(const std::vector<Batch>& batches) {
  auto c = std::make_unique<Captured>(task_.module().build().device);
  c->shapes = shapes_of(batches);
  const auto copy = [](const Tensor& t) { return t.defined() ? clone(t) : Tensor(); };
  for (const Batch& b : batches) c->batches.push_back({copy(b.x), copy(b.labels), copy(b.soft)});
  if (scaling()) c->seed = c->graph.numbers(1), c->loss_scale = c->graph.numbers(1);
  optimizer_->zero_grad();
  const auto count = static_cast<double>(batches.size());
  c->graph.capture([&] {
    for (const Batch& batch : c->batches) {
      const Tensor loss = task_.loss(batch);
      CAPO_CHECK(loss.numel() == 1, "trainer: a loss must have one element, got ", loss.shape());
      Tensor seed;
      if (scaling())
        seed = strided_view(c->seed.there, loss.shape(), contiguous_strides(loss.shape()), c->seed.there.offset());
      else if (count != 1)
        seed = full(loss.shape(), 1 / count, loss.dtype(), loss.device());
      backward(loss, seed);
      c->losses.push_back(loss.detach());
    }
    c->verdict = optimizer_->grad_verdict(c->losses, options_.clip_norm, c->loss_scale.there);
    optimizer_->capture_step(c->graph, c->verdict);
    if (ema_) ema_->capture_update(c->graph, c->verdict.skip);
    optimizer_->zero_grad();
  });
  captured_ = std::move(c);
}

double Trainer::replay(const std::vector<Batch>& batches) {
  Captured& c = *captured_;
  const auto count = static_cast<std::int64_t>(batches.size());
  for (std::size_t i = 0; i < batches.size(); ++i) {
    const Batch &from = batches[i], &to = c.batches[i];
    copy_into(to.x, from.x);
    copy_into(to.labels, from.labels);
    if (to.soft.defined()) copy_into(to.soft, from.soft);
  }
  optimizer_->next_replay(lr_);
  if (ema_) ema_->next_replay();
  if (scaling()) {
    *c.seed.here = static_cast<float>(at_.loss_scale / static_cast<double>(count));
    *c.loss_scale.here = static_cast<float>(at_.loss_scale);
  }
  std::vector<std::uint64_t> offsets;
  for (const auto& g : generators_) offsets.push_back(g.second->offset());
  c.graph.replay();

  std::vector<double> losses;
  for (const Tensor& t : c.losses) losses.push_back(host_item(t));
  grad_norm_ = host_item(c.verdict.norm);
  const bool clean = std::isfinite(grad_norm_);
  bool good = clean || at_.loss_scale > 1;
  for (const double v : losses) good = good && std::isfinite(v);
  if (!good) {  // nothing was written: the same step as usual finds the batch and the op to blame
    c.graph.check();
    for (std::size_t i = 0; i < generators_.size(); ++i) generators_[i].second->set_offset(offsets[i]);
    for (const Batch& b : c.batches) account(b, forward_backward(b, count));
    detail::fail("train: the captured step ", at_.step, " is not finite, as usual it is");
  }
  if (clean) {
    optimizer_->count_step();
    if (ema_) ema_->count_update();
  }
  next_loss_scale(clean);
  double sum = 0;
  for (std::size_t i = 0; i < batches.size(); ++i) {
    account(batches[i], losses[i]);
    sum += losses[i];
  }
  return sum;
}

double Trainer::step(std::int64_t count) {
  const ProfileScope scope("step");
  const auto start = Clock::now();
  double waited = 0, loss_sum = 0;
  const std::int64_t samples_before = at_.loss_count;
  lr_ = schedule_.at(at_.step);
  std::vector<Batch> batches;  // of a step that may be a graph: it needs them all
  for (std::int64_t i = 0; i < count && options_.graph; ++i) batches.push_back(next_batch(waited));
  if (take_graph(batches)) {
    loss_sum = replay(batches);
  } else {
    for (std::int64_t i = 0; i < count; ++i) {
      const Batch batch = options_.graph ? std::exchange(batches[static_cast<std::size_t>(i)], {}) : next_batch(waited);
      const double loss = forward_backward(batch, count);
      loss_sum += loss;
      account(batch, loss);
    }
    const bool clean = std::isfinite(grad_norm_);
    if (clean) update();
    optimizer_->zero_grad();
    next_loss_scale(clean);
  }
  ++at_.step;

  // Means over about the last 20 steps; the first step warms caches and counts little.
  const double keep = step_seconds_ == 0 ? 0 : 0.95, seconds = since(start);
  step_seconds_ = keep * step_seconds_ + (1 - keep) * seconds;
  wait_seconds_ = keep * wait_seconds_ + (1 - keep) * waited;
  images_ = keep * images_ + (1 - keep) * static_cast<double>(at_.loss_count - samples_before);
  return loss_sum / static_cast<double>(count);
}

void Trainer::end_epoch(TrainResult& result) {
  EpochReport report{at_.epoch, at_.step, at_.loss_sum / static_cast<double>(std::max<std::int64_t>(at_.loss_count, 1)),
                     false, {}, false, epoch_seconds_};
  const bool last = at_.epoch + 1 == options_.epochs;
  if (validation_ && ((at_.epoch + 1) % options_.validate_every == 0 || last)) {
    const auto start = Clock::now();
    nn::Module& module = task_.module();
    const ProfileScope scope("validation");
    const NoGrad off;
    std::unique_ptr<EmaScope> averaged;
    if (ema_) averaged = std::make_unique<EmaScope>(*ema_);
    module.train(false);
    validation_->seek(0, 0);
    report.validation = task_.evaluate(*validation_);
    module.train(true);
    averaged.reset();
    validation_seconds_ = since(start);
    report.validated = true;
    report.best = report.validation.score > at_.best;
    if (report.best) at_.best = report.validation.score;
    logs_->validation(at_.step, at_.epoch, schedule_.at(std::max<std::int64_t>(at_.step - 1, 0)), report.validation,
                      static_cast<double>(report.validation.samples) / std::max(validation_seconds_, 1e-9));
  }
  result.epochs.push_back(report);
  ++at_.epoch;
  at_.batch = 0;
  at_.loss_sum = 0;
  at_.loss_count = 0;
  epoch_seconds_ = 0;
  save();
  if (options_.on_epoch) options_.on_epoch(report, options_.user);
}

TrainResult Trainer::run() {
  CAPO_CHECK(!ran_, "trainer: run() may be called once");
  ran_ = true;
  TrainResult result;
  nn::Module& module = task_.module();
  const bool resumed = checkpointer_ && options_.resume && checkpointer_->exists();
  if (resumed) {
    TrainState loaded = state();
    result.resumed_from = checkpointer_->load(loaded);
    at_ = loaded.position;
    const std::int64_t batches = train_.batches_per_epoch();
    CAPO_CHECK(at_.epoch >= 0 && at_.batch >= 0 && at_.batch <= batches && at_.step >= 0, result.resumed_from,
               ": epoch ", at_.epoch, " and batch ", at_.batch, " lie outside this run of ", batches,
               " batches an epoch");
  }
  constexpr const char* kHeader = "step,epoch,kind,lr,loss,grad_norm,top1,top5,images_per_s";
  if (!options_.csv.empty())
    logs_->csv = std::make_unique<CsvLog>(options_.csv, kHeader, resumed ? at_.csv_rows : -1, at_.step);
  if (!options_.tensorboard_dir.empty())
    logs_->board = std::make_unique<TensorBoard>(options_.tensorboard_dir, resumed ? at_.step : -1);

  module.train(true);
  optimizer_->zero_grad();
  const Device device = module.build().device;
  const std::int64_t batches = train_.batches_per_epoch();
  auto saved = Clock::now();
  const auto stop_here = [&] {
    return stop_.load(std::memory_order_relaxed) || (options_.max_steps > 0 && at_.step >= options_.max_steps);
  };
  const auto stopped = [&] {
    save();
    result.stopped = true;
    result.position = at_;
    return result;
  };

  while (at_.epoch < options_.epochs) {
    if (at_.batch < batches) {
      if (stop_here()) return stopped();
      train_.seek(at_.epoch, at_.batch);
    }
    while (at_.batch < batches) {
      const auto start = Clock::now();
      double loss = 0;
      try {
        loss = step(std::min(options_.accumulate, batches - at_.batch));
      } catch (const OutOfMemory& error) {
        fail_out_of_memory(error);
      }
      epoch_seconds_ += since(start);
      const double rate = images_ / std::max(step_seconds_, 1e-9);
      if (at_.step % options_.log_every == 0) logs_->train(at_.step, at_.epoch, lr_, loss, grad_norm_, rate);
      if (options_.on_progress) {
        const std::int64_t per_epoch = (batches + options_.accumulate - 1) / options_.accumulate;
        const std::int64_t steps = options_.epochs * per_epoch;
        const double epochs_left = validation_ ? static_cast<double>(options_.epochs - at_.epoch) /
                                                     static_cast<double>(options_.validate_every)
                                               : 0;
        const MemoryStats memory = allocator(device).stats();
        options_.on_progress({at_.epoch, options_.epochs, at_.batch, batches, at_.step, steps, loss, lr_, grad_norm_,
                              rate, wait_seconds_ / std::max(step_seconds_, 1e-9),
                              step_seconds_ * static_cast<double>(steps - at_.step) + epochs_left * validation_seconds_,
                              memory.live_bytes, memory.peak_bytes},
                             options_.user);
      }
      if (stop_here()) return stopped();
      // Not right before the epoch's end, which saves anyway.
      if (at_.batch < batches && since(saved) >= options_.checkpoint_seconds) {
        save();
        saved = Clock::now();
      }
    }
    end_epoch(result);
    saved = Clock::now();
  }
  result.position = at_;
  return result;
}

}  // namespace capo::train
