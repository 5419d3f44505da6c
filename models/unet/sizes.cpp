#include <capo/models/unet/sizes_internal.h>

namespace capo::unet {

void check_sizes(const Tensor& x, std::int64_t channels, const Dims& divisor) {
  CAPO_CHECK(x.rank() == divisor.size() + 2 && x.size(-1) == channels, "unet: x must be [B, ",
             divisor.size() == 2 ? "H, W, " : "D, H, W, ", channels, "], got ", x.shape());
  for (int a = 0; a < divisor.size(); ++a)
    CAPO_CHECK(x.size(a + 1) > 0 && x.size(a + 1) % divisor[a] == 0, "unet: axis ", a + 1,
               " of x must be a multiple of ", divisor[a], ", got ", x.size(a + 1), " in ", x.shape(),
               " (sliding_window takes any size)");
}

}  // namespace capo::unet
