// Attaching tuners by text:
//
//   blocks.*.attn: u_prefix(length=10); blocks.*.mlp: u_adapter(dim=32); head: train
//
// item      pattern ':' action, separated by ';'. Patterns are nn::matches(): '*' inside a path segment, '**' across;
//           "@conv", "layer4.**@norm": by kind of layer (tuners/select.h).
// actions   train                                        unfreezes the matching parameters or modules
//           u_adapter(dim=32, scale=1, on=y|x|z, act=gelu|relu|silu|quick_gelu|gelu_tanh|none, init=zero|xavier)
//           u_prefix(length=10)                          at an attention: exact merge; elsewhere: beside (tuner.h)
//           u_prompt(length=10)                          likewise
//           lora(rank=8, alpha=0, slices=, rslora=false, dropout=0)
//                                                        at a Linear or Conv; with slices (q, qv, ..) at a fused qkv or
//                                                        its attention
//           residual_adapter(scale=1)                    at a Conv (tuners/conv_tuners.h)
// methods   linear, bitfit, u-tuning, full, ..           named in tuners/presets.h; items too: "linear; **.qkv: lora()"
//
// Everything not named is frozen. A pattern that matches nothing, an unknown action or argument, and a value outside
// its range throw, with near misses.
#pragma once

#include <capo/tuners/tuner.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace capo::tuners {

struct SpecItem {
  std::string pattern, action;
  std::vector<std::pair<std::string, std::string>> args;
};

std::vector<SpecItem> parse_spec(std::string_view text);
std::string to_string(const std::vector<SpecItem>& items);

// Freezes the model, then applies the spec. Returns the tuners it attached. On an error the model has no tuner of this
// call left, and is frozen.
std::vector<Tuner*> apply_spec(nn::Module& model, std::string_view spec);

std::vector<Tuner*> tuners_of(nn::Module& model);
// Folds every tuner that can be folded (throws if one cannot) / puts the base's bits back.
void merge_tuners(nn::Module& model);
void unmerge_tuners(nn::Module& model);
// Removes every tuner; merged ones give the base's bits back first.
void detach_tuners(nn::Module& model);

}  // namespace capo::tuners
