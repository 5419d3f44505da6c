// Samples of convolutions. References are scalar f64 loops over every (position, tap, channel) triple.
#include <capo/ops/conv.h>
#include <capo/tests/op_test.h>

#include <cmath>

namespace capo::test {
namespace {

using std::int64_t;

int64_t at(const Dims& d, int axis, int64_t fallback) { return d.empty() ? fallback : d[d.size() == 1 ? 0 : axis]; }

// Sizes with three spatial axes: missing ones in front are 1 wide with stride 1 and no padding.
struct Loop {
  int64_t batch, cx, cy, groups;  // channels of conv's x and y
  int64_t x[3], y[3], k[3], stride[3], pad[3], dilation[3];
};

// Calls f(offset in x, offset in y, offset in w) for all triples that a conv multiplies.
template <class F>
void for_each_product(const Loop& l, const F& f) {
  const int64_t cin = l.cx / l.groups, cout = l.cy / l.groups;
  for (int64_t b = 0; b < l.batch; ++b)
    for (int64_t o = 0; o < l.y[0] * l.y[1] * l.y[2]; ++o)
      for (int64_t t = 0; t < l.k[0] * l.k[1] * l.k[2]; ++t) {
        const int64_t ys[3] = {o / (l.y[1] * l.y[2]), o / l.y[2] % l.y[1], o % l.y[2]};
        const int64_t ts[3] = {t / (l.k[1] * l.k[2]), t / l.k[2] % l.k[1], t % l.k[2]};
        int64_t place = b;
        bool inside = true;
        for (int a = 0; a < 3; ++a) {
          const int64_t s = ys[a] * l.stride[a] - l.pad[a] + ts[a] * l.dilation[a];
          inside = inside && s >= 0 && s < l.x[a];
          place = place * l.x[a] + s;
        }
        if (!inside) continue;
        for (int64_t co = 0; co < l.cy; ++co)
          for (int64_t ci = 0; ci < cin; ++ci)
            f(place * l.cx + co / cout * cin + ci, (b * l.y[0] * l.y[1] * l.y[2] + o) * l.cy + co,
              (co * l.k[0] * l.k[1] * l.k[2] + t) * cin + ci);
      }
}

Tensors reference(const Tensors& in, const ConvOptions& o, bool transposed) {
  const Tensor &source = in[0], &w = in[1];
  const int spatial = source.rank() - 2;
  Loop l{source.size(0), transposed ? w.size(-1) * o.groups : source.size(-1), w.size(0), o.groups,
         {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  Shape shape{l.batch};
  for (int i = 0; i < spatial; ++i) {
    const int a = 3 - spatial + i;
    l.k[a] = w.size(1 + i);
    l.stride[a] = at(o.stride, i, 1);
    l.dilation[a] = at(o.dilation, i, 1);
    l.pad[a] = at(o.pad_before, i, 0);
    const int64_t pads = l.pad[a] + at(o.pad_after, i, l.pad[a]), reach = l.dilation[a] * (l.k[a] - 1) + 1,
                  n = source.size(1 + i);
    if (transposed) {
      l.y[a] = n;
      l.x[a] = (n - 1) * l.stride[a] - pads + reach + at(o.output_padding, i, 0);
    } else {
      l.x[a] = n;
      l.y[a] = (n + pads - reach) / l.stride[a] + 1;
    }
    shape.push_back(transposed ? l.x[a] : l.y[a]);
  }
  const int64_t channels = transposed ? l.cx : l.cy;
  shape.push_back(channels);
  const auto s = to_vector<double>(source), k = to_vector<double>(w);
  std::vector<double> result(static_cast<std::size_t>(numel(shape)), 0.0);
  if (in.size() > 2) {
    const auto bias = to_vector<double>(in[2]);
    for (std::size_t i = 0; i < result.size(); ++i) result[i] = bias[i % static_cast<std::size_t>(channels)];
  }
  for_each_product(l, [&](int64_t x, int64_t y, int64_t t) {
    const auto from = static_cast<std::size_t>(transposed ? y : x), to = static_cast<std::size_t>(transposed ? x : y);
    result[to] += s[from] * k[static_cast<std::size_t>(t)];
  });
  return {from_vector<double>(result, shape)};
}

struct Entry {
  const char* label;
  Shape source, weight;
  bool bias;
  ConvOptions options;
};

const Entry kConv[] = {
    {"3x3, padded", {2, 5, 7, 3}, {4, 3, 3, 3}, true, {.pad_before = {1}}},
    {"1x1", {2, 3, 5, 7}, {6, 1, 1, 7}, true, {}},
    {"1x1, stride 2", {1, 5, 4, 3}, {5, 1, 1, 3}, false, {.stride = {2}}},
    {"7x7, stride 2", {1, 9, 11, 3}, {5, 7, 7, 3}, true, {.stride = {2}, .pad_before = {3}}},
    {"uneven", {1, 6, 5, 2}, {3, 2, 3, 2}, true, {.stride = {2, 1}, .pad_before = {0, 2}, .pad_after = {1, 0}}},
    {"dilation 2", {1, 7, 6, 2}, {3, 3, 2, 2}, false, {.pad_before = {2}, .dilation = {2}}},
    {"dilation 2 and 3, stride 3 and 2",
     {1, 9, 10, 2},
     {2, 3, 3, 2},
     true,
     {.stride = {3, 2}, .pad_before = {1}, .dilation = {2, 3}}},
    {"groups", {2, 4, 5, 6}, {4, 3, 2, 3}, true, {.pad_before = {1}, .groups = 2}},
    {"groups of one input, two outputs", {1, 4, 4, 3}, {6, 3, 3, 1}, false, {.pad_before = {1}, .groups = 3}},
    {"depthwise", {2, 5, 4, 5}, {5, 3, 3, 1}, true, {.pad_before = {1}, .groups = 5}},
    {"depthwise, stride 2, dilation 2",
     {1, 7, 8, 3},
     {3, 3, 3, 1},
     true,
     {.stride = {2}, .pad_before = {2}, .dilation = {2}, .groups = 3}},
    {"patches", {1, 6, 6, 3}, {7, 3, 3, 3}, true, {.stride = {3}}},
    {"stride beyond the kernel", {1, 7, 9, 2}, {3, 2, 2, 2}, true, {.stride = {3, 4}}},
    {"1d", {2, 9, 3}, {4, 3, 3}, true, {.stride = {2}, .pad_before = {1}}},
    {"3d", {1, 4, 3, 5, 2}, {3, 2, 3, 2, 2}, true, {.stride = {1, 2, 2}, .pad_before = {1}}},
    {"3d, depthwise", {1, 3, 3, 4, 2}, {2, 2, 2, 2, 1}, false, {.pad_before = {1, 0, 1}, .groups = 2}},
    {"size 1", {1, 1, 1, 1}, {1, 1, 1, 1}, true, {}},
    {"padding wider than x", {1, 1, 2, 2}, {2, 3, 3, 2}, true, {.pad_before = {4}}},
    {"no images", {0, 4, 4, 3}, {2, 3, 3, 3}, true, {.pad_before = {1}}},
    {"no images, depthwise", {0, 4, 4, 3}, {3, 3, 3, 1}, true, {.pad_before = {1}, .groups = 3}},
};

const Entry kTransposed[] = {
    {"2x2, stride 2", {2, 3, 4, 3}, {3, 2, 2, 4}, true, {.stride = {2}}},
    {"4x4, stride 2, padded", {1, 3, 2, 2}, {2, 4, 4, 3}, true, {.stride = {2}, .pad_before = {1}}},
    {"3x3, output padding",
     {1, 3, 4, 2},
     {2, 3, 3, 3},
     true,
     {.stride = {2}, .pad_before = {1}, .output_padding = {1, 0}}},
    {"stride 1", {2, 4, 3, 2}, {2, 3, 3, 3}, false, {.pad_before = {1}, .pad_after = {0}}},
    {"dilation 2, stride 3", {1, 3, 3, 2}, {2, 3, 2, 2}, true, {.stride = {3}, .dilation = {2}}},
    {"output padding below the dilation", {1, 3, 3, 2}, {2, 2, 2, 2}, true, {.dilation = {3}, .output_padding = {2}}},
    {"stride beyond the kernel", {1, 3, 2, 2}, {2, 2, 1, 3}, true, {.stride = {3}}},
    {"groups", {1, 3, 3, 4}, {4, 3, 3, 3}, true, {.stride = {2}, .groups = 2}},
    {"depthwise", {2, 3, 3, 3}, {3, 3, 3, 1}, true, {.stride = {2}, .pad_before = {1}, .groups = 3}},
    {"1d", {2, 5, 3}, {3, 4, 2}, true, {.stride = {2}, .pad_before = {1}}},
    {"3d", {1, 2, 3, 2, 2}, {2, 2, 2, 3, 3}, true, {.stride = {2, 1, 2}}},
    {"size 1", {1, 1, 1, 1}, {1, 1, 1, 1}, false, {}},
    {"no images", {0, 3, 3, 2}, {2, 2, 2, 3}, true, {.stride = {2}}},
};

Sample make(const Entry& e, bool transposed) {
  const std::string seed = cat(e.label, transposed ? " transposed" : "");
  const int64_t channels = transposed ? e.weight.back() * e.options.groups : e.weight[0];
  Tensors inputs{normal(e.source, seed + " x", 0.5), normal(e.weight, seed + " w")};
  if (e.bias) inputs.push_back(normal({channels}, seed + " b"));
  const ConvOptions o = e.options;
  Sample s{e.label, inputs,
           [o, transposed](const Tensors& in) {
             const Tensor bias = in.size() > 2 ? in[2] : Tensor();
             return Tensors{transposed ? conv_transpose(in[0], in[1], bias, o) : conv(in[0], in[1], bias, o)};
           },
           [o, transposed](const Tensors& in) { return reference(in, o, transposed); }};
  s.second_order = true;
  return s;
}

// A convolution and what follows it; the residual is the last input.
struct End {
  Activation activation;
  bool residual;
  double ceiling;
};
Sample make_ended(const Entry& e, const End& end) {
  const Sample bare = make(e, false);
  Tensors inputs = bare.inputs;
  if (end.residual) {  // which keeps the sums off the kinks: rounded to 16 bits they would fall on either side
    const Tensor y = bare.reference(inputs)[0], residual = normal(y.shape(), cat(e.label, " residual"), 0.3);
    for (std::int64_t i = 0; i < y.numel(); ++i)
      for (const double kink : {0.0, end.ceiling})
        if (std::fabs(y.data<double>()[i] + residual.data<double>()[i] - kink) < 0.05)
          residual.data<double>()[i] += 0.12;
    inputs.push_back(residual);
  }
  const ConvOptions o = e.options;
  const std::size_t plain = bare.inputs.size();
  Sample s{cat(e.label, ", ", name_of(end.activation), end.residual ? " + residual" : "",
               end.ceiling > 0 ? ", ceiling" : ""),
           inputs,
           [o, end, plain](const Tensors& in) {
             return Tensors{conv(in[0], in[1], plain > 2 ? in[2] : Tensor(), o, end.activation,
                                 end.residual ? in[plain] : Tensor(), end.ceiling)};
           },
           [o, end, plain](const Tensors& in) {
             const Tensor sum =
                 reference(Tensors(in.begin(), in.begin() + static_cast<std::ptrdiff_t>(plain)), o, false)[0];
             auto y = to_vector<double>(sum);
             const auto r = end.residual ? to_vector<double>(in[plain]) : std::vector<double>(y.size());
             for (std::size_t i = 0; i < y.size(); ++i) {
               y[i] += r[i];
               if (end.activation == Activation::relu && y[i] < 0) y[i] = 0;
               if (end.ceiling > 0 && y[i] > end.ceiling) y[i] = end.ceiling;
             }
             return Tensors{from_vector<double>(y, sum.shape())};
           }};
  s.second_order = true;
  return s;
}

// Sizes that fill tiles, panels, column blocks and chunks, with remainders. Values and first gradients by f32 and bits.
Sample make_large(const char* label, const Shape& x, const Shape& w, const ConvOptions& o, bool transposed = false) {
  Sample s = make({label, x, w, true, o}, transposed);
  s.second_order = false;
  s.tol_f32 = 4e-6;
  return s;
}

}  // namespace

std::vector<OpCase> op_cases() {
  OpCase c{"conv", {}, {}}, t{"conv_transpose", {}, {}};
  for (const Entry& e : kConv) c.samples.push_back(make(e, false));
  for (const Entry& e : kTransposed) t.samples.push_back(make(e, true));
  c.samples.push_back(make_large("many channels", {2, 7, 9, 67}, {70, 3, 3, 67}, {.pad_before = {1}}));
  c.samples.push_back(
      make_large("many channels, stride 2", {1, 9, 8, 130}, {35, 3, 3, 130}, {.stride = {2}, .pad_before = {1}}));
  c.samples.push_back(make_large("1x1, many channels", {1, 7, 9, 150}, {100, 1, 1, 150}, {}));
  c.samples.push_back(make_large("many positions", {3, 31, 33, 3}, {5, 3, 3, 3}, {.pad_before = {1}}));
  c.samples.push_back(make_large("many groups", {1, 13, 13, 64}, {64, 3, 3, 2}, {.pad_before = {1}, .groups = 32}));
  c.samples.push_back(make_large("depthwise, many channels", {2, 9, 11, 83}, {83, 3, 3, 1},
                                 {.stride = {2}, .pad_before = {1}, .groups = 83}));
  c.samples.push_back(make_large("channels in eights", {2, 9, 11, 48}, {144, 3, 3, 24},
                                 {.stride = {2}, .pad_before = {1}, .groups = 2}));
  c.samples.push_back(make_large("channels in eights, dilated 3d", {1, 3, 5, 6, 8}, {80, 2, 3, 2, 8},
                                 {.stride = {1, 2, 1}, .pad_before = {1}, .dilation = {1, 1, 2}}));
  c.samples.push_back(make_large("inputs in eights", {2, 6, 7, 16}, {5, 3, 3, 16}, {.pad_before = {1}}));
  c.samples.push_back(make_large("outputs in eights", {2, 9, 8, 3}, {72, 4, 4, 3}, {.stride = {4}}));
  c.samples.push_back(make_large("few inputs, outputs in sixteens", {3, 11, 35, 3}, {48, 3, 5, 3},
                                 {.stride = {2, 1}, .pad_before = {1, 2}}));
  c.samples.push_back(make_large("few inputs, outputs in sixteens, 3d, groups", {2, 4, 5, 7, 14}, {32, 3, 2, 3, 7},
                                 {.pad_before = {1, 1, 2}, .groups = 2}));
  c.samples.push_back(make_large("groups of four", {2, 9, 15, 32}, {32, 3, 3, 4}, {.pad_before = {1}, .groups = 8}));
  c.samples.push_back(make_large("groups of three and five", {1, 9, 7, 18}, {30, 3, 3, 3},
                                 {.stride = {2}, .pad_before = {1}, .groups = 6}));
  c.samples.push_back(make_large("1x1, inputs summed in pieces", {1, 3, 5, 700}, {20, 1, 1, 700}, {.stride = {1, 2}}));
  c.samples.push_back(make_large("3x2, inputs summed in pieces", {1, 3, 4, 601}, {9, 3, 2, 601}, {.pad_before = {1}}));
  c.samples.push_back(make_large("depthwise, 5x5", {2, 7, 9, 37}, {37, 5, 5, 1}, {.pad_before = {2}, .groups = 37}));
  c.samples.push_back(make_large("depthwise, 3d", {1, 5, 4, 6, 35}, {35, 3, 3, 3, 1},
                                 {.stride = {1, 1, 2}, .pad_before = {1}, .groups = 35}));
  c.samples.push_back(make_large("inputs in sixteens", {4, 12, 13, 48}, {70, 3, 3, 48}, {.pad_before = {1}}));
  c.samples.push_back(make_large("inputs in sixteens, stride 2, dilation 2, wide padding", {2, 7, 9, 80},
                                 {20, 3, 3, 80}, {.stride = {2}, .pad_before = {5}, .dilation = {2}}));
  c.samples.push_back(make_large("inputs in sixteens, 1x1", {2, 16, 17, 64}, {130, 1, 1, 64}, {}));
  c.samples.push_back(
      make_large("inputs in sixteens, groups", {2, 6, 7, 64}, {36, 3, 3, 32}, {.pad_before = {1}, .groups = 2}));
  c.samples.push_back(make_large("inputs in sixteens, 3d", {1, 3, 4, 6, 16}, {10, 2, 3, 2, 16},
                                 {.stride = {1, 2, 1}, .pad_before = {1, 1, 0}}));
  c.samples.push_back(make_large("inputs in sixteens, wide dw", {1, 5, 6, 208}, {226, 3, 3, 208}, {.pad_before = {1}}));
  c.samples.push_back(
      make({"inputs in sixteens, no images", {0, 4, 4, 16}, {2, 3, 3, 16}, true, {.pad_before = {1}}}, false));
  // Small images, whose positions are multiplied in another order: windows over one end, both, on every axis.
  c.samples.push_back(make_large("small images", {13, 4, 4, 50}, {70, 3, 3, 50}, {.pad_before = {1}}));
  c.samples.push_back(
      make_large("small images, stride 2", {11, 5, 4, 48}, {50, 3, 3, 48}, {.stride = {2}, .pad_before = {1}}));
  c.samples.push_back(make_large("images smaller than the kernel", {9, 3, 2, 49}, {48, 5, 5, 49}, {.pad_before = {2}}));
  c.samples.push_back(
      make_large("small images, dilated", {7, 6, 5, 48}, {49, 3, 3, 48}, {.pad_before = {2}, .dilation = {2}}));
  c.samples.push_back(make_large("small volumes", {5, 3, 2, 4, 48}, {50, 3, 3, 3, 48}, {.pad_before = {1}}));
  c.samples.push_back(
      make_large("small images, a wide kernel", {3, 9, 8, 48}, {20, 11, 17, 48}, {.pad_before = {5, 8}}));
  // Few positions and long sums, which CUDA cuts; the data gradients too.
  c.samples.push_back(make_large("long sums", {1, 4, 5, 72}, {72, 3, 5, 72}, {.pad_before = {1, 2}}));
  c.samples.push_back(
      make_large("long sums, odd, groups", {1, 3, 4, 118}, {66, 3, 6, 59}, {.pad_before = {1, 3}, .groups = 2}));
  // So many blocks that CUDA takes its widest ones.
  c.samples.push_back(make_large("groups in eights", {1, 10, 13, 512}, {4608, 1, 1, 8}, {.groups = 64}));
  t.samples.push_back(
      make_large("groups in eights", {1, 5, 14, 128}, {128, 2, 4, 72}, {.stride = {2, 4}, .groups = 16}, true));
  t.samples.push_back(
      make_large("channels in eights", {1, 7, 9, 48}, {48, 3, 3, 72}, {.stride = {2}, .pad_before = {1}}, true));
  t.samples.push_back(
      make_large("many channels", {1, 5, 6, 70}, {70, 4, 4, 67}, {.stride = {2}, .pad_before = {1}}, true));

  const End ends[] = {{Activation::none, true, 0},
                      {Activation::relu, false, 0},
                      {Activation::relu, true, 0},
                      {Activation::relu, true, 1.5}};
  for (const End& end : ends) {
    c.samples.push_back(
        make_ended({"3x3, 20 channels", {2, 5, 7, 3}, {20, 3, 3, 3}, true, {.stride = {2}, .pad_before = {1}}}, end));
    c.samples.push_back(make_ended(
        {"depthwise, 19 channels", {2, 5, 4, 19}, {19, 3, 3, 1}, false, {.pad_before = {1}, .groups = 19}}, end));
  }

  const Tensor x = normal({1, 5, 5, 4}, "x"), w = normal({6, 3, 3, 4}, "w");
  const auto bad = [&](OpCase& to, const char* label, const Tensor& a, const Tensor& b, const Tensor& bias,
                       const ConvOptions& o, const char* text) {
    const bool is_conv = &to == &c;
    to.errors.push_back({label, [=] { is_conv ? conv(a, b, bias, o) : conv_transpose(a, b, bias, o); }, text});
  };
  bad(c, "kernel too large", x, normal({6, 7, 3, 4}, "w"), {}, {}, "larger than x");
  bad(c, "dilated kernel too large", x, w, {}, {.dilation = {3}}, "larger than x");
  bad(c, "channels", x, normal({6, 3, 3, 5}, "w"), {}, {}, "input channels");
  bad(c, "groups", x, normal({5, 3, 3, 2}, "w"), {}, {.groups = 2}, "do not divide");
  bad(c, "no groups", x, w, {}, {.groups = 0}, "groups must be >= 1");
  bad(c, "rank", x, normal({6, 3, 4}, "w"), {}, {}, "rank");
  bad(c, "no spatial axis", normal({2, 3}, "x"), normal({2, 3}, "w"), {}, {}, "spatial axes");
  bad(c, "bias", x, w, normal({5}, "b"), {}, "bias must be [6]");
  bad(c, "stride", x, w, {}, {.stride = {0}}, "stride must be >= 1");
  bad(c, "stride entries", x, w, {}, {.stride = {1, 1, 1}}, "1 or 2 entries");
  bad(c, "padding", x, w, {}, {.pad_before = {-1}}, "pad_before must be >= 0");
  bad(c, "output padding", x, w, {}, {.output_padding = {1}}, "conv_transpose");
  bad(c, "dtypes", x, cast(w, f32), {}, {}, "mixed dtypes");
  bad(c, "integers", cast(x, i64), cast(w, i64), {}, {}, "floating");
  const auto bad_end = [&](const char* label, Activation a, const Tensor& residual, double ceiling, const char* text) {
    c.errors.push_back({label, [=] { conv(x, w, {}, {}, a, residual, ceiling); }, text});
  };
  bad_end("activation", Activation::silu, {}, 0, "activation must be none or relu, got silu");
  bad_end("ceiling without relu", Activation::none, {}, 6, "ceiling must be >= 0 and belongs to relu, got 6 with none");
  bad_end("ceiling below zero", Activation::relu, {}, -1, "ceiling must be >= 0");
  bad_end("residual's shape", Activation::relu, normal({1, 3, 3, 4}, "r"), 0, "residual must be f64 [1, 3, 3, 6]");
  bad_end("residual's dtype", Activation::relu, cast(normal({1, 3, 3, 6}, "r"), f32), 0,
          "residual must be f64 [1, 3, 3, 6]");

  const Tensor v = normal({4, 3, 3, 6}, "v");
  bad(t, "channels", x, w, {}, {}, "input channels");
  bad(t, "groups", x, v, {}, {.groups = 3}, "do not divide");
  bad(t, "bias", x, v, normal({4}, "b"), {}, "bias must be [6]");
  bad(t, "output padding", x, v, {}, {.stride = {2}, .output_padding = {2}}, "output_padding");
  bad(t, "nothing left", normal({1, 1, 1, 4}, "x"), v, {}, {.pad_before = {2}}, "nothing is left");
  bad(t, "empty image", normal({1, 0, 3, 4}, "x"), v, {}, {}, "empty spatial axis");
  return {c, t};
}

}  // namespace capo::test
