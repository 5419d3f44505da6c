// Elementwise functions that an op may apply to its result before writing it: linear's and the norms' last argument.
#pragma once

namespace capo {

enum class Activation : int { none, relu, gelu, gelu_tanh, quick_gelu, silu };

inline const char* name_of(Activation activation) {
  constexpr const char* names[] = {"none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu"};
  return names[static_cast<int>(activation)];
}

}  // namespace capo
