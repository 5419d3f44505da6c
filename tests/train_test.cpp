// models/train: optimisers against scalar f64 formulas, schedules, averages, accumulation, the guard, logs, the plan.
#include <capo/datasets/batch_source.h>
#include <capo/engine/threads.h>
#include <capo/examples/curve.h>
#include <capo/models/train/memory_plan.h>
#include <capo/models/train/tensorboard.h>
#include <capo/models/vit/vit.h>
#include <capo/ops/binary.h>
#include <capo/ops/reduce.h>
#include <capo/tests/temp_folder.h>
#include <capo/tests/tiny_model.h>
#include <capo/tuners/spec.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>

using namespace capo;
using namespace capo::testing;

namespace {

nn::Build build_of(DType dtype) {
  nn::Build b;
  b.dtype = dtype;
  return b;
}

// Parameters of every kind of default: decayed, 1-D, and tokens.
struct Zoo : nn::Module {
  explicit Zoo(DType dtype) : Module(build_of(dtype)) {}
  nn::Parameter cls_token{this, "cls_token", {1, 1, 3}, nn::Init::normal(1)};
  nn::Linear fc{this, "fc", 5, 7, true, nn::Init::normal(1)};
  nn::Linear head{this, "head", 7, 2, true, nn::Init::normal(1)};
};

// The same gradients for everybody: step t, element i of parameter p.
double gradient(int t, int p, std::size_t i) {
  return std::sin(1.3 * t + 2.1 * p + 0.7 * static_cast<double>(i)) * std::pow(10.0, p - 2);
}

void set_gradients(const std::vector<nn::Parameter*>& parameters, int t) {
  for (std::size_t p = 0; p < parameters.size(); ++p) {
    const Tensor& v = parameters[p]->value();
    std::vector<double> g;
    for (std::int64_t i = 0; i < v.numel(); ++i)
      g.push_back(gradient(t, static_cast<int>(p), static_cast<std::size_t>(i)));
    set_grad(v, cast(from_vector(g, v.shape()), v.dtype()));
  }
}

std::vector<std::vector<double>> values_of(const std::vector<nn::Parameter*>& parameters) {
  std::vector<std::vector<double>> out;
  for (auto* p : parameters) out.push_back(to_vector<double>(p->value()));
  return out;
}

// Infinite when a difference is NaN.
double worst(const std::vector<std::vector<double>>& a, const std::vector<std::vector<double>>& b) {
  REQUIRE(a.size() == b.size());
  double e = 0;
  for (std::size_t p = 0; p < a.size(); ++p) {
    REQUIRE(a[p].size() == b[p].size());
    for (std::size_t i = 0; i < a[p].size(); ++i) {
      const double d = std::fabs(a[p][i] - b[p][i]) / (1 + std::fabs(b[p][i]));
      e = std::isnan(d) ? HUGE_VAL : std::max(e, d);
    }
  }
  return e;
}

Tensor state_named(const train::Optimizer& opt, const std::string& name) {
  for (const auto& s : opt.state_list())
    if (s.name == name) return s.value;
  FAIL("no state " << name);
  return {};
}

const std::vector<train::Rule> kRules{{"head", 10}, {"**.weight", 0.5, 0.2}, {"head.bias", 3, 0.4}};
// By hand, from the rules and the defaults, in declaration order: cls_token, fc.weight, fc.bias, head.weight,
// head.bias.
constexpr double kScale[] = {1, 0.5, 1, 0.5, 3};
constexpr double kDecay[] = {0, 0.2, 0, 0.2, 0.4};

}  // namespace

TEST_CASE("optim: AdamW is the textbook formula") {
  for (const DType dtype : {f64, f32}) {
    Zoo zoo(dtype);
    const auto parameters = zoo.parameters();
    train::AdamW opt(zoo, {0.8, 0.95, 1e-7, 0.1, kRules});
    for (std::size_t p = 0; p < parameters.size(); ++p) {
      CHECK(opt.lr_scale(p) == kScale[p]);
      CHECK(opt.weight_decay(p) == kDecay[p]);
    }
    auto want = values_of(parameters);
    std::map<std::pair<std::size_t, std::size_t>, std::pair<double, double>> moments;
    for (int t = 1; t <= 20; ++t) {
      set_gradients(parameters, t);
      const double lr = 0.1 / t;
      opt.step(lr);
      for (std::size_t p = 0; p < want.size(); ++p)
        for (std::size_t i = 0; i < want[p].size(); ++i) {
          auto& [m, v] = moments[{p, i}];
          const double g = gradient(t, static_cast<int>(p), i), rate = lr * kScale[p];
          m = 0.8 * m + 0.2 * g;
          v = 0.95 * v + 0.05 * g * g;
          want[p][i] *= 1 - rate * kDecay[p];
          want[p][i] -= rate * (m / (1 - std::pow(0.8, t))) / (std::sqrt(v / (1 - std::pow(0.95, t))) + 1e-7);
        }
    }
    CHECK(opt.steps() == 20);
    CHECK(worst(values_of(parameters), want) < (dtype == f64 ? 1e-13 : 2e-6));
    opt.zero_grad();
    const auto before = values_of(parameters);
    opt.step(1);  // without gradients nothing moves
    CHECK(values_of(parameters) == before);
  }
}

