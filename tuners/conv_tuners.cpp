#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>
#include <capo/ops/matmul.h>
#include <capo/ops/view.h>
#include <capo/tuners/conv_tuners.h>

#include <cmath>

namespace capo::tuners {
namespace {

nn::Conv& conv_of(nn::Module* target, std::string_view name) {
  auto* conv = dynamic_cast<nn::Conv*>(target);
  CAPO_CHECK(conv, name, ": ", target->path(), " is no Conv");
  return *conv;
}

// [rows, k.., columns] in a Conv weight's layout; taps = false: k = 1.
Shape kernel_shape(const nn::Conv& conv, std::int64_t rows, std::int64_t columns, bool taps) {
  Shape s = conv.weight.value().shape();
  for (int i = 1; i + 1 < s.size(); ++i) s[i] = taps ? s[i] : 1;
  s[0] = rows;
  s.back() = columns;
  return s;
}

std::int64_t rank_of(const nn::Conv& conv, const LoraOptions& o) {
  CAPO_CHECK(o.rank > 0 && o.rank % conv.options.groups == 0, "lora: rank must be a positive multiple of the ",
             conv.options.groups, " groups of ", conv.path(), ", got ", o.rank);
  CAPO_CHECK(o.slices.empty(), "lora: slices need a fused qkv, ", conv.path(), " is a Conv");
  return o.rank;
}

// The value of a per-axis option that may be empty, have one entry for all axes, or one per axis.
std::int64_t at(const Dims& d, int axis, std::int64_t otherwise) {
  return d.size() == 0 ? otherwise : d[d.size() == 1 ? 0 : axis];
}

}  // namespace

ConvLora::ConvLora(nn::Module* target, std::string_view name, const LoraOptions& o)
    : ConvLora(conv_of(target, name), name, o) {}

ConvLora::ConvLora(nn::Conv& target, std::string_view name, const LoraOptions& o)
    : FoldingTuner(&target, name, target.weight),
      options(o),
      a(this, "a", kernel_shape(target, rank_of(target, o), target.weight.value().size(-1), true),
        nn::Init::kaiming(std::sqrt(5.0)), nn::Layout::conv),
      b(this, "b", kernel_shape(target, target.width(), o.rank / target.options.groups, false), nn::Init::zero(),
        nn::Layout::conv),
      conv_(target),
      dropout_(this, "dropout", o.dropout) {}

Tensor ConvLora::apply(const nn::Site& site) {
  if (merged()) return site.y;
  const Tensor h = conv(dropout_(site.z), a, {}, conv_.options) * options.scale();
  if (conv_.options.groups == 1) return add_linear(site.y, {{h, reshape(b.value(), {conv_.width(), options.rank})}});
  return site.y + conv(h, b, {}, {.groups = conv_.options.groups});
}

Tensor ConvLora::delta_weight() const {
  const Tensor& w = conv_.weight.value();
  const std::int64_t groups = conv_.options.groups, rank = options.rank / groups;
  const Tensor product = matmul(reshape(b.value(), {groups, w.size(0) / groups, rank}),
                                reshape(a.value(), {groups, rank, w.numel() / w.size(0)}));
  return reshape(product, w.shape()) * options.scale();
}

ResidualAdapter::ResidualAdapter(nn::Module* target, std::string_view name, const ResidualAdapterOptions& o)
    : ResidualAdapter(conv_of(target, name), name, o) {}

ResidualAdapter::ResidualAdapter(nn::Conv& target, std::string_view name, const ResidualAdapterOptions& o)
    : FoldingTuner(&target, name, target.weight),
      options(o),
      weight(this, "weight", kernel_shape(target, target.width(), target.weight.value().size(-1), false),
             nn::Init::zero(), nn::Layout::conv),
      conv_(target) {}

Tensor ResidualAdapter::apply(const nn::Site& site) {
  if (merged()) return site.y;
  Tensor x = site.z;
  for (int axis = 1; axis + 1 < x.rank(); ++axis) {
    const std::int64_t taps = conv_.weight.value().size(axis), stride = at(conv_.options.stride, axis - 1, 1);
    const std::int64_t first = at(conv_.options.dilation, axis - 1, 1) * ((taps - 1) / 2) -
                               at(conv_.options.pad_before, axis - 1, 0);
    const std::int64_t end = first + (site.y.size(axis) - 1) * stride + 1;
    CAPO_CHECK(first >= 0 && end <= x.size(axis), "residual_adapter: the middle tap of ", conv_.path(),
               " must stay inside its input along every axis, but reads [", first, ", ", end, ") of ", x.shape());
    // Only what is read is kept for the gradient; the module's input itself, where that is all of it, may be one that
    // the tape makes again.
    if (stride > 1 || first > 0 || end < x.size(axis)) x = slice(x, axis, first, end, stride);
  }
  const Tensor tau = conv(x, weight, {}, {.groups = conv_.options.groups});
  return site.y + (options.scale == 1.0 ? tau : tau * options.scale);
}

Tensor ResidualAdapter::delta_weight() const {
  const Shape& w = conv_.weight.value().shape();
  Dims before, after;
  for (int axis = 0; axis < w.size(); ++axis) {
    const bool spatial = axis > 0 && axis + 1 < w.size();
    before.push_back(spatial ? (w[axis] - 1) / 2 : 0);
    after.push_back(spatial ? w[axis] - 1 - before.back() : 0);
  }
  return pad(weight.value() * options.scale, before, after);
}

}  // namespace capo::tuners
