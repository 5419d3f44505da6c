// capo::Graph: a captured step, replayed, gives the bits of the eager one. Runs where a device is: on the host shim,
// whose device keeps what is captured and runs it at the replay alone, as a card does.
#include <capo/autograd/autograd.h>
#include <capo/engine/caching_allocator.h>
#include <capo/engine/graph.h>
#include <capo/models/nn/layers.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>
#include <capo/ops/dropout.h>
#include <capo/ops/index.h>
#include <capo/ops/optim.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/tests/support.h>
#include <capo/tests/temp_folder.h>
#include <capo/tests/tiny_model.h>

#if defined(CAPO_TEST_SHIM)
#include <capo/tests/shim/backend.h>
#include <capo/tests/shim/device.h>
#endif

#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <utility>

using namespace capo;
using namespace capo::testing;

namespace {

constexpr Device kDevice{DeviceType::cuda, 0};

bool no_device() {
  if (device_count() > 0) return false;
  MESSAGE("no CUDA device");
  return true;
}

nn::Build on_device() {
  nn::Build b;
  b.device = kDevice;
  return b;
}

std::string bytes_there(const Tensor& t) { return bytes_of(to(t.detach(), kCpu)); }

Tensor input(int step, const Shape& shape) {
  Generator rng(static_cast<std::uint64_t>(100 + step));
  return to(rand_normal(shape, rng), kDevice);
}

// With memory as on a card, where freed blocks are handed out again, and with blocks of exact size.
template <class F>
void with_each_allocator(const F& f) {
#if defined(CAPO_TEST_SHIM)
  for (const bool caching : {false, true}) {
    CAPTURE(caching);
    const bool before = std::exchange(shim::device_settings().caching, caching);
    f();
    shim::device_settings().caching = before;
  }
#else
  f();
#endif
}

}  // namespace

TEST_CASE("graph: forward and backward, with dropout that goes on") {
  if (no_device()) return;
  with_each_allocator([] {
    TinyMlp eager(on_device()), captured(on_device());
    const Shape shape{8, 6};
    const auto run = [](TinyMlp& m, const Tensor& x, Tensor& loss) {
      const Tensor y = mean(square(m(x)));
      backward(y);
      loss = y.detach();
    };
    const auto clear = [](TinyMlp& m) {
      for (nn::Parameter* p : m.parameters()) clear_grad(p->value());
    };
    const auto result = [](TinyMlp& m, const Tensor& loss) {
      std::string all = bytes_there(loss);
      for (nn::Parameter* p : m.parameters()) all += bytes_there(grad_of(p->value()));
      return all + std::to_string(m.drop.rng.offset()) + " " + std::to_string(m.path.rng.offset());
    };
    Tensor loss, loss_there;
    const Tensor x = clone(input(0, shape));
    run(captured, x, loss_there);  // the warm-up, step 0
    run(eager, input(0, shape), loss);
    CHECK((result(eager, loss) == result(captured, loss_there)));
    clear(captured);
    Graph graph(kDevice);
    graph.capture([&] { run(captured, x, loss_there); });
    CHECK(graph.captured());
    std::string before;
    for (int step = 1; step < 4; ++step) {
      clear(eager);
      run(eager, input(step, shape), loss);
      copy_into(x, input(step, shape));
      const Tensor other = ones({64, 64}, f32, kDevice);  // must not get the graph's memory
      graph.replay();
      const std::string now = result(captured, loss_there);
      CHECK((now == result(eager, loss)));
      CHECK(now != before);
      CHECK(to_vector<float>(other)[4095] == 1);
      before = now;
    }
  });
}