TEST_CASE("optim: SGD is the textbook formula") {
  for (const DType dtype : {f64, f32})
    for (const bool nesterov : {false, true})
      for (const double momentum : {0.0, 0.9}) {
        if (nesterov && momentum == 0) continue;
        Zoo zoo(dtype);
        const auto parameters = zoo.parameters();
        train::Sgd opt(zoo, {momentum, nesterov, 0.1, kRules});
        auto want = values_of(parameters);
        std::map<std::pair<std::size_t, std::size_t>, double> velocity;
        for (int t = 1; t <= 20; ++t) {
          set_gradients(parameters, t);
          opt.step(0.01);
          for (std::size_t p = 0; p < want.size(); ++p)
            for (std::size_t i = 0; i < want[p].size(); ++i) {
              double& v = velocity[{p, i}];
              const double g = gradient(t, static_cast<int>(p), i) + kDecay[p] * want[p][i];
              v = momentum * v + g;
              want[p][i] -= 0.01 * kScale[p] * (nesterov ? g + momentum * v : v);
            }
        }
        CHECK(worst(values_of(parameters), want) < (dtype == f64 ? 1e-13 : 2e-6));
      }
}

namespace {

// Square, wide and tall matrices, two of one shape; no head.
struct Matrices : nn::Module {
  explicit Matrices(DType dtype) : Module(build_of(dtype)) {}
  nn::Linear wide{this, "wide", 9, 4, true, nn::Init::normal(1)};
  nn::Linear tall{this, "tall", 5, 13, true, nn::Init::normal(1)};
  nn::Linear wide2{this, "wide2", 9, 4, false, nn::Init::normal(1)};
  nn::Linear one{this, "one", 1, 1, false, nn::Init::normal(1)};
};

using Matrix = std::vector<std::vector<double>>;
Matrix product_of(const Matrix& a, const Matrix& b) {
  Matrix c(a.size(), std::vector<double>(b[0].size(), 0.0));
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t j = 0; j < b[0].size(); ++j)
      for (std::size_t k = 0; k < b.size(); ++k) c[i][j] += a[i][k] * b[k][j];
  return c;
}
Matrix transposed(const Matrix& a) {
  Matrix t(a[0].size(), std::vector<double>(a.size()));
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t j = 0; j < a[0].size(); ++j) t[j][i] = a[i][j];
  return t;
}
// Row-major [rows, columns], as PyTorch's _zeropower_via_newtonschulz does it, in f64.
std::vector<double> newton_schulz_by_loop(const std::vector<double>& values, std::size_t rows, int steps) {
  Matrix x(rows);
  const std::size_t columns = values.size() / rows;
  double squares = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    x[i / columns].push_back(values[i]);
    squares += values[i] * values[i];
  }
  if (rows > columns) x = transposed(x);
  for (auto& row : x)
    for (double& v : row) v /= std::max(std::sqrt(squares), 1e-7);
  for (int s = 0; s < steps; ++s) {
    const Matrix gram = product_of(x, transposed(x));
    Matrix b = product_of(gram, gram);
    for (std::size_t i = 0; i < b.size(); ++i)
      for (std::size_t j = 0; j < b.size(); ++j) b[i][j] = -4.7750 * gram[i][j] + 2.0315 * b[i][j];
    const Matrix bx = product_of(b, x);
    for (std::size_t i = 0; i < x.size(); ++i)
      for (std::size_t j = 0; j < x[0].size(); ++j) x[i][j] = 3.4445 * x[i][j] + bx[i][j];
  }
  if (rows > columns) x = transposed(x);
  std::vector<double> out;
  for (const auto& row : x) out.insert(out.end(), row.begin(), row.end());
  return out;
}

}  // namespace

TEST_CASE("optim: Muon is the published algorithm; vectors go by AdamW") {
  for (const DType dtype : {f64, f32})
    for (const bool nesterov : {true, false}) {
      Matrices model(dtype);
      // wide.weight, wide.bias, tall.weight, tall.bias, wide2.weight, one.weight
      const auto parameters = model.parameters();
      REQUIRE(parameters.size() == 6);
      const std::vector<train::Rule> rules{{"tall", 0.5, 0.3}};
      const double scales[] = {1, 1, 0.5, 0.5, 1, 1}, decays[] = {0.05, 0, 0.3, 0.3, 0.05, 0.05};
      train::Muon opt(model, {.nesterov = nesterov, .beta1 = 0.8, .beta2 = 0.95, .rules = rules});
      auto want = values_of(parameters);
      auto buffers = want, squares = want;
      for (auto* state : {&buffers, &squares})
        for (auto& values : *state) std::fill(values.begin(), values.end(), 0.0);
      for (int t = 1; t <= 4; ++t) {
        set_gradients(parameters, t);
        const double lr = 0.1 / t, grad_scale = t == 2 ? 0.25 : 1;
        opt.step(lr, grad_scale);
        for (std::size_t p = 0; p < want.size(); ++p) {
          const double rate = lr * scales[p];
          CHECK(opt.weight_decay(p) == decays[p]);
          std::vector<double> update;
          for (std::size_t i = 0; i < want[p].size(); ++i) {
            const double g = grad_scale * gradient(t, static_cast<int>(p), i);
            double& m = buffers[p][i];
            if (parameters[p]->value().rank() == 2) {
              m = 0.95 * m + 0.05 * g;
              update.push_back(nesterov ? 0.95 * m + 0.05 * g : m);
            } else {
              double& v = squares[p][i];
              m = 0.8 * m + 0.2 * g;
              v = 0.95 * v + 0.05 * g * g;
              update.push_back(m / (1 - std::pow(0.8, t)) / (std::sqrt(v / (1 - std::pow(0.95, t))) + 1e-8));
            }
          }
          double factor = 1;
          if (parameters[p]->value().rank() == 2) {
            const auto rows = static_cast<std::size_t>(parameters[p]->value().size(0));
            update = newton_schulz_by_loop(update, rows, 5);
            factor = 0.2 * std::sqrt(static_cast<double>(std::max(rows, update.size() / rows)));
          }
          for (std::size_t i = 0; i < want[p].size(); ++i) {
            want[p][i] *= 1 - rate * decays[p];
            want[p][i] -= rate * factor * update[i];
          }
        }
      }
      const double error = worst(values_of(parameters), want);
      CHECK_MESSAGE(error < (dtype == f64 ? 1e-12 : 1e-4), error);
      std::string names;
      for (const auto& s : opt.state_list()) names += s.name + " ";
      CHECK(names == "step momentum/wide.weight m/wide.bias v/wide.bias momentum/tall.weight m/tall.bias v/tall.bias "
                     "momentum/wide2.weight momentum/one.weight ");
    }
}

