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
  for (const auto& t : in)
    v.push_back(t.defined() ? to_vector<double>(t) : std::vector<double>(static_cast<std::size_t>(in[0].numel())));
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
  return {normal(shape, "param"), normal(shape, "grad", 0.1, 2), normal(shape, "first"),
          uniform(shape, "second", 0, 2)};
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

// The step with 16-bit weights beside f32 masters: what cast, step and copy_into make of the same tensors, to the bit,
// and the scalar loop's values. Inputs are rows {param, gradient, first, second}.
struct Beside {
  DType weight, gradient;  // weight f32: none in this row
};
using Beside16 = std::vector<Beside>;
using Shapes = std::vector<Shape>;
using Step = void (*)(const Tensors& p, const Tensors& g, const Tensors& first, const Tensors& second,
                      const Tensors& w);

Sample beside_sample(const std::string& label, const Shapes& shapes, const Beside16& rows, Step step,
                     Tensors (*loop)(const Tensors& row), bool second, double spread = 1) {
  Tensors in;
  for (std::size_t k = 0; k < rows.size(); ++k) {
    Tensors state = state_of(shapes[k]);
    state[0] = cast(normal(shapes[k], cat("param ", k), 0, spread), f32);
    state[1] = cast(state[1], rows[k].gradient);
    for (std::size_t i : {2, 3}) state[i] = cast(state[i], f32);
    in.insert(in.end(), state.begin(), state.end());
  }
  const auto run = [rows, step, second](const Tensors& x) -> Tensors {
    // list l of both calls; [4] the weights
    Tensors at_once[5], one_by_one[5];
    for (std::size_t k = 0; k < rows.size(); ++k) {
      const bool has = rows[k].weight != f32;
      for (std::size_t i = 0; i < 4; ++i)
        for (Tensors* list : {&at_once[i], &one_by_one[i]})
          list->push_back(clone(cast(x[4 * k + i], i == 1 ? rows[k].gradient : f32)));
      at_once[4].push_back(has ? full(x[4 * k].shape(), 7, rows[k].weight, x[4 * k].device()) : Tensor());
    }
    step(at_once[0], at_once[1], at_once[2], at_once[3], at_once[4]);
    for (Tensor& g : one_by_one[1]) g = cast(g, f32);
    step(one_by_one[0], one_by_one[1], one_by_one[2], one_by_one[3], {});
    Tensors out;
    for (std::size_t k = 0; k < rows.size(); ++k)
      for (std::size_t i : {0, 2, 3, 4}) {
        if (i == 4 ? !at_once[4][k].defined() : (i == 3 && !second)) continue;
        const Tensor want = i == 4 ? cast(one_by_one[0][k], rows[k].weight) : one_by_one[i][k];
        if (i < 4) out.push_back(at_once[i][k]);
        out.push_back(equal(at_once[i][k], want));
      }
    return out;
  };
  const auto reference = [rows, loop, second](const Tensors& x) -> Tensors {
    Tensors out;
    for (std::size_t k = 0; k < rows.size(); ++k) {
      const auto at = x.begin() + static_cast<std::ptrdiff_t>(4 * k);
      const Tensors want = loop(Tensors(at, at + 4));
      const Tensor yes = full(x[4 * k].shape(), 1, boolean);
      for (std::size_t i = 0; i < (second ? 3u : 2u); ++i) out.insert(out.end(), {want[i], yes});
      if (rows[k].weight != f32) out.push_back(yes);
    }
    return out;
  };
  Sample s = in_place(label, in, run, reference);
  s.f32 = false;
  s.as_is = true;
  s.tol = 5e-6;
  return s;
}

constexpr SgdOptions kBesideSgd{.lr = 0.1, .momentum = 0.9, .weight_decay = 0.01, .grad_scale = 0.5, .nesterov = true};
constexpr AdamwOptions kBesideAdamw{.lr = 0.01, .weight_decay = 0.1, .grad_scale = 0.25, .step = 10};

