// Convolutions by cuDNN: forward, data gradient (conv_transpose is one) and weight gradient, 1 to 3 axes, any groups.
// Not on the shim: cuDNN runs on a card alone; conv.cu's own kernels, on which every sample runs, take its place.
//
// cuDNN names axes N C D H W whatever their order in memory: sizes in that order, strides channels-last. A filter is
// K C/g D H W, ours [K, D, H, W, C/g].
//
// A bias joins the convolution's graph, before the only rounding. Where no engine fuses it, f32 adds it in a second
// pass; the halves, which that would round twice, go to our own kernel.
#include <capo/cuda/cudnn.h>
#include <capo/cuda/cudnn_graph.h>
#include <capo/cuda/gemm.h>
#include <capo/engine/error.h>

#include <algorithm>
#include <optional>
#include <tuple>

namespace capo::kernels {
namespace {

using cudnn::Descriptor;
using cudnn::Graph;
using Sizes = std::vector<std::int64_t>;

enum Kind : std::int64_t { kForward, kDataGradient, kWeightGradient };
enum Uid : std::int64_t { kX = 1, kW, kY, kBias, kSum };

// What is contiguous and channels-last, of sizes N C spatial..
Sizes channels_last(const Sizes& n) {
  Sizes s(n.size());
  std::int64_t step = n[1];
  s[1] = 1;
  for (std::size_t a = n.size() - 1; a >= 2; --a) {
    s[a] = step;
    step *= n[a];
  }
  s[0] = step;
  return s;
}

// The spatial axes that cuDNN sees: 2 or 3.
int axes_of(const ConvGeometry& g) { return g.spatial == 3 ? 3 : 2; }
Sizes last(const std::int64_t (&values)[3], int axes) { return {values + 3 - axes, values + 3}; }
Sizes sizes(std::int64_t n, std::int64_t c, const std::int64_t (&spatial)[3], int axes) {
  Sizes s{n, c};
  for (const auto v : last(spatial, axes)) s.push_back(v);
  return s;
}

// Padding behind an axis: as before it where that gives the output's size, since more engines take that; else what the
// last window needs. Nothing where no padding does.
std::optional<std::int64_t> pad_after(const ConvGeometry& g, int a) {
  const std::int64_t used = (g.out[a] - 1) * g.stride[a] + g.dilation[a] * (g.kernel[a] - 1) + 1;
  for (const std::int64_t pad : {g.pad[a], std::max<std::int64_t>(used - g.in[a] - g.pad[a], 0)}) {
    const std::int64_t rest = g.in[a] + g.pad[a] + pad - used;
    if (rest >= 0 && rest < g.stride[a]) return pad;
  }
  return {};
}

// Three operands of one convolution, whatever is its result.
struct Problem {
  Kind kind;
  const ConvGeometry& g;
  DType dtype;
  const void *x, *w, *y, *bias;
  Sizes after;

  static std::optional<Problem> of(Kind kind, const ConvGeometry& g, DType dtype, const void* x, const void* w,
                                   const void* y, const void* bias) {
    if (g.batch == 0) return {};
    Problem p{kind, g, dtype, x, w, y, bias, {}};
    for (int a = 3 - axes_of(g); a < 3; ++a) {
      const auto pad = pad_after(g, a);
      if (!pad) return {};
      p.after.push_back(*pad);
    }
    return p;
  }

