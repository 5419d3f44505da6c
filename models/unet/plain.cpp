#include <capo/models/unet/plain.h>
#include <capo/models/unet/sizes_internal.h>
#include <capo/ops/join.h>

#include <algorithm>

namespace capo::unet {
namespace {

std::int64_t product(const Dims& d) {
  std::int64_t n = 1;
  for (auto x : d) n *= x;
  return n;
}

PlainConfig checked(const PlainConfig& c) {
  CAPO_CHECK(c.channels > 0 && c.classes > 0, "unet: channels and classes must be positive, got ", c.channels, " and ",
             c.classes);
  CAPO_CHECK(c.stages.size() >= 2, "unet: needs two stages or more, got ", c.stages.size());
  CAPO_CHECK(c.axes() == 2 || c.axes() == 3, "unet: kernels must have 2 or 3 entries, got ", c.stages[0].kernel);
  for (std::size_t i = 0; i < c.stages.size(); ++i) {
    const PlainStage& s = c.stages[i];
    CAPO_CHECK(s.kernel.size() == c.axes() && s.stride.size() == c.axes(), "unet: kernel and stride of stage ", i,
               " must have ", c.axes(), " entries, got ", s.kernel, " and ", s.stride);
    CAPO_CHECK(s.features > 0 && s.convs > 0 && s.decoder_convs > 0, "unet: features and convolutions of stage ", i,
               " must be positive, got ", s.features, ", ", s.convs, " and ", s.decoder_convs);
    for (int a = 0; a < c.axes(); ++a) {
      CAPO_CHECK(s.kernel[a] > 0 && s.kernel[a] % 2 == 1, "unet: kernels must be odd, got ", s.kernel, " in stage ", i);
      CAPO_CHECK(s.stride[a] > 0 && (i > 0 || s.stride[a] == 1),
                 "unet: strides must be positive, and 1 in the first stage, got ", s.stride, " in stage ", i);
    }
  }
  return c;
}

}  // namespace

Dims PlainConfig::divisor() const {
  Dims d = Dims::filled(axes(), 1);
  for (const PlainStage& s : stages)
    for (int a = 0; a < axes(); ++a) d[a] *= s.stride[a];
  return d;
}

PlainConfig plain_config(const Dims& patch, int channels, int classes, std::int64_t base) {
  CAPO_CHECK(patch.size() == 2 || patch.size() == 3, "unet: patch must have 2 or 3 sizes, got ", patch);
  PlainConfig c;
  c.channels = channels;
  c.classes = classes;
  Dims size = patch, stride = Dims::filled(patch.size(), 1);
  std::int64_t features = base;
  do {
    c.stages.push_back({features, Dims::filled(patch.size(), 3), stride});
    features = std::min<std::int64_t>(2 * features, patch.size() == 2 ? 512 : 320);
    for (int a = 0; a < patch.size(); ++a) {
      stride[a] = size[a] % 2 == 0 && size[a] >= 8 ? 2 : 1;
      size[a] /= stride[a];
    }
  } while (product(stride) > 1);
  CAPO_CHECK(c.stages.size() >= 2, "unet: a patch needs an even size of 8 or more, got ", patch);
  return c;
}

PlainUnet::Encoder::Encoder(nn::Module* up, const PlainConfig& c) : Module(up, "encoder"), stages(this, "stages") {
  std::int64_t in = c.channels;
  for (const PlainStage& s : c.stages) {
    stages.add(c, in, s);
    in = s.features;
  }
}

PlainUnet::Decoder::Decoder(nn::Module* up, const PlainConfig& c)
    : Module(up, "decoder"),
      stages(this, "stages"),
      transpconvs(this, "transpconvs"),
      seg_layers(this, "seg_layers", nn::Kind::head) {
  const Dims one = Dims::filled(c.axes(), 1);
  for (std::size_t i = c.stages.size() - 1; i-- > 0;) {
    const PlainStage &s = c.stages[i], &below = c.stages[i + 1];
    stages.add(c.block, s.decoder_convs, 2 * s.features, s.features, s.kernel, one);
    transpconvs.add(below.features, s.features, below.stride, ConvOptions{.stride = below.stride}, c.block.bias,
                    he_normal(s.features * product(below.stride)), nn::Init::zero());
    seg_layers.add(s.features, c.classes, one, ConvOptions{}, true, he_normal(s.features), nn::Init::zero());
  }
}

PlainUnet::PlainUnet(const PlainConfig& c, const nn::Build& build)
    : Layer(build), config(checked(c)), encoder(this, c), decoder(this, c) {}

std::vector<Tensor> PlainUnet::run(const Tensor& x, bool supervise) {
  check_sizes(x, config.channels, config.divisor());
  std::vector<Tensor> skips;
  Tensor h = x;
  for (auto& stage : encoder.stages) {
    h = (*stage)(h);
    skips.push_back(h);
  }
  skips.pop_back();
  std::vector<Tensor> logits;
  for (int i = 0; i < decoder.stages.size(); ++i) {
    h = decoder.stages[i](concat({decoder.transpconvs[i](h), skips.back()}, -1));
    skips.pop_back();
    if (supervise || skips.empty()) logits.insert(logits.begin(), decoder.seg_layers[i](h));
  }
  return logits;
}

Tensor PlainUnet::forward(const Tensor& x) { return run(x, false)[0]; }
std::vector<Tensor> PlainUnet::outputs(const Tensor& x) { return run(x, true); }

}  // namespace capo::unet
