#include <capo/autograd/autograd.h>
#include <capo/ops/args.h>
#include <capo/ops/binary.h>
#include <capo/ops/conv.h>
#include <capo/ops/conv_sum_internal.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/reduce.h>
#include <capo/ops/streaming_internal.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

#include <algorithm>
#include <limits>

namespace capo {

namespace {
// The same for the map, its transpose and the weights' gradient. Taps on padding count, and of merged groups the zeros
// between them: the kernels multiply both.
Work geometry_work(const ConvGeometry& g) {
  std::int64_t n = 2 * g.batch * g.groups * g.cin * g.cout;
  for (int a = 0; a < 3; ++a) n *= g.out[a] * g.kernel[a];
  return Work::computed(n);
}
Work conv_work(const ConvArgs& p, std::int64_t) { return geometry_work(p.g); }
Work weight_work(const ConvWeightArgs& p, std::int64_t) { return geometry_work(p.g); }
Work direct_work(const ConvDirectArgs& p, std::int64_t) { return geometry_work(p.g); }
Work weight_parts_work(const ConvWeightPartsArgs& p, std::int64_t) { return geometry_work(p.g); }
Work pack_work(const ConvPackArgs& p, std::int64_t) {
  const ConvGeometry& g = p.g;
  return Work::moved(2 * bytes_of(p.dtype, g.groups * g.cout * g.cin * g.kernel[0] * g.kernel[1] * g.kernel[2]));
}
Work join_work(const ConvJoinArgs& p, std::int64_t) { return Work::moved(bytes_of(p.dtype, (p.chunks + 1) * p.plane)); }
}  // namespace

CAPO_KERNEL(conv_pack, ConvPackArgs, pack_work)
CAPO_KERNEL(conv, ConvArgs, conv_work)
CAPO_KERNEL(conv_depthwise_pack, ConvPackArgs, pack_work)
CAPO_KERNEL(conv_depthwise, ConvArgs, conv_work)
CAPO_KERNEL(conv_weight_gradient, ConvWeightArgs, weight_work)
CAPO_KERNEL(conv_weight_gradient_few, ConvWeightArgs, weight_work)
CAPO_KERNEL(conv_weight_gradient_lines, ConvWeightArgs, weight_work)
CAPO_KERNEL(conv_depthwise_weight_gradient, ConvWeightArgs, weight_work)
CAPO_KERNEL(conv_join, ConvJoinArgs, join_work)
CAPO_KERNEL_CUDA_ONLY(conv_direct, ConvDirectArgs, direct_work)
CAPO_KERNEL_CUDA_ONLY(conv_weight_parts, ConvWeightPartsArgs, weight_parts_work)

namespace {

using Geometry = ConvGeometry;

bool is_depthwise(const Geometry& g) { return g.groups > 1 && g.cin == 1 && g.cout == 1; }
std::int64_t taps_of(const Geometry& g) { return g.kernel[0] * g.kernel[1] * g.kernel[2]; }

Shape image_shape(const Geometry& g, const std::int64_t* sizes, std::int64_t channels) {
  Shape s{g.batch};
  for (int a = 3 - g.spatial; a < 3; ++a) s.push_back(sizes[a]);
  s.push_back(channels);
  return s;
}
Shape x_shape(const Geometry& g) { return image_shape(g, g.in, g.groups * g.cin); }
Shape y_shape(const Geometry& g) { return image_shape(g, g.out, g.groups * g.cout); }
Shape w_shape(const Geometry& g) {
  Shape s{g.groups * g.cout};
  for (int a = 3 - g.spatial; a < 3; ++a) s.push_back(g.kernel[a]);
  s.push_back(g.cin);
  return s;
}

// Chunks of items of `cost` multiply-adds each: enough work to hide a fork.
std::int64_t grain_for(std::int64_t cost) { return 1 + (std::int64_t{1} << 20) / (cost + 1); }

// How many positions the largest phase of the result has, and how many lines of the last axis.
struct Extent {
  std::int64_t phases, lines, positions;
};
Extent extent_of(const Geometry& g, bool transposed) {
  Extent e{1, g.batch, g.batch};
  for (int a = 0; a < 3; ++a) {
    const std::int64_t result = transposed ? (g.in[a] + g.stride[a] - 1) / g.stride[a] : g.out[a];
    if (transposed) e.phases *= g.stride[a];
    if (a < 2) e.lines *= result;
    e.positions *= result;
  }
  return e;
}

// Groups of few channels are multiplied side by side, as one group with zeros between them: a vector's worth at a time.
std::int64_t merged_groups(const Geometry& g, DType dtype) {
  const std::int64_t channels = std::max(g.cin, g.cout), vector = dtype == f64 ? 8 : 16;
  for (std::int64_t m = std::min(vector / channels, g.groups); m > 1; --m)
    if (g.groups % m == 0) return m;
  return 1;
}
Geometry merge(Geometry g, std::int64_t m) {
  g.groups /= m, g.cin *= m, g.cout *= m;
  return g;
}

// Whether apply_dense writes every result only once.
bool sums_at_once(const Geometry& one, bool transposed, DType dtype) {
  const Geometry g = merge(one, merged_groups(one, dtype));
  const std::int64_t taps = taps_of(g), depth = transposed ? g.cout : g.cin;
  return taps <= kConvSegments && bytes_of(accumulator(dtype), taps * depth) <= kConvLongest;
}

// What happens to a sum before it is stored.
struct End {
  Activation activation = Activation::none;
  Tensor residual = {};
  double ceiling = 0;
  bool in_place = false;  // the result is the residual's storage; only what sums_at_once()
  bool any() const { return activation != Activation::none || residual.defined(); }
};

Tensor ended(const Tensor& x, const End& end) {
  const Tensor y = end.residual.defined() ? x + end.residual : x;
  if (end.activation == Activation::none) return y;
  return end.ceiling > 0 ? clamp(y, 0, end.ceiling) : relu(y);
}

void set_end(ConvArgs& p, const End& end) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  p.ends = end.any();
  p.residual = data_or_null(end.residual);
  p.low = end.activation == Activation::relu ? 0 : -kInfinity;
  p.high = end.ceiling > 0 ? end.ceiling : kInfinity;
}
bool is_far(const Tensor& y) { return bytes_of(y.dtype(), y.numel()) > (8 << 20); }
bool is_streamed(const Tensor& y) { return bytes_of(y.dtype(), y.numel()) >= kStreamed; }

Tensor apply_depthwise(const Geometry& g, bool transposed, const Tensor& source, const Tensor& w, const Tensor& bias,
                       const End& end, const Tensor& y) {
  const std::int64_t taps = taps_of(g);
  const Tensor packed = empty({taps, g.groups}, accumulator(source.dtype()), source.device());
  if (y.device().is_meta() || y.numel() == 0) return y;
  const Extent e = extent_of(g, transposed);
  const ConvPackArgs pack{g, source.dtype(), transposed, w.data(), packed.data(), 0, 1};
  ConvArgs args{g,        source.dtype(), transposed, source.data(), packed.data(), data_or_null(bias),
                y.data(), e.lines,        0,          0,             {},            {}, {}, {}, is_far(y), false};
  set_end(args, end);
  launch(kernels::conv_depthwise_pack, y.device(), pack, 1, 1);
  launch(kernels::conv_depthwise, y.device(), args, e.phases * e.lines,
         grain_for(e.positions / e.lines * g.groups * taps / e.phases * 4));
  return y;
}

Tensor apply_dense(const Geometry& one, bool transposed, const Tensor& source, const Tensor& w, const Tensor& bias,
                   const End& end, const Tensor& y) {
  const auto parts = [](std::int64_t n, std::int64_t part) { return (n + part - 1) / part; };
  const std::int64_t merged = merged_groups(one, source.dtype());
  const Geometry g = merge(one, merged);
  const std::int64_t depth = transposed ? g.cout : g.cin, n = transposed ? g.cin : g.cout, taps = taps_of(g);
  const std::int64_t padded = parts(n, 16) * 16;  // whole vectors of any instruction set
  const Tensor packed = empty({g.groups * taps * depth * padded + depth}, accumulator(source.dtype()), source.device());
  if (y.device().is_meta() || y.numel() == 0) return y;

  // Tiles of up to kConvTile positions and all columns; fewer columns when that leaves too few items for the threads.
  const Extent e = extent_of(g, transposed);
  std::int64_t tiles = parts(e.positions, kConvTile);
  const std::int64_t tile = parts(parts(e.positions, tiles), 24) * 24;
  tiles = parts(e.positions, tile);
  const std::int64_t wanted = std::min(parts(32, tiles * e.phases * g.groups), parts(n, 128));
  const std::int64_t most = is_half(source.dtype()) ? std::min(n, kConvHalfColumns) : n;
  const std::int64_t columns = parts(std::min(parts(n, wanted), most), 64) * 64, blocks = parts(n, columns);
  const ConvPackArgs pack{g, source.dtype(), transposed, w.data(), packed.data(), tile, merged};
  ConvArgs args{g,        source.dtype(), transposed, source.data(), packed.data(), data_or_null(bias),
                y.data(), tiles,          tile,       columns,       {},            {}, {}, {}, is_far(y),
                is_streamed(y) && !end.in_place};
  set_end(args, end);
  launch(kernels::conv_pack, y.device(), pack, g.groups * e.phases * parts(n, 64), 1);
  launch(kernels::conv, y.device(), args, g.groups * e.phases * blocks * tiles,
         grain_for(tile * (taps / e.phases + 1) * depth * std::min(padded, columns)));
  return y;
}

// On CUDA: how the sum over (tap, channel) is cut, by shape alone, where too few blocks of positions would fill a
// device.
struct SumCut {
  std::int64_t chunks, chunk;
};
SumCut cut_sum(const Geometry& g, bool transposed, DType dtype) {
  constexpr std::int64_t kBlocks = 256, kMinChunk = 512, kMostChunks = 32, kWhole = 64;
  const auto tiles = [](std::int64_t n, std::int64_t tile) { return (n + tile - 1) / tile; };
  const std::int64_t sum = taps_of(g) * (transposed ? g.cout : g.cin);
  const bool phases = transposed && g.stride[0] * g.stride[1] * g.stride[2] > 1;  // they cut the sum already
  const auto& result = transposed ? g.in : g.out;
  const std::int64_t positions = g.batch * result[0] * result[1] * result[2];
  const std::int64_t rows = is_half(dtype) ? 2 * kConvCudaTile : kConvCudaTile;
  const std::int64_t blocks = g.groups * tiles(positions, rows) * tiles(transposed ? g.cin : g.cout, kConvCudaTile);
  const std::int64_t wanted = blocks > 0 ? std::min({kBlocks / blocks, sum / kMinChunk, kMostChunks}) : 1;
  if (phases || is_depthwise(g) || wanted <= 1) return {1, std::max<std::int64_t>(sum, 1)};
  const std::int64_t chunk = tiles(tiles(sum, wanted), kWhole) * kWhole;
  return {tiles(sum, chunk), chunk};
}

// y from x (transposed = false), or what is shaped like x from what is shaped like y. All contiguous; bias may be
// undefined. end: on the CPU only.
Tensor apply(const Geometry& g, bool transposed, const Tensor& source, const Tensor& w, const Tensor& bias,
             const End& end = {}) {
  if (through_f32(source) && is_depthwise(g) && taps_of(g) > kConvHalfTaps) {
    const NoGrad off;
    const End wide{end.activation, cast_or_undefined(end.residual, f32), end.ceiling};
    const Tensor y = apply(g, transposed, cast(source, f32), cast(w, f32), cast_or_undefined(bias, f32), wide);
    return cast(y, source.dtype());
  }
  const Tensor y = end.in_place ? end.residual
                                : empty(transposed ? x_shape(g) : y_shape(g), source.dtype(), source.device());
  if (y.device().is_cuda()) {
    const SumCut cut = cut_sum(g, transposed, source.dtype());
    const Tensor parts = cut.chunks > 1 ? empty({cut.chunks, y.numel()}, f32, y.device()) : Tensor();
    const ConvDirectArgs direct{g, source.dtype(), transposed, source.data(), w.data(), data_or_null(bias), y.data(),
                                parts.defined() ? parts.data<float>() : nullptr, cut.chunks, cut.chunk};
    launch(kernels::conv_direct, y.device(), direct, y.numel(), 1);
    return y;
  }
  return is_depthwise(g) ? apply_depthwise(g, transposed, source, w, bias, end, y)
                         : apply_dense(g, transposed, source, w, bias, end, y);
}

// The same on CUDA: about 512 blocks, chunks of at least 256 positions, parts below 64 MB.
Tensor weight_gradient_there(const Geometry& g, const Tensor& dy, const Tensor& x) {
  const Tensor dw = empty(w_shape(g), x.dtype(), x.device());
  const bool depthwise = is_depthwise(g);
  const std::int64_t lines = g.batch * g.out[0] * g.out[1], work = depthwise ? lines : lines * g.out[2];
  const auto tiles = [](std::int64_t n, std::int64_t tile) { return (n + tile - 1) / tile; };
  const std::int64_t columns = taps_of(g) * g.cin;
  const bool broad = is_half(x.dtype()) && g.cout > kConvCudaTile && columns > kConvCudaTile;
  const std::int64_t tile = broad ? 2 * kConvCudaTile : kConvCudaTile;
  const std::int64_t blocks = depthwise ? tiles(g.groups, 32) : g.groups * tiles(g.cout, tile) * tiles(columns, tile);
  const std::int64_t unit = depthwise ? tiles(256, g.out[2]) : 256;
  std::int64_t chunks = std::min({tiles(512, blocks), tiles(work, unit), (std::int64_t{1} << 24) / (dw.numel() + 1)});
  chunks = std::max<std::int64_t>(chunks, 1);
  const std::int64_t chunk = std::max<std::int64_t>(tiles(tiles(work, chunks), unit) * unit, 1);
  chunks = std::max<std::int64_t>(tiles(work, chunk), 1);
  const Tensor parts = empty({chunks, dw.numel()}, f32, x.device());
  const ConvWeightPartsArgs args{g,         x.dtype(), x.data(), dy.data(), parts.data<float>(),
                                 dw.data(), chunks,    chunk,    tile};
  launch(kernels::conv_weight_parts, x.device(), args, dw.numel(), 1);
  return dw;
}

// conv_weight_gradient_few is for this geometry.
bool reads_windows(const Geometry& g, DType dtype) {
  if (g.cin >= kConvFew || g.cout % 16 != 0 || g.kernel[2] == 1 || g.dilation[2] != 1 || g.out[2] == 0) return false;
  const std::int64_t line = ((g.out[2] - 1) * g.stride[2] + g.kernel[2]) * g.cin + 16;
  return g.kernel[0] * g.kernel[1] * line * static_cast<std::int64_t>(size_of(dtype)) <= kConvWindow;
}

// How a weight gradient is cut, by shape alone: what a work item sums, and into how many planes.
struct WeightCut {
  std::int64_t chunks, chunk, rows, columns, blocks;  // blocks: items of a chunk
};

// Items whose part of dw stays in L2, and enough of them for many cores; planes below 8 MB, chunks of at least 256
// positions.
WeightCut cut_lines(const Geometry& g, DType dtype, std::int64_t lines) {
  constexpr std::int64_t kItems = 16, kInL2 = 768 << 10, kPlanes = 8 << 20, kLeast = 96;
  const auto parts = [](std::int64_t n, std::int64_t part) { return (n + part - 1) / part; };
  const std::int64_t size = static_cast<std::int64_t>(size_of(dtype)), taps = taps_of(g),
                     plane = g.groups * g.cout * taps * g.cin * size;
  WeightCut c{1, 0, g.cout, g.cin, 1};
  const auto halve_rows = [&] { c.rows = parts(parts(c.rows, 2), 6) * 6; };
  while (c.rows * taps * c.columns * size > kInL2 && (c.columns > 64 || c.rows > kLeast)) {
    if (c.columns > 64 && (c.columns >= c.rows || c.rows <= kLeast))
      c.columns = parts(parts(c.columns, 2), 64) * 64;
    else
      halve_rows();
  }
  const auto blocks = [&] { return g.groups * parts(g.cin, c.columns) * parts(g.cout, c.rows); };
  const std::int64_t most = std::min({parts(kItems, blocks()), lines * g.out[2] / 256, kPlanes / plane});
  c.chunk = std::max<std::int64_t>(parts(lines, std::max<std::int64_t>(most, 1)), 1);
  c.chunks = std::max<std::int64_t>(parts(lines, c.chunk), 1);
  while (blocks() * c.chunks < kItems && c.rows > kLeast) halve_rows();
  c.blocks = blocks();
  return c;
}

// At least 32 items for the threads: blocks of columns, of rows, then chunks of whole depth blocks, planes below 64 MB.
WeightCut cut_weight(const Geometry& g, bool depthwise, bool few, std::int64_t lines, std::int64_t plane) {
  const auto parts = [](std::int64_t n, std::int64_t part) { return (n + part - 1) / part; };
  const bool by_lines = depthwise || few;
  const std::int64_t work = by_lines ? lines : lines * g.out[2], taps = taps_of(g);  // what is cut into chunks
  WeightCut c{1, 0, g.cout, parts(parts(taps * g.cin, parts(taps * g.cin, kConvColumns)), 64) * 64, 1};
  c.blocks = depthwise ? 1 : few ? g.groups : g.groups * parts(taps * g.cin, c.columns);
  if (!by_lines) {
    c.rows = parts(parts(g.cout, std::min(parts(32, c.blocks), parts(g.cout, 96))), 6) * 6;
    c.blocks *= parts(g.cout, c.rows);
  }
  const std::int64_t unit = by_lines ? parts(128, g.out[2]) : 128;
  std::int64_t chunks = std::min({parts(32, c.blocks), parts(work, unit), (std::int64_t{1} << 24) / (plane + 1)});
  chunks = std::max<std::int64_t>(chunks, 1);
  c.chunk = std::max<std::int64_t>(parts(parts(work, chunks), unit) * unit, unit);
  c.chunks = std::max<std::int64_t>(parts(work, c.chunk), 1);
  return c;
}

Tensor apply_weight_gradient(const Geometry& one, const Tensor& dy, const Tensor& x) {
  if (x.device().is_cuda()) return weight_gradient_there(one, dy, x);
  const bool depthwise = is_depthwise(one), half = is_half(x.dtype());
  const DType acc = accumulator(x.dtype());
  const std::int64_t merged = depthwise ? 1 : merged_groups(one, acc);
  const Geometry g = merge(one, merged);
  const Tensor dw = empty(w_shape(one), x.dtype(), x.device());
  const std::int64_t lines = g.batch * g.out[0] * g.out[1], plane = dw.numel() * merged;
  const bool few = !depthwise && reads_windows(g, acc), whole = !depthwise && !few && g.cin % 16 == 0;
  if (half && (few || whole) && g.out[2] > kConvHalfLine) {
    const NoGrad off;
    return cast(apply_weight_gradient(one, cast(dy, f32), cast(x, f32)), x.dtype());
  }
  const WeightCut cut = whole ? cut_lines(g, acc, lines) : cut_weight(g, depthwise, few, lines, plane);
  const bool turned = depthwise || few, as_it_is = cut.chunks == 1 && merged == 1 && !turned && !half;
  const Tensor planes = as_it_is ? dw : empty({cut.chunks, plane}, acc, x.device());
  if (dw.device().is_meta()) return dw;

  const ConvWeightArgs args{g,          x.dtype(), x.data(), dy.data(),  planes.data(),
                            cut.chunks, cut.chunk, cut.rows, cut.columns};
  const auto& kernel = depthwise ? kernels::conv_depthwise_weight_gradient
                       : few     ? kernels::conv_weight_gradient_few
                       : whole   ? kernels::conv_weight_gradient_lines
                                 : kernels::conv_weight_gradient;
  launch(kernel, x.device(), args, cut.chunks * cut.blocks, 1);
  if (!as_it_is) {
    const std::int64_t cout = depthwise ? g.groups : one.cout;
    const ConvJoinArgs join{x.dtype(), turned,     planes.data(), dw.data(), cut.chunks,
                            plane,     taps_of(g), one.cin,       cout,      merged};
    launch(kernels::conv_join, x.device(), join, plane, 16384);
  }
  return dw;
}

// The three bilinear maps of one geometry; each one's gradients are the other two. bias only joins the first two; end
// only what nothing needs a gradient of.
Tensor forward(const Geometry& g, const Tensor& x, const Tensor& w, const Tensor& bias, const End& end = {});
Tensor transposed(const Geometry& g, const Tensor& y, const Tensor& w, const Tensor& bias);
Tensor weight_gradient(const Geometry& g, const Tensor& dy, const Tensor& x);

// x's gradient, added to what its other uses have sent: as it is written, and in that place where nobody else sees it.
Tensor data_gradient(const Geometry& g, const Tensor& dy, const Tensor& w, Pending& pending) {
  const Tensor before = dy.device().is_cuda() || is_depthwise(g) ? Tensor() : pending.take(0);
  if (!before.defined()) return transposed(g, dy, w, {});
  const bool mine = before.unique() && before.is_contiguous() && !requires_grad(before);
  const bool in_place = mine && sums_at_once(g, true, dy.dtype());
  if (in_place) write_in_place("conv_transpose", before);
  const Tensor dx =
      apply(g, true, contiguous(dy), contiguous(w), {}, {.residual = contiguous(before), .in_place = in_place});
  detail::observe("conv_transpose", dx);
  return dx;
}

Tensor forward(const Geometry& g, const Tensor& x0, const Tensor& w0, const Tensor& bias0, const End& end) {
  const Tensor x = contiguous(x0), w = contiguous(w0), bias = contiguous_or_undefined(bias0);
  const Needs need = needs_of({x, w, bias});
  return record("conv", apply(g, false, x, w, bias, end), {x, w, bias},
                Saved({keep_if(need[1], x), keep_if(need[0], w)}),
                [g](const Saved& s, const Tensor& dy, Needs n, Pending& pending) -> Grads {
                  Grads out(3);
                  if (n[0]) out[0] = data_gradient(g, dy, s[1], pending);
                  if (n[1]) out[1] = weight_gradient(g, dy, s[0]);
                  if (n[2]) out[2] = sum(reshape(dy, {dy.numel() / dy.size(-1), dy.size(-1)}), {0});
                  return out;
                });
}

Tensor transposed(const Geometry& g, const Tensor& y0, const Tensor& w0, const Tensor& bias0) {
  const Tensor y = contiguous(y0), w = contiguous(w0), bias = contiguous_or_undefined(bias0);
  const Needs need = needs_of({y, w, bias});
  return record("conv_transpose", apply(g, true, y, w, bias), {y, w, bias},
                Saved({keep_if(need[1], y), keep_if(need[0], w)}),
                [g](const Saved& s, const Tensor& dx, Needs n) -> Grads {
                  Grads out(3);
                  if (n[0]) out[0] = forward(g, dx, s[1], {});
                  if (n[1]) out[1] = weight_gradient(g, s[0], dx);
                  if (n[2]) out[2] = sum(reshape(dx, {dx.numel() / dx.size(-1), dx.size(-1)}), {0});
                  return out;
                });
}

Tensor weight_gradient(const Geometry& g, const Tensor& dy0, const Tensor& x0) {
  const Tensor dy = contiguous(dy0), x = contiguous(x0);
  const Needs need = needs_of({dy, x});
  return record("conv_weight_gradient", apply_weight_gradient(g, dy, x), {dy, x},
                Saved({keep_if(need[1], dy), keep_if(need[0], x)}),
                [g](const Saved& s, const Tensor& dw, Needs n) -> Grads {
                  Grads out(2);
                  if (n[0]) out[0] = forward(g, s[1], dw, {});
                  if (n[1]) out[1] = transposed(g, s[0], dw, {});
                  return out;
                });
}

// One entry per axis from an option that may be empty or have a single entry.
Dims per_axis(const char* op, const char* what, const Dims& given, int spatial, std::int64_t fallback,
              std::int64_t least) {
  CAPO_CHECK(given.size() <= 1 || given.size() == spatial, op, ": ", what, " must have 1 or ", spatial,
             " entries, got ", given);
  Dims d = Dims::filled(spatial, fallback);
  for (int a = 0; a < spatial && !given.empty(); ++a) d[a] = given[given.size() == 1 ? 0 : a];
  for (const auto v : d) CAPO_CHECK(v >= least, op, ": ", what, " must be >= ", least, ", got ", given);
  return d;
}

void check(const char* op, const Tensor& x, const Tensor& w, const Tensor& bias, int groups) {
  CAPO_CHECK(is_floating(x.dtype()), op, ": x must be floating, got ", describe(x));
  CAPO_CHECK(x.rank() >= 3 && x.rank() <= 5, op, ": x must be [B, 1 to 3 spatial axes, C], got ", x.shape());
  CAPO_CHECK(w.rank() == x.rank(), op, ": weight must have the rank of x ", x.shape(), ", got ", w.shape());
  CAPO_CHECK(w.numel() > 0, op, ": weight must have no empty axis, got ", w.shape());
  CAPO_CHECK(w.dtype() == x.dtype(), op, ": weight is ", w.dtype(), ", x is ", x.dtype(), ": mixed dtypes, cast one");
  CAPO_CHECK(w.device() == x.device(), op, ": weight is on ", w.device(), ", x is on ", x.device());
  CAPO_CHECK(groups >= 1, op, ": groups must be >= 1, got ", groups);
  if (!bias.defined()) return;
  CAPO_CHECK(bias.dtype() == x.dtype(), op, ": bias is ", bias.dtype(), ", x is ", x.dtype(),
             ": mixed dtypes, cast one");
  CAPO_CHECK(bias.device() == x.device(), op, ": bias is on ", bias.device(), ", x is on ", x.device());
}

void check_end(const char* op, const End& end) {
  const Activation a = end.activation;
  CAPO_CHECK(a == Activation::none || a == Activation::relu, op, ": activation must be none or relu, got ", name_of(a));
  CAPO_CHECK(end.ceiling == 0 || (end.ceiling > 0 && a == Activation::relu), op,
             ": ceiling must be >= 0 and belongs to relu, got ", end.ceiling, " with ", name_of(a));
}

}  // namespace

