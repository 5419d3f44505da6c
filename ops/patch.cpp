#include <capo/ops/copy.h>
#include <capo/ops/patch.h>
#include <capo/ops/view.h>

namespace capo {

Tensor patchify(const Tensor& x, std::int64_t ph, std::int64_t pw) {
  CAPO_CHECK(x.rank() == 4, "patchify: x must be [B, H, W, C], got ", x.shape());
  const std::int64_t b = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
  CAPO_CHECK(ph >= 1 && pw >= 1 && h % ph == 0 && w % pw == 0, "patchify: patches ", ph, " x ", pw, " must divide x ",
             x.shape());
  const Tensor blocks = permute(reshape(x, {b, h / ph, ph, w / pw, pw, c}), {0, 1, 3, 2, 4, 5});
  return reshape(contiguous(blocks), {b, h / ph * (w / pw), ph * pw * c});
}

Tensor unpatchify(const Tensor& tokens, std::int64_t height, std::int64_t width, std::int64_t channels, std::int64_t ph,
                  std::int64_t pw) {
  CAPO_CHECK(height >= 0 && width >= 0 && channels >= 0 && ph >= 1 && pw >= 1 && height % ph == 0 && width % pw == 0,
             "unpatchify: patches ", ph, " x ", pw, " must divide ", height, " x ", width);
  const std::int64_t rows = height / ph, columns = width / pw;
  CAPO_CHECK(tokens.rank() == 3 && tokens.size(1) == rows * columns && tokens.size(2) == ph * pw * channels,
             "unpatchify: tokens must be [B, ", rows * columns, ", ", ph * pw * channels, "], got ", tokens.shape());
  const std::int64_t b = tokens.size(0);
  const Tensor blocks = permute(reshape(tokens, {b, rows, columns, ph, pw, channels}), {0, 1, 3, 2, 4, 5});
  return reshape(contiguous(blocks), {b, height, width, channels});
}

Tensor patchify3d(const Tensor& x, std::int64_t pd, std::int64_t ph, std::int64_t pw) {
  CAPO_CHECK(x.rank() == 5, "patchify3d: x must be [B, D, H, W, C], got ", x.shape());
  const std::int64_t b = x.size(0), d = x.size(1), h = x.size(2), w = x.size(3), c = x.size(4);
  CAPO_CHECK(pd >= 1 && ph >= 1 && pw >= 1 && d % pd == 0 && h % ph == 0 && w % pw == 0, "patchify3d: patches ", pd,
             " x ", ph, " x ", pw, " must divide x ", x.shape());
  const Tensor blocks = permute(reshape(x, {b, d / pd, pd, h / ph, ph, w / pw, pw, c}), {0, 1, 3, 5, 2, 4, 6, 7});
  return reshape(contiguous(blocks), {b, d / pd * (h / ph) * (w / pw), pd * ph * pw * c});
}

Tensor pixel_shuffle(const Tensor& x, std::int64_t r) {
  CAPO_CHECK(x.rank() == 4, "pixel_shuffle: x must be [B, H, W, C r r], got ", x.shape());
  const std::int64_t b = x.size(0), h = x.size(1), w = x.size(2);
  CAPO_CHECK(r >= 1 && x.size(3) % r == 0 && x.size(3) / r % r == 0, "pixel_shuffle: the channels of ", x.shape(),
             " must divide by ", r, " squared");
  const std::int64_t c = x.size(3) / r / r;
  const Tensor blocks = permute(reshape(x, {b, h, w, c, r, r}), {0, 1, 4, 2, 5, 3});
  return reshape(contiguous(blocks), {b, h * r, w * r, c});
}

Tensor pixel_unshuffle(const Tensor& x, std::int64_t r) {
  CAPO_CHECK(x.rank() == 4, "pixel_unshuffle: x must be [B, H, W, C], got ", x.shape());
  const std::int64_t b = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
  CAPO_CHECK(r >= 1 && h % r == 0 && w % r == 0, "pixel_unshuffle: r must divide height and width of ", x.shape(),
             ", got ", r);
  const Tensor blocks = permute(reshape(x, {b, h / r, r, w / r, r, c}), {0, 1, 3, 5, 2, 4});
  return reshape(contiguous(blocks), {b, h / r, w / r, c * r * r});
}

}  // namespace capo
