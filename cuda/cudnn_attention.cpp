// Attention by cuDNN: forward with the log-sum-exp, of 16-bit elements, neither causal nor with a bias. The backward is
// ours and reads the same o and lse.
// Not on the shim: cuDNN runs on a card alone; attention.cu's own kernels, on which every sample runs, take its place.
//
// The graph is the formula, in the order that cuDNN's engines look for; axes are B H N D whatever their order in memory.
#include <capo/cuda/cudnn.h>
#include <capo/cuda/cudnn_graph.h>

namespace capo::kernels {
namespace {

using cudnn::Descriptor;
using cudnn::Graph;
using Sizes = std::vector<std::int64_t>;

enum Uid : std::int64_t { kQ = 1, kK, kV, kO, kLse, kScale };
constexpr std::int64_t kForward = 100;  // the kind of problem, beside the convolutions'

struct Problem {
  const AttentionArgs& a;
  std::int64_t batch;
};

cudnn::Key key_of(const Problem& p) {
  const AttentionArgs& a = p.a;
  cudnn::Key k{kForward, static_cast<std::int64_t>(a.dtype), p.batch, a.heads, a.nq, a.nk, a.d, a.dv};
  std::size_t at = 8;
  for (const auto* strides : {&a.qs, &a.ks, &a.vs})
    for (const auto s : *strides) k[at++] = s;
  for (const void* x : {a.q, a.k, a.v, static_cast<const void*>(a.o), static_cast<const void*>(a.lse)})
    k[at++] = cudnn::alignment(x);
  return k;
}

// Adds operations on [B, H, Nq, ..] tensors that stay inside the kernel.
class Chain {
 public:
  Chain(Graph& graph, Sizes scores) : graph_(graph), scores_(std::move(scores)), rows_(scores_) { rows_[3] = 1; }

  const Descriptor& scores(cudnnDataType_t type) { return hidden(type, scores_); }
  const Descriptor& rows() { return hidden(CUDNN_DATA_FLOAT, rows_); }

  void matmul(const Descriptor& a, const Descriptor& b, const Descriptor& c) {
    Descriptor d(CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    d.set(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_DATA_FLOAT);
    const Descriptor& product = graph_.part(std::move(d));
    Descriptor op(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, c);
    op.set(CUDNN_ATTR_OPERATION_MATMUL_DESC, product);
    graph_.operation(std::move(op));
  }
  // y = x mode b, or mode of x.
  const Descriptor& pointwise(cudnnPointwiseMode_t mode, const Descriptor& x, const Descriptor* b,
                              const Descriptor& y) {
    Descriptor d(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    d.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    d.set(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_DATA_FLOAT);
    const Descriptor& what = graph_.part(std::move(d));
    Descriptor op(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    op.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, what);
    op.set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    if (b) op.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, *b);
    op.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
    graph_.operation(std::move(op));
    return y;
  }
  const Descriptor& reduce(cudnnReduceTensorOp_t how, const Descriptor& x) {
    Descriptor d(CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    d.set(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &how);
    d.set(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_DATA_FLOAT);
    const Descriptor& what = graph_.part(std::move(d));
    const Descriptor& y = rows();
    Descriptor op(CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
    op.set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, what);
    op.set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
    op.set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y);
    graph_.operation(std::move(op));
    return y;
  }

 private:
  const Descriptor& hidden(cudnnDataType_t type, const Sizes& n) {
    return graph_.tensor(next_++, type, n, {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1}, 0);
  }
  Graph& graph_;
  Sizes scores_, rows_;
  std::int64_t next_ = 100;
};

void describe(Graph& graph, const Problem& p) {
  const AttentionArgs& a = p.a;
  const cudnnDataType_t type = cudnn::type_of(a.dtype);
  const std::int64_t b = p.batch, h = a.heads;
  const Descriptor& q =
      graph.tensor(kQ, type, {b, h, a.nq, a.d}, {a.qs[0], a.qs[2], a.qs[1], 1}, cudnn::alignment(a.q));
  const Descriptor& k =
      graph.tensor(kK, type, {b, h, a.d, a.nk}, {a.ks[0], a.ks[2], 1, a.ks[1]}, cudnn::alignment(a.k));
  const Descriptor& v =
      graph.tensor(kV, type, {b, h, a.nk, a.dv}, {a.vs[0], a.vs[2], a.vs[1], 1}, cudnn::alignment(a.v));
  const Descriptor& o =
      graph.tensor(kO, type, {b, h, a.nq, a.dv}, {a.nq * h * a.dv, a.dv, h * a.dv, 1}, cudnn::alignment(a.o));
  const Descriptor& lse =
      graph.tensor(kLse, CUDNN_DATA_FLOAT, {b, h, a.nq, 1}, {h * a.nq, a.nq, 1, 1}, cudnn::alignment(a.lse));
  const Descriptor& scale = graph.number(kScale);
  Chain c(graph, {b, h, a.nq, a.nk});
  const Descriptor& product = c.scores(CUDNN_DATA_FLOAT);
  c.matmul(q, k, product);
  const Descriptor& scores = c.pointwise(CUDNN_POINTWISE_MUL, product, &scale, c.scores(CUDNN_DATA_FLOAT));
  const Descriptor& most = c.reduce(CUDNN_REDUCE_TENSOR_MAX, scores);
  const Descriptor& below = c.pointwise(CUDNN_POINTWISE_SUB, scores, &most, c.scores(CUDNN_DATA_FLOAT));
  const Descriptor& weights = c.pointwise(CUDNN_POINTWISE_EXP, below, nullptr, c.scores(CUDNN_DATA_FLOAT));
  const Descriptor& sum = c.reduce(CUDNN_REDUCE_TENSOR_ADD, weights);
  const Descriptor& log = c.pointwise(CUDNN_POINTWISE_LOG, sum, nullptr, c.rows());
  c.pointwise(CUDNN_POINTWISE_ADD, most, &log, lse);
  const Descriptor& shares = c.pointwise(CUDNN_POINTWISE_DIV, weights, &sum, c.scores(type));
  c.matmul(shares, v, o);
}
void describe_any(Graph& graph, const void* problem) { describe(graph, *static_cast<const Problem*>(problem)); }

bool plain(const AttentionArgs& a, std::int64_t items) {
  return items > 0 && a.nq > 0 && a.nk > 0 && a.dtype != f32 && !a.causal && !a.bias;
}

}  // namespace

bool cudnn_attention(const AttentionArgs& a, std::int64_t items, void* stream) {
  if (!cudnn::on() || !plain(a, items)) return false;
  const Problem p{a, items / a.heads};
  const float scale = static_cast<float>(a.scale);
  return cudnn::run("attention", key_of(p), describe_any, &p,
                    {{kQ, a.q}, {kK, a.k}, {kV, a.v}, {kO, a.o}, {kLse, a.lse}, {kScale, &scale}}, stream);
}

}  // namespace capo::kernels
