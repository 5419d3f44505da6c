// Convolution over 1, 2 or 3 spatial axes, channels last.
//
//   x     [B, spatial.., Cin]
//   w     [Cout, kernel.., Cin / groups]        conv            (OHWI: PyTorch's [Cout, Cin / groups, k..] moved)
//         [Cin, kernel.., Cout / groups]        conv_transpose  (the layout of the conv whose data gradient it is)
//   bias  [Cout] or undefined
//   y     [B, out.., Cout], contiguous
//
// conv may be followed, before y is written, by the shortcut and the activation of a residual network:
// act(conv + residual).
//   act       none or relu; ceiling: relu's greatest value where that is not 0 (relu6: 6)
//   residual  y's shape, dtype and device, any strides; or undefined (zeros)
//
// As in PyTorch it is a cross-correlation, and groups split the channels of x and y into consecutive parts.
// groups = Cin = Cout is depthwise and has its own kernels.
//
// dtypes  x, w, bias equal: f32, f64; bf16 and f16 summed in f32 (CUDA: no f64). Mixed dtypes and devices throw.
//         On the CPU 16-bit tensors are widened as they are copied beside the product and results rounded once: the
//         bits of the f32 op between two casts. Whole tensors are cast for weight gradients along lines of more than
//         1,024 positions (not depthwise), for depthwise kernels of more than 1,024 elements, and where a residual or
//         an activation follows and a gradient is needed.
// errors  ranks and channels that do not match, stride or dilation < 1, padding < 0, a kernel larger than the padded x;
//         another activation, a ceiling below 0 or without relu, a residual unlike y.
// grad    x, w and bias, of any order: the gradients are made of conv, conv_transpose and conv_weight_gradient, all
//         recorded. Keeps x only when w needs a gradient, w only when x does. Residual and activation are recorded as
//         add, relu and clamp; where nothing needs a gradient, on the CPU, they join the convolution's own pass.
// bits    sums are cut by shape only: the same for any thread count. In f32 and f64 those of conv, add and activation
//         one after the other, but for the sign of a zero; on the CPU 16-bit values are rounded once, at the end. On
//         the CPU groups of at most 8 channels are multiplied side by side, zeros between them: a NaN or infinity in
//         one reaches its neighbours' results.
#pragma once

#include <capo/engine/tensor.h>
#include <capo/ops/activation.h>