TEST_CASE("graph: what needs the host throws by name, and the capture may be made again") {
  if (no_device()) return;
  const Tensor x = input(0, {4, 3});
  Generator rng(5);
  Graph graph(kDevice);
  const auto refused = [&](const char* name, auto f) {
    const std::string text = error_of([&] {
      graph.capture([&] {
        const Tensor y = dropout(x, 0.5, rng, true);
        f();
      });
    });
    CHECK_MESSAGE(starts_with(text, std::string(name) +
                                        ": needs the host, which cannot take part while a graph is captured on cuda:0"),
                  text);
    CHECK(rng.offset() == 0);
    CHECK(!graph.captured());
  };
  refused("item", [&] { sum(x).item(); });
  refused("to_vector", [&] { to_vector<float>(x); });
  refused("to_string", [&] { to_string(x); });
  refused("to", [&] { to(x, kCpu); });
  refused("to", [&] { to(ones({2}), kDevice); });
  refused("synchronize", [&] { synchronize(kDevice); });
  refused("global_norm", [&] { global_norm({x}); });
  refused("all_finite", [&] { all_finite(x); });
  refused("graph: replay", [&] {
    Graph done(kDevice);
    done.replay();
  });
  Graph other(kDevice);
  CHECK(starts_with(error_of([&] { graph.capture([&] { other.capture([] {}); }); }),
                    "graph: this thread is capturing another"));
  CHECK(starts_with(error_of([&] { graph.capture([&] { dropout(ones({8}), 0.5, rng, true); }); }),
                    "dropout: a CPU tensor"));
  CHECK(starts_with(error_of([&] { graph.replay(); }), "graph: replay before a capture"));
  Tensor y;
  graph.capture([&] { y = x * 2.0; });
  graph.replay();
  CHECK((bytes_there(y) == bytes_there(x * 2.0)));
  CHECK(starts_with(error_of([&] { graph.capture([] {}); }), "graph: has captured already"));
  CHECK(starts_with(error_of([&] { graph.numbers(1); }), "graph: numbers are made before the capture"));
  CHECK(starts_with(error_of([] { Graph cpu(kCpu); }), "device: cpu has no backend"));
}

TEST_CASE("graph: results outlive it, copies and reseeded draws are part of it") {
  if (no_device()) return;
  with_each_allocator([] {
    const Tensor x = clone(input(0, {33}));
    Generator rng(3), eager_rng(3);
    Tensor y;
    {
      Graph graph(kDevice);
      graph.capture([&] {
        const Tensor noise = rand_normal({33}, rng, 0, 1, f32, kDevice);
        Tensor kept = empty({33}, f32, kDevice);
        copy_bytes(kept.data(), kDevice, noise.data(), kDevice, kept.nbytes());
        y = kept + x + rand_uniform({33}, rng, 0, 1, f32, kDevice);
      });
      for (const std::uint64_t seed : {3, 4, 4}) {
        if (seed != rng.seed()) rng.reseed(seed), eager_rng.reseed(seed);
        graph.replay();
        const Tensor noise = rand_normal({33}, eager_rng, 0, 1, f32, kDevice);
        CHECK((bytes_there(y) == bytes_there(noise + x + rand_uniform({33}, eager_rng, 0, 1, f32, kDevice))));
        CHECK(rng.offset() == eager_rng.offset());
      }
    }
    const std::string before = bytes_there(y);
    const Tensor a = ones({33}, f32, kDevice), b = ones({33}, f32, kDevice), c = ones({33}, f32, kDevice);
    CHECK((bytes_there(y) == before));
    CHECK(y.data() != a.data());
  });
}

TEST_CASE("graph: checkpointed segments draw the same numbers twice") {
  if (no_device()) return;
  const auto run = [](Generator& rng, const Tensor& x) {
    const auto segment = [&rng](const std::vector<Tensor>& in) {
      return std::vector<Tensor>{square(dropout(in[0], 0.4, rng, true))};
    };
    const Tensor head = dropout(x, 0.2, rng, true);
    return grad({sum(checkpoint(segment, {head}, {})[0])}, {x})[0];
  };
  Generator rng(9), eager_rng(9);
  const Tensor x = clone(input(1, {57}));
  set_requires_grad(x, true);
  CHECK((bytes_there(run(rng, x)) == bytes_there(run(eager_rng, x))));
  Graph graph(kDevice);
  Tensor g;
  graph.capture([&] { g = run(rng, x); });
  for (int i = 0; i < 3; ++i) {
    graph.replay();
    CHECK((bytes_there(g) == bytes_there(run(eager_rng, x))));
    CHECK(rng.offset() == eager_rng.offset());
  }
}

