// The patterns of a spec: a path pattern, a kind of layer, or both.
//
//   blocks.*.attn      paths, by nn::matches()
//   @norm              every layer of that kind
//   layer4.**@conv     those whose path matches
//
// kinds  head          the classifier
//        norm          LayerNorm, RmsNorm, BatchNorm, GroupNorm, InstanceNorm
//        linear        Linear
//        conv          Conv of one group (no ConvTranspose)
//        grouped_conv  Conv of more (depthwise too)
//        spatial_conv  Conv of any groups whose kernel is larger than one along some axis
#pragma once

#include <capo/models/nn/module.h>

#include <string>
#include <vector>

namespace capo::tuners {

bool names_kind(const std::string& pattern);  // it has an '@'
// Matching modules, tuners left out. Throws when there is none, and on an unknown kind.
std::vector<nn::Module*> select(nn::Module& model, const std::string& pattern);

}  // namespace capo::tuners
