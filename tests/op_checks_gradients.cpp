// Checks (e), (f), (g): gradients against differences, subsets of needs, second order.
//
// Every comparison is written !(error <= tol), so that NaN fails. Cotangents are random: the sum of a softmax has
// gradient zero, and a zeroed backward would pass.
#include <capo/tests/op_checks.h>

#include <cmath>

namespace capo::test {
namespace {

using Vectors = std::vector<std::vector<double>>;  // one per input or output; empty where not differentiated

Vectors hosts(const Tensors& tensors, const std::vector<bool>& which) {
  Vectors out(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (which[i] && tensors[i].defined()) out[i] = host(tensors[i]);
  return out;
}

// inputs + step * direction on the wanted ones, in fresh tensors.
Tensors moved(const Tensors& inputs, const Vectors& direction, double step) {
  Tensors out = inputs;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (direction[i].empty()) continue;
    auto v = host(inputs[i]);
    for (std::size_t j = 0; j < v.size(); ++j) v[j] += step * direction[i][j];
    out[i] = values(v, inputs[i].shape());
  }
  return out;
}

// Differences of `f` along a direction, at several steps and orders: near a kink small steps are right, where values
// are large wide ones are. The derivative is right when one of them agrees.
struct Stencil {
  double step;
  bool four_points;
};
constexpr Stencil kStencils[] = {{1e-5, false}, {1e-4, true}, {1e-3, true}, {1e-6, false}};

Vectors differences(const Fn& f, const Tensors& inputs, const Vectors& direction, const std::vector<bool>& outputs,
                    Stencil s) {
  const auto at = [&](double step) { return hosts(f(moved(inputs, direction, step)), outputs); };
  const Vectors a = at(s.step), b = at(-s.step);
  const Vectors c = s.four_points ? at(2 * s.step) : a, d = s.four_points ? at(-2 * s.step) : b;
  Vectors out = a;
  for (std::size_t k = 0; k < a.size(); ++k)
    for (std::size_t j = 0; j < a[k].size(); ++j) {
      const double near = (a[k][j] - b[k][j]) / (2 * s.step), far = (c[k][j] - d[k][j]) / (4 * s.step);
      out[k][j] = s.four_points ? (4 * near - far) / 3 : near;
    }
  return out;
}

double dot(const Vectors& a, const Vectors& b) {
  double sum = 0;
  for (std::size_t k = 0; k < a.size(); ++k)
    for (std::size_t j = 0; j < a[k].size() && j < b[k].size(); ++j) sum += a[k][j] * b[k][j];
  return sum;
}

Vectors random_direction(const Tensors& inputs, const std::vector<bool>& wanted, const std::string& seed) {
  Vectors out(inputs.size());
  for (std::size_t i = 0; i < inputs.size(); ++i)
    if (wanted[i]) out[i] = host(normal(inputs[i].shape(), cat(seed, " ", i)));
  return out;
}

std::vector<bool> defined(const Tensors& tensors) {
  std::vector<bool> out;
  for (const auto& t : tensors) out.push_back(t.defined());
  return out;
}

std::int64_t count(const Tensors& tensors, const std::vector<bool>& which) {
  std::int64_t n = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (which[i]) n += tensors[i].numel();
  return n;
}

// <gradients, direction> against the difference of <f, cotangents> along it.
void expect_directional(const std::string& what, const Fn& f, const Tensors& inputs, const Vectors& direction,
                        const Tensors& cotangents, const Tensors& gradients, double tol) {
  const auto outputs = defined(cotangents);
  const Vectors c = hosts(cotangents, outputs);
  const double analytic = dot(hosts(gradients, defined(gradients)), direction);
  double numeric = 0;
  for (const Stencil s : kStencils) {
    numeric = dot(differences(f, inputs, direction, outputs, s), c);
    if (std::fabs(analytic - numeric) <= tol * std::fmax(1, std::fabs(numeric))) return;
  }
  expect(false, cat(what, ": derivative is ", analytic, ", differences give ", numeric));
}

// Row by row: the gradient of each output element against its differences.
void expect_jacobian(const Fn& run, const Tensors& inputs, const std::vector<bool>& wanted, double tol) {
  const Tensors leaves = leaves_of(inputs, wanted);
  const Tensors outputs = run(leaves);
  Tensors asked;
  for (std::size_t i = 0; i < leaves.size(); ++i)
    if (wanted[i]) asked.push_back(leaves[i]);
  std::vector<bool> live;
  for (const auto& y : outputs) live.push_back(y.defined() && requires_grad(y));

  std::vector<std::vector<Vectors>> rows(outputs.size());  // [output][element][wanted input] -> gradient
  for (std::size_t k = 0; k < outputs.size(); ++k) {
    if (!live[k]) continue;
    const auto n = static_cast<std::size_t>(outputs[k].numel());
    for (std::size_t e = 0; e < n; ++e) {
      std::vector<double> one(n, 0.0);
      one[e] = 1;
      const Tensors g = grad({outputs[k]}, asked, {values(one, outputs[k].shape())}, {.keep_graph = true});
      rows[k].push_back(hosts(g, defined(g)));
    }
  }
  std::size_t place = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (!wanted[i]) continue;
    for (std::size_t j = 0; j < static_cast<std::size_t>(inputs[i].numel()); ++j) {
      Vectors direction(inputs.size());
      direction[i].assign(static_cast<std::size_t>(inputs[i].numel()), 0.0);
      direction[i][j] = 1;
      std::string wrong;
      for (const Stencil s : kStencils) {
        const Vectors numeric = differences(run, inputs, direction, live, s);
        wrong.clear();
        for (std::size_t k = 0; k < outputs.size(); ++k)
          for (std::size_t e = 0; e < numeric[k].size(); ++e) {
            const double analytic = rows[k][e][place].empty() ? 0 : rows[k][e][place][j];
            if (!(std::fabs(analytic - numeric[k][e]) <= tol * std::fmax(1, std::fabs(numeric[k][e]))))
              wrong = cat("d output ", k, "[", e, "] / d input ", i, "[", j, "] is ", analytic, ", differences give ",
                          numeric[k][e]);
          }
        if (wrong.empty()) break;
      }
      expect(wrong.empty(), wrong);
    }
    ++place;
  }
}

void check_first_order(const Fn& run, const Tensors& inputs, const std::vector<bool>& wanted, double tol) {
  const Result r = differentiate(run, inputs, wanted);
  const Fn value = [&](const Tensors& x) { return forward(run, x); };
  std::vector<bool> live;
  for (const auto& y : r.outputs) live.push_back(y.defined() && requires_grad(y));
  const Tensors cotangents = cotangents_of(r.outputs);
  for (const auto* seed : {"direction a", "direction b"})
    expect_directional(seed, value, inputs, random_direction(inputs, wanted, seed), cotangents, r.gradients, tol);
  for (std::size_t i = 0; i < inputs.size(); ++i) {  // each input alone: a small one must not drown
    if (!wanted[i]) continue;
    std::vector<bool> only(inputs.size(), false);
    only[i] = true;
    expect_directional(cat("input ", i), value, inputs, random_direction(inputs, only, "alone"), cotangents,
                       r.gradients, tol);
  }
  const std::int64_t in = count(inputs, wanted), out = count(r.outputs, live);
  if (in <= 64 && in * out <= 2048) expect_jacobian(run, inputs, wanted, tol);
}

std::vector<std::vector<bool>> subsets(const std::vector<bool>& wanted) {
  std::vector<std::size_t> places;
  for (std::size_t i = 0; i < wanted.size(); ++i)
    if (wanted[i]) places.push_back(i);
  std::vector<std::vector<bool>> out;
  const auto add = [&](auto in_subset) {
    std::vector<bool> s(wanted.size(), false);
    for (std::size_t p = 0; p < places.size(); ++p) s[places[p]] = in_subset(p);
    out.push_back(s);
  };
  if (places.size() <= 4) {
    for (unsigned mask = 1; mask + 1 < 1u << places.size(); ++mask)
      add([&](std::size_t p) { return (mask >> p & 1) != 0; });
  } else {
    for (std::size_t k = 0; k < places.size(); ++k) {
      add([&](std::size_t p) { return p == k; });
      add([&](std::size_t p) { return p != k; });
    }
  }
  return out;
}

Tensors only(const Tensors& tensors, const std::vector<bool>& which) {
  Tensors out;
  for (std::size_t i = 0; i < tensors.size(); ++i) out.push_back(which[i] ? tensors[i] : Tensor());
  return out;
}

// Asks the newest node itself: a gradient nobody needs must not be computed.
void expect_unneeded_undefined(const Subject& s, const std::vector<bool>& subset) {
  struct : Pending {
    Tensor take(int) override { return {}; }
  } nothing;
  const Tensors leaves = leaves_of(s.inputs, s.wanted);
  const Tensors outputs = s.sample.run(leaves);
  const Tensors cotangents = cotangents_of(outputs);
  for (std::size_t k = 0; k < outputs.size(); ++k) {
    if (!cotangents[k].defined()) continue;
    Node* node = static_cast<GradSlot*>(outputs[k].grad_slot().get())->node.get();
    if (!node) continue;
    std::uint64_t mask = 0;
    for (std::size_t e = 0; e < node->edges().size(); ++e)
      for (std::size_t i = 0; i < leaves.size(); ++i)
        if (subset[i] && node->edges()[e].leaf && node->edges()[e].leaf.get() == leaves[i].grad_slot().get())
          mask |= std::uint64_t{1} << (e < 63 ? e : 63);
    if (mask == 0) continue;  // a composite: its newest node does not see the inputs
    Grads given(static_cast<std::size_t>(node->outputs()));
    given[static_cast<std::size_t>(static_cast<GradSlot*>(outputs[k].grad_slot().get())->output)] = cotangents[k];
    const NoGrad off;
    const Grads g = node->apply(given, Needs(mask), nothing);
    for (std::size_t e = 0; e < g.size() && e < 63; ++e)
      expect(!g[e].defined() || (mask >> e & 1),
             cat("gradient of input ", e, " was computed although nobody needs it"));
  }
}

}  // namespace