namespace {

Tensor indices(const std::vector<std::int64_t>& v, const Shape& shape) { return to(from_vector(v, shape), kDevice); }

struct IndexOp {
  const char* name;
  Shape index;
  Tensor (*run)(const Tensor& x, const Tensor& index);  // x [5, 3]
};
const IndexOp kIndexOps[] = {
    {"index_select", {4}, [](const Tensor& x, const Tensor& i) { return index_select(x, 0, i); }},
    {"index_add", {4}, [](const Tensor& x, const Tensor& i) { return index_add(x, 0, i, slice(x, 0, 0, 4)); }},
    {"gather", {2, 2}, [](const Tensor& x, const Tensor& i) { return gather(x, 0, i); }},
    {"scatter_add", {2, 2}, [](const Tensor& x, const Tensor& i) {
       return scatter_add(x, 0, i, slice(slice(x, 0, 0, 2), 1, 0, 2));
     }},
    {"embedding", {2, 1, 2}, [](const Tensor& x, const Tensor& i) { return embedding(x, i); }},
    {"one_hot", {4}, [](const Tensor& x, const Tensor& i) { return sum(x) * one_hot(i, 5); }},
};

}  // namespace

TEST_CASE("graph: index ops check on the device, and the replay throws as the eager op does") {
  if (no_device()) return;
  with_each_allocator([] {
    for (const IndexOp& op : kIndexOps) {
      CAPTURE(op.name);
      const Tensor x = clone(input(0, {5, 3})), index = indices({0, 1, 2, 3}, op.index);
      set_requires_grad(x, true);
      Tensor y, g;
      const auto run = [&](const Tensor& at, Tensor& out, Tensor& gradient) {
        out = op.run(x, at);
        gradient = grad({sum(square(out))}, {x})[0];
      };
      run(index, y, g);
      Graph graph(kDevice);
      graph.capture([&] { run(index, y, g); });
      const auto right = [&](const std::vector<std::int64_t>& v) {
        Tensor eager, eager_g;
        run(indices(v, op.index), eager, eager_g);
        copy_into(index, indices(v, op.index));
        graph.replay();
        CHECK((bytes_there(y) == bytes_there(eager)));
        CHECK((bytes_there(g) == bytes_there(eager_g)));
      };
      right({4, 0, 4, 2});
      for (const std::vector<std::int64_t>& v : {std::vector<std::int64_t>{1, 7, -2, 9}, {0, 1, 2, 5}, {-1, 0, 0, 0}}) {
        copy_into(index, indices(v, op.index));
        const std::string text = error_of([&] { graph.replay(); });
        CHECK(starts_with(text, op.name));
        CHECK(text == error_of([&] { op.run(x, indices(v, op.index)); }));
        CHECK(text == error_of([&] { graph.check(); }));
      }
      right({3, 3, 3, 1});
    }
  });
}

TEST_CASE("graph: of several wrong indices the first op's first is named") {
  if (no_device()) return;
  const Tensor x = clone(input(0, {5, 3}));
  std::vector<std::int64_t> v(3000, 2);
  const Tensor many = indices(v, {3000}), few = indices({0, 4}, {2});
  Graph graph(kDevice);
  Tensor y;
  graph.capture([&] {
    const Tensor first = sum(index_select(x, 0, many));
    y = first + sum(embedding(x, few));
  });
  graph.replay();
  CHECK((bytes_there(y) == bytes_there(sum(index_select(x, 0, many)) + sum(embedding(x, few)))));
  copy_into(few, indices({0, 6}, {2}));
  CHECK(error_of([&] { graph.replay(); }) == "embedding: ids must be in [0, 5), got 6 at [1]");
  v[2700] = -3, v[2500] = 11;
  copy_into(many, indices(v, {3000}));
  CHECK(error_of([&] { graph.replay(); }) == "index_select: index must be in [0, 5), got 11 at [2500]");
  Graph none(kDevice);
  CHECK(error_of([&] { none.capture([&] { index_select(slice(x, 0, 0, 0), 0, few); }); }) ==
        "index_select: index must be in [0, 0), got [2] of them");
}

