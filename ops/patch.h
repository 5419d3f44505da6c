// Images cut into patches or channels and back: pure rearrangements (reshape, permute, one copy). Any dtype; each
// gradient is the inverse, so all orders exist. Contiguous results.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

// x [B, H, W, C] -> [B, (H/ph)(W/pw), ph pw C]: patches row by row, inside each (y, x, c). ph, pw must divide H, W.
// With weights [dim, ph, pw, C] flattened to [dim, ph pw C], a linear layer over it is ViT's patch embedding.
Tensor patchify(const Tensor& x, std::int64_t ph, std::int64_t pw);
// The inverse: tokens [B, (H/ph)(W/pw), ph pw C] -> [B, H, W, C].
Tensor unpatchify(const Tensor& tokens, std::int64_t height, std::int64_t width, std::int64_t channels, std::int64_t ph,
                  std::int64_t pw);
// The same for volumes: [B, D, H, W, C] -> [B, (D/pd)(H/ph)(W/pw), pd ph pw C].
Tensor patchify3d(const Tensor& x, std::int64_t pd, std::int64_t ph, std::int64_t pw);

// x [B, H, W, C r r] -> [B, H r, W r, C]; channel c r r + dy r + dx goes to (dy, dx) of its block (PyTorch's order,
// here in NHWC).
Tensor pixel_shuffle(const Tensor& x, std::int64_t r);
// The inverse: [B, H, W, C] -> [B, H/r, W/r, C r r].
Tensor pixel_unshuffle(const Tensor& x, std::int64_t r);

}  // namespace capo