TEST_CASE("optim: newton_schulz makes singular values about 1, of one matrix or a stack") {
  Generator rng(3);
  for (const Shape& shape : {Shape{40, 24}, Shape{24, 40}, Shape{3, 17, 33}}) {
    const Tensor x = rand_normal(shape, rng, 0, 100, f64), y = train::newton_schulz(x);
    const std::int64_t r = shape[shape.size() - 2], c = shape[shape.size() - 1];
    CHECK(y.shape() == shape);
    const auto xs = to_vector<double>(x), ys = to_vector<double>(y);
    const std::size_t each = static_cast<std::size_t>(r * c);
    for (std::size_t at = 0; at < xs.size(); at += each) {
      const std::vector<double> one(xs.begin() + static_cast<std::ptrdiff_t>(at),
                                    xs.begin() + static_cast<std::ptrdiff_t>(at + each));
      const auto want = newton_schulz_by_loop(one, static_cast<std::size_t>(r), 5);
      double error = 0, squares = 0;
      for (std::size_t i = 0; i < each; ++i) {
        error = std::max(error, std::fabs(ys[at + i] - want[i]));
        squares += ys[at + i] * ys[at + i];
      }
      CHECK(error < 1e-10);
      // Mean squared singular value.
      CHECK(squares / static_cast<double>(std::min(r, c)) == doctest::Approx(1).epsilon(0.25));
    }
  }
  CHECK(to_vector<double>(train::newton_schulz(zeros({3, 5}, f64))) == std::vector<double>(15, 0.0));
  CHECK(starts_with(error_of([] { train::newton_schulz(zeros({3})); }), "newton_schulz: needs"));
}

TEST_CASE("optim: Muon leaves head, embeddings and tokens to AdamW, bit by bit") {
  vit::VitConfig c = vit::config("vit_ti", 16, 8, 10);
  c.dim = 24, c.depth = 2, c.heads = 2;
  vit::Vit a(c), b(c);
  train::Muon muon(a);
  train::AdamW adamw(b);
  for (int t = 1; t <= 2; ++t) {
    set_gradients(a.parameters(), 1);
    set_gradients(b.parameters(), 1);
    muon.step(0.01);
    adamw.step(0.01);
  }
  const auto pa = a.parameters(), pb = b.parameters();
  std::string taken;
  for (std::size_t i = 0; i < pa.size(); ++i) {
    const bool takes = train::muon_takes(*pa[i]);
    if (takes && starts_with(pa[i]->path(), "blocks.1.")) taken += pa[i]->path() + " ";
    CHECK(takes == (pa[i]->value().rank() == 2 && starts_with(pa[i]->path(), "blocks.")));
    CHECK_MESSAGE((bytes_of(pa[i]->value()) == bytes_of(pb[i]->value())) == !takes, pa[i]->path());
    CHECK(muon.weight_decay(i) == adamw.weight_decay(i));
  }
  CHECK(taken == "blocks.1.attn.qkv.weight blocks.1.attn.proj.weight blocks.1.mlp.fc1.weight blocks.1.mlp.fc2.weight ");
  struct Table : nn::Module {
    Table() : Module(nn::Build{}) {}
    nn::Embedding words{this, "words", 7, 3};
  } table;
  CHECK(!train::muon_takes(table.words.weight));
}

TEST_CASE("optim: of tuners Muon takes the adapters' matrices alone") {
  vit::VitConfig c = vit::config("vit_ti", 16, 8, 10);
  c.dim = 24, c.depth = 1, c.heads = 2;
  vit::Vit model(c);
  tuners::apply_spec(model,
                     "**.attn: u_prefix(); **.attn: u_prompt(); **.attn: lora(rank=2, slices=qv); **.mlp: u_prefix(); "
                     "**.mlp: u_prompt(); **.mlp.fc1: lora(rank=2); **.mlp: u_adapter(dim=3); head: train");
  std::string taken;
  int matrices = 0;
  for (const nn::Parameter* p : model.parameters()) {
    if (!p->trainable()) continue;
    matrices += p->value().rank() == 2;
    if (train::muon_takes(*p)) taken += p->path() + " ";
  }
  CHECK(taken == "blocks.0.mlp.u_adapter.down.weight blocks.0.mlp.u_adapter.up.weight ");
  CHECK(matrices == 2 + 1 + 4 + 2 + 1 + 2 + 2 + 1);
}