TEST_CASE("graph: a wrong label makes the loss NaN, and check() names it") {
  if (no_device()) return;
  const Tensor logits = input(0, {4, 6}), labels = indices({0, 5, -100, 2}, {4});
  Graph graph(kDevice);
  Tensor loss;
  graph.capture([&] { loss = cross_entropy(logits, labels); });
  graph.replay();
  graph.check();
  CHECK((bytes_there(loss) == bytes_there(cross_entropy(logits, labels))));
  copy_into(labels, indices({0, 5, -100, 6}, {4}));
  graph.replay();
  CHECK(std::isnan(loss.item()));
  CHECK(error_of([&] { graph.check(); }) ==
        "cross_entropy: labels must be in [0, 6) or -100 (ignore_index), row 3 has 6");
}

namespace {

// A step of every in-place op: rates by pointer or, planted, by value.
struct OpStep {
  TensorList p, m, v, average, weights;  // weights: p rounded
  Generator rng{1};
  OpStep() {
    for (int k = 0; k < 3; ++k) {
      p.push_back(clone(input(50 + k, {7, 5 * k + 1})));
      average.push_back(clone(p.back()));
      m.push_back(zeros_like(p.back()));
      v.push_back(zeros_like(p.back()));
      weights.push_back(cast(p.back(), bf16));
    }
  }
  AdamwOptions options(int step) const {
    AdamwOptions o;
    o.lr = 0.1 / step;
    o.step = step;
    return o;
  }
  static double decay(int step) { return 0.9 - 0.1 / step; }
  void run(const TensorList& g0, int step, const AtRun& adamw, const AtRun& ema) {
    TensorList g;
    for (const Tensor& t : g0) g.push_back(dropout(t, 0.3, rng, true));
    adamw_(p, g, m, v, options(step), adamw);
    sgd_(p, g, {}, {.lr = 0.01});
    ema_(average, p, decay(step), ema);
    ema_(average, weights, decay(step), ema);
    for (Tensor& t : g) t = cast(t, bf16);
    adamw_(p, g, m, v, options(step), adamw, weights);
    sgd_(p, g, m, {.lr = 0.01, .momentum = 0.5}, {}, weights);
  }
  std::string bytes() const {
    std::string all;
    for (const auto* list : {&p, &m, &v, &average, &weights})
      for (const Tensor& t : *list) all += bytes_there(t);
    return all;
  }
};

}  // namespace

TEST_CASE("graph: optimisers with new gradients, rates and draws; a frozen rate is found") {
  if (no_device()) return;
  for (const bool frozen : {false, true}) {
    CAPTURE(frozen);
    OpStep eager, captured;
    TensorList g;
    for (const Tensor& t : eager.p) g.push_back(zeros_like(t));
    Graph graph(kDevice);
    const Graph::Numbers three = graph.numbers(3), weight = graph.numbers(1);
    graph.capture([&] { captured.run(g, 1, frozen ? AtRun{} : AtRun{three.there, {}, {}}, {weight.there, {}, {}}); });
    bool same = true;
    for (int step = 1; step < 4; ++step) {
      for (std::size_t k = 0; k < g.size(); ++k) copy_into(g[k], input(10 * step + static_cast<int>(k), g[k].shape()));
      adamw_numbers(captured.options(step), three.here);
      *weight.here = static_cast<float>(1 - OpStep::decay(step));
      graph.replay();
      eager.run(g, step, {}, {});
      same = same && captured.bytes() == eager.bytes();
    }
    CHECK(same == !frozen);
  }
}

