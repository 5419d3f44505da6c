// Named tuning methods and their settings. Rates come from held-out training images, never from a test set:
// docs/results.md has the search, by one method of each family. All train every head: a distilled model has two.
#pragma once

#include <string>
#include <string_view>

namespace capo::tuners {

struct Method {
  const char* name;
  const char* spec;  // tuners/spec.h
  double lr;         // AdamW, cosine after one epoch of warm-up, batch 16
  double weight_decay;
};

inline constexpr Method kMethods[] = {
    {"linear", "@head: train", 2e-3, 1e-4},
    {"bitfit", "**.bias: train; @head: train", 1.3e-3, 0},
    {"lora", "blocks.*.attn: lora(rank=8, slices=qv); @head: train", 1.3e-3, 1e-4},
    {"adapter-attn", "blocks.*.attn: u_adapter(dim=32); @head: train", 1e-3, 1e-4},
    {"adapter-ffn", "blocks.*.mlp: u_adapter(dim=32); @head: train", 1e-3, 1e-4},
    {"adapter-block", "blocks.*: u_adapter(dim=32); @head: train", 1e-3, 1e-4},
    {"prefix-attn", "blocks.*.attn: u_prefix(length=10); @head: train", 1.3e-3, 1e-4},
    {"prefix-ffn", "blocks.*.mlp: u_prefix(length=10); @head: train", 1.3e-3, 1e-4},
    {"prefix-block", "blocks.*: u_prefix(length=10); @head: train", 1.3e-3, 1e-4},
    {"prompt-attn", "blocks.*.attn: u_prompt(length=10); @head: train", 4e-3, 1e-4},
    {"prompt-ffn", "blocks.*.mlp: u_prompt(length=10); @head: train", 4e-3, 1e-4},
    {"prompt-block", "blocks.*: u_prompt(length=10); @head: train", 4e-3, 1e-4},
    // The flagship: a prefix beside each attention; beside each FFN an adapter that reads the stream, as AdaptFormer
    // does. A prefix of 10 takes a third of the attention of a model with 17 tokens before it has learned anything.
    {"u-tuning", "blocks.*.attn: u_prefix(length=2); blocks.*.mlp: u_adapter(dim=46, on=x); @head: train", 1e-3, 1e-4},
    {"full", "**: train", 5e-4, 0.05},
    {"norm", "@norm: train; @head: train", 2e-3, 0},
};

// Of models with convolutions; those above that name no blocks serve them too.
inline constexpr Method kConvMethods[] = {
    {"conv-lora", "@conv: lora(rank=8); @head: train", 1.3e-3, 1e-4},
    // As in the paper beside the kernels that look around. At a depthwise one it is a number for each channel; beside a
    // 1x1 convolution it would be all its weights again.
    {"residual-adapter", "@spatial_conv: residual_adapter(); @head: train", 1e-3, 1e-4},
};

// Null when there is no method of that name: then the text is a spec.
constexpr const Method* find_method(std::string_view name) {
  for (const Method& m : kMethods)
    if (name == m.name) return &m;
  for (const Method& m : kConvMethods)
    if (name == m.name) return &m;
  return nullptr;
}

// "linear, bitfit, ..."
inline std::string method_names() {
  std::string out;
  for (const Method& m : kMethods) out += (out.empty() ? "" : ", ") + std::string(m.name);
  for (const Method& m : kConvMethods) out += ", " + std::string(m.name);
  return out;
}

}  // namespace capo::tuners
