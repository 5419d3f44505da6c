// Must be stopped by AddressSanitizer: a kernel of the library writes one element past a heap block.
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>

#include <cstdio>
#include <vector>

namespace capo {
CAPO_DECLARE_CPU_KERNEL(fill, FillArgs)
}

int main() {
  std::vector<float> ten(10);
  capo::kernels::fill_v2({capo::f32, ten.data(), 1, false}, 0, 11);
  std::printf("not noticed: %g\n", ten[9]);
}