TEST_CASE("graph: the verdict on gradients is the host's") {
  if (no_device()) return;
  const TensorList g{input(1, {300, 77}), Tensor(), input(2, {5}), cast(input(3, {41}), f16)};
  const double norm = global_norm(g), inf = std::numeric_limits<double>::infinity();
  const auto item = [](const Tensor& t) { return t.item(); };
  for (const double max_norm : {0.0, norm / 3, norm, 2 * norm})
    for (const double loss_scale : {1.0, 1024.0}) {
      const double scaled = norm / loss_scale,
                   want = (max_norm > 0 && scaled > max_norm ? max_norm / scaled : 1) / loss_scale;
      const auto v = grad_verdict(g, {ones({}, f32, kDevice)}, max_norm,
                                  loss_scale == 1 ? Tensor() : full({1}, loss_scale, f32, kDevice));
      CHECK(item(v.norm) == scaled);
      CHECK(item(v.scale) == static_cast<double>(static_cast<float>(want)));
      CHECK(item(v.skip) == 0);
    }
  CHECK(item(grad_verdict(g, {full({}, inf, f32, kDevice)}, 0).skip) == 1);
  CHECK(item(grad_verdict({full({9}, -inf, f32, kDevice)}, {}, 1).skip) == 1);
  CHECK(starts_with(error_of([] { grad_verdict({Tensor()}, {}, 1); }), "grad_verdict: needs a gradient"));
  CHECK(starts_with(error_of([] { grad_verdict({ones({2})}, {}, 1); }),
                    "grad_verdict: needs tensors of one CUDA device"));
  const Tensor p = ones({4}), number = ones({1});
  CHECK(starts_with(error_of([&] {
                      ema_(TensorList{p}, TensorList{ones({4})}, 0.5, {number, {}, {}});
                    }),
                    "ema_: numbers that are read at run are for CUDA"));

  // Nothing moves while it says skip.
  OpStep s;
  const std::string before = s.bytes();
  const AtRun skip{{}, {}, ones({1}, f32, kDevice)};
  adamw_(s.p, s.m, s.m, s.v, s.options(1), skip);
  adamw_(s.p, s.weights, s.m, s.v, s.options(1), skip, s.weights);
  sgd_(s.p, s.average, s.m, {.lr = 1, .momentum = 0.5}, skip);
  sgd_(s.p, s.average, {}, {.lr = 1}, skip);
  ema_(s.average, s.m, 0.5, skip);
  scale_(s.p, 3, skip);
  CHECK((s.bytes() == before));
  // The scale at run is that of the options.
  OpStep a, b;
  const AtRun quarter{{}, full({1}, 0.25, f32, kDevice), zeros({1}, f32, kDevice)};
  AdamwOptions o = a.options(2);
  adamw_(a.p, a.average, a.m, a.v, o, quarter);
  sgd_(a.p, a.average, a.m, {.lr = 1, .momentum = 0.5}, quarter);
  sgd_(a.p, a.average, {}, {.lr = 1}, quarter);
  scale_(a.p, 9, quarter);
  o.grad_scale = 0.25;
  adamw_(b.p, b.average, b.m, b.v, o);
  sgd_(b.p, b.average, b.m, {.lr = 1, .momentum = 0.5, .grad_scale = 0.25});
  sgd_(b.p, b.average, {}, {.lr = 1, .grad_scale = 0.25});
  scale_(b.p, 0.25);
  CHECK((a.bytes() == b.bytes()));
}

namespace {

// SyntheticSource's batches on the device; the last one of an epoch may be smaller.
class There final : public train::BatchSource {
 public:
  There(std::int64_t batches, DType dtype, bool smaller_last, bool soft = false)
      : host_(batches, 8, 1, dtype, soft), smaller_(smaller_last) {}
  std::int64_t batches_per_epoch() const override { return host_.batches_per_epoch(); }
  void seek(std::int64_t epoch, std::int64_t batch) override {
    host_.seek(epoch, batch);
    at_ = batch;
  }
  train::Batch next() override {
    train::Batch b = host_.next();
    const bool last = ++at_ % host_.batches_per_epoch() == 0;
    const std::int64_t rows = smaller_ && last ? 5 : b.size();
    const auto there = [&](const Tensor& t) { return t.defined() ? to(slice(t, 0, 0, rows), kDevice) : Tensor(); };
    return {there(b.x), there(b.labels), there(b.soft)};
  }

