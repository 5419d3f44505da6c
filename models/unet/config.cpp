// The configurations as JSON text, and back.
#include <capo/engine/json.h>
#include <capo/models/unet/classic.h>
#include <capo/models/unet/plain.h>

#include <nlohmann/json.hpp>

namespace capo::unet {
namespace {

constexpr int kMostStages = 16;

void append(std::vector<std::int64_t>& list, const Dims& d) { list.insert(list.end(), d.begin(), d.end()); }

}  // namespace

std::string to_json(const ClassicConfig& c) {
  return nlohmann::json{{"channels", c.channels},
                        {"classes", c.classes},
                        {"base", c.base},
                        {"depth", c.depth},
                        {"batch_norm", c.batch_norm}}
      .dump();
}

ClassicConfig classic_config_from_json(std::string_view text, const std::string& source) {
  JsonFields f(text, source);
  ClassicConfig c;
  f.take("channels", c.channels, 1, 4096);
  f.take("classes", c.classes, 1, 65536);
  f.take("base", c.base, 1, 4096);
  f.take("depth", c.depth, 1, 15);
  f.take("batch_norm", c.batch_norm);
  f.finish();
  return c;
}

std::string to_json(const PlainConfig& c) {
  std::vector<std::int64_t> features, kernels, strides, convs, decoder_convs;
  for (const PlainStage& s : c.stages) {
    features.push_back(s.features);
    append(kernels, s.kernel);
    append(strides, s.stride);
    convs.push_back(s.convs);
    decoder_convs.push_back(s.decoder_convs);
  }
  return nlohmann::json{{"channels", c.channels},
                        {"classes", c.classes},
                        {"axes", c.axes()},
                        {"features", features},
                        {"kernels", kernels},
                        {"strides", strides},
                        {"convs", convs},
                        {"decoder_convs", decoder_convs},
                        {"bias", c.block.bias},
                        {"slope", c.block.slope},
                        {"norm_eps", c.block.norm_eps}}
      .dump();
}

PlainConfig plain_config_from_json(std::string_view text, const std::string& source) {
  JsonFields f(text, source);
  PlainConfig c;
  int axes = 2;
  std::vector<int> features, kernels, strides, convs, decoder_convs;
  f.take("channels", c.channels, 1, 4096);
  f.take("classes", c.classes, 1, 65536);
  f.take("axes", axes, 2, 3);
  f.take("features", features, 1, 65536);
  f.take("kernels", kernels, 1, 63);
  f.take("strides", strides, 1, 64);
  f.take("convs", convs, 1, 64);
  f.take("decoder_convs", decoder_convs, 1, 64);
  f.take("bias", c.block.bias);
  f.take("slope", c.block.slope, 0, 1);
  f.take("norm_eps", c.block.norm_eps, 1e-20, 1);
  f.finish();
  const std::size_t n = features.size(), per_stage = static_cast<std::size_t>(axes);
  CAPO_CHECK(n >= 2 && n <= kMostStages, source, ": features must name 2 to ", kMostStages, " stages, got ", n);
  const auto as_many = [&](const char* key, const std::vector<int>& list, std::size_t want) {
    CAPO_CHECK(list.size() == want, source, ": ", key, " must have ", want, " entries for ", n, " stages of ", axes,
               " axes, got ", list.size());
  };
  as_many("kernels", kernels, n * per_stage);
  as_many("strides", strides, n * per_stage);
  as_many("convs", convs, n);
  as_many("decoder_convs", decoder_convs, n);
  for (std::size_t i = 0; i < n; ++i) {
    PlainStage s{features[i], {}, {}, convs[i], decoder_convs[i]};
    for (std::size_t a = i * per_stage; a < (i + 1) * per_stage; ++a) {
      s.kernel.push_back(kernels[a]);
      s.stride.push_back(strides[a]);
    }
    c.stages.push_back(s);
  }
  return c;
}

}  // namespace capo::unet