namespace capo {

// Each Dims is empty (the default), has one entry for all spatial axes, or one entry per axis.
struct ConvOptions {
  Dims stride = {};      // 1
  Dims pad_before = {};  // 0: zeros before each axis ..
  Dims pad_after = {};   // .. and after it; empty means as before
  Dims dilation = {};    // 1
  int groups = 1;
  Dims output_padding = {};  // conv_transpose only: 0; < max(stride, dilation)
};

// out = floor((in + pad_before + pad_after - dilation (k - 1) - 1) / stride) + 1
//   Tensor y = conv2d(image, weight, {}, {.stride = {2}, .pad_before = {1}});  // [B, 32, 32, 3] -> [B, 16, 16, 64]
Tensor conv(const Tensor& x, const Tensor& w, const Tensor& bias = {}, const ConvOptions& options = {},
            Activation activation = Activation::none, const Tensor& residual = {}, double ceiling = 0);

// The adjoint of conv: out = (in - 1) stride - pad_before - pad_after + dilation (k - 1) + 1 + output_padding
Tensor conv_transpose(const Tensor& x, const Tensor& w, const Tensor& bias = {}, const ConvOptions& options = {});

// The same with the rank of x checked: [B, L, C], [B, H, W, C], [B, D, H, W, C].
Tensor conv1d(const Tensor& x, const Tensor& w, const Tensor& bias = {}, const ConvOptions& options = {});
Tensor conv2d(const Tensor& x, const Tensor& w, const Tensor& bias = {}, const ConvOptions& options = {});
Tensor conv3d(const Tensor& x, const Tensor& w, const Tensor& bias = {}, const ConvOptions& options = {});

// ---- What the kernels see. Fewer than three spatial axes are padded in front with size 1, kernel 1, stride 1.

// The linear map of one convolution, whichever way it is applied: `in` and `cin` belong to the conv's x, `out` and
// `cout` to its y; channel counts are per group.
struct ConvGeometry {
  int spatial;  // axes that the user sees
  std::int64_t batch, groups, cin, cout;
  std::int64_t in[3], out[3], kernel[3], stride[3], pad[3], dilation[3];  // pad: before
};

// No im2col matrix on the CPU: a tile of positions times a panel of weights, its rows found through pointers into the
// source, or, of few channels, into copies of the lines that the tile reads (ops/cpu/conv.cpp).
// Forward (transposed = false) reads x and writes y; transposed reads something shaped like y and writes like x. In
// both each result position gathers its sources. A transposed result is cut into phases by its position modulo the
// stride: inside a phase the taps that count are the same for all positions, and consecutive ones read consecutive
// sources.
struct ConvArgs {
  ConvGeometry g;
  DType dtype;
  bool transposed;
  const void* source;
  const void* packed;  // by conv_pack
  const void* bias;    // of the result's channels, or null
  void* result;
  std::int64_t tiles;          // of `tile` positions in the largest phase; depthwise: lines in it
  std::int64_t tile, columns;  // of one item: positions, at most kConvTile; result channels, a multiple of 64
  bool ends;                   // then results are min(max(sum + residual, low), high), NaN passing
  const void* residual;        // laid out like the result, or null
  double low, high;
  bool far, streamed;          // the result is larger than what one core's cache holds; than what all of them do
};
inline constexpr std::int64_t kConvTile = 96;
inline constexpr std::int64_t kConvHalfColumns = 512;  // at most of a 16-bit result: the sums lie beside it
inline constexpr int kConvHalfTaps = 1024;             // at most of a 16-bit depthwise convolution

// packed: the weights as GEMM panels, per (group, phase), then zeros for as many channels as a group of the source has,
// which stand for its padding; depthwise: [taps, channels].
// Items: conv: group x phase x panels of 64 columns; depthwise: 1.
struct ConvPackArgs {
  ConvGeometry g;
  DType dtype;
  bool transposed;
  const void* w;
  void* packed;
  std::int64_t tile;    // as ConvArgs
  std::int64_t merged;  // each group of g stands for so many, whose weights lie in w one after the other
};

// dw = sum over positions of y's gradient x the sources under each tap. Positions are cut into `chunks`, each summed to
// its own plane; conv_join adds the planes in order.
//   conv_weight_gradient            planes [cout * groups, taps, cin]; items: chunk x group x blocks of `rows` channels
//                                   of y x blocks of `columns` (tap, cin) columns
//   conv_weight_gradient_few        planes [groups, taps, cin, cout]; items: chunk x group. For cin < kConvFew, cout a
//                                   multiple of 16, no dilation of the last axis, lines that fit into kConvWindow
//   conv_weight_gradient_lines      as the first, chunks of lines; `columns`: channels of x, each under every tap. For
//                                   cin a multiple of 16
//   conv_depthwise_weight_gradient  planes [taps, channels]; items: chunk
struct ConvWeightArgs {
  ConvGeometry g;
  DType dtype;
  const void *x, *dy;
  void* planes;                // f32 (f64 for f64)
  std::int64_t chunks, chunk;  // positions per chunk; few, lines and depthwise: lines of the last spatial axis
  std::int64_t rows, columns;  // columns: a multiple of 64, at most kConvColumns (lines: as many as cin)
};
inline constexpr std::int64_t kConvColumns = 256;
inline constexpr std::int64_t kConvFew = 48;           // channels: fewer are read from copies of the source lines
inline constexpr std::int64_t kConvWindow = 1 << 18;  // bytes of these copies
inline constexpr std::int64_t kConvHalfLine = 1024;    // positions of 16-bit lines that few and lines take at most
// Items: elements of a plane.
struct ConvJoinArgs {
  DType dtype;
  bool turned;  // planes [groups, taps, cin, cout], else [groups, cout, taps, cin]; `merged` groups as one
  const void* planes;
  void* dw;
  std::int64_t chunks, plane;
  std::int64_t taps, cin, cout, merged;  // of dw [groups, cout, taps, cin]; of a depthwise conv cout is its channels
};

// ---- CUDA: nothing packed.

// As ConvArgs. Items: elements of the result.
struct ConvDirectArgs {
  ConvGeometry g;
  DType dtype;
  bool transposed;
  const void *source, *w, *bias;
  void* result;
  // A long sum over few positions goes in chunks of `chunk` (tap, channel) pairs, whose f32 parts [chunks, result] are
  // added in order; null: chunks is 1.
  float* parts;
  std::int64_t chunks, chunk;
};
// As ConvWeightArgs; the parts are f32, and dw is their sum. Items: elements of dw.
// tile: output channels and (tap, input channel) columns of a block, kConvCudaTile or, of 16-bit elements, twice that.
struct ConvWeightPartsArgs {
  ConvGeometry g;
  DType dtype;
  const void *x, *dy;
  float* parts;
  void* dw;
  std::int64_t chunks, chunk, tile;
};
inline constexpr std::int64_t kConvCudaTile = 64;

}  // namespace capo