Tensor conv(const Tensor& x, const Tensor& w, const Tensor& bias, const ConvOptions& o, Activation activation,
            const Tensor& residual, double ceiling) {
  const char* op = "conv";
  check(op, x, w, bias, o.groups);
  check_end(op, {activation, residual, ceiling});
  const int spatial = x.rank() - 2;
  const Dims stride = per_axis(op, "stride", o.stride, spatial, 1, 1),
             dilation = per_axis(op, "dilation", o.dilation, spatial, 1, 1);
  const Dims before = per_axis(op, "pad_before", o.pad_before, spatial, 0, 0);
  const Dims after = o.pad_after.empty() ? before : per_axis(op, "pad_after", o.pad_after, spatial, 0, 0);
  CAPO_CHECK(o.output_padding.empty(), op, ": output_padding belongs to conv_transpose, got ", o.output_padding);
  const std::int64_t groups = o.groups, cin = x.size(-1), cout = w.size(0);
  CAPO_CHECK(cout % groups == 0, op, ": ", cout, " output channels do not divide into ", groups, " groups");
  CAPO_CHECK(w.size(-1) * groups == cin, op, ": weight ", w.shape(), " with ", groups, " groups takes ",
             w.size(-1) * groups, " input channels, x ", x.shape(), " has ", cin);
  CAPO_CHECK(!bias.defined() || bias.shape() == Shape{cout}, op, ": bias must be [", cout, "], got ", bias.shape());

  Geometry g{spatial,   x.size(0), groups,    w.size(-1), cout / groups, {1, 1, 1},
             {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0},  {1, 1, 1}};
  for (int i = 0; i < spatial; ++i) {
    const int a = 3 - spatial + i;
    const std::int64_t k = w.size(1 + i), room = x.size(1 + i) + before[i] + after[i] - dilation[i] * (k - 1) - 1;
    CAPO_CHECK(room >= 0, op, ": the kernel of ", w.shape(), " with dilation ", dilation, " is larger than x ",
               x.shape(), " padded by ", before, " and ", after);
    g.in[a] = x.size(1 + i);
    g.out[a] = room / stride[i] + 1;
    g.kernel[a] = k;
    g.stride[a] = stride[i];
    g.pad[a] = before[i];
    g.dilation[a] = dilation[i];
  }
  const Shape out = y_shape(g);
  CAPO_CHECK(!residual.defined() ||
                 (residual.shape() == out && residual.dtype() == x.dtype() && residual.device() == x.device()),
             op, ": residual must be ", x.dtype(), " ", out, " on ", x.device(), " as y, got ", describe(residual));
  const End end{activation, residual, ceiling};
  const bool needed = needs_of({x, w, bias, residual}).any();
  if (through_f32(x) && end.any() && needed)  // rounded once, at the end
    return cast(conv(cast(x, f32), cast(w, f32), cast_or_undefined(bias, f32), o, activation,
                     cast_or_undefined(residual, f32), ceiling),
                x.dtype());
  if (!end.any()) return forward(g, x, w, bias);
  if (x.device().is_cuda() || needed) return ended(forward(g, x, w, bias), end);
  return forward(g, x, w, bias, {activation, contiguous_or_undefined(residual), ceiling});
}

