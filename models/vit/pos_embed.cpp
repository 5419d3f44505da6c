#include <capo/models/vit/vit.h>
#include <capo/ops/join.h>
#include <capo/ops/resize.h>
#include <capo/ops/view.h>

#include <cmath>

namespace capo::vit {

Tensor resize_pos_embed(const Tensor& pos, int prefix, int grid) {
  CAPO_CHECK(pos.rank() == 3 && pos.size(0) == 1 && pos.size(1) > prefix,
             "resize_pos_embed: needs [1, prefix + n*n, C], got ", pos.shape());
  const std::int64_t n = pos.size(1) - prefix, c = pos.size(2);
  const auto side = static_cast<std::int64_t>(std::llround(std::sqrt(static_cast<double>(n))));
  CAPO_CHECK(side * side == n, "resize_pos_embed: ", n, " positions are no square grid");
  if (side == grid) return pos;
  const Tensor image = reshape(slice(pos, 1, prefix, pos.size(1)), {1, side, side, c});
  const Tensor resized =
      reshape(resize(image, {grid, grid}, ResizeMode::bicubic, true), {1, static_cast<std::int64_t>(grid) * grid, c});
  return prefix ? concat({slice(pos, 1, 0, prefix), resized}, 1) : resized;
}

}  // namespace capo::vit