 private:
  SyntheticSource host_;
  bool smaller_;
  std::int64_t at_ = 0;
};

struct Settings {
  const char* name;
  train::OptimizerKind kind;
  DType dtype = f32;
  std::int64_t accumulate = 1;
  bool smaller_last = false;
  double loss_scale = 0, clip = 0.5;
  bool warm_up = false, soft = false;
};

struct Run {
  std::vector<double> losses, norms;
  std::string state;
  std::int64_t steps = 0;
  double loss_scale = 0;
  std::string resumed_from;
};

Run run(const Settings& s, bool graph, const std::string& folder = "", std::int64_t max_steps = 0) {
  nn::Build build = on_device();
  build.seed = 7;
  build.dtype = s.dtype;
  TinyMlp model(build);
  train::ClassifierOf classifier(model);
  train::ClassificationTask task(classifier, 0.1);
  There data(5, s.dtype, s.smaller_last, s.soft), held_out(1, s.dtype, false);
  train::TrainOptions o;
  o.epochs = 3;
  o.accumulate = s.accumulate;
  o.optimizer = s.kind;
  o.adamw.rules = {{"head", 2, 0.01}};
  o.schedule.lr = 0.02;
  o.warmup_epochs = 0.7;
  o.clip_norm = s.clip;
  o.ema_decay = 0.9;
  o.ema_warm_up = s.warm_up;
  o.loss_scale = s.loss_scale;
  o.graph = graph;
  o.checkpoint_dir = folder;
  o.max_steps = max_steps;
  Run r;
  o.on_progress = [](const train::Progress& p, void* user) {
    static_cast<Run*>(user)->losses.push_back(p.loss);
    static_cast<Run*>(user)->norms.push_back(p.grad_norm);
  };
  o.user = &r;
  train::Trainer trainer(task, data, &held_out, o);
  const auto result = trainer.run();
  r.resumed_from = result.resumed_from;
  r.steps = trainer.optimizer().steps();
  r.loss_scale = result.position.loss_scale;
  r.state = bytes_of(nn::state_dict(model, nn::Part::all)) + bytes_of(trainer.optimizer().state()) +
            bytes_of(trainer.ema()->state()) + std::to_string(model.drop.rng.offset()) + " " +
            std::to_string(model.path.rng.offset());
  return r;
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {  // NaN too
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

constexpr auto kAdamw = train::OptimizerKind::adamw;

}  // namespace

TEST_CASE("graph: the trainer's steps are the eager ones to the bit") {
  if (no_device()) return;
  with_each_allocator([] {
    for (const Settings& s : {Settings{"adamw", kAdamw},
                              {"sgd, a smaller last batch", train::OptimizerKind::sgd, f32, 1, true},
                              {"muon, soft", train::OptimizerKind::muon, f32, 1, false, 0, 0.5, false, true},
                              {"accumulate, warm averages", kAdamw, f32, 2, true, 0, 0.5, true},
                              {"bf16", kAdamw, bf16},
                              {"no clipping", kAdamw, f32, 1, false, 0, 0},
                              {"f16, scaled", kAdamw, f16, 1, false, 0x1p16},
                              {"f16, overflow at first", kAdamw, f16, 2, false, 0x1p24, 0.5, true}}) {
      CAPTURE(s.name);
      const Run eager = run(s, false), captured = run(s, true);
      CHECK(same_bits(eager.losses, captured.losses));
      CHECK(same_bits(eager.norms, captured.norms));
      CHECK((eager.state == captured.state));
      CHECK(eager.steps == captured.steps);
      CHECK(eager.loss_scale == captured.loss_scale);
      if (s.loss_scale == 0x1p24) {
        CHECK(captured.steps < 9);
        CHECK(captured.steps > 0);
        CHECK(captured.loss_scale < 0x1p24);
      }
    }
  });
}

TEST_CASE("graph: a captured run that stopped anywhere and resumed ends with the eager run's bits") {
  if (no_device()) return;
  for (const Settings& s : {Settings{"accumulate, warm averages", kAdamw, f32, 2, true, 0, 0.5, true},
                            {"f16, overflow at first", kAdamw, f16, 2, false, 0x1p24, 0.5, true}}) {
    CAPTURE(s.name);
    const Run straight = run(s, false);
    for (const std::int64_t k : {1, 2, 4, 5}) {
      CAPTURE(k);
      const TempFolder t;
      run(s, true, t.path(), k);
      const Run rest = run(s, true, t.path());
      CHECK(rest.resumed_from != "");
      CHECK((rest.state == straight.state));
      CHECK(rest.loss_scale == straight.loss_scale);
    }
  }
}

namespace {

// The fourth batch is not finite, or has a label of no class.
class Broken final : public train::BatchSource {
 public:
  explicit Broken(bool label = false) : label_(label) {}
  std::int64_t batches_per_epoch() const override { return 6; }
  void seek(std::int64_t, std::int64_t batch) override { at_ = batch; }
  train::Batch next() override {
    SyntheticSource host(6, 8);
    host.seek(0, at_);
    train::Batch b = host.next();
    if (at_++ == 3) label_ ? fill_(b.labels, 99) : fill_(b.x, NAN);
    return {to(b.x, kDevice), to(b.labels, kDevice), {}};
  }

 private:
  bool label_;
  std::int64_t at_ = 0;
};

}  // namespace

TEST_CASE("graph: a step that is not finite is left out and traced as an eager one") {
  if (no_device()) return;
  std::vector<std::string> texts, weights;
  for (const auto& [graph, label] : {std::pair{false, false}, {true, false}, {false, true}, {true, true}}) {
    TinyMlp model(on_device());
    train::ClassifierOf classifier(model);
    train::ClassificationTask task(classifier);
    Broken data(label);
    train::TrainOptions o;
    o.epochs = 1;
    o.graph = graph;
    train::Trainer trainer(task, data, nullptr, o);
    texts.push_back(error_of([&] { trainer.run(); }));
    weights.push_back(bytes_of(nn::state_dict(model, nn::Part::all)));
  }
  CHECK(
      starts_with(texts[0], "train: the loss is nan in step 3 (epoch 0, batch 3); first not finite: the batch itself"));
  CHECK(texts[1] == texts[0]);
  CHECK((weights[1] == weights[0]));
  CHECK(starts_with(texts[2], "train: the loss is nan in step 3 (epoch 0, batch 3)"));
  CHECK(contains(texts[3], "cross_entropy: labels must be in [0, "));
  CHECK(contains(texts[3], "(ignore_index), row 0 has 99"));
  CHECK((weights[2] == weights[0]));
  CHECK((weights[3] == weights[0]));
}

TEST_CASE("trainer: graph is for CUDA, loss_scale for powers of two") {
  TinyMlp model{nn::Build{}};
  train::ClassifierOf classifier(model);
  train::ClassificationTask task(classifier);
  SyntheticSource data(2, 4);
  train::TrainOptions o;
  o.graph = true;
  CHECK(error_of([&] { train::Trainer t(task, data, nullptr, o); }) ==
        "trainer: graph needs a model on a CUDA device, it is on cpu");
  o.graph = false;
  for (const double bad : {3.0, 0.5, -2.0}) {
    o.loss_scale = bad;
    CHECK(starts_with(error_of([&] { train::Trainer t(task, data, nullptr, o); }),
                      "trainer: loss_scale must be 0 or a power of two"));
  }
}

TEST_CASE("trainer: the loss scale changes no f32 bit, halves at an overflow, is resumed") {
  const auto train = [](DType dtype, double loss_scale, const std::string& folder, std::int64_t max_steps) {
    nn::Build build;
    build.dtype = dtype;
    TinyMlp model(build);
    train::ClassifierOf classifier(model);
    train::ClassificationTask task(classifier);
    SyntheticSource data(4, 8, 1, dtype);
    train::TrainOptions o;
    o.epochs = 3;
    o.clip_norm = 0.5;
    o.loss_scale = loss_scale;
    o.checkpoint_dir = folder;
    o.max_steps = max_steps;
    train::Trainer trainer(task, data, nullptr, o);
    Run r;
    r.loss_scale = trainer.run().position.loss_scale;
    r.steps = trainer.optimizer().steps();
    r.state = bytes_of(nn::state_dict(model, nn::Part::all)) + bytes_of(trainer.optimizer().state());
    return r;
  };
  CHECK((train(f32, 0, "", 0).state == train(f32, 0x1p16, "", 0).state));
  const Run half = train(f16, 0x1p20, "", 0);
  CHECK(half.steps < 12);
  CHECK(half.steps > 4);
  CHECK(half.loss_scale == std::ldexp(1.0, 20 - static_cast<int>(12 - half.steps)));
  const TempFolder t;
  train(f16, 0x1p20, t.path(), 2);
  const Run rest = train(f16, 0x1p20, t.path(), 0);
  CHECK((rest.state == half.state));
  CHECK(rest.loss_scale == half.loss_scale);
}

namespace {

class Heap final : public MemorySource {
 public:
  const char* name() const override { return "heap"; }
  void* take(std::size_t bytes) override {
    if (bytes > 1 << 20) return nullptr;
    ++blocks;
    return std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  }
  void give_back(void* p, std::size_t) override {
    --blocks;
    std::free(p);
  }
  int blocks = 0;
};

}  // namespace

TEST_CASE("allocator: a pool's blocks are nobody else's until it is dropped") {
  Heap heap;
  {
    CachingAllocator a(heap);
    void* const outside = a.allocate(1000);
    void* const cached = a.allocate(1000);
    a.release(cached, 1000);
    a.begin_pool();
    CHECK(starts_with(error_of([&] { a.begin_pool(); }), "heap allocator: a graph is being captured already"));
    void* const first = a.allocate(1000);
    CHECK(first == cached);  // what lay in the cache is taken over
    a.release(first, 1000);
    void* const second = a.allocate(1000);
    CHECK(second == first);  // within the pool it is reused
    void* const kept = a.allocate(1000);
    a.release(second, 1000);
    a.release(outside, 1000);
    CachingAllocator::Pool* const pool = a.end_pool();
    void* const other = a.allocate(1000);
    CHECK(other != first);
    CHECK(other != outside);
    a.release(kept, 1000);  // by a tensor that outlived the capture: the graph still writes there
    void* const another = a.allocate(1000);
    CHECK(another != kept);
    const MemoryStats stats = a.stats();
    CHECK(stats.live_bytes == 2 * static_cast<std::int64_t>(rounded_bytes(1000)));
    CHECK(stats.cached_bytes == 3 * static_cast<std::int64_t>(rounded_bytes(1000)));
    a.release_all();
    CHECK(heap.blocks == 5);  // the pool's stay
    a.drop_pool(pool);
    void* const again = a.allocate(1000);
    CHECK((again == first || again == kept || again == outside));
    for (void* p : {other, another, again}) a.release(p, 1000);
    CHECK(contains(error_of([&] { a.allocate(1 << 21); }), "the system has no room"));
    CHECK(heap.blocks == 0);

    a.begin_pool();
    void* const late = a.allocate(64);
    a.drop_pool(a.end_pool());
    a.release(late, 64);  // after its pool
    void* const reused = a.allocate(64);
    CHECK(reused == late);
    a.release(reused, 64);
    // So are the workspaces that its graph may use.
    void* const scratch = a.workspace(nullptr, 1000);
    a.begin_pool();
    CachingAllocator::Pool* const user = a.end_pool();
    a.release_all();
    CHECK(a.workspace(nullptr, 1000) == scratch);
    void* const larger = a.workspace(nullptr, 5000);
    CHECK(larger != scratch);
    void* const tensor = a.allocate(1000);
    CHECK(tensor != scratch);
    CHECK(a.workspace_bytes() == static_cast<std::int64_t>(rounded_bytes(1000) + rounded_bytes(5000)));
    a.drop_pool(user);
    CHECK(a.workspace_bytes() == static_cast<std::int64_t>(rounded_bytes(5000)));
    void* const free_again = a.allocate(1000);
    CHECK(free_again == scratch);
    a.release(tensor, 1000);
    a.release(free_again, 1000);
    a.release_all();
  }
  CHECK(heap.blocks == 0);
}
