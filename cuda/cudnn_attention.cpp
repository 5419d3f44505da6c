// Attention by cuDNN: forward with the log-sum-exp, and backward, of 16-bit elements, neither causal nor with a bias.
// Not on the shim: cuDNN runs on a card alone; attention.cu's own kernels, on which every sample runs, take its place.
//
// The graphs are the formulas, in the order that cuDNN's engines look for; axes are B H N D whatever their order in
// memory. Keys come transposed, in the backward values too. The backward makes its own delta = rowsum(do o): cuDNN 9.19
// offers no engine to a graph that reads ours. dq comes straight from its product, for which cuDNN keeps all of dS in
// its workspace; cudnn-frontend, whose graph this is, does so where it is asked to be deterministic.
#include <capo/cuda/cudnn.h>
#include <capo/cuda/cudnn_graph.h>
#include <capo/cuda/runtime.h>

#include <algorithm>
#include <tuple>

namespace capo::kernels {
namespace {

using cudnn::Descriptor;
using cudnn::Graph;
using Sizes = std::vector<std::int64_t>;

enum Uid : std::int64_t { kQ = 1, kK, kV, kO, kLse, kScale, kDo, kDelta, kDq, kDk, kDv, kOne };
constexpr std::int64_t kForward = 100, kBackward = 101;  // kinds of problem, beside the convolutions'

struct Problem {
  const AttentionArgs& a;
  std::int64_t batch;
  const AttentionGradArgs* g = nullptr;  // the backward's
};

cudnn::Key key_of(const Problem& p) {
  const AttentionArgs& a = p.a;
  cudnn::Key k{p.g ? kBackward : kForward, static_cast<std::int64_t>(a.dtype), p.batch, a.heads, a.nq, a.nk, a.d, a.dv};
  std::size_t at = 8;
  for (const auto* strides : {&a.qs, &a.ks, &a.vs})
    for (const auto s : *strides) k[at++] = s;
  const auto add = [&](std::initializer_list<const void*> pointers) {
    for (const void* x : pointers) k[at++] = cudnn::alignment(x);
  };
  add({a.q, a.k, a.v, a.o, a.lse});
  if (p.g) add({p.g->d_o, p.g->delta, p.g->dq, p.g->dk, p.g->dv});
  static_assert(8 + 3 * 3 + 10 <= std::tuple_size_v<cudnn::Key>);
  return k;
}

// Adds operations on [B, H, Nq, Nk] tensors, and their rows, that stay inside the kernel.
class Chain {
 public:
  Chain(Graph& graph, const Problem& p)
      : graph_(graph), type_(cudnn::type_of(p.a.dtype)), scores_{p.batch, p.a.heads, p.a.nq, p.a.nk}, rows_(scores_) {
    rows_[3] = 1;
  }

  const Descriptor& matmul(const Descriptor& a, const Descriptor& b, const Descriptor& c) {
    Descriptor d(CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    d.set(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_DATA_FLOAT);
    const Descriptor& product = graph_.part(std::move(d));
    Descriptor op(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, c);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_DESC, product);
    graph_.operation(std::move(op));
    return c;
  }
  // a b, f32 scores.
  const Descriptor& scores(const Descriptor& a, const Descriptor& b) { return matmul(a, b, hidden(CUDNN_DATA_FLOAT)); }
  // x mode b, or mode of x, in f32; rounded to the operands' type for a product.
  const Descriptor& apply(cudnnPointwiseMode_t mode, const Descriptor& x, const Descriptor* b = nullptr) {
    return graph_.pointwise(mode, x, b, hidden(CUDNN_DATA_FLOAT));
  }
  const Descriptor& rounded(cudnnPointwiseMode_t mode, const Descriptor& x, const Descriptor* b) {
    return graph_.pointwise(mode, x, b, hidden(type_));
  }
  const Descriptor& rows(cudnnPointwiseMode_t mode, const Descriptor& x) {
    return graph_.pointwise(mode, x, nullptr, row());
  }
  const Descriptor& reduce(cudnnReduceTensorOp_t how, const Descriptor& x) {
    Descriptor d(CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    d.set(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &how);
    d.set(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_DATA_FLOAT);
    const Descriptor& what = graph_.part(std::move(d));
    const Descriptor& y = row();
    Descriptor op(CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
    op.set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, what);
    op.set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
    op.set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y);
    graph_.operation(std::move(op));
    return y;
  }
  // x as a tensor of these sizes and strides, in the operands' type.
  const Descriptor& reshape(const Descriptor& x, const Sizes& sizes, const Sizes& strides) {
    const Descriptor& y = graph_.tensor(next_++, type_, sizes, strides, 0);
    Descriptor op(CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
    op.set(CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x);
    op.set(CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y);
    graph_.operation(std::move(op));
    return y;
  }
  const Descriptor& transposed(const Descriptor& x) {
    const Sizes& n = scores_;
    return reshape(x, {n[0], n[1], n[3], n[2]}, {n[1] * n[2] * n[3], n[2] * n[3], 1, n[3]});
  }

  // The sums of x y over the vectors of each query, to `to`.
  void row_products(const Descriptor& x, const Descriptor& y, std::int64_t width, const Descriptor& one,
                    const Descriptor& to) {
    Sizes n = scores_;
    n[3] = width;
    const Descriptor& products = graph_.tensor(next_++, CUDNN_DATA_FLOAT, n, contiguous(n), 0);
    graph_.pointwise(CUDNN_POINTWISE_MUL, x, &y, products);
    graph_.pointwise(CUDNN_POINTWISE_MUL, reduce(CUDNN_REDUCE_TENSOR_ADD, products), &one, to);
  }

 private:
  static Sizes contiguous(const Sizes& n) { return {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1}; }
  const Descriptor& hidden(cudnnDataType_t type) {
    return graph_.tensor(next_++, type, scores_, contiguous(scores_), 0);
  }
  const Descriptor& row() { return graph_.tensor(next_++, CUDNN_DATA_FLOAT, rows_, contiguous(rows_), 0); }

  Graph& graph_;
  cudnnDataType_t type_;
  Sizes scores_, rows_;
  std::int64_t next_ = 100;
};

// The tensors in memory.
struct Operands {
  Graph& graph;
  const Problem& p;