TEST_CASE("optim: Muon in bf16 follows the f32 masters; any number of threads gives the same bits") {
  Matrices half(bf16), single(f32);
  {
    const NoGrad off;
    for (std::size_t i = 0; i < half.parameters().size(); ++i)
      copy_into(single.parameters()[i]->value(), half.parameters()[i]->value());
  }
  train::Muon x(half), y(single);
  for (int t = 1; t <= 3; ++t) {
    for (auto* model : {&half, &single})
      for (auto* p : model->parameters())
        set_grad(p->value(), full(p->value().shape(), t % 2 ? 1 : -0.5, p->value().dtype()));
    x.step(1e-3);
    y.step(1e-3);
  }
  const Tensor master = state_named(x, "master/tall.weight");
  const auto got = to_vector<double>(master), want = to_vector<double>(single.tall.weight.value());
  REQUIRE(got.size() == want.size());
  for (std::size_t i = 0; i < got.size(); ++i) CHECK(got[i] == doctest::Approx(want[i]).epsilon(1e-5));
  CHECK(bytes_of(cast(master, bf16)) == bytes_of(half.tall.weight.value()));

  std::vector<std::string> bits;
  const ThreadsScope restore;
  for (const int threads : {1, 2, 5}) {
    set_num_threads(threads);
    vit::VitConfig c = vit::config("vit_ti", 16, 8, 10);
    c.depth = 2;
    vit::Vit model(c);
    train::Muon opt(model);
    set_gradients(model.parameters(), 1);
    opt.step(0.01);
    bits.push_back(bytes_of(nn::state_dict(model, nn::Part::all)) + bytes_of(opt.state()));
  }
  CHECK((bits[0] == bits[1]));
  CHECK((bits[0] == bits[2]));
}

TEST_CASE("optim: defaults, errors, frozen parameters") {
  Zoo zoo(f32);
  CHECK(!train::decays_by_default(zoo.cls_token));
  CHECK(train::decays_by_default(zoo.fc.weight));
  CHECK(!train::decays_by_default(*zoo.fc.bias));
  CHECK(contains(error_of([&] { train::AdamW o(zoo, {.rules = {{"blocks.*", 2}}}); }),
                 "\"blocks.*\" matches no parameter"));
  CHECK(starts_with(error_of([&] { train::AdamW o(zoo, {.beta1 = 1}); }), "adamw: betas"));
  CHECK(starts_with(error_of([&] { train::Sgd o(zoo, {.momentum = 0, .nesterov = true}); }), "sgd: nesterov"));
  CHECK(starts_with(error_of([&] { train::Muon o(zoo, {.momentum = 1}); }), "muon: momentum"));
  CHECK(starts_with(error_of([&] { train::Muon o(zoo, {.ns_steps = 0}); }), "muon: ns_steps"));
  CHECK(starts_with(error_of([&] { train::optimizer_kind("adam"); }),
                    "optimizer: must be adamw, sgd or muon, got \"adam\""));
  for (const char* name : {"adamw", "sgd", "muon"}) {
    CHECK(to_string(train::optimizer_kind(name)) == name);
    CHECK(std::string(train::make_optimizer(train::optimizer_kind(name), zoo)->name()) == name);
  }
  zoo.fc.set_trainable(false);
  train::AdamW opt(zoo);
  CHECK(opt.parameters().size() == 3);
  const auto before = to_vector<double>(zoo.fc.weight.value());
  set_gradients(zoo.parameters(), 1);
  opt.step(1);
  CHECK(to_vector<double>(zoo.fc.weight.value()) == before);
}

TEST_CASE("optim: bf16 parameters move by their f32 masters") {
  Zoo half(bf16);
  train::AdamW opt(half);
  const auto first = to_vector<double>(half.fc.weight.value());
  // Steps far below bf16's resolution of the values add up.
  for (int t = 1; t <= 400; ++t) {
    for (auto* p : half.parameters()) set_grad(p->value(), full(p->value().shape(), 1, bf16));
    opt.step(1e-4);
  }
  const auto last = to_vector<double>(half.fc.weight.value());
  for (std::size_t i = 0; i < first.size(); ++i) CHECK(last[i] == doctest::Approx(first[i] - 0.04).epsilon(0.03));
  CHECK(bytes_of(cast(state_named(opt, "master/fc.weight"), bf16)) == bytes_of(half.fc.weight.value()));
}

TEST_CASE("optim: clipping by the global norm") {
  Zoo zoo(f64);
  train::AdamW opt(zoo);
  set_gradients(zoo.parameters(), 3);
  double squares = 0;
  for (auto* p : zoo.parameters())
    for (const double g : to_vector<double>(grad_of(p->value()))) squares += g * g;
  const double norm = std::sqrt(squares);
  CHECK(opt.grad_norm() == doctest::Approx(norm).epsilon(1e-12));
  const auto before = to_vector<double>(grad_of(zoo.fc.weight.value()));
  CHECK(opt.clip_grad_norm(2 * norm) == doctest::Approx(norm));
  CHECK(to_vector<double>(grad_of(zoo.fc.weight.value())) == before);
  opt.clip_grad_norm(norm / 4);
  CHECK(opt.grad_norm() == doctest::Approx(norm / 4).epsilon(1e-12));
  CHECK(to_vector<double>(grad_of(zoo.fc.weight.value()))[3] == doctest::Approx(before[3] / 4).epsilon(1e-12));
  // Two parameters that share one gradient tensor are scaled once each.
  const Tensor shared = ones({7, 5}, f64);
  opt.zero_grad();
  set_grad(zoo.fc.weight.value(), shared);
  opt.clip_grad_norm(1e-3);
  CHECK(to_vector<double>(shared)[0] == 1);
  CHECK(opt.grad_norm() == doctest::Approx(1e-3));
  CHECK(error_of([&] { opt.clip_grad_norm(0); }) != "no error");
}