void check_gradient(const Subject& s) {
  if (differentiable(s)) check_first_order(s.sample.run, s.inputs, s.wanted, s.sample.grad_tol);
}

void check_subsets(const Subject& s) {
  if (!differentiable(s)) return;
  const Result full = differentiate(s.sample.run, s.inputs, s.wanted);
  for (const auto& subset : subsets(s.wanted)) {
    const Result part = differentiate(s.sample.run, s.inputs, subset);
    compare("output", part.outputs, full.outputs, 1e-12);
    compare("gradient of a subset", part.gradients, only(full.gradients, subset), 1e-12);
    expect_unneeded_undefined(s, subset);
  }
}

// G(x, c) = the gradient of <run(x), c>. Its own gradient, by create_graph, against differences of G.
void check_second_order(const Subject& s) {
  if (!differentiable(s)) return;
  const std::size_t n = s.inputs.size();
  const Result first = differentiate(s.sample.run, s.inputs, s.wanted);
  const Tensors cotangents = cotangents_of(first.outputs);
  Tensors point = s.inputs, gradients;  // point: inputs, then cotangents
  point.insert(point.end(), cotangents.begin(), cotangents.end());
  std::vector<bool> of_inputs = s.wanted, of_cotangents(n, false), live = s.wanted;
  of_inputs.resize(point.size(), false);
  for (const auto& c : cotangents) {
    of_cotangents.push_back(c.defined());
    live.push_back(c.defined());
  }

  const auto gradient_at = [&](const Tensors& p, bool create_graph) {
    const Tensors leaves = leaves_of(p, create_graph ? live : of_inputs);
    const Tensors outputs = s.sample.run(Tensors(leaves.begin(), leaves.begin() + static_cast<std::ptrdiff_t>(n)));
    Tensors roots, seeds, asked;
    for (std::size_t k = 0; k < outputs.size(); ++k)
      if (leaves[n + k].defined()) {
        roots.push_back(outputs[k]);
        seeds.push_back(leaves[n + k]);
      }
    for (std::size_t i = 0; i < n; ++i)
      if (s.wanted[i]) asked.push_back(leaves[i]);
    return std::pair(grad(roots, asked, seeds, {.create_graph = create_graph}), leaves);
  };

  Tensors second(point.size()), weights;
  try {
    const auto [g, leaves] = gradient_at(point, true);
    DebugAllocator::instance().check();
    Tensors plain;
    for (std::size_t i = 0; i < n; ++i)
      if (s.wanted[i]) plain.push_back(first.gradients[i]);
    compare("gradient with create_graph", g, plain, 1e-9);
    Tensors roots, seeds, asked;
    for (std::size_t i = 0; i < g.size(); ++i) {
      weights.push_back(g[i].defined() ? normal(g[i].shape(), cat("weight ", i)) : Tensor());
      if (!g[i].defined() || !requires_grad(g[i])) continue;
      roots.push_back(g[i]);
      seeds.push_back(weights[i]);
    }
    for (std::size_t i = 0; i < point.size(); ++i)
      if (live[i]) asked.push_back(leaves[i]);
    const Tensors got = roots.empty() ? Tensors(asked.size()) : grad(roots, asked, seeds);
    DebugAllocator::instance().check();
    std::size_t next = 0;
    for (std::size_t i = 0; i < point.size(); ++i)
      if (live[i]) second[i] = got[next++];
  } catch (const Error& e) {
    const std::string text = e.what();
    expect(!s.sample.second_order, "second_order is promised, but: " + text);
    expect(text.find(s.op) != std::string::npos || text.find("derivative") != std::string::npos,
           "the error names neither the op nor the derivative: " + text);
    return;
  }
  const Fn plain_gradient = [&](const Tensors& p) {
    Tensors g = gradient_at(p, false).first;
    for (std::size_t i = 0; i < g.size(); ++i)
      if (!g[i].defined() && weights[i].defined())
        g[i] = values(std::vector<double>(static_cast<std::size_t>(weights[i].numel()), 0.0), weights[i].shape());
    return g;
  };
  const double tol = 10 * s.sample.grad_tol;
  expect_directional("second order", plain_gradient, point, random_direction(point, of_inputs, "second"), weights,
                     second, tol);
  expect_directional("second order, cotangent", plain_gradient, point, random_direction(point, of_cotangents, "second"),
                     weights, second, tol);
}

std::string gradcheck(const Fn& run, const Tensors& inputs, const std::vector<bool>& wanted, double tol) {
  std::vector<bool> which = wanted;
  if (which.empty())
    for (const auto& t : inputs) which.push_back(t.defined() && is_floating(t.dtype()));
  try {
    check_first_order(run, inputs, which, tol);
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

}  // namespace capo::test
