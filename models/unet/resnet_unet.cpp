#include <capo/engine/json.h>
#include <capo/models/unet/resnet_unet.h>
#include <capo/models/unet/sizes_internal.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace capo::unet {
namespace {

ResnetUnetConfig checked(ResnetUnetConfig c) {
  c.encoder.classes = 0;
  CAPO_CHECK(c.encoder.stem != resnet::Stem::cifar,
             "resnet_unet: the encoder's stem must pool, so that each map is half as large as the one before");
  CAPO_CHECK(c.widths.size() == c.encoder.blocks.size() + 1, "resnet_unet: widths must be one more than stages, got ",
             c.widths.size(), " for ", c.encoder.blocks.size());
  for (int w : c.widths) CAPO_CHECK(w > 0, "resnet_unet: widths must be positive, got ", w);
  CAPO_CHECK(c.classes > 0, "resnet_unet: classes must be positive, got ", c.classes);
  return c;
}

std::vector<std::int64_t> channels_of(const resnet::Resnet& encoder) {
  std::vector<std::int64_t> all{encoder.config.width};
  for (const auto& stage : encoder.stages) all.push_back((*stage)[stage->size() - 1].out);
  return all;
}

nn::Init xavier(std::int64_t in, int out) {  // of a 3x3 convolution
  return nn::Init::uniform(std::sqrt(6.0 / (9.0 * static_cast<double>(in + out))));
}

}  // namespace

ResnetUnet::Head::Head(nn::Module* up, std::string_view name, std::int64_t in, int classes)
    : Layer(up, name, nn::Kind::head),
      conv(this, "0", in, classes, {3, 3}, {.pad_before = {1}}, true, xavier(in, classes), nn::Init::zero()) {}

ResnetUnet::ResnetUnet(const ResnetUnetConfig& c, const nn::Build& build)
    : Layer(build),
      config(checked(c)),
      encoder(this, "encoder", config.encoder),
      decoder(this, "decoder", channels_of(encoder), c.widths, c.plusplus),
      segmentation_head(this, "segmentation_head", c.widths.back(), c.classes) {}

Tensor ResnetUnet::forward(const Tensor& x) {
  check_sizes(x, config.encoder.channels, {config.divisor(), config.divisor()});
  CAPO_CHECK(!encoder.tapped(), "resnet_unet: a tap on the whole encoder would never run; attach it to a part");
  return segmentation_head(decoder(encoder.maps(x)));
}

void ResnetUnet::load_encoder(const nn::StateDict& resnet) {
  nn::StateDict below;
  for (const auto& t : resnet)
    if (!nn::matches("fc.*", t.name) && !nn::matches("**.num_batches_tracked", t.name))
      below.push_back({encoder.path() + "." + t.name, t.value});
  nn::load_state(encoder, below);
}

std::string to_json(const ResnetUnetConfig& c) {
  return nlohmann::json{
      {"encoder", resnet::to_json(c.encoder)}, {"widths", c.widths}, {"plusplus", c.plusplus}, {"classes", c.classes}}
      .dump();
}

ResnetUnetConfig resnet_unet_config_from_json(std::string_view text, const std::string& source) {
  JsonFields f(text, source);
  ResnetUnetConfig c;
  std::string encoder;
  f.take("encoder", encoder);
  f.take("widths", c.widths, 1, 65536);
  f.take("plusplus", c.plusplus);
  f.take("classes", c.classes, 1, 65536);
  f.finish();
  if (!encoder.empty()) c.encoder = resnet::config_from_json(encoder, source + ": encoder");
  return c;
}

}  // namespace capo::unet