TEST_CASE("optim: state round trip is strict") {
  Zoo a(f32), b(f32);
  train::AdamW x(a), y(b);
  for (int t = 1; t <= 3; ++t) {
    set_gradients(a.parameters(), t);
    x.step(0.1);
  }
  const nn::StateDict state = x.state();
  CHECK(state.size() == 11);
  y.load_state(state);
  CHECK((bytes_of(y.state()) == bytes_of(state)));
  CHECK(y.steps() == 3);
  nn::StateDict wrong = state;
  wrong[2].value = zeros({2, 2});
  wrong[3].name = "m/none";
  const std::string text = error_of([&] { y.load_state(wrong); });
  CHECK(starts_with(text, "adamw: names, shapes and dtypes must agree; 1 missing: "));
  CHECK(contains(text, "unexpected: m/none"));
  CHECK(contains(text, "misfitting: "));
  CHECK((bytes_of(y.state()) == bytes_of(state)));
}

TEST_CASE("schedule: values") {
  const train::Schedule s{train::Decay::cosine, 1.0, 0.1, 4, 14};
  CHECK(s.at(0) == 0.25);
  CHECK(s.at(3) == 1.0);
  CHECK(s.at(4) == 1.0);
  CHECK(s.at(9) == doctest::Approx(0.55));
  CHECK(s.at(13) == doctest::Approx(0.1 + 0.9 * 0.5 * (1 + std::cos(3.14159265358979 * 0.9))));
  CHECK(s.at(14) == 0.1);
  CHECK(s.at(1000) == 0.1);
  const train::Schedule l{train::Decay::linear, 2.0, 0.0, 0, 10};
  CHECK(l.at(0) == 2.0);
  CHECK(l.at(5) == 1.0);
  CHECK(l.at(10) == 0.0);
  const train::Schedule c{train::Decay::constant, 3.0, 0.0, 2, 10};
  CHECK(c.at(0) == 1.5);
  CHECK(c.at(99) == 3.0);
  for (std::int64_t i = 4; i < 14; ++i) CHECK(s.at(i + 1) < s.at(i));
  CHECK(error_of([&] { s.at(-1); }) != "no error");
}

TEST_CASE("ema: the formula, and swapping to the bit") {
  for (const bool warm : {false, true})
    for (const DType dtype : {f64, bf16}) {
      Zoo zoo(dtype);
      train::Ema ema(zoo, 0.9, warm);
      auto want = values_of(zoo.parameters());
      for (int t = 0; t < 6; ++t) {
        const NoGrad off;
        for (auto* p : zoo.parameters()) fill_(p->value(), t);
        ema.update();
        const double d = warm ? std::min(0.9, (1.0 + t) / (10.0 + t)) : 0.9;
        for (auto& p : want)
          for (double& v : p) v = d * v + (1 - d) * t;
      }
      const auto live = values_of(zoo.parameters());
      const std::string state = bytes_of(ema.state());
      {
        const train::EmaScope averaged(ema);
        CHECK(worst(values_of(zoo.parameters()), want) < (dtype == f64 ? 1e-14 : 5e-3));
        CHECK(error_of([&] { ema.update(); }) != "no error");
        CHECK(error_of([&] { ema.state(); }) != "no error");
      }
      CHECK(values_of(zoo.parameters()) == live);
      CHECK((bytes_of(ema.state()) == state));
      CHECK(ema.updates() == 6);
      train::Ema other(zoo, 0.9);
      other.load_state(ema.state());
      CHECK((bytes_of(other.state()) == state));
    }
}

namespace {

struct Trained {
  std::vector<std::vector<double>> values;
  std::vector<train::EpochReport> epochs;
};
Trained train_tiny(std::int64_t batches, std::int64_t size, std::int64_t accumulate) {
  nn::Build build;
  build.dtype = f64;
  TinyMlp model(build, 0.0);
  train::ClassifierOf classifier(model);
  train::ClassificationTask task(classifier, 0.1);
  SyntheticSource data(batches, size, 1, f64), held_out(1, 64, 2, f64);
  train::TrainOptions o;
  o.epochs = 4;
  o.accumulate = accumulate;
  o.schedule.lr = 0.05;
  o.clip_norm = 0.5;
  train::Trainer trainer(task, data, &held_out, o);
  const auto result = trainer.run();
  return {values_of(model.parameters()), result.epochs};
}

}  // namespace

TEST_CASE("trainer: accumulation equals the large batch; the task is learned") {
  const Trained large = train_tiny(4, 32, 1), small = train_tiny(16, 8, 4);
  CHECK(worst(large.values, small.values) < 1e-11);
  REQUIRE(large.epochs.size() == 4);
  CHECK(large.epochs[3].validation.top1 > 0.75);
  CHECK(large.epochs[3].validation.loss < large.epochs[0].validation.loss);
  CHECK(large.epochs[3].validation.top5 == 1);
  CHECK(large.epochs[3].validation.samples == 64);
  CHECK(large.epochs[0].train_loss == doctest::Approx(small.epochs[0].train_loss));
}

