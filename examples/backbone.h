// The pre-trained networks that tune and predict know. Of each: features(image), classify(features), and below.
#pragma once

#include <capo/engine/error.h>
#include <capo/models/mobilenet/mobilenet.h>
#include <capo/models/resnet/resnet.h>
#include <capo/models/vit/load.h>

#include <string>
#include <string_view>

namespace capo::examples {

template <class M>
struct Backbone;

template <>
struct Backbone<vit::Vit> {
  static constexpr const char* kFamily = "vit";
  // A new head of so many classes; image: side of the input, 0: the file's.
  static vit::LoadedVit open(const std::string& weights, int classes, int image, const nn::Build& build) {
    return vit::load_vit(weights, {.classes = classes, .image = image}, build);
  }
  static int side(const vit::Vit& model) { return model.config.image; }
  static vit::VitConfig config_from_json(std::string_view text, const std::string& source) {
    return vit::config_from_json(text, source);
  }
};

template <>
struct Backbone<resnet::Resnet> {
  static constexpr const char* kFamily = "resnet";
  static resnet::LoadedResnet open(const std::string& weights, int classes, int, const nn::Build& build) {
    return resnet::load_resnet(weights, {.classes = classes}, build);
  }
  static int side(const resnet::Resnet&) { return 0; }  // any
  static resnet::ResnetConfig config_from_json(std::string_view text, const std::string& source) {
    return resnet::config_from_json(text, source);
  }
};

template <>
struct Backbone<mobilenet::Mobilenet> {
  static constexpr const char* kFamily = "mobilenet";
  static mobilenet::LoadedMobilenet open(const std::string& weights, int classes, int, const nn::Build& build) {
    return mobilenet::load_mobilenet(weights, {.classes = classes}, build);
  }
  static int side(const mobilenet::Mobilenet&) { return 0; }  // any
  static mobilenet::MobilenetConfig config_from_json(std::string_view text, const std::string& source) {
    return mobilenet::config_from_json(text, source);
  }
};

// f.template operator()<M>() for the family's model class.
template <class F>
auto with_family(const std::string& family, F&& f) {
  if (family == Backbone<vit::Vit>::kFamily) return f.template operator()<vit::Vit>();
  if (family == Backbone<resnet::Resnet>::kFamily) return f.template operator()<resnet::Resnet>();
  CAPO_CHECK(family == Backbone<mobilenet::Mobilenet>::kFamily, "--family: must be vit, resnet or mobilenet, got ",
             family);
  return f.template operator()<mobilenet::Mobilenet>();
}

}  // namespace capo::examples
