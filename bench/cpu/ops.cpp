// Capo's side of bench/cpu/run: prepares the ops that it is told and times them when asked.
//   bench_cpu_ops [--threads 2]        then bench/cpu/serve.h's protocol on its input
// A case is {"op": .., "threads": n if other than --threads, ..}; the functions below say what each op reads.
#include <capo/autograd/autograd.h>
#include <capo/bench/cpu/serve.h>
#include <capo/bench/peak.h>
#include <capo/engine/cpu.h>
#include <capo/engine/rng.h>
#include <capo/engine/threads.h>
#include <capo/ops/attention.h>
#include <capo/ops/conv.h>
#include <capo/ops/copy.h>
#include <capo/ops/group_norm.h>
#include <capo/ops/layer_norm.h>
#include <capo/ops/matmul.h>
#include <capo/ops/optim.h>
#include <capo/ops/softmax.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <stdexcept>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace capo;
using nlohmann::json;

namespace {

using bench::Served;

DType dtype_of(const json& c) { return c.value("dtype", "f32") == "bf16" ? bf16 : f32; }
Tensor random(const Shape& shape, DType dtype = f32) {
  static Generator rng(1);
  return cast(rand_normal(shape, rng), dtype);
}
Tensor leaf(const Tensor& t) {
  set_requires_grad(t, true);
  return t;
}
Shape shape_of(const json& j) {
  Shape shape;
  for (const std::int64_t size : j) shape.push_back(size);
  return shape;
}

// A [m, k] times B [k, n], of which ta, tb say that they lie transposed; with a bias it is a layer, x w^T + b.
// "round": f32 operands rounded to bf16 inside the product.
Served gemm(const json& c) {
  const std::int64_t m = c["m"], n = c["n"], k = c["k"];
  const DType dtype = dtype_of(c);
  set_matmul_precision(c.value("round", false) ? bf16 : f32);
  const bool ta = c.value("ta", false), tb = c.value("tb", false);
  const Tensor a = ta ? transpose(random({k, m}, dtype), 0, 1) : random({m, k}, dtype);
  const Tensor b = random(tb ? Shape{n, k} : Shape{k, n}, dtype),
               bias = c.value("bias", false) ? random({n}, dtype) : Tensor();
  if (tb) return {[=] { linear(a, b, bias); }};
  return {[=] { matmul(a, b); }};
}

Served peak(const json&) {
  return {[] { bench::multiply_adds(); }, bench::multiply_adds()};
}

// What a pass times: y = f(inputs), or the gradients of y with respect to those of them that ask for one, or both.
template <class F>
Served differentiated(const std::string& pass, const std::vector<Tensor>& inputs, F f) {
  if (pass == "forward") {
    return {[=] {
      NoGrad no_grad;
      f(inputs);
    }};
  }
  for (const Tensor& t : inputs) leaf(t);
  const Tensor y = f(inputs), dy = random(y.shape(), y.dtype());
  if (pass == "backward") return {[=] { grad({y}, inputs, {dy}, {.keep_graph = true}); }};
  if (pass != "both") throw std::runtime_error("pass must be forward, backward or both");
  return {[=] { grad({f(inputs)}, inputs, {dy}); }};
}

// x [batch, spatial.., in], w [out, kernel.., in / groups]. The passes are those of training: y, dx and dw.
Served conv_pass(const json& c) {
  const Shape in = shape_of(c["x"]), kernel = shape_of(c["kernel"]);
  Shape weight{c["out"].get<std::int64_t>()};
  for (const std::int64_t size : kernel) weight.push_back(size);
  const int groups = c.value("groups", 1);
  weight.push_back(in.back() / groups);
  const ConvOptions options{.stride = {c.value("stride", std::int64_t{1})},
                            .pad_before = {c.value("pad", std::int64_t{0})},
                            .groups = groups};
  const DType dtype = dtype_of(c);
  const Tensor x = random(in, dtype), w = random(weight, dtype);
  const std::string pass = c["pass"];
  if (pass == "forward") return {[=] { conv(x, w, {}, options); }};
  const Tensor wanted = leaf(pass == "data" ? x : w);
  const Tensor y = conv(x, w, {}, options), dy = random(y.shape(), dtype);
  return {[=] { grad({y}, {wanted}, {dy}, {.keep_graph = true}); }};
}

// Forward and backward of [batch, n, heads, d], q, k and v being parts of one product's result, as in a ViT.
Served attention_pass(const json& c) {
  const std::int64_t b = c["batch"], n = c["n"], h = c["heads"], d = c["d"];
  const Tensor qkv = random({b, n, 3, h, d}, dtype_of(c));
  return differentiated(c["pass"], {select(qkv, 2, 0), select(qkv, 2, 1), select(qkv, 2, 2)},
                        [](const std::vector<Tensor>& in) { return attention(in[0], in[1], in[2]).o; });
}

Served layer_norm_pass(const json& c) {
  const std::int64_t rows = c["rows"], columns = c["columns"];
  return differentiated(c["pass"], {random({rows, columns}), random({columns}), random({columns})},
                        [](const std::vector<Tensor>& in) { return layer_norm(in[0], in[1], in[2]); });
}

Served group_norm_pass(const json& c) {
  const Shape in = shape_of(c["x"]);
  const std::int64_t groups = c["groups"];
  return differentiated(c["pass"], {random(in), random({in.back()}), random({in.back()})},
                        [groups](const std::vector<Tensor>& t) { return group_norm(t[0], groups, t[1], t[2]); });
}

Served softmax_pass(const json& c) {
  return differentiated(c["pass"], {random({c["rows"].get<std::int64_t>(), c["columns"].get<std::int64_t>()})},
                        [](const std::vector<Tensor>& in) { return softmax(in[0]); });
}

Served gelu_pass(const json& c) {
  return differentiated(c["pass"], {random({c["elements"].get<std::int64_t>()})},
                        [](const std::vector<Tensor>& in) { return gelu(in[0]); });
}

// Equal tensors, as many as a ViT has large ones.
Served adamw(const json& c) {
  const std::int64_t tensors = c["tensors"], elements = c["elements"].get<std::int64_t>() / tensors;
  TensorList lists[4];
  for (TensorList& list : lists)
    for (std::int64_t i = 0; i < tensors; ++i) list.push_back(random({elements}));
  for (const Tensor& v : lists[3]) copy_into(v, square(v));
  return {[params = lists[0], grads = lists[1], m = lists[2], v = lists[3]] {
    adamw_(params, grads, m, v, {.step = 100});
  }};
}

#if defined(__x86_64__)
[[gnu::target("avx512f")]] void stream_v4(float* out, const float* in, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 16) _mm512_stream_ps(out + i, _mm512_load_ps(in + i));
  _mm_sfence();
}
[[gnu::target("avx2")]] void stream_v3(float* out, const float* in, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 8) _mm256_stream_ps(out + i, _mm256_load_ps(in + i));
  _mm_sfence();
}
#endif
void stream(float* out, const float* in, std::int64_t n) {
#if defined(__x86_64__)
  if (isa() == Isa::v4) return stream_v4(out, in, n);
  if (isa() == Isa::v3) return stream_v3(out, in, n);
#endif
  std::copy(in, in + n, out);
}