TEST_CASE("trainer: soft targets and label smoothing") {
  nn::Build build;
  build.dtype = f64;
  TinyMlp model(build, 0.0);
  SyntheticSource hard(1, 16, 3, f64), soft(1, 16, 3, f64, true);
  const train::Batch a = hard.next(), b = soft.next();
  const NoGrad off;
  const Tensor logits = model(a.x);
  // 0.7 on the label and 0.1 elsewhere is smoothing by 0.4 over four classes.
  CHECK(train::classification_loss(logits, b).item() ==
        doctest::Approx(train::classification_loss(logits, a, 0.4).item()).epsilon(1e-12));
}

TEST_CASE("trainer: stops on request, reports progress") {
  nn::Build build;
  TinyMlp model(build);
  train::ClassifierOf classifier(model);
  train::ClassificationTask task(classifier);
  SyntheticSource data(6, 8);
  struct Seen {
    train::Trainer* trainer = nullptr;
    std::vector<train::Progress> progress;
  } seen;
  train::TrainOptions o;
  o.epochs = 3;
  o.user = &seen;
  o.on_progress = [](const train::Progress& p, void* user) {
    auto* s = static_cast<Seen*>(user);
    s->progress.push_back(p);
    if (p.step == 8) s->trainer->request_stop();
  };
  train::Trainer trainer(task, data, nullptr, o);
  seen.trainer = &trainer;
  const auto result = trainer.run();
  CHECK(result.stopped);
  CHECK(result.position.step == 8);
  CHECK(result.position.epoch == 1);
  CHECK(result.position.batch == 2);
  REQUIRE(seen.progress.size() == 8);
  const auto& p = seen.progress.back();
  CHECK(p.steps == 18);
  CHECK(p.batches == 6);
  CHECK(p.images_per_s > 0);
  CHECK(p.eta_seconds > 0);
  CHECK(p.live_bytes > 0);
  CHECK(p.peak_bytes >= p.live_bytes);
  const auto before = values_of(model.parameters());
  CHECK(error_of([&] { trainer.run(); }) == "trainer: run() may be called once");
  CHECK(values_of(model.parameters()) == before);
  CHECK(seen.progress.size() == 8);
}

namespace {

// Hands out one poisoned batch.
class Poisoned final : public train::BatchSource {
 public:
  explicit Poisoned(std::int64_t at) : source_(8, 8), at_(at) {}
  std::int64_t batches_per_epoch() const override { return 8; }
  void seek(std::int64_t e, std::int64_t b) override { source_.seek(e, n_ = b); }
  train::Batch next() override {
    train::Batch b = source_.next();
    if (n_++ == at_) b.x = b.x * std::numeric_limits<double>::quiet_NaN();
    return b;
  }

 private:
  SyntheticSource source_;
  std::int64_t at_, n_ = 0;
};

// sqrt(0) has an infinite slope: a finite loss with a gradient that is not.
struct InfiniteSlope : nn::Layer<InfiniteSlope> {
  explicit InfiniteSlope(const nn::Build& b) : Layer(b) {}
  Tensor forward(const Tensor& x) { return head(x) + sum(sqrt(bad.value())); }
  nn::Linear head{this, "head", 6, 4};
  nn::Parameter bad{this, "bad", {3}, nn::Init::zero()};
};

// The logarithm of 0 between two modules, in a recomputed segment or not.
struct Bottomless : nn::Layer<Bottomless> {
  Bottomless(const nn::Build& b, bool recompute_) : Layer(b), recompute(recompute_) {}
  Tensor forward(const Tensor& x) {
    const auto segment = [this](const std::vector<Tensor>& in) { return std::vector<Tensor>{log(fc1(in[0]) * 0.0)}; };
    if (!recompute) return head(segment({x})[0]);
    return head(checkpoint(segment, {x}, {fc1.weight.value(), fc1.bias->value()})[0]);
  }
  nn::Linear fc1{this, "fc1", 6, 5}, head{this, "head", 5, 4};
  bool recompute;
};

template <class M>
std::string failure_of(M& model, train::BatchSource& data, std::int64_t accumulate = 1) {
  train::ClassifierOf classifier(model);
  train::ClassificationTask task(classifier);
  train::TrainOptions o;
  o.epochs = 1;
  o.accumulate = accumulate;
  train::Trainer trainer(task, data, nullptr, o);
  return error_of([&] { trainer.run(); });
}

}  // namespace

TEST_CASE("trainer: values that are not finite are traced to their origin") {
  nn::Build build;
  {
    TinyMlp model(build);
    Poisoned data(5);
    const std::string text = failure_of(model, data);
    CHECK_MESSAGE(starts_with(text, "train: the loss is nan in step 5 (epoch 0, batch 5); first not finite: "
                                    "the batch itself (48 of 48"),
                  text);
    CHECK(!model.fc1.tapped());
  }
  {
    TinyMlp model(build);
    Poisoned data(5);
    CHECK(starts_with(failure_of(model, data, 2), "train: the loss is nan in step 2 (epoch 0, batch 5)"));
  }
  {
    TinyMlp model(build);
    {
      const NoGrad off;
      fill_(model.head.weight.value(), 3e38);
      fill_(model.head.bias->value(), 3e38);
    }
    SyntheticSource data(8, 8);
    const std::string text = failure_of(model, data);
    CHECK_MESSAGE(starts_with(text, "train: the loss is "), text);
    CHECK_MESSAGE(contains(text, " in step 0 (epoch 0, batch 0); first not finite: the output of linear in head ("),
                  text);
  }
  for (const bool frozen : {false, true}) {  // a frozen op is seen too; so are those of a recomputed segment
    Bottomless model(build, !frozen);
    if (frozen) model.fc1.set_trainable(false);
    SyntheticSource data(8, 8);
    const std::string text = failure_of(model, data);
    CHECK_MESSAGE(contains(text, "first not finite: the output of log ("), text);
  }
  {
    InfiniteSlope model(build);
    SyntheticSource data(8, 8);
    const std::string text = failure_of(model, data);
    CHECK_MESSAGE(contains(text, "train: the gradient norm is"), text);
    CHECK_MESSAGE(contains(text, "first not finite: the gradient of bad (3 of 3 values"), text);
  }
}

