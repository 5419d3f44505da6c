// Work that only moves memory, as a share of what a copy reaches in the same run: layer norm, AdamW, the optimiser.
//   bench_gpu_bandwidth [--device cuda] [--only TEXT] [--rounds 15]; --device cpu --tiny
#include <capo/autograd/autograd.h>
#include <capo/bench/gpu/harness.h>
#include <capo/engine/backend.h>
#include <capo/models/train/optim.h>
#include <capo/models/vit/vit.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/optim.h>

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

using namespace capo;
using namespace capo::bench;

namespace {

Tensor leaf(const Tensor& t) {
  set_requires_grad(t, true);
  return t;
}

struct Passes {
  Options options;
  DType dtype;
  std::vector<Case> cases;

  void add(const std::string& name, double bytes, std::function<void()> run) {
    cases.push_back({name, bytes, std::move(run)});
  }

  void copies() {
    const std::int64_t n = std::int64_t{1} << (options.tiny ? 12 : 29);  // 1 GiB in bf16: many times the L2
    const Tensor one = random({std::min<std::int64_t>(n, 1 << 24)}, dtype, options.device);
    const Tensor from = empty({n}, dtype, options.device), to = empty({n}, dtype, options.device);
    for (std::int64_t at = 0; at < n; at += one.numel())
      copy_bytes(static_cast<char*>(from.data()) + at * static_cast<std::int64_t>(size_of(dtype)), options.device,
                 one.data(), options.device, one.nbytes());
    const double bytes = 2.0 * static_cast<double>(from.nbytes());
    add("copy, the driver's", bytes,
        [=] { copy_bytes(to.data(), to.device(), from.data(), from.device(), from.nbytes()); });
    add("copy, our kernel", bytes, [=] { copy_into(to, from); });
  }

  // Bytes: what must move, each tensor once; statistics and [C] vectors are left out.
  void norm(std::int64_t rows, std::int64_t columns) {
    const Tensor x = leaf(random({rows, columns}, dtype, options.device)),
                 dy = random({rows, columns}, dtype, options.device);
    const Tensor w = leaf(random({columns}, dtype, options.device)), b = leaf(random({columns}, dtype, options.device));
    const std::string name = cat("layer norm ", rows, " x ", columns);
    const double pass = static_cast<double>(x.nbytes());
    add(name + ", forward", 2 * pass, [=] { layer_norm(x, w, b); });
    const Tensor y = layer_norm(x, w, b);
    add(name + ", backward", 3 * pass, [=] { grad({y}, {x, w, b}, {dy}, {.keep_graph = true}); });
    // sum = x + branch and its norm; backward: dy and the stream's own gradient come in, one gradient goes out to both.
    const Tensor branch = leaf(random({rows, columns}, dtype, options.device)),
                 ds = random({rows, columns}, dtype, options.device);
    add("residual + " + name + ", forward", 4 * pass, [=] { add_layer_norm(x, branch, w, b); });
    const AddNorm both = add_layer_norm(x, branch, w, b);
    add("residual + " + name + ", backward", 4 * pass,
        [=] { grad({both.y, both.sum}, {x, branch, w, b}, {dy, ds}, {.keep_graph = true}); });
  }

  void adamw(const std::vector<Shape>& shapes) {
    TensorList p, g, m, v;
    double bytes = 0;
    for (const Shape& s : shapes) {
      for (TensorList* list : {&p, &g, &m}) list->push_back(random(s, f32, options.device));
      v.push_back(m.back() * m.back());
      bytes += 7.0 * static_cast<double>(p.back().nbytes());  // reads p, g, m, v, writes p, m, v
    }
    add(cat("AdamW f32, ", shapes.size(), " tensors"), bytes, [=] { adamw_(p, g, m, v, {}); });
  }

  // The optimiser on the model's weights in `dtype`: f32 master, m and v read and written, gradient read, weight
  // written.
  void optimizer(train::AdamW& step, nn::Module& model) {
    double bytes = 0;
    for (nn::Parameter* p : model.parameters()) {
      set_grad(p->value(), random(p->value().shape(), dtype, options.device));
      bytes += static_cast<double>(p->value().numel()) * (24.0 + 2.0 * static_cast<double>(size_of(dtype)));
    }
    if (dtype == f32) bytes *= 28.0 / 32.0;  // no master beside the weight
    add(cat("AdamW.step, weights in ", dtype), bytes, [&step] { step.step(1e-6); });
  }
};

void body(Options o) {
  const DType dtype = o.dtype();
  o.no_more();
  Passes p{o, dtype, {}};
  p.copies();
  if (o.tiny) {
    p.norm(12, 16);
  } else {
    p.norm(256 * 197, 768);
    p.norm(256 * 197, 384);
    p.norm(1024, 12288);
  }
  vit::VitConfig config = vit::config("vit_b", 224, 16, 1000);
  if (o.tiny) config = vit::config("vit_ti", 32, 16, 10), config.depth = 1;
  vit::Vit model(config, {.dtype = dtype, .device = o.device});
  train::AdamW optimizer(model);
  std::vector<Shape> shapes;
  for (nn::Parameter* parameter : model.parameters()) shapes.push_back(parameter->value().shape());
  p.adamw(shapes);
  p.optimizer(optimizer, model);
  measure(p.cases, o);

  double ceiling = 0;
  for (const Case& c : p.cases)
    if (c.name.rfind("copy", 0) == 0) ceiling = std::max(ceiling, c.work / median(c.seconds));
  nlohmann::json rows = nlohmann::json::array();
  std::printf("%-52s %10s %8s\n", "pass", "GB/s", "of copy");
  for (const Case& c : p.cases) {
    const double rate = c.work / median(c.seconds);
    nlohmann::json row{{"case", c.name}, {"bytes", c.work}, {"capo", figures(c)}};
    std::printf("%-52s %10.1f", c.name.c_str(), rate * 1e-9);
    if (ceiling > 0) {
      row["of_copy"] = rate / ceiling;
      std::printf(" %7.1f%%", 100 * rate / ceiling);
    }
    std::printf("%s\n", c.captured || o.device.is_cpu() ? "" : "  (a loop of launches)");
    rows.push_back(row);
  }
  print_result({{"bench", "bandwidth"}, {"device", to_string(o.device)}, {"dtype", to_string(dtype)}, {"tiny", o.tiny},
                {"copy_bytes_per_second", ceiling}, {"rows", rows}});
}

}  // namespace

int main(int argc, char** argv) { return guarded(argc, argv, body); }
