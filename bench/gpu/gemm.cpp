// Capo's matrix products at the shapes of the benched models against cuBLASLt's best algorithm for each, in one run.
//   bench_gpu_gemm [--device cuda] [--dtype bf16] [--only TEXT] [--rounds 15]; --device cpu --tiny has Capo alone
#include <capo/bench/gpu/harness.h>
#include <capo/ops/matmul.h>
#include <capo/ops/view.h>
#if defined(CAPO_BENCH_CUDA)
#include <capo/bench/gpu/best_product.h>
#endif

#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

using namespace capo;
using namespace capo::bench;

namespace {

struct Products {
  Options options;
  DType dtype;
  std::vector<Case> cases;
  nlohmann::json peers = nlohmann::json::object();  // what cuBLASLt offered, by name

  // a [M, K] times b [K, N]; with a bias as linear() does it.
  void add(const std::string& name, const Tensor& a, const Tensor& b, const Tensor& bias, std::function<void()> run) {
    if (name.find(options.only) == std::string::npos) return;
    const double flops =
        2.0 * static_cast<double>(a.size(0)) * static_cast<double>(a.size(1)) * static_cast<double>(b.size(1));
    cases.push_back({"capo " + name, flops, std::move(run)});
#if defined(CAPO_BENCH_CUDA)
    if (!options.device.is_cuda()) return;
    const BestProduct best(a, b, bias);
    peers[name] = {{"offered", best.offered()}, {"chosen", best.chosen()}};
    cases.push_back({"cublaslt " + name, flops, [best] { best.run(); }});
#else
    static_cast<void>(bias);
#endif
  }

  // The three products of a layer [rows, in] -> [rows, out]: forward with bias, and both gradients. x and dy may be
  // shared by layers of equal width.
  void layer(const std::string& name, const Tensor& x, const Tensor& dy) {
    const std::int64_t in = x.size(1), out = dy.size(1);
    const Tensor w = random({out, in}, dtype, options.device), b = random({out}, dtype, options.device);
    const Tensor wt = transpose(w, 0, 1), dyt = transpose(dy, 0, 1);
    const std::string text = cat(name, " ", x.size(0), ": ", in, " -> ", out);
    add(text + ", forward", x, wt, b, [=] { linear(x, w, b); });
    add(text + ", dx", dy, w, {}, [=] { matmul(dy, w); });
    add(text + ", dw", dyt, x, {}, [=] { matmul(dyt, x); });
  }

  void model(const std::string& name, std::int64_t rows, std::int64_t dim) {
    std::map<std::int64_t, Tensor> wide;  // a tensor per width serves as input and as gradient
    for (const std::int64_t width : {dim, 3 * dim, 4 * dim}) wide[width] = random({rows, width}, dtype, options.device);
    const Tensor other = random({rows, dim}, dtype, options.device);
    layer(name + " qkv", wide[dim], wide[3 * dim]);
    layer(name + " proj", wide[dim], other);
    layer(name + " fc1", wide[dim], wide[4 * dim]);
    layer(name + " fc2", wide[4 * dim], wide[dim]);
  }
};

void body(Options o) {
  const DType dtype = o.dtype();
  o.no_more();
  Products p{o, dtype, {}, nlohmann::json::object()};
  const std::int64_t n = o.tiny ? 64 : 8192;
  const Tensor a = random({n, n}, dtype, o.device), b = random({n, n}, dtype, o.device);
  p.add(cat("ceiling ", n, "^3"), a, b, {}, [=] { matmul(a, b); });
  if (o.tiny) {
    p.model("tiny", 24, 16);
  } else {
    p.model("vit_b16", 256 * 197, 768);
    p.model("vit_s16", 256 * 197, 384);
    p.model("vit_ti4", 128 * 65, 192);
  }
  Options all = o;
  all.only = "";  // chosen already
  measure(p.cases, all);

  nlohmann::json rows = nlohmann::json::array();
  std::printf("%-44s %10s %12s %10s %8s\n", "product", "TFLOP/s", "cuBLASLt best", "of best", "offered");
  for (std::size_t i = 0; i < p.cases.size(); ++i) {
    const Case& mine = p.cases[i];
    if (mine.name.rfind("capo ", 0) != 0) continue;
    const std::string name = mine.name.substr(5);
    nlohmann::json row{{"case", name}, {"flops", mine.work}, {"capo", figures(mine)}};
    std::printf("%-44s %10.1f", name.c_str(), mine.work / median(mine.seconds) * 1e-12);
    if (i + 1 < p.cases.size() && p.cases[i + 1].name == "cublaslt " + name) {
      const Case& best = p.cases[i + 1];
      const double share = median_ratio(best.seconds, mine.seconds);
      row["cublaslt"] = figures(best);
      row["search"] = p.peers[name];
      row["of_best"] = share;
      std::printf(" %12.1f %9.1f%% %8d", best.work / median(best.seconds) * 1e-12, 100 * share,
                  p.peers[name]["offered"].get<int>());
    }
    std::printf("\n");
    rows.push_back(row);
  }
  print_result({{"bench", "gemm"}, {"device", to_string(o.device)}, {"dtype", to_string(dtype)},
                {"tiny", o.tiny}, {"rows", rows}});
}

}  // namespace

int main(int argc, char** argv) { return guarded(argc, argv, body); }