  const Descriptor& vectors(Uid uid, const void* at, std::int64_t n, std::int64_t width, const std::int64_t (&s)[3]) {
    return graph.tensor(uid, cudnn::type_of(p.a.dtype), {p.batch, p.a.heads, n, width}, {s[0], s[2], s[1], 1},
                        cudnn::alignment(at));
  }
  const Descriptor& transposed(Uid uid, const void* at, std::int64_t n, std::int64_t width,
                               const std::int64_t (&s)[3]) {
    return graph.tensor(uid, cudnn::type_of(p.a.dtype), {p.batch, p.a.heads, width, n}, {s[0], s[2], 1, s[1]},
                        cudnn::alignment(at));
  }
  // [B, N, H, width] without gaps.
  const Descriptor& contiguous(Uid uid, const void* at, std::int64_t n, std::int64_t width) {
    return vectors(uid, at, n, width, {n * p.a.heads * width, p.a.heads * width, width});
  }
  // One f32 for each query.
  const Descriptor& rows(Uid uid, const void* at) {
    return graph.tensor(uid, CUDNN_DATA_FLOAT, {p.batch, p.a.heads, p.a.nq, 1}, {p.a.heads * p.a.nq, p.a.nq, 1, 1},
                        cudnn::alignment(at));
  }
};

void describe_forward(Graph& graph, const Problem& p) {
  const AttentionArgs& a = p.a;
  Operands in{graph, p};
  Chain c(graph, p);
  const Descriptor &q = in.vectors(kQ, a.q, a.nq, a.d, a.qs), &k = in.transposed(kK, a.k, a.nk, a.d, a.ks),
                   &v = in.vectors(kV, a.v, a.nk, a.dv, a.vs), &o = in.contiguous(kO, a.o, a.nq, a.dv),
                   &lse = in.rows(kLse, a.lse), &scale = graph.number(kScale);
  const Descriptor& scores = c.apply(CUDNN_POINTWISE_MUL, c.scores(q, k), &scale);
  const Descriptor& most = c.reduce(CUDNN_REDUCE_TENSOR_MAX, scores);
  const Descriptor& weights = c.apply(CUDNN_POINTWISE_EXP, c.apply(CUDNN_POINTWISE_SUB, scores, &most));
  const Descriptor& sum = c.reduce(CUDNN_REDUCE_TENSOR_ADD, weights);
  const Descriptor& log = c.rows(CUDNN_POINTWISE_LOG, sum);
  graph.pointwise(CUDNN_POINTWISE_ADD, most, &log, lse);
  c.matmul(c.rounded(CUDNN_POINTWISE_DIV, weights, &sum), v, o);
}

// delta = rowsum(do o), P = exp(scale q k^T - lse), dv = P^T do, dS = (do v^T - delta) P scale, dk = dS^T q, dq = dS k.
void describe_backward(Graph& graph, const Problem& p) {
  const AttentionArgs& a = p.a;
  const AttentionGradArgs& g = *p.g;
  Operands in{graph, p};
  Chain c(graph, p);
  const Descriptor &q = in.vectors(kQ, a.q, a.nq, a.d, a.qs), &k = in.transposed(kK, a.k, a.nk, a.d, a.ks),
                   &v = in.transposed(kV, a.v, a.nk, a.dv, a.vs), &o = in.contiguous(kO, a.o, a.nq, a.dv),
                   &lse = in.rows(kLse, a.lse), &d_o = in.contiguous(kDo, g.d_o, a.nq, a.dv),
                   &delta = in.rows(kDelta, g.delta), &dq = in.contiguous(kDq, g.dq, a.nq, a.d),
                   &dk = in.contiguous(kDk, g.dk, a.nk, a.d), &dv = in.contiguous(kDv, g.dv, a.nk, a.dv),
                   &scale = graph.number(kScale), &one = graph.number(kOne);
  c.row_products(d_o, o, a.dv, one, delta);
  const Descriptor& scores = c.apply(CUDNN_POINTWISE_MUL, c.scores(q, k), &scale);
  const Descriptor& shares = c.apply(CUDNN_POINTWISE_EXP, c.apply(CUDNN_POINTWISE_SUB, scores, &lse));
  c.matmul(c.transposed(shares), d_o, dv);
  const Descriptor& rest = c.apply(CUDNN_POINTWISE_SUB, c.scores(d_o, v), &delta);
  const Descriptor& ds = c.apply(CUDNN_POINTWISE_MUL, c.apply(CUDNN_POINTWISE_MUL, rest, &shares), &scale);
  c.matmul(c.transposed(ds), q, dk);
  c.matmul(ds, c.reshape(k, {p.batch, a.heads, a.nk, a.d}, {a.ks[0], a.ks[2], a.ks[1], 1}), dq);
}

void describe(Graph& graph, const void* problem) {
  const auto& p = *static_cast<const Problem*>(problem);
  p.g ? describe_backward(graph, p) : describe_forward(graph, p);
}

bool plain(const AttentionArgs& a, std::int64_t items) {
  return items > 0 && a.nq > 0 && a.nk > 0 && a.dtype != f32 && !a.causal && !a.bias;
}

// The images that one call of the backward takes: dS, 16-bit, lies in the workspace in tiles of 64 x 128. None: 0.
std::int64_t images_at_once(const AttentionArgs& a, std::int64_t batch) {
  constexpr std::int64_t kRoom = static_cast<std::int64_t>(gpu::kWorkspace) - 4096;  // beside cuDNN's own few bytes
  const std::int64_t image = a.heads * ((a.nq + 63) / 64 * 64) * ((a.nk + 127) / 128 * 128) * 2, most = kRoom / image;
  if (most == 0) return 0;
  const std::int64_t calls = (batch + most - 1) / most;
  return (batch + calls - 1) / calls;
}

const void* past(const void* p, std::int64_t elements, std::int64_t bytes) {
  return static_cast<const char*>(p) + elements * bytes;
}
void* past(void* p, std::int64_t elements, std::int64_t bytes) { return static_cast<char*>(p) + elements * bytes; }

// The same from image `first` on.
AttentionGradArgs from_image(AttentionGradArgs g, std::int64_t first) {
  constexpr std::int64_t kHalf = 2, kFloat = 4;
  AttentionArgs& a = g.forward;
  const std::int64_t queries = first * a.nq * a.heads, keys = first * a.nk * a.heads;
  a.q = past(a.q, first * a.qs[0], kHalf), a.k = past(a.k, first * a.ks[0], kHalf);
  a.v = past(a.v, first * a.vs[0], kHalf), a.o = past(a.o, queries * a.dv, kHalf);
  a.lse = past(a.lse, queries, kFloat);
  g.d_o = past(g.d_o, queries * a.dv, kHalf), g.delta = past(g.delta, queries, kFloat);
  g.dq = past(g.dq, queries * a.d, kHalf), g.dk = past(g.dk, keys * a.d, kHalf), g.dv = past(g.dv, keys * a.dv, kHalf);
  return g;
}

bool run_backward(const AttentionGradArgs& g, std::int64_t batch, void* stream) {
  const AttentionArgs& a = g.forward;
  const Problem p{a, batch, &g};
  const float scale = static_cast<float>(a.scale), one = 1;
  return cudnn::run("attention_backward", key_of(p), describe, &p,
                    {{kQ, a.q}, {kK, a.k}, {kV, a.v}, {kO, a.o}, {kLse, a.lse}, {kDo, g.d_o}, {kDelta, g.delta},
                     {kDq, g.dq}, {kDk, g.dk}, {kDv, g.dv}, {kScale, &scale}, {kOne, &one}},
                    stream);
}

}  // namespace

bool cudnn_attention(const AttentionArgs& a, std::int64_t items, void* stream) {
  if (!cudnn::on() || !plain(a, items)) return false;
  const Problem p{a, items / a.heads};
  const float scale = static_cast<float>(a.scale);
  return cudnn::run("attention", key_of(p), describe, &p,
                    {{kQ, a.q}, {kK, a.k}, {kV, a.v}, {kO, a.o}, {kLse, a.lse}, {kScale, &scale}}, stream);
}

bool cudnn_attention_backward(const AttentionGradArgs& g, std::int64_t items, void* stream) {
  const AttentionArgs& a = g.forward;
  if (!cudnn::on() || !plain(a, items) || g.dlse || g.dbias || !g.dq || !g.dk || !g.dv) return false;
  const std::int64_t batch = items / a.heads, step = images_at_once(a, batch);
  if (step == 0) return false;
  for (std::int64_t first = 0; first < batch; first += step)
    if (!run_backward(from_image(g, first), std::min(step, batch - first), stream)) return false;
  return true;
}

}  // namespace capo::kernels