  cudnn::Key key() const {
    cudnn::Key k{kind, static_cast<std::int64_t>(dtype), g.spatial, g.batch, g.groups, g.cin, g.cout};
    std::size_t at = 7;
    for (const auto* values : {&g.in, &g.out, &g.kernel, &g.stride, &g.pad, &g.dilation})
      for (const auto v : *values) k[at++] = v;
    for (const void* p : {x, w, y}) k[at++] = cudnn::alignment(p);
    k[at] = bias ? cudnn::alignment(bias) : 0;
    static_assert(7 + 6 * 3 + 4 <= std::tuple_size_v<cudnn::Key>);
    return k;
  }
};

const Descriptor& convolution(Graph& graph, const Problem& p) {
  const int axes = axes_of(p.g);
  const cudnnConvolutionMode_t mode = CUDNN_CROSS_CORRELATION;
  Descriptor d(CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR);
  d.set(CUDNN_ATTR_CONVOLUTION_COMP_TYPE, CUDNN_DATA_FLOAT);
  d.set(CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_TYPE_CONVOLUTION_MODE, 1, &mode);
  d.set(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, std::int64_t{axes});
  d.set(CUDNN_ATTR_CONVOLUTION_DILATIONS, last(p.g.dilation, axes));
  d.set(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, last(p.g.stride, axes));
  d.set(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, last(p.g.pad, axes));
  d.set(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, p.after);
  return graph.part(std::move(d));
}

// result = sum + bias
void add_bias(Graph& graph, const Problem& p, const Descriptor& sum, const Descriptor& result, std::int64_t channels,
              std::size_t rank) {
  Sizes one(rank, 1);
  one[1] = channels;
  const Descriptor& bias =
      graph.tensor(kBias, cudnn::type_of(p.dtype), one, channels_last(one), cudnn::alignment(p.bias));
  graph.pointwise(CUDNN_POINTWISE_ADD, sum, &bias, result);
}

struct Names {
  cudnnBackendDescriptorType_t operation;
  cudnnBackendAttributeName_t convolution, x, w, y, alpha, beta;
};
Names names_of(Kind kind) {
  if (kind == kForward)
    return {CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
            CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
            CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X,
            CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
            CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y,
            CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
            CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA};
  if (kind == kDataGradient)
    return {CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA};
  return {CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
          CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
          CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
          CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
          CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
          CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
          CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA};
}

void describe(Graph& graph, const Problem& p) {
  const ConvGeometry& g = p.g;
  const int axes = axes_of(g);
  const cudnnDataType_t type = cudnn::type_of(p.dtype);
  graph.tensor_cores = p.dtype != f32;
  const auto tensor = [&](Uid uid, const Sizes& n, const void* at) -> const Descriptor& {
    return graph.tensor(uid, type, n, channels_last(n), cudnn::alignment(at));
  };
  const Sizes nx = sizes(g.batch, g.groups * g.cin, g.in, axes), ny = sizes(g.batch, g.groups * g.cout, g.out, axes);
  const Descriptor &x = tensor(kX, nx, p.x), &w = tensor(kW, sizes(g.groups * g.cout, g.cin, g.kernel, axes), p.w),
                   &y = tensor(kY, ny, p.y);
  const Sizes& result = p.kind == kForward ? ny : nx;
  const Descriptor* sum = nullptr;  // the result before the bias
  if (p.bias) sum = &graph.tensor(kSum, CUDNN_DATA_FLOAT, result, channels_last(result), 0);

  const Names names = names_of(p.kind);
  const float one = 1, zero = 0;
  const Descriptor& conv = convolution(graph, p);
  Descriptor op(names.operation);
  op.set(names.convolution, conv);
  op.set(names.x, sum && p.kind == kDataGradient ? *sum : x);
  op.set(names.w, w);
  op.set(names.y, sum && p.kind == kForward ? *sum : y);
  op.set(names.alpha, CUDNN_TYPE_FLOAT, 1, &one);
  op.set(names.beta, CUDNN_TYPE_FLOAT, 1, &zero);
  graph.operation(std::move(op));
  if (sum) add_bias(graph, p, *sum, p.kind == kForward ? y : x, result[1], result.size());
}

bool run(const char* op, const std::optional<Problem>& p, void* stream) {
  if (!p) return false;
  const cudnn::Describe graph = [](Graph& to, const void* problem) {
    describe(to, *static_cast<const Problem*>(problem));
  };
  if (!p->bias) return cudnn::run(op, p->key(), graph, &*p, {{kX, p->x}, {kW, p->w}, {kY, p->y}}, stream);
  return cudnn::run(op, p->key(), graph, &*p, {{kX, p->x}, {kW, p->w}, {kY, p->y}, {kBias, p->bias}}, stream);
}

}  // namespace

bool cudnn_conv(const ConvDirectArgs& a, void* stream) {
  if (!cudnn::on()) return false;
  const char* const op = a.transposed ? "conv_data_gradient" : "conv";
  const Kind kind = a.transposed ? kDataGradient : kForward;
  const void *const x = a.transposed ? a.result : a.source, *const y = a.transposed ? a.source : a.result;
  if (run(op, Problem::of(kind, a.g, a.dtype, x, a.w, y, a.bias), stream)) return true;
  if (!a.bias || a.dtype != f32 || !run(op, Problem::of(kind, a.g, a.dtype, x, a.w, y, nullptr), stream)) return false;
  const std::int64_t* const result = a.transposed ? a.g.in : a.g.out;
  const std::int64_t rows = a.g.batch * result[0] * result[1] * result[2],
                     channels = a.g.groups * (a.transposed ? a.g.cin : a.g.cout);
  gemm_finish_cuda({f32, f32, a.result, a.bias, nullptr, a.result, Activation::none, 1, rows, channels, nullptr,
                    channels},
                   stream);
  return true;
}

bool cudnn_conv_weight_gradient(const ConvWeightPartsArgs& a, void* stream) {
  return cudnn::on() &&
         run("conv_weight_gradient", Problem::of(kWeightGradient, a.g, a.dtype, a.x, a.dw, a.dy, nullptr), stream);
}

}  // namespace capo::kernels
