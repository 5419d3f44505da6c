// oneDNN's side of bench/cpu/run: products, by the same protocol as bench/cpu/ops.cpp.
//   bench_cpu_onednn [--threads 2]
// {"op": "gemm", m, n, k, ta, tb, bias, dtype, prepacked}: as there; prepacked: B in the layout that oneDNN asks for.
#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <dnnl.hpp>
#include <random>
#include <stdexcept>
#include <unordered_map>

#include <capo/bench/cpu/serve.h>

using namespace dnnl;
using capo::bench::Served;
using nlohmann::json;

namespace {

const engine& cpu() {
  static const engine e(engine::kind::cpu, 0);
  return e;
}
stream& queue() {
  static stream s(cpu());
  return s;
}

// Normal numbers in the layout `desc`.
memory random(const memory::desc& desc, memory::dim rows, memory::dim columns) {
  static std::mt19937 rng(1);
  memory plain({{rows, columns}, memory::data_type::f32, memory::format_tag::ab}, cpu());
  std::normal_distribution<float> normal;
  float* p = static_cast<float*>(plain.get_data_handle());
  for (memory::dim i = 0; i < rows * columns; ++i) p[i] = normal(rng);
  memory wanted(desc, cpu());
  reorder(plain, wanted).execute(queue(), plain, wanted);
  queue().wait();
  return wanted;
}

Served gemm(const json& c) {
  using tag = memory::format_tag;
  const memory::dim m = c["m"], n = c["n"], k = c["k"];
  const auto type = c.value("dtype", "f32") == "bf16" ? memory::data_type::bf16 : memory::data_type::f32;
  const memory::desc a({m, k}, type, c.value("ta", false) ? tag::ba : tag::ab), y({m, n}, type, tag::ab);
  const memory::desc b({k, n}, type, c.value("prepacked", false) ? tag::any : c.value("tb", false) ? tag::ba : tag::ab);
  const bool with_bias = c.value("bias", false);
  const memory::desc bias({1, n}, type, tag::ab);
  const auto op = with_bias ? matmul::desc(a, b, bias, y) : matmul::desc(a, b, y);
  const matmul::primitive_desc made(op, cpu());
  std::unordered_map<int, memory> args{{DNNL_ARG_SRC, random(a, m, k)},
                                       {DNNL_ARG_WEIGHTS, random(made.weights_desc(), k, n)},
                                       {DNNL_ARG_DST, memory(y, cpu())}};
  if (with_bias) args.emplace(DNNL_ARG_BIAS, random(bias, 1, n));
  Served served{[product = matmul(made), args] {
    product.execute(queue(), args);
    queue().wait();
  }};
  served.notes = {{"implementation", made.impl_info_str()}};
  return served;
}

int threads_asked = 2;

Served make(const json& c) {
  if (c["op"] != "gemm") throw std::runtime_error("only products here");
  const int threads = c.value("threads", threads_asked);
  omp_set_num_threads(threads);
  Served served = gemm(c);
  served.alone = threads == 1;
  return served;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && std::string(argv[1]) == "--threads") threads_asked = std::atoi(argv[2]);
  const dnnl_version_t* v = dnnl_version();
  const std::string version =
      std::to_string(v->major) + "." + std::to_string(v->minor) + "." + std::to_string(v->patch);
  capo::bench::serve({{"seconds", 0}, {"versions", {{"oneDNN", version}}}}, make);
}
