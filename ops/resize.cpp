#include <capo/ops/axis_filter.h>
#include <capo/ops/copy.h>
#include <capo/ops/resize.h>

namespace capo {

Tensor resize(const Tensor& x, const Dims& size, ResizeMode mode, bool antialias, bool align_corners) {
  const int space = x.rank() - 2;
  CAPO_CHECK(is_floating(x.dtype()), "resize: needs a floating tensor, got ", describe(x));
  CAPO_CHECK(space >= 1 && space <= 3 && size.size() == space,
             "resize: size must name the one to three spatial axes of x [B, spatial.., C], got ", size, " for ",
             x.shape());
  CAPO_CHECK(mode != ResizeMode::nearest || (!antialias && !align_corners),
             "resize: nearest has neither antialias nor align_corners");
  for (int i = 0; i < space; ++i)
    CAPO_CHECK(size[i] >= 1 && x.shape()[1 + i] >= 1, "resize: sizes must be positive, got ", size, " for ", x.shape());
  if (is_half(x.dtype()) && !x.device().is_cuda())
    return cast(resize(cast(x, f32), size, mode, antialias, align_corners), x.dtype());
  Tensor y = x;
  bool done[3] = {};
  for (int round = 0; round < space; ++round) {
    int next = -1;  // the axis with the smallest out / in
    for (int i = 0; i < space; ++i)
      if (!done[i] && (next < 0 || size[i] * x.shape()[1 + next] < size[next] * x.shape()[1 + i])) next = i;
    done[next] = true;
    AxisFilter f;
    f.kind = mode == ResizeMode::nearest    ? FilterKind::nearest
             : mode == ResizeMode::bilinear ? FilterKind::linear
                                            : FilterKind::cubic;
    f.in = x.shape()[1 + next];
    f.out = size[next];
    f.antialias = antialias;
    f.align_corners = align_corners;
    if (f.in != f.out) y = axis_filter(y, 1 + next, f);
  }
  return y;
}

}  // namespace capo
