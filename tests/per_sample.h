// For references of ops whose factors are given for each channel, or for each sample and channel.
#pragma once

#include <capo/ops/view.h>

namespace capo::test {

// [B, C] as [B, 1, .., C] beside x; [C] broadcasts by itself.
inline Tensor spread(const Tensor& t, const Tensor& x) {
  if (t.rank() == 1) return t;
  Shape s = Shape::filled(x.rank(), 1);
  s[0] = t.size(0);
  s[x.rank() - 1] = t.size(1);
  return reshape(t, s);
}

}  // namespace capo::test
