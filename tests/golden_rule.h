// The weights and inputs of the golden files, computed: see tests/golden/make_golden.py. Beyond its names: reg_token
// and dist_token like cls_token, *.gamma 0.5 + 0.1 r.
#pragma once

#include <capo/engine/rng.h>
#include <capo/engine/tensor.h>
#include <capo/models/nn/state.h>

#include <cmath>
#include <string>
#include <vector>

namespace capo::golden {

inline std::uint64_t splitmix64(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
// In [-1, 1). stream_of is FNV-1a.
inline double draw(std::uint64_t seed, std::uint64_t i) {
  return 2.0 * (static_cast<double>(splitmix64(seed + i) >> 11) * 0x1p-53) - 1.0;
}

// PyTorch shape, f64.
inline Tensor make(const std::string& name, const Shape& shape) {
  double offset = 0, scale = 1;
  const bool weight = name.ends_with(".weight");
  if (name == "cls_token" || name == "pos_embed" || name == "reg_token" || name == "dist_token") {
    scale = 0.5;
  } else if (weight && shape.size() >= 2) {
    double fan_in = 1;
    for (int i = 1; i < shape.size(); ++i) fan_in *= static_cast<double>(shape[i]);
    scale = 1.0 / std::sqrt(fan_in);
  } else if (weight || name.ends_with(".bias")) {
    offset = weight ? 1 : 0;
    scale = 0.1;
  } else if (name.ends_with(".gamma")) {
    offset = 0.5;
    scale = 0.1;
  } else {
    CAPO_CHECK(name == "input", "golden: no rule for ", name);
  }
  std::vector<double> v(static_cast<std::size_t>(numel(shape)));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = offset + scale * draw(stream_of(name), i);
  return from_vector(v, shape);
}

// Every parameter of a model by the rule.
inline void fill(nn::Module& model) {
  nn::StateDict weights;
  for (const auto& t : nn::state_dict(model)) weights.push_back({t.name, make(t.name, t.value.shape())});
  nn::load_state(model, weights);
}

}  // namespace capo::golden