using L = const Tensors&;
Sample sgd_beside(const std::string& label, const Shapes& shapes, const Beside16& rows, double spread = 1) {
  return beside_sample(label, shapes, rows, [](L p, L g, L buffers, L, L w) {
    sgd_(p, g, buffers, kBesideSgd, {}, w);
  }, [](const Tensors& row) { return sgd_by_loop(row, kBesideSgd, {0, 2}); }, false, spread);
}

Sample plain_sgd_beside(const std::string& label, const Shapes& shapes, const Beside16& rows) {
  return beside_sample(label, shapes, rows, [](L p, L g, L, L, L w) {
    sgd_(p, g, {}, {.lr = 0.1}, {}, w);
  }, [](const Tensors& row) { return sgd_by_loop(row, {.lr = 0.1}, {0, 2}); }, false);
}

Sample adamw_beside(const std::string& label, const Shapes& shapes, const Beside16& rows, double spread = 1) {
  return beside_sample(label, shapes, rows, [](L p, L g, L m, L v, L w) {
    adamw_(p, g, m, v, kBesideAdamw, {}, w);
  }, [](const Tensors& row) { return adamw_by_loop(row, kBesideAdamw); }, true, spread);
}

// Every pair of dtypes, sizes that no pack divides, several chunks, and rows of other kinds between.
const Shapes kBesideShapes{{7, 9}, {3, 5}, {20011}, {4, 8}, {1}, {33}};
const Beside16 kBesideRows{{bf16, bf16}, {f32, f32}, {f16, f16}, {bf16, bf16}, {bf16, f32}, {f16, f32}};

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
      sgd_beside("16-bit weights", kBesideShapes, kBesideRows),
      plain_sgd_beside("16-bit weights, no momentum", kBesideShapes, kBesideRows),
      sgd_beside("16-bit weights, f16's overflow", {{200}}, {{f16, f16}}, 6e4),
  };
  Sample unset = sgd_sample("first step over a buffer of NaN", {5}, {.lr = 0.1, .momentum = 0.9, .first = true});
  unset.inputs[2] = values(std::vector<double>(5, std::numeric_limits<double>::quiet_NaN()), {5});
  c.samples.push_back(unset);
  const Tensors t = state_of({4});
  c.errors = {
      {"gradient shape", [=] { sgd_(clone(t[0]), normal({3}, "g"), {}, {}); }, "gradient must be like"},
      {"no buffer", [=] { sgd_(clone(t[0]), t[1], {}, {.momentum = 0.9}); }, "momentum buffer is undefined"},
      {"negative lr", [=] { sgd_(clone(t[0]), t[1], {}, {.lr = -1}); }, "must be >= 0"},
      {"nesterov without momentum", [=] { sgd_(clone(t[0]), t[1], {}, {.nesterov = true}); },
       "nesterov needs momentum"},
      {"mixed dtypes", [=] { sgd_(cast(t[0], f32), t[1], {}, {}); }, "gradient must be like"},
      {"half", [=] { sgd_(cast(t[0], bf16), cast(t[1], bf16), {}, {}); }, "f32 masters"},
      {"half beside f64", [=] { sgd_(TensorList{clone(t[0])}, {t[1]}, {}, {}, {}, {cast(t[0], bf16)}); },
       "must be bf16 or f16 and the param f32"},
      {"an f32 weight", [=] {
         const Tensor p = cast(t[0], f32);
         sgd_(TensorList{p}, {cast(t[1], f32)}, {}, {}, {}, {clone(p)});
       }, "must be bf16 or f16"},
      {"gradient of the other half", [=] {
         sgd_(TensorList{cast(t[0], f32)}, {cast(t[1], f16)}, {}, {}, {}, {cast(t[0], bf16)});
       }, "gradient must be like"},
      {"weight shape", [=] { sgd_(TensorList{cast(t[0], f32)}, {cast(t[1], f32)}, {}, {}, {}, {full({3}, 0, bf16)}); },
       "weight must be like its param"},
      {"strided weight", [=] {
         sgd_(TensorList{zeros({2, 3})}, {zeros({2, 3})}, {}, {}, {}, {transpose(full({3, 2}, 0, bf16), 0, 1)});
       }, "must be contiguous"},
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
      adamw_sample("scaled gradient, no decay", {2, 1, 9},
                   {.lr = 0.01, .weight_decay = 0, .grad_scale = 1.0 / 128, .step = 2}),
      adamw_sample("late step", {33}, {.lr = 0.01, .step = 1000000}),
      adamw_sample("several chunks", {3, 11003}, {.lr = 0.01, .step = 7}),
      adamw_sample("empty", {3, 0}, {}),
  };
  for (auto& s : c.samples) s.tol_f32 = 5e-6;
  c.samples.push_back(adamw_beside("16-bit weights", kBesideShapes, kBesideRows));
  c.samples.push_back(adamw_beside("16-bit weights, f16's subnormals", {{77, 3}}, {{f16, f16}}, 1e-6));
  // Tensors of many sizes, more than one table holds; the third has no gradient.
  Tensors many;
  for (std::int64_t k = 0; k < 35; ++k)
    for (const auto& t : state_of({k % 7 + 1, k * 9 + 1})) many.push_back(t);
  many[9] = Tensor();
  c.samples.push_back(in_place("a list of 35", many, [](const Tensors& x) {
    const Tensors t = cloned(x);
    Tensors p, g, m, v;
    for (std::size_t i = 0; i < t.size(); i += 4)
      p.push_back(t[i]), g.push_back(x[i + 1]), m.push_back(t[i + 2]), v.push_back(t[i + 3]);
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
      {"a 16-bit gradient alone", [=] {
         const Tensor p = cast(t[0], f32), m = cast(t[2], f32), v = cast(t[3], f32);
         adamw_(p, cast(t[1], bf16), m, v, {});
       }, "gradient must be like"},
      {"weights missing", [=] {
         const Tensor p = cast(t[0], f32), m = cast(t[2], f32), v = cast(t[3], f32);
         adamw_(TensorList{p, p}, {t[1], t[1]}, {m, m}, {v, v}, {}, {}, {cast(p, bf16)});
       },
       "the list of weights has 1 tensors for 2"},
      {"mixed devices", [=] { adamw_(clone(t[0]), empty({4}, f64, kMeta), clone(t[2]), clone(t[3]), {}); },
       "gradient must be like"},
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
  const auto half = [](const std::string& label, DType dtype) {
    Sample s = in_place(label, {cast(normal({3, 7001}, "average"), f32), cast(normal({3, 7001}, "value"), dtype)},
                        [dtype](const Tensors& x) -> Tensors {
      const Tensor one = clone(cast(x[0], f32)), two = clone(one), value = cast(x[1], dtype);
      ema_(one, value, 0.9);
      ema_(two, cast(value, f32), 0.9);
      return {one, equal(one, two)};
    }, [](const Tensors& x) -> Tensors {
      return {cast(x[0], f64) * 0.9 + cast(x[1], f64) * 0.1, full({3, 7001}, 1, boolean)};
    });
    s.f32 = false;
    s.as_is = true;
    s.tol = 2e-6;
    return s;
  };
  OpCase c{"ema_", {}, {}};
  c.samples = {sample("small", {3, 5}, 0.9), sample("slow", {37}, 0.9999), sample("copies", {4, 1}, 0),
               sample("stays", {4}, 1), sample("several chunks", {40003}, 0.5), sample("empty", {0}, 0.9),
               half("bf16 values", bf16), half("f16 values", f16)};
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
  c.samples = {sample("small", {3, 5}, 0.3), sample("several chunks", {2, 20001}, -2), sample("empty", {0, 2}, 2),
               sample("scalar", {}, 0)};
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
  c.samples = {sample("one", {normal({3, 5}, "a")}),
               sample("several, one undefined", {normal({7}, "a"), {}, normal({2, 1, 9}, "b"), normal({}, "c")}),
               sample("several chunks", {normal({50021}, "a", 100, 1), normal({3, 20000}, "b")}),
               sample("empty", {normal({0, 2}, "a")})};
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

std::vector<OpCase> op_cases() {
  return {sgd_case(), adamw_case(), ema_case(), scale_case(), norm_case(), finite_case()};
}

}  // namespace capo::test