TEST_CASE("tensorboard: records are sound and read back") {
  CHECK(train::crc32c("123456789") == 0xE3069283u);
  CHECK(train::crc32c("") == 0);
  CHECK(train::crc32c(std::string(32, '\0')) == 0x8A9136AAu);  // RFC 3720, B.4
  const TempFolder t;
  std::string path;
  {
    train::TensorBoard board(t / "logs", 41);
    board.scalar("train/loss", 42, 0.5);
    board.scalar("größe", 1ll << 40, -1e30);
    path = board.path();
  }
  CHECK(contains(path, "/events.out.tfevents."));
  const std::string file = read_file(path, 1 << 20);
  const auto fixed = [&](std::size_t at, int bytes) {
    std::uint64_t v = 0;
    for (int i = 0; i < bytes; ++i)
      v |= std::uint64_t{static_cast<unsigned char>(file.at(at + static_cast<std::size_t>(i)))} << (8 * i);
    return v;
  };
  const auto unmasked = [](std::uint64_t m) {
    const auto r = static_cast<std::uint32_t>(m) - 0xA282EAD8u;
    return (r >> 17) | (r << 15);
  };
  // A small reader of the wire format: field -> (wire type, number or bytes).
  struct Field {
    std::uint64_t number = 0;
    std::string bytes;
  };
  const auto parse = [](const std::string& m) {
    std::map<int, Field> fields;
    std::size_t at = 0;
    const auto varint = [&] {
      std::uint64_t v = 0;
      for (int shift = 0;; shift += 7) {
        const auto b = static_cast<unsigned char>(m.at(at++));
        v |= std::uint64_t{b & 127u} << shift;
        if (b < 128) return v;
      }
    };
    while (at < m.size()) {
      const std::uint64_t key = varint();
      Field f;
      if ((key & 7) == 0) {
        f.number = varint();
      } else if ((key & 7) == 2) {
        const std::uint64_t n = varint();
        f.bytes = m.substr(at, n);
        at += n;
      } else {
        const int n = (key & 7) == 1 ? 8 : 4;
        for (int i = 0; i < n; ++i) f.number |= std::uint64_t{static_cast<unsigned char>(m.at(at++))} << (8 * i);
      }
      fields[static_cast<int>(key >> 3)] = f;
    }
    return fields;
  };
  std::vector<std::map<int, Field>> events;
  for (std::size_t at = 0; at < file.size();) {
    const auto n = static_cast<std::size_t>(fixed(at, 8));
    REQUIRE(train::crc32c(file.substr(at, 8)) == unmasked(fixed(at + 8, 4)));
    REQUIRE(train::crc32c(file.substr(at + 12, n)) == unmasked(fixed(at + 12 + n, 4)));
    events.push_back(parse(file.substr(at + 12, n)));
    at += 16 + n;
  }
  REQUIRE(events.size() == 4);
  CHECK(events[0][3].bytes == "brain.Event:2");
  CHECK(events[1][2].number == 42);
  CHECK(parse(events[1][7].bytes)[1].number == 1);
  auto value = parse(parse(events[2][5].bytes)[1].bytes);
  CHECK(events[2][2].number == 42);
  CHECK(value[1].bytes == "train/loss");
  CHECK(std::bit_cast<float>(static_cast<std::uint32_t>(value[2].number)) == 0.5f);
  CHECK(events[3][2].number == std::uint64_t{1} << 40);
  CHECK(std::bit_cast<double>(events[3][1].number) > 1.6e9);  // wall time
}

TEST_CASE("csv: a table goes on where the checkpoint says") {
  const TempFolder t;
  const std::string p = t / "logs/a.csv";
  {
    train::CsvLog log(p, "step,x");
    for (int i = 1; i <= 5; ++i) log.row(cat(i, ",", 10 * i));
    CHECK(log.rows() == 5);
  }
  {
    train::CsvLog log(p, "step,x", 4, 3);
    CHECK(log.rows() == 3);
    log.row("4,new");
  }
  CHECK(read_file(p, 1000) == "step,x\n1,10\n2,20\n3,30\n4,new\n");
  t.file("logs/a.csv", "step,x\n1,10\n2,2");
  { train::CsvLog log(p, "step,x", 9, 9); }
  CHECK(read_file(p, 1000) == "step,x\n1,10\n");
  CHECK(starts_with(error_of([&] { train::CsvLog log(p, "step,y", 1, 1); }), p + ": must have the header"));
  { train::CsvLog log(p, "step,y"); }
  CHECK(read_file(p, 1000) == "step,y\n");
}

