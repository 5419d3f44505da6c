// Must not compile: a gradient closure that captures a Tensor would hide it from version checks and accounting.
// With -DCONTROL the same code without the capture must compile, so that no other mistake passes for the rejection.
#include <capo/autograd/node.h>

namespace capo {

Tensor twice(const Tensor& x, const Tensor& y) {
#if defined(CONTROL)
  return record("twice", y, {x}, Saved({x}), [](const Saved& s, const Tensor&, Needs) -> Grads { return {s[0]}; });
#else
  return record("twice", y, {x}, Saved(), [x](const Saved&, const Tensor&, Needs) -> Grads { return {x}; });
#endif
}

}  // namespace capo
