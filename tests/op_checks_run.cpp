// Running a sample forward and backward, and comparing what comes out.
#include <capo/tests/op_checks.h>

#include <algorithm>
#include <cmath>

namespace capo::test {

void expect(bool ok, const std::string& text) {
  if (!ok) throw std::runtime_error(text);
}

bool any(const std::vector<bool>& v) { return std::find(v.begin(), v.end(), true) != v.end(); }

Tensors forward(const Fn& run, const Tensors& inputs) {
  const NoGrad off;
  Tensors outputs = run(inputs);
  DebugAllocator::instance().check();
  return outputs;
}

Tensors leaves_of(const Tensors& inputs, const std::vector<bool>& wanted) {
  Tensors leaves;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    leaves.push_back(inputs[i].defined() ? inputs[i].detach() : Tensor());
    if (wanted[i]) set_requires_grad(leaves[i], true);
  }
  return leaves;
}

Tensor cotangent_of(const Tensor& y, std::size_t output, Layout layout) {
  if (y.device().is_meta()) return empty_like(y);
  const Tensor c = in_dtype({normal(y.shape(), cat("cotangent ", output))}, bf16)[0];  // the same value in every dtype
  return on_device(lay_out(in_dtype({c}, y.dtype())[0], layout), y.device());
}

Tensors cotangents_of(const Tensors& outputs, Layout layout) {
  Tensors cotangents;
  for (std::size_t k = 0; k < outputs.size(); ++k) {
    const Tensor& y = outputs[k];
    cotangents.push_back(y.defined() && requires_grad(y) ? cotangent_of(y, k, layout) : Tensor());
  }
  return cotangents;
}

namespace {

// cotangents_for(outputs): one per output.
template <class F>
Result differentiate_with(const Fn& run, const Tensors& inputs, const std::vector<bool>& wanted,
                          const F& cotangents_for) {
  Result r;
  const Tensors leaves = leaves_of(inputs, wanted);
  r.outputs = run(leaves);
  DebugAllocator::instance().check();
  Tensors roots, seeds, asked;
  const Tensors cotangents = cotangents_for(r.outputs);
  for (std::size_t k = 0; k < r.outputs.size(); ++k)
    if (cotangents[k].defined() && requires_grad(r.outputs[k])) {
      roots.push_back(r.outputs[k]);
      seeds.push_back(cotangents[k]);
    }
  for (std::size_t i = 0; i < leaves.size(); ++i)
    if (wanted[i]) asked.push_back(leaves[i]);
  expect(!roots.empty(), "an input requires a gradient, but nothing was recorded");
  const Tensors got = grad(roots, asked, seeds);
  DebugAllocator::instance().check();
  std::size_t next = 0;
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    r.gradients.push_back(wanted[i] ? got[next++] : Tensor());
    const Tensor& g = r.gradients.back();
    if (!g.defined()) continue;
    expect(g.shape() == leaves[i].shape() && g.dtype() == leaves[i].dtype() && g.device() == leaves[i].device(),
           cat("gradient ", i, " is ", describe(g), " for an input ", describe(leaves[i])));
  }
  return r;
}

}  // namespace

Result differentiate(const Fn& run, const Tensors& inputs, const std::vector<bool>& wanted, Layout layout) {
  return differentiate_with(run, inputs, wanted,
                            [layout](const Tensors& outputs) { return cotangents_of(outputs, layout); });
}

Result differentiate(const Fn& run, const Tensors& inputs, const std::vector<bool>& wanted, const Tensors& cotangents) {
  return differentiate_with(run, inputs, wanted, [&](const Tensors&) { return cotangents; });
}

Result run_all(const Subject& s, const Tensors& inputs) {
  if (differentiable(s)) return differentiate(s.sample.run, inputs, s.wanted);
  return {forward(s.sample.run, inputs), {}};
}

bool has_floating(const Tensors& inputs) {
  return std::any_of(inputs.begin(), inputs.end(),
                     [](const Tensor& t) { return t.defined() && is_floating(t.dtype()); });
}

bool all_finite_values(const Tensors& tensors) {
  for (const auto& t : tensors)
    if (t.defined())
      for (const double v : host(t))
        if (!std::isfinite(v)) return false;
  return true;
}

void compare(const std::string& what, const Tensors& a, const Tensors& b, double tol) {
  expect(a.size() == b.size(), cat(what, ": ", a.size(), " results instead of ", b.size()));
  for (std::size_t i = 0; i < a.size(); ++i) {
    Tensor x = a[i], y = b[i];
    if (!x.defined() && !y.defined()) continue;
    if (!x.defined()) x = values(std::vector<double>(static_cast<std::size_t>(y.numel()), 0.0), y.shape());
    if (!y.defined()) y = values(std::vector<double>(static_cast<std::size_t>(x.numel()), 0.0), x.shape());
    const std::string text = difference(x, y, tol);
    expect(text.empty(), cat(what, " ", i, ": ", text));
  }
}

void compare_bits(const std::string& what, const Tensors& a, const Tensors& b) {
  expect(a.size() == b.size(), cat(what, ": ", a.size(), " results instead of ", b.size()));
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (same_bits(a[i], b[i])) continue;
    expect(false, cat(what, " ", i, " differs in bits: ", difference(a[i], b[i], 0)));
  }
}

void compare_bits(const std::string& what, const Result& a, const Result& b) {
  compare_bits(what + ", output", a.outputs, b.outputs);
  compare_bits(what + ", gradient", a.gradients, b.gradients);
}

}  // namespace capo::test