TEST_CASE("examples: the validation curve of a training log") {
  const TempFolder t;
  const std::string csv = t / "log.csv";
  TinyMlp model(nn::Build{});
  train::ClassifierOf classifier(model);
  train::ClassificationTask task(classifier);
  SyntheticSource data(4, 8), held_out(1, 64, 2);
  train::TrainOptions o;
  o.epochs = 3;
  o.validate_every = 2;
  o.log_every = 1;
  o.csv = csv;
  std::vector<train::EpochReport> epochs;
  {
    train::Trainer trainer(task, data, &held_out, o);
    epochs = trainer.run().epochs;
  }
  REQUIRE(epochs.size() == 3);
  const Series curve = examples::validation_curve(csv, "tiny");
  CHECK(curve.name == "tiny");
  CHECK(curve.x == std::vector<double>{2, 3});  // epochs count from 1, the last is always validated
  REQUIRE(curve.y.size() == 2);
  for (std::size_t i = 0; i < 2; ++i)
    CHECK(curve.y[i] == doctest::Approx(100 * epochs[i + 1].validation.top1).epsilon(1e-6));
  CHECK(examples::validation_curve(t / "none.csv", "none").x.empty());
}

TEST_CASE("memory: the plan on the meta device is what the CPU measures") {
  const auto make = [](const nn::Build& b) { return std::make_unique<TinyMlp>(b); };
  for (const auto kind : {train::OptimizerKind::adamw, train::OptimizerKind::sgd, train::OptimizerKind::muon})
    for (const std::int64_t accumulate : {1, 3}) {
      train::MemoryOptions o;
      o.optimizer = kind;
      o.accumulate = accumulate;
      const auto plan = train::plan_memory(make, {512, 6}, o);
      o.device = kCpu;
      const auto real = train::plan_memory(make, {512, 6}, o);
      CHECK(plan.weights == real.weights);
      CHECK(plan.gradients == real.gradients);
      CHECK(plan.optimizer == real.optimizer);
      CHECK(plan.activations == real.activations);
      CHECK(plan.rows.size() == real.rows.size());
      CHECK(std::fabs(static_cast<double>(plan.peak - real.peak)) <= 0.05 * static_cast<double>(real.peak));
      // Muon: one momentum for the matrices, two moments for the two biases, which fill one unit of the allocator each.
      const std::int64_t biases = 2 * static_cast<std::int64_t>(rounded_bytes(1));
      CHECK(plan.optimizer == (kind == train::OptimizerKind::adamw ? 2 : 1) * plan.gradients +
                                  (kind == train::OptimizerKind::muon ? biases : 0));
      CHECK(plan.peak > plan.weights + plan.optimizer + plan.activations);
      CHECK(contains(to_string(plan), "peak of a step"));
    }
}

TEST_CASE("memory: a ViT's plan, whole, recomputed and frozen") {
  enum class How { whole, recomputed, frozen };
  std::int64_t whole = 0;
  for (const How how : {How::whole, How::recomputed, How::frozen}) {
    const auto make = [how](const nn::Build& b) {
      vit::VitConfig c = vit::config("vit_ti", 32, 8, 10);
      c.depth = 3;
      c.drop = c.drop_path = 0.1;
      c.checkpoint = how == How::recomputed;
      auto model = std::make_unique<vit::Vit>(c, b);
      if (how == How::frozen) {
        model->set_trainable(false);
        model->head->set_trainable(true);
      }
      return model;
    };
    train::MemoryOptions o;
    const auto step = train::plan_memory(make, {8, 32, 32, 3}, o);
    CHECK(step.evaluation == 0);
    for (const std::int64_t evaluation_batch : {0, 100}) {
      o.evaluation_batch = evaluation_batch;
      o.device = kMeta;
      const auto told = train::plan_memory(make, {8, 32, 32, 3}, o);
      o.device = kCpu;
      const auto real = train::plan_memory(make, {8, 32, 32, 3}, o);
      CHECK(std::fabs(static_cast<double>(told.peak - real.peak)) <= 0.05 * static_cast<double>(real.peak));
      CHECK(std::fabs(static_cast<double>(told.evaluation - real.evaluation)) <=
            0.05 * static_cast<double>(real.evaluation));
      CHECK(told.activations == real.activations);
      CHECK(told.peak == std::max(step.peak, evaluation_batch ? told.weights + told.optimizer + told.evaluation : 0));
    }
    const auto& plan = step;
    if (how == How::whole)
      whole = plan.activations;
    else
      CHECK(plan.activations < whole / 2);
  }
}

namespace {

class Ramp final : public ImageDataset {
 public:
  Ramp() : ImageDataset("ramp", {"a", "b", "c"}) {}
  std::int64_t size() const override { return 10; }
  Image image(std::int64_t i) const override {
    return Image(4, 4, 3, static_cast<std::uint8_t>(20 * i));
  }
  std::int64_t label(std::int64_t i) const override { return i % 3; }
};

}  // namespace

TEST_CASE("batch source: a loader's batches as tensors") {
  Preprocess pre;
  pre.size = 4;
  LoaderOptions o;
  o.batch_size = 4;
  LoaderSource source(std::make_shared<Ramp>(), pre, o);
  CHECK(source.batches_per_epoch() == 3);
  train::Batch b = source.next();
  CHECK(to_string(b.x.shape()) == "[4, 4, 4, 3]");
  CHECK(to_vector<std::int64_t>(b.labels) == std::vector<std::int64_t>{0, 1, 2, 0});
  CHECK(!b.soft.defined());
  source.seek(2, 2);
  b = source.next();
  CHECK(b.size() == 2);
  Loader same(std::make_shared<Ramp>(), pre, o);
  same.seek(2, 2);
  CHECK(to_vector<float>(b.x) == same.next().x);
  o.mixing.mixup_alpha = 0.4f;
  LoaderSource mixed(std::make_shared<Ramp>(), pre, o, kCpu, bf16);
  b = mixed.next();
  CHECK(b.x.dtype() == bf16);
  CHECK(to_string(b.soft.shape()) == "[4, 3]");
}
