#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/optim.h>
#include <capo/ops/view.h>
#include <capo/tests/op_test.h>

#include <cmath>
#include <limits>

namespace capo::test {
namespace {

Tensors cloned(const Tensors& in) {
  Tensors out;
  for (const auto& t : in) out.push_back(t.defined() ? clone(t) : t);
  return out;
}

Sample in_place(const std::string& label, const Tensors& inputs, const Fn& run, const Fn& reference) {
  Sample s;
  s.label = label;
  s.inputs = inputs;
  s.run = run;
  s.reference = reference;
  s.gradient = false;
  s.half = false;
  return s;
}

// Applies f to entry i of all vectors, then makes tensors of those listed.
using Vectors = std::vector<std::vector<double>>;
template <class F>
Tensors each(const Tensors& in, const std::vector<std::size_t>& written, F f) {
  Vectors v;
  for (const auto& t : in) v.push_back(t.defined() ? to_vector<double>(t) : std::vector<double>(static_cast<std::size_t>(in[0].numel())));
  for (std::size_t i = 0; i < v[0].size(); ++i) f(v, i);
  Tensors out;
  for (std::size_t k : written) out.push_back(values(v[k], in[0].shape()));
  return out;
}

Tensors sgd_by_loop(const Tensors& in, const SgdOptions& o, const std::vector<std::size_t>& written) {
  return each(in, written, [&](Vectors& v, std::size_t i) {
    const double g = v[1][i] * o.grad_scale + o.weight_decay * v[0][i];
    double step = g;
    if (o.momentum != 0) {
      v[2][i] = o.first ? g : o.momentum * v[2][i] + (1 - o.dampening) * g;
      step = o.nesterov ? g + o.momentum * v[2][i] : v[2][i];
    }
    v[0][i] -= o.lr * step;
  });
}

Tensors adamw_by_loop(const Tensors& in, const AdamwOptions& o) {
  return each(in, {0, 2, 3}, [&](Vectors& v, std::size_t i) {
    const double g = v[1][i] * o.grad_scale, t = static_cast<double>(o.step);
    v[0][i] *= 1 - o.lr * o.weight_decay;
    v[2][i] = o.beta1 * v[2][i] + (1 - o.beta1) * g;
    v[3][i] = o.beta2 * v[3][i] + (1 - o.beta2) * g * g;
    const double root = std::sqrt(v[3][i] / (1 - std::pow(o.beta2, t)));
    v[0][i] -= o.lr * (v[2][i] / (1 - std::pow(o.beta1, t))) / (root + o.eps);
  });
}

Tensors state_of(const Shape& shape) {
  return {normal(shape, "param"), normal(shape, "grad", 0.1, 2), normal(shape, "first"), uniform(shape, "second", 0, 2)};
}

Sample sgd_sample(const std::string& label, const Shape& shape, const SgdOptions& o) {
  Tensors in = state_of(shape);
  in.pop_back();
  if (o.momentum == 0) in[2] = Tensor();
  std::vector<std::size_t> written{0};
  if (o.momentum != 0) written.push_back(2);
  return in_place(label, in, [o](const Tensors& x) -> Tensors {
    const Tensors t = cloned(x);
    sgd_(t[0], x[1], t[2], o);
    if (!t[2].defined()) return {t[0]};
    return {t[0], t[2]};
  }, [o, written](const Tensors& x) { return sgd_by_loop(x, o, written); });
}

Sample adamw_sample(const std::string& label, const Shape& shape, const AdamwOptions& o) {
  return in_place(label, state_of(shape), [o](const Tensors& x) -> Tensors {
    const Tensors t = cloned(x);
    adamw_(t[0], x[1], t[2], t[3], o);
    return {t[0], t[2], t[3]};
  }, [o](const Tensors& x) { return adamw_by_loop(x, o); });
}

OpCase sgd_case() {
  OpCase c{"sgd_", {}, {}};
  c.samples = {
      sgd_sample("plain", {3, 5}, {.lr = 0.1}),
      sgd_sample("weight decay, scaled gradient", {7}, {.lr = 0.1, .weight_decay = 0.05, .grad_scale = 0.25}),
      sgd_sample("momentum", {3, 5}, {.lr = 0.1, .momentum = 0.9, .weight_decay = 0.01}),
      sgd_sample("dampening", {33}, {.lr = 0.1, .momentum = 0.9, .dampening = 0.3}),
      sgd_sample("nesterov", {3, 5}, {.lr = 0.1, .momentum = 0.8, .weight_decay = 0.01, .nesterov = true}),
      sgd_sample("first step", {4, 1}, {.lr = 0.1, .momentum = 0.9, .dampening = 0.5, .first = true}),
      sgd_sample("several chunks", {5, 7001}, {.lr = 0.01, .momentum = 0.9}),
      sgd_sample("empty", {0, 3}, {.lr = 0.1, .momentum = 0.9}),
      sgd_sample("scalar", {}, {.lr = 0.1}),
  };
  Sample unset = sgd_sample("first step over a buffer of NaN", {5}, {.lr = 0.1, .momentum = 0.9, .first = true});
  unset.inputs[2] = values(std::vector<double>(5, std::numeric_limits<double>::quiet_NaN()), {5});
  c.samples.push_back(unset);
  const Tensors t = state_of({4});
  c.errors = {
      {"gradient shape", [=] { sgd_(clone(t[0]), normal({3}, "g"), {}, {}); }, "gradient must be like"},
      {"no buffer", [=] { sgd_(clone(t[0]), t[1], {}, {.momentum = 0.9}); }, "momentum buffer is undefined"},
      {"negative lr", [=] { sgd_(clone(t[0]), t[1], {}, {.lr = -1}); }, "must be >= 0"},
      {"nesterov without momentum", [=] { sgd_(clone(t[0]), t[1], {}, {.nesterov = true}); }, "nesterov needs momentum"},
      {"mixed dtypes", [=] { sgd_(cast(t[0], f32), t[1], {}, {}); }, "gradient must be like"},
      {"half", [=] { sgd_(cast(t[0], bf16), cast(t[1], bf16), {}, {}); }, "f32 masters"},
      {"strided", [] { sgd_(transpose(normal({2, 3}, "p"), 0, 1), normal({3, 2}, "g"), {}, {}); }, "contiguous"},
      {"list lengths", [=] { sgd_(TensorList{clone(t[0])}, TensorList{}, TensorList{}, {}); }, "0 tensors for 1"},
      {"a graph tensor", [=] {
         const Tensor leaf = clone(t[0]);
         set_requires_grad(leaf, true);
         sgd_(leaf * 2.0, t[1], {}, {});
       }, "must not write into a tensor of the graph"},
  };
  return c;
}

OpCase adamw_case() {
  OpCase c{"adamw_", {}, {}};
  c.samples = {
      adamw_sample("first step", {3, 5}, {.lr = 0.01}),
      adamw_sample("tenth step", {3, 5}, {.lr = 0.01, .weight_decay = 0.1, .step = 10}),
      adamw_sample("other betas", {17}, {.lr = 0.01, .beta1 = 0, .beta2 = 0.95, .eps = 1e-3, .step = 3}),
      adamw_sample("scaled gradient, no decay", {2, 1, 9}, {.lr = 0.01, .weight_decay = 0, .grad_scale = 1.0 / 128, .step = 2}),
      adamw_sample("late step", {33}, {.lr = 0.01, .step = 1000000}),
      adamw_sample("several chunks", {3, 11003}, {.lr = 0.01, .step = 7}),
      adamw_sample("empty", {3, 0}, {}),
  };
  for (auto& s : c.samples) s.tol_f32 = 5e-6;
  // Tensors of many sizes, more than one table holds; the third has no gradient.
  Tensors many;
  for (std::int64_t k = 0; k < 35; ++k)
    for (const auto& t : state_of({k % 7 + 1, k * 9 + 1})) many.push_back(t);
  many[9] = Tensor();
  c.samples.push_back(in_place("a list of 35", many, [](const Tensors& x) {
    const Tensors t = cloned(x);
    Tensors p, g, m, v;
    for (std::size_t i = 0; i < t.size(); i += 4) p.push_back(t[i]), g.push_back(x[i + 1]), m.push_back(t[i + 2]), v.push_back(t[i + 3]);
    adamw_(p, g, m, v, {.lr = 0.02, .step = 4});
    for (auto* list : {&m, &v}) p.insert(p.end(), list->begin(), list->end());
    return p;
  }, [](const Tensors& x) {
    Tensors p, m, v;
    for (std::size_t i = 0; i < x.size(); i += 4) {
      const Tensors in(x.begin() + static_cast<std::ptrdiff_t>(i), x.begin() + static_cast<std::ptrdiff_t>(i) + 4);
      const Tensors out = in[1].defined() ? adamw_by_loop(in, {.lr = 0.02, .step = 4}) : Tensors{in[0], in[2], in[3]};
      p.push_back(out[0]), m.push_back(out[1]), v.push_back(out[2]);
    }
    for (auto* list : {&m, &v}) p.insert(p.end(), list->begin(), list->end());
    return p;
  }));
  c.samples.back().tol_f32 = 5e-6;
  c.samples.back().strided = false;  // hundreds of runs; the samples above have them
  const Tensors t = state_of({4});
  const auto run = [t](const AdamwOptions& o) { adamw_(clone(t[0]), t[1], clone(t[2]), clone(t[3]), o); };
  c.errors = {
      {"step", [=] { run({.step = 0}); }, "step counts from 1"},
      {"beta", [=] { run({.beta2 = 1}); }, "must be in [0, 1)"},
      {"eps", [=] { run({.eps = -1}); }, "must be >= 0"},
      {"m shape", [=] { adamw_(clone(t[0]), t[1], normal({3}, "m"), clone(t[3]), {}); }, "m must be like"},
      {"mixed devices", [=] { adamw_(clone(t[0]), empty({4}, f64, kMeta), clone(t[2]), clone(t[3]), {}); }, "gradient must be like"},
  };
  return c;
}

OpCase ema_case() {
  const auto sample = [](const std::string& label, const Shape& shape, double decay) {
    return in_place(label, {normal(shape, "average"), normal(shape, "value")}, [decay](const Tensors& x) -> Tensors {
      const Tensor average = clone(x[0]);
      ema_(average, x[1], decay);
      return {average};
    }, [decay](const Tensors& x) -> Tensors { return {x[0] * decay + x[1] * (1 - decay)}; });
  };
  OpCase c{"ema_", {}, {}};
  c.samples = {sample("small", {3, 5}, 0.9), sample("slow", {37}, 0.9999), sample("copies", {4, 1}, 0),
               sample("stays", {4}, 1), sample("several chunks", {40003}, 0.5), sample("empty", {0}, 0.9)};
  const Tensor x = normal({4}, "x");
  c.errors = {
      {"decay", [=] { ema_(clone(x), x, 1.1); }, "decay must be in [0, 1]"},
      {"shape", [=] { ema_(clone(x), normal({5}, "v"), 0.9); }, "must be like"},
      {"undefined value", [=] { ema_(clone(x), Tensor(), 0.9); }, "value 0 is undefined"},
  };
  return c;
}

OpCase scale_case() {
  const auto sample = [](const std::string& label, const Shape& shape, double scale) {
    return in_place(label, {normal(shape, "x")}, [scale](const Tensors& x) -> Tensors {
      const Tensor y = clone(x[0]);
      scale_(y, scale);
      return {y};
    }, [scale](const Tensors& x) -> Tensors { return {x[0] * scale}; });
  };
  OpCase c{"scale_", {}, {}};
  c.samples = {sample("small", {3, 5}, 0.3), sample("several chunks", {2, 20001}, -2), sample("empty", {0, 2}, 2), sample("scalar", {}, 0)};
  c.errors = {
      {"half", [] { scale_(cast(normal({2}, "x"), f16), 2); }, "f32 or f64"},
      {"undefined alone", [] { scale_(TensorList{integers({2}, "i", 0, 3)}, 2); }, "f32 or f64"},
  };
  return c;
}

OpCase norm_case() {
  const auto sample = [](const std::string& label, const Tensors& inputs) {
    Sample s = in_place(label, inputs, [](const Tensors& x) -> Tensors {
      return {full({}, global_norm(x), x[0].dtype(), x[0].device())};
    }, [](const Tensors& x) -> Tensors {
      double total = 0;
      for (const auto& t : x)
        if (t.defined())
          for (double v : to_vector<double>(t)) total += v * v;
      return {values({std::sqrt(total)}, {})};
    });
    s.half = true;
    return s;
  };
  OpCase c{"global_norm", {}, {}};
  c.samples = {sample("one", {normal({3, 5}, "a")}), sample("several, one undefined", {normal({7}, "a"), {}, normal({2, 1, 9}, "b"), normal({}, "c")}),
               sample("several chunks", {normal({50021}, "a", 100, 1), normal({3, 20000}, "b")}), sample("empty", {normal({0, 2}, "a")})};
  Sample large = sample("squares beyond f32", {values({3e30, 4e30}, {2})});
  large.half = false;
  c.samples.push_back(large);
  c.errors = {
      {"integers", [] { global_norm({integers({3}, "i", 0, 4)}); }, "floating"},
      {"bool after a good one", [] { global_norm({normal({3}, "x"), full({2}, 1, boolean)}); }, "floating"},
  };
  return c;
}

OpCase finite_case() {
  const auto sample = [](const std::string& label, const Tensors& inputs, bool answer) {
    return in_place(label, inputs, [](const Tensors& x) -> Tensors {
      return {full({}, all_finite(x), boolean, x[0].device())};
    }, [answer](const Tensors&) -> Tensors { return {full({}, answer, boolean)}; });
  };
  const auto with = [](double bad, std::size_t at) {
    std::vector<double> v(40001, 0.5);
    v[at] = bad;
    return values(v, {40001});
  };
  const double inf = std::numeric_limits<double>::infinity();
  OpCase c{"all_finite", {}, {}};
  c.samples = {sample("finite", {normal({3, 5}, "a")}, true), sample("NaN at the end", {with(NAN, 40000)}, false),
               sample("infinity in the second", {normal({3}, "a"), with(inf, 17)}, false),
               sample("minus infinity first", {with(-inf, 0)}, false), sample("empty", {normal({0}, "a")}, true)};
  for (auto& s : c.samples) s.strided = false;  // repeating an element of an input would change the answer
  Sample large = sample("squares beyond f64", {values({1e300, -1e300}, {2})}, true);
  large.f32 = false;
  c.samples.push_back(large);
  c.errors = {
      {"integers", [] { all_finite(integers({3}, "i", 0, 4)); }, "floating"},
      {"bool", [] { all_finite(full({2}, 1, boolean)); }, "floating"},
  };
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() { return {sgd_case(), adamw_case(), ema_case(), scale_case(), norm_case(), finite_case()}; }

}  // namespace capo::test