Tensor conv_transpose(const Tensor& x, const Tensor& w, const Tensor& bias, const ConvOptions& o) {
  const char* op = "conv_transpose";
  check(op, x, w, bias, o.groups);
  const int spatial = x.rank() - 2;
  const Dims stride = per_axis(op, "stride", o.stride, spatial, 1, 1),
             dilation = per_axis(op, "dilation", o.dilation, spatial, 1, 1);
  const Dims before = per_axis(op, "pad_before", o.pad_before, spatial, 0, 0);
  const Dims after = o.pad_after.empty() ? before : per_axis(op, "pad_after", o.pad_after, spatial, 0, 0);
  const Dims extra = per_axis(op, "output_padding", o.output_padding, spatial, 0, 0);
  const std::int64_t groups = o.groups, cin = x.size(-1), cout = w.size(-1) * groups;
  CAPO_CHECK(w.size(0) == cin, op, ": weight ", w.shape(), " takes ", w.size(0), " input channels, x ", x.shape(),
             " has ", cin);
  CAPO_CHECK(cin % groups == 0, op, ": ", cin, " input channels do not divide into ", groups, " groups");
  CAPO_CHECK(!bias.defined() || bias.shape() == Shape{cout}, op, ": bias must be [", cout, "], got ", bias.shape());

  // The geometry of the conv whose data gradient this is: its y is our x.
  Geometry g{spatial,   x.size(0), groups,    w.size(-1), cin / groups, {1, 1, 1},
             {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0},  {1, 1, 1}};
  for (int i = 0; i < spatial; ++i) {
    const int a = 3 - spatial + i;
    const std::int64_t k = w.size(1 + i), in = x.size(1 + i);
    CAPO_CHECK(in >= 1, op, ": x must have no empty spatial axis, got ", x.shape());
    CAPO_CHECK(extra[i] < std::max(stride[i], dilation[i]), op, ": output_padding ", extra,
               " must be smaller than stride ", stride, " or dilation ", dilation);
    g.out[a] = in;
    g.in[a] = (in - 1) * stride[i] - before[i] - after[i] + dilation[i] * (k - 1) + 1 + extra[i];
    CAPO_CHECK(g.in[a] >= 1, op, ": nothing is left of x ", x.shape(), " after padding ", before, " and ", after,
               " with kernel ", w.shape());
    g.kernel[a] = k;
    g.stride[a] = stride[i];
    g.pad[a] = before[i];
    g.dilation[a] = dilation[i];
  }
  return transposed(g, x, w, bias);
}

namespace {
Tensor ranked(const char* op, int rank, const Tensor& x, const Tensor& w, const Tensor& bias, const ConvOptions& o) {
  CAPO_CHECK(x.rank() == rank, op, ": x must have ", rank, " axes, got ", x.shape());
  return conv(x, w, bias, o);
}
}  // namespace

Tensor conv1d(const Tensor& x, const Tensor& w, const Tensor& bias, const ConvOptions& o) {
  return ranked("conv1d", 3, x, w, bias, o);
}
Tensor conv2d(const Tensor& x, const Tensor& w, const Tensor& bias, const ConvOptions& o) {
  return ranked("conv2d", 4, x, w, bias, o);
}
Tensor conv3d(const Tensor& x, const Tensor& w, const Tensor& bias, const ConvOptions& o) {
  return ranked("conv3d", 5, x, w, bias, o);
}

}  // namespace capo