// The ceiling of the passes: a copy past the caches, which reads and writes each byte once. elements: a multiple of 16.
Served copy(const json& c) {
  const std::int64_t n = c["elements"];
  const Tensor from = random({n}), to = random({n});
  const auto run = [=] {
    const float* in = from.data<float>();
    float* out = to.data<float>();
    parallel_for(n, 1 << 16,
                 [&](std::int64_t begin, std::int64_t end) { stream(out + begin, in + begin, end - begin); });
  };
  return {run, 8.0 * static_cast<double>(n)};
}

const std::map<std::string, Served (*)(const json&)> kOps = {
    {"gemm", gemm},
    {"peak", peak},
    {"copy", copy},
    {"conv", conv_pass},
    {"attention", attention_pass},
    {"layer_norm", layer_norm_pass},
    {"group_norm", group_norm_pass},
    {"softmax", softmax_pass},
    {"gelu", gelu_pass},
    {"adamw", adamw},
};

int threads_asked = 2;

Served make(const json& c) {
  const auto op = kOps.find(c["op"].get<std::string>());
  if (op == kOps.end()) throw std::runtime_error("no such op");
  const int threads = c.value("threads", threads_asked);
  set_num_threads(threads);
  Served served = op->second(c);
  served.alone = threads == 1;
  return served;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && std::string(argv[1]) == "--threads") threads_asked = std::atoi(argv[2]);
  bench::serve({{"seconds", 0}, {"versions", {{"isa", to_string(isa())}, {"bf16_dot", has_bf16_dot()}}}}, make);
}
